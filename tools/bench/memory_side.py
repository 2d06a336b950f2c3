"""A training of `python -m tools.bench memory`, as `cascade train` runs it: what it took, as JSON
on the last line.
"""

import json
import sys
from pathlib import Path
from statistics import median

from launch.cli.check_report import check_stage
from launch.jobs.worker import train
from tools.bench.train_side import peak


def measure(path: str, overrides: list[str]) -> dict[str, object]:
    """Bytes at most, foretold and found, and seconds of a step after the first two."""
    report = check_stage(path, overrides)
    metrics = Path(report["config"]["run"], "metrics.jsonl")
    code = train(path, overrides)
    if code:
        raise RuntimeError(f"the training ended with {code}")
    taken = [json.loads(line)["seconds"] for line in metrics.read_text().splitlines()]
    return {
        "parameters": report["parameters"],
        "predicted": report["memory"]["total"],
        "memory": report["memory"],
        "peak": peak(),
        "seconds": median(taken[2:]),
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2:])))
