"""The program that trains: a rank of a job, `python -m launch.jobs.worker CONFIG key=value ...`, or
the whole job in this process.

A rank under a supervisor prints into its own log and writes an exit report into the attempt's
folder (`launch.jobs.heartbeats`): exit codes of ranks get lost under msrun and mpirun. Those two
also kill all other ranks when one exits with a code. So a rank that stopped after saving exits with
0 rather than 75: the others may still be saving.
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
    signals: list[int] = []

    def record(number: int, frame: FrameType | None) -> None:
        # A second Ctrl-C does not wait for the end of the step.
        if signals and number == signal.SIGINT:
            raise KeyboardInterrupt
        signals.append(number)

    config, _ = read_stage_config(path, overrides)

    from pipeline.train import loop

    # Until here a signal ends the process at once: there is nothing to save yet.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, record)

    stage = stage_class(config.kind)(config)
    return 0 if loop.train(stage, lambda: bool(signals)) else STOPPED


def run_rank(folder: Path, argv: Sequence[str]) -> NoReturn:
    """Runs a rank of the attempt whose folder this is, and exits."""
    rank = rank_info().rank
    redirect_output(folder / f"rank_{rank}.log")

    # Before what takes long: from its first heartbeat on, the supervisor watches this process.
    Heartbeat(folder, rank).beat("starting")

    code = 1
    error: str | None = None
    try:
        code = train(argv[0], argv[1:])
    except UserError as mistake:
        code = 2
        error = str(mistake)
    except JobError as problem:
        error = str(problem)
    # KeyboardInterrupt too: without a report the supervisor could only say that the rank ended.
    except BaseException as bug:
        error = f"{describe(bug)}\n{traceback.format_exc()}"
        print(error, file=sys.stderr, flush=True)

    report = {"code": code, "error": error, "time": time.time()}
    write_atomically(folder / f"rank_{rank}.end.json", json.dumps(report).encode())

    # Not 75, at which msrun and mpirun would kill the ranks that are still saving.
    sys.exit(0 if code == STOPPED else code)


def redirect_output(log: Path) -> None:
    """Sends stdout and stderr to `log` by their descriptors, as MindSpore's C++ prints too."""
    # Appended to: under msrun the same file is this process's output already.
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for standard in (1, 2):
        os.dup2(descriptor, standard)


if __name__ == "__main__":
    if is_scheduler():  # msrun starts its scheduler by the same command
        start_communication()
    elif (attempt_folder := attempt_dir()) is not None:
        run_rank(attempt_folder, sys.argv[1:])
    else:
        run(lambda argv: train(argv[0], argv[1:]))
