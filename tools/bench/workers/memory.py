"""`CONFIG [key=value ...]`: a training as `cascade train` runs it in a rank, and its peak memory.

It imports `launch`, as it is the whole command whose memory is measured and predicted.
"""

import json
import sys
from pathlib import Path
from statistics import median

from launch.cli.check_report import check_stage
from launch.jobs.worker import train
from tools.bench.workers.timing import peak_memory, print_answer

WARM_UP = 2  # steps that are not timed


def measure(path: str, overrides: list[str]) -> dict[str, object]:
    """Predicted and measured peak in bytes, and the median seconds of a step."""
    # Its parameters have no memory, so that it does not raise the peak.
    report = check_stage(path, overrides)
    code = train(path, overrides)
    if code:
        raise RuntimeError(f"the training ended with {code}")

    metrics = Path(report["config"]["run"], "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in metrics]
    return {
        "parameters": report["parameters"],
        "predicted": report["memory"]["total"],
        "memory": report["memory"],
        "peak": peak_memory(),
        "seconds": median(seconds[WARM_UP:]),
    }


if __name__ == "__main__":
    print_answer(measure(sys.argv[1], sys.argv[2:]))
