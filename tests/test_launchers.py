"""The real msrun and mpirun under a supervisor, with two ranks that sum: half a minute a job, `make test-launchers`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_supervisor import ROOT, left, until

from launch import processes
from launch.heartbeats import read_beat

pytestmark = pytest.mark.launchers
WAIT = 240.0  # seconds for what takes 30
FOUND = 10.0  # seconds in which a rank that died has to be found


@pytest.fixture(params=["msrun", "mpirun"])
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a supervised job in tmp_path/run; at the end nothing may be left of it."""
    if request.param == "mpirun" and not shutil.which("mpirun"):
        pytest.skip("there is no mpirun here; install openmpi-bin")
    run, started = tmp_path / "run", []

    def job(*words: str, **options: object) -> subprocess.Popen[str]:
        given = json.dumps({"launcher": request.param, **options})
        argv = [sys.executable, "-m", "tests.supervised", str(run), given, *words]
        process = subprocess.Popen(argv, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started.append(process)
        return process

    yield job
    ended = all(process.poll() is not None for process in started)
    for process in started:
        process.kill()
        process.communicate()
    try:
        assert ended
        until(lambda: not left(run), "a process was left behind")
    finally:
        processes.send(left(run), signal.SIGKILL)


def facts(run: Path, rank: int) -> dict[str, float]:
    return json.loads((run / "logs" / "attempt-0" / f"sum_{rank}.json").read_text())


def summing(run: Path, process: subprocess.Popen[str]) -> None:
    """Returns when both ranks have made three steps."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end and process.poll() is None:
        beats = [read_beat(run / "logs" / "attempt-0", rank) for rank in (0, 1)]
        if all(beat and beat.step >= 3 for beat in beats):
            return
        time.sleep(0.1)
    raise AssertionError(process.communicate()[1] if process.poll() is not None else "no sum")


def test_two_ranks_sum_on_cores_of_their_own(start, tmp_path):
    process = start("5")
    out, err = process.communicate(timeout=WAIT)
    assert (process.returncode, out) == (0, ""), err
    assert [facts(tmp_path / "run", rank)["sum"] for rank in (0, 1)] == [3.0, 3.0]
    cores = len(os.sched_getaffinity(0))
    assert [facts(tmp_path / "run", rank)["cores"] for rank in (0, 1)] == [max(1, cores // 2)] * 2


def test_a_killed_rank_is_found_and_the_job_starts_again(start, tmp_path):
    """The second attempt is one that SIGTERM ends."""
    run = tmp_path / "run"
    process = start("100000", restarts=1, backoff=0.2)
    summing(run, process)
    beat = read_beat(run / "logs" / "attempt-0", 1)
    os.kill(beat.pid, signal.SIGKILL)
    begun = time.monotonic()
    until((run / "logs" / "attempt-1").exists, "a second attempt")
    assert time.monotonic() - begun < FOUND
    until(lambda: (run / "logs" / "attempt-1" / "sum_0.json").exists(), "a sum of the second attempt")
    process.terminate()
    _, err = process.communicate(timeout=WAIT)
    assert process.returncode == 75, err
    assert f"rank 1 (pid {beat.pid} on {beat.host}, step " in err
    assert "): killed by SIGKILL\n" in err
    words = [json.loads((run / "logs" / "attempt-1" / f"rank_{rank}.end.json").read_text()) for rank in (0, 1)]
    assert [word["code"] for word in words] == [75, 75]


def test_an_error_is_named_with_its_traceback(start, tmp_path):
    process = start("100000", "1:raise:4")
    _, err = process.communicate(timeout=WAIT)
    assert process.returncode == 1
    assert "step 4): ValueError: too hot\n  Traceback (most recent call last):\n" in err


def test_a_supervisor_that_is_killed_leaves_nothing(start, tmp_path):
    process = start("100000")
    summing(tmp_path / "run", process)
    process.kill()
    process.wait(WAIT)
    until(lambda: not left(tmp_path / "run"), "a process was left behind")
