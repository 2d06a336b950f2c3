"""What a supervisor starts in tests, without MindSpore: a launcher and its ranks, with faults.

    python -m tests.helpers.fake_ranks WORKERS FIRST FAULT...

is a launcher as msrun and mpirun are: it kills all ranks if one fails. FAULT is `RANK:WHAT` or
`RANK:WHAT:STEP`, see `misbehave`; STEP is 3 by default. A rank makes 20 steps of 0.1 s; with the
fault `RANK:steps:N`, N steps of 0.5 s.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from pipeline.files import write_atomically
from pipeline.runtime import attempt_dir

FOLDER = attempt_dir() or Path()
ERROR = """ValueError: too hot
Traceback (most recent call last):
  in the middle of it
ValueError: too hot"""
FOREVER = 1000.0  # seconds, longer than a test


def beat(rank: int, phase: str, step: int, error: str | None = None) -> None:
    content = {
        "rank": rank,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "phase": phase,
        "step": step,
        "time": time.time(),
        "error": error,
    }
    write_atomically(FOLDER / f"rank_{rank}.json", json.dumps(content).encode())


def end(rank: int, code: int, error: str | None = None) -> None:
    report = {"code": code, "error": error, "time": time.time()}
    write_atomically(FOLDER / f"rank_{rank}.end.json", json.dumps(report).encode())
    sys.exit(0 if code == 75 else code)


def misbehave(rank: int, what: str, step: int) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "raise":
        beat(rank, "failed", step, ERROR)
        time.sleep(0.3)  # MindSpore takes its time to exit
        end(rank, 1, ERROR)
    elif what == "late":  # its neighbour has died, which it notices a little later
        time.sleep(0.05)
        misbehave(rank, "raise", step)
    elif what == "hang":
        time.sleep(FOREVER)
    elif what == "deaf":  # hangs and ignores SIGTERM
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(FOREVER)
    elif what == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "mistake":
        end(rank, 2, "data.shards: nothing.tar: no such file; give what is there")
    elif what == "daemon":  # leaves a process that has left session, parent and group
        code = "import os, time; os.setsid(); os.fork() and os._exit(0); time.sleep(1000)"
        subprocess.Popen([sys.executable, "-c", code])
    elif what == "chatter":
        print("x" * 99 + "\n" + "warning: hot\n", end="", flush=True)
        print(("y" * 99 + "\n") * 100_000, end="", flush=True)
    elif what == "silent":  # before its first heartbeat
        os._exit(9)
    elif what == "sample":  # as rank 0 does while the others wait
        beat(rank, "sampling", step)
        time.sleep(8)
    elif what == "wait":
        time.sleep(8)
    elif what == "save":
        name = f"step_{int(time.time() * 1000):013d}"
        folder = FOLDER.parent.parent / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "COMPLETE").touch()


def train(rank: int, faults: list[list[str]]) -> None:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    mine = [(what, int(*step or "3")) for number, what, *step in faults if int(number) == rank]
    kinds = {what for what, _ in mine}
    if "silent" in kinds:
        misbehave(rank, "silent", 0)

    steps, pause = 20, 0.1
    for what, number in mine:
        if what == "steps":
            steps, pause = number, 0.5

    beat(rank, "starting", 0)
    if "compile" in kinds:
        beat(rank, "compiling", 0)
        time.sleep(FOREVER)

    for step in range(1, steps + 1):
        beat(rank, "training", step)
        print(f"rank {rank} step {step}", flush=True)
        for what, fault_step in mine:
            if fault_step == step:
                misbehave(rank, what, step)

        time.sleep(pause)
        if stopped and "stubborn" not in kinds:
            beat(rank, "checkpoint", step)
            time.sleep(0.2)
            end(rank, 75)

    beat(rank, "finished", steps)
    end(rank, 0)


def launcher(workers: int, first: int, faults: list[str]) -> None:
    """As msrun does: a session and a log for each rank, and no signals passed on."""
    ranks = []
    for number in range(first, first + workers):
        argv = [sys.executable, "-m", "tests.helpers.fake_ranks", "rank", str(number), *faults]
        with (FOLDER / f"rank_{number}.log").open("wb") as log:
            ranks.append(subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True))

    while any(rank.poll() is None for rank in ranks):
        for rank in ranks:
            if rank.poll():
                print(
                    f"Worker process {rank.pid} exit with exception. "
                    f"Error code: {rank.returncode}.",
                    flush=True,
                )
                for other in ranks:
                    other.kill()
                time.sleep(FOREVER)  # msrun waits for its scheduler
        time.sleep(0.1)


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        train(int(sys.argv[2]), [fault.split(":") for fault in sys.argv[3:]])
    else:
        launcher(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
