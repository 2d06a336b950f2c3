"""What trains: a rank of a job, `python -m launch.jobs.worker CONFIG key=value ...`, or the whole
job in this process.

A rank under a supervisor prints into its own log, and leaves a last word in the attempt's folder
(`launch.jobs.heartbeats`): the exit codes of ranks get lost under msrun and mpirun. Those two also
kill all other ranks when one exits with a code, so that a rank that stopped after saving, 75, exits
with 0: the others may be saving still.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from launch.jobs.nodes import STOPPED
from pipeline.errors import JobError, UserError
from pipeline.files import write_atomically
from pipeline.runtime import attempt_dir, is_scheduler, rank_info, start_communication
from pipeline.terminal import run
from pipeline.train.heartbeat import Heartbeat, describe


def train(path: str, overrides: Sequence[str]) -> int:
    """Trains the stage in `path`; 0, or 75 if SIGTERM or SIGINT ended it early, after saving."""
    from pipeline.log import setup_logging
    from pipeline.stage.registry import read_stage_config, stage_class

    setup_logging()
    stopped: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped and number == signal.SIGINT:  # a second Ctrl-C does not wait for the step
            raise KeyboardInterrupt
        stopped.append(number)

    config, _ = read_stage_config(path, overrides)
    from pipeline.train import loop

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    stage = stage_class(config.kind)(config)
    return 0 if loop.train(stage, lambda: bool(stopped)) else STOPPED


def rank(folder: Path, argv: Sequence[str]) -> NoReturn:
    """A rank of the attempt in `folder`."""
    number = rank_info().rank
    output = os.open(folder / f"rank_{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor in (1, 2):  # MindSpore's C++ writes there too
        os.dup2(output, descriptor)
    Heartbeat(folder, number).beat(
        "starting"
    )  # before what takes long: from now on its process is known
    code, error = 1, None
    try:
        code = train(argv[0], argv[1:])
    except UserError as mistake:
        code, error = 2, str(mistake)
    except JobError as problem:
        error = str(problem)
    except BaseException as fault:
        error = f"{describe(fault)}\n{traceback.format_exc()}"
        print(error, file=sys.stderr, flush=True)
    word = {"code": code, "error": error, "time": time.time()}
    write_atomically(folder / f"rank_{number}.end.json", json.dumps(word).encode())
    sys.exit(0 if code == STOPPED else code)


if __name__ == "__main__":
    if is_scheduler():  # msrun starts that by the same command
        start_communication()
    elif (place := attempt_dir()) is not None:
        rank(place, sys.argv[1:])
    else:
        run(lambda argv: train(argv[0], argv[1:]))
