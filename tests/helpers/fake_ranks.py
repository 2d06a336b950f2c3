"""What a supervisor starts in tests, without MindSpore: a launcher and its ranks, which misbehave
on command.

    python -m tests.helpers.fake_ranks WORKERS FIRST FAULT...   a launcher as msrun and mpirun are: kills all if one fails

FAULT is `RANK:WHAT` or `RANK:WHAT:STEP`; see `misbehave`. A rank makes 20 steps of 0.1 s unless it
is told otherwise.
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


def beat(rank: int, phase: str, step: int, error: str | None = None) -> None:
    facts = {
        "rank": rank,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "phase": phase,
        "step": step,
    }
    write_atomically(
        FOLDER / f"rank_{rank}.json",
        json.dumps(facts | {"time": time.time(), "error": error}).encode(),
    )


def end(rank: int, code: int, error: str | None = None) -> None:
    write_atomically(
        FOLDER / f"rank_{rank}.end.json",
        json.dumps({"code": code, "error": error, "time": time.time()}).encode(),
    )
    sys.exit(0 if code == 75 else code)


def misbehave(rank: int, what: str, step: int) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "raise":
        error = "ValueError: too hot\nTraceback (most recent call last):\n  in the middle of it\nValueError: too hot"
        beat(rank, "failed", step, error)
        time.sleep(0.3)  # MindSpore takes its time to leave
        end(rank, 1, error)
    elif what == "late":  # its neighbour is gone, which it finds out a little later
        time.sleep(0.05)
        misbehave(rank, "raise", step)
    elif what == "hang":
        time.sleep(1000)
    elif what == "deaf":  # hangs and does not hear
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    elif what == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "mistake":
        end(rank, 2, "data.shards: nothing.tar: no such file; give what is there")
    elif what == "daemon":  # leaves a process behind that has left session, parent and group
        code = "import os, time; os.setsid(); os.fork() and os._exit(0); time.sleep(1000)"
        subprocess.Popen([sys.executable, "-c", code])
    elif what == "chatter":
        print("x" * 99 + "\n" + "warning: hot\n", end="", flush=True)
        print(("y" * 99 + "\n") * 100_000, end="", flush=True)
    elif what == "silent":  # before its first beat
        os._exit(9)
    elif what == "sample":  # as rank 0 does, and the others wait for it
        beat(rank, "sampling", step)
        time.sleep(8)
    elif what == "wait":
        time.sleep(8)
    elif what == "save":
        folder = FOLDER.parent.parent / "checkpoints" / f"step_{int(time.time() * 1000):013d}"
        folder.mkdir(parents=True)
        (folder / "COMPLETE").touch()


def train(rank: int, faults: list[list[str]]) -> None:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    mine = [(what, int(*step or "3")) for who, what, *step in faults if int(who) == rank]
    if ("silent", 3) in mine:
        misbehave(rank, "silent", 0)
    steps, pause = next(((step, 0.5) for what, step in mine if what == "steps"), (20, 0.1))
    beat(rank, "starting", 0)
    if ("compile", 3) in mine:
        beat(rank, "compiling", 0)
        time.sleep(1000)
    for step in range(1, steps + 1):
        beat(rank, "training", step)
        print(f"rank {rank} step {step}", flush=True)
        for what, when in mine:
            if when == step:
                misbehave(rank, what, step)
        time.sleep(pause)
        if stopped and not [what for what, _ in mine if what == "stubborn"]:
            beat(rank, "checkpoint", step)
            time.sleep(0.2)
            end(rank, 75)
    beat(rank, "finished", steps)
    end(rank, 0)


def launcher(workers: int, first: int, faults: list[str]) -> None:
    """Like msrun: sessions of their own, a log each, and no thought for signals."""
    ranks = []
    for rank in range(first, first + workers):
        argv = [sys.executable, "-m", "tests.helpers.fake_ranks", "rank", str(rank), *faults]
        with (FOLDER / f"rank_{rank}.log").open("wb") as log:
            ranks.append(subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True))
    while any(rank.poll() is None for rank in ranks):
        for rank in ranks:
            if rank.poll():
                print(
                    f"Worker process {rank.pid} exit with exception. Error code: {rank.returncode}.",
                    flush=True,
                )
                for other in ranks:
                    other.kill()
                time.sleep(1000)  # waits for its scheduler
        time.sleep(0.1)


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        train(int(sys.argv[2]), [fault.split(":") for fault in sys.argv[3:]])
    else:
        launcher(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
