"""A rank of a real job, started by msrun from test_ranks.py: `python -m tests.helpers.ranks JOB`,
where JOB is a JSON file of runs.

Each run is {"name", "raw": a stage's configuration, "stop": [rank, step] or null, "nan": [rank,
step] or null}. They are trained in their order. Writes NAME.rank_R.json beside JOB: what `train`
returned, or the error, and the last bytes of each parameter.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import runtime


def main(path: Path) -> None:
    job = runtime.start_communication()

    from pipeline.config import build
    from pipeline.errors import JobError
    from pipeline.stage.registry import stage_class
    from pipeline.train.loop import train

    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    for run in json.loads(path.read_text()):
        stopped.clear()
        cls = stage_class(run["raw"]["kind"])
        stage = cls(build(cls.Config, run["raw"]))
        result: dict[str, Any] = {"cores": len(os.sched_getaffinity(0))}
        if run["nan"] and run["nan"][0] == job.rank:
            spoil(stage, bad_step=run["nan"][1])
        calls = 0

        def should_stop(run: dict[str, Any] = run) -> bool:
            nonlocal calls
            calls += 1
            if run["stop"] == [job.rank, calls]:
                os.kill(os.getpid(), signal.SIGTERM)
            return bool(stopped)

        try:
            result["finished"] = train(stage, should_stop)
        except JobError as error:
            result["error"] = str(error)
        result["steps"] = calls
        result["weights"] = [
            p.asnumpy().tobytes().hex()[-64:] for p in stage.network.trainable_params()
        ]
        (path.parent / f"{run['name']}.rank_{job.rank}.json").write_text(json.dumps(result))


def spoil(stage: Any, bad_step: int) -> None:
    """Puts a NaN into the images of step `bad_step`, from 0."""
    training_inputs = stage.training_inputs

    def spoiled(images: np.ndarray, prompt: Any, draws: Any) -> Any:
        arrays = training_inputs(images, prompt, draws)
        if draws.step == bad_step:
            arrays["x"][0] = np.nan
        return arrays

    stage.training_inputs = spoiled


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except BaseException:
        (Path(sys.argv[1]).parent / f"crash.{os.getpid()}").write_text(traceback.format_exc())
        raise
