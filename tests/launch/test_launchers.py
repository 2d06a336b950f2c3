"""The real msrun and mpirun under a supervisor, with two ranks that sum: half a minute per job,
`make test-launchers`.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.jobs import (
    WAIT,
    Process,
    beat_of,
    leaving_nothing,
    remaining_processes,
    until,
    until_step,
)

pytestmark = pytest.mark.launchers
NOTICED = 10.0  # seconds within which the end of a rank has to be noticed

Start = Callable[..., Process]


@pytest.fixture
def start(launcher: str, tmp_path: Path) -> Iterator[Start]:
    """Starts a supervised job in tmp_path/run; at the end nothing may be left of it."""
    run = tmp_path / "run"
    with leaving_nothing(run) as begin:

        def job(*words: str, **options: object) -> Process:
            options_json = json.dumps({"launcher": launcher, **options})
            return begin(
                [sys.executable, "-m", "tests.helpers.supervised", str(run), options_json, *words]
            )

        yield job


def sum_report(run: Path, rank: int) -> dict[str, float]:
    """What `tests.helpers.sum_ranks` wrote."""
    return json.loads((run / "logs" / "attempt-0" / f"sum_{rank}.json").read_text())


def test_two_ranks_sum_on_cores_of_their_own(start: Start, tmp_path: Path) -> None:
    process = start("5")
    out, err = process.communicate(timeout=WAIT)
    assert (process.returncode, out) == (0, ""), err
    assert [sum_report(tmp_path / "run", rank)["sum"] for rank in (0, 1)] == [3.0, 3.0]
    cores = len(os.sched_getaffinity(0))
    assert [sum_report(tmp_path / "run", rank)["cores"] for rank in (0, 1)] == [
        max(1, cores // 2)
    ] * 2


def test_a_killed_rank_is_noticed_and_the_job_restarts(start: Start, tmp_path: Path) -> None:
    """The second attempt is one that SIGTERM ends."""
    run = tmp_path / "run"
    process = start("100000", restarts=1, backoff=0.2)
    until_step(3, run / "logs" / "attempt-0", (0, 1), [process])
    beat = beat_of(run / "logs" / "attempt-0", 1)
    os.kill(beat.pid, signal.SIGKILL)
    killed_at = time.monotonic()
    until((run / "logs" / "attempt-1").exists, "a second attempt")
    assert time.monotonic() - killed_at < NOTICED
    until(
        lambda: (run / "logs" / "attempt-1" / "sum_0.json").exists(), "a sum of the second attempt"
    )
    process.terminate()
    _, err = process.communicate(timeout=WAIT)
    assert process.returncode == 75, err
    assert f"rank 1 (pid {beat.pid} on {beat.host}, step " in err
    assert "): killed by SIGKILL\n" in err
    reports = [
        json.loads((run / "logs" / "attempt-1" / f"rank_{rank}.end.json").read_text())
        for rank in (0, 1)
    ]
    assert [report["code"] for report in reports] == [75, 75]


def test_an_error_is_named_with_its_traceback(start: Start, tmp_path: Path) -> None:
    process = start("100000", "1:raise:4")
    _, err = process.communicate(timeout=WAIT)
    assert process.returncode == 1
    assert "step 4): ValueError: too hot\n  Traceback (most recent call last):\n" in err


def test_a_supervisor_that_is_killed_leaves_no_process(start: Start, tmp_path: Path) -> None:
    process = start("100000")
    until_step(3, tmp_path / "run" / "logs" / "attempt-0", (0, 1), [process])
    process.kill()
    process.wait(WAIT)
    until(lambda: not remaining_processes(tmp_path / "run"), "no process is left")
