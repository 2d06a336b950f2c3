"""The real msrun and mpirun under a supervisor, with two ranks that sum: half a minute a job, `make
test-launchers`.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.jobs.heartbeats import read_beat
from tests.helpers.jobs import WAIT, Process, leaving_nothing, left, until, until_step

pytestmark = pytest.mark.launchers
FOUND = 10.0  # seconds in which a rank that died has to be found


@pytest.fixture
def start(launcher: str, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts a supervised job in tmp_path/run; at the end nothing may be left of it."""
    run = tmp_path / "run"
    with leaving_nothing(run) as begin:

        def job(*words: str, **options: object) -> Process:
            given = json.dumps({"launcher": launcher, **options})
            return begin(
                [sys.executable, "-m", "tests.helpers.supervised", str(run), given, *words]
            )

        yield job


def facts(run: Path, rank: int) -> dict[str, float]:
    return json.loads((run / "logs" / "attempt-0" / f"sum_{rank}.json").read_text())


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
    until_step(3, run / "logs" / "attempt-0", (0, 1), [process])
    beat = read_beat(run / "logs" / "attempt-0", 1)
    os.kill(beat.pid, signal.SIGKILL)
    begun = time.monotonic()
    until((run / "logs" / "attempt-1").exists, "a second attempt")
    assert time.monotonic() - begun < FOUND
    until(
        lambda: (run / "logs" / "attempt-1" / "sum_0.json").exists(), "a sum of the second attempt"
    )
    process.terminate()
    _, err = process.communicate(timeout=WAIT)
    assert process.returncode == 75, err
    assert f"rank 1 (pid {beat.pid} on {beat.host}, step " in err
    assert "): killed by SIGKILL\n" in err
    words = [
        json.loads((run / "logs" / "attempt-1" / f"rank_{rank}.end.json").read_text())
        for rank in (0, 1)
    ]
    assert [word["code"] for word in words] == [75, 75]


def test_an_error_is_named_with_its_traceback(start, tmp_path):
    process = start("100000", "1:raise:4")
    _, err = process.communicate(timeout=WAIT)
    assert process.returncode == 1
    assert "step 4): ValueError: too hot\n  Traceback (most recent call last):\n" in err


def test_a_supervisor_that_is_killed_leaves_nothing(start, tmp_path):
    process = start("100000")
    until_step(3, tmp_path / "run" / "logs" / "attempt-0", (0, 1), [process])
    process.kill()
    process.wait(WAIT)
    until(lambda: not left(tmp_path / "run"), "a process was left behind")
