"""`cascade train-all`: jobs in turn and at once, one that fails among others, a signal; with small
programs as jobs.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from launch.jobs.train_all import StageJob, plan_jobs, train_all
from pipeline.errors import UserError
from tests.helpers.jobs import ROOT

CONFIG = yaml.safe_dump({"train": {"steps": 3}, "data": {"global_batch": 4}})


PROGRAM = """
import os, signal, sys, time
from pathlib import Path

run_dir = Path({run_dir!r})
(run_dir / "began").write_text(str(time.time()))
{code}
(run_dir / "ended").write_text(str(time.time()))
"""


def job(name: str, folder: Path, code: str) -> StageJob:
    """A job that writes when it began and ended, and runs `code` between."""
    run_dir = folder / name
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(CONFIG)
    program = PROGRAM.format(run_dir=str(run_dir), code=code)
    return StageJob(name=name, argv=[sys.executable, "-c", program], run_dir=run_dir)


def times(jobs: list[StageJob], event: str) -> list[float]:
    return [float((each.run_dir / event).read_text()) for each in jobs]


def test_in_turn_a_job_begins_when_the_one_before_has_ended(tmp_path: Path) -> None:
    jobs = [job(name, tmp_path, "time.sleep(0.1)") for name in "abc"]
    assert train_all(jobs, at_once=1) == 0
    began, ended = times(jobs, "began"), times(jobs, "ended")
    assert all(end <= begin for end, begin in zip(ended, began[1:], strict=False))


WAITS = """
for _ in range(300):
    if (run_dir.parent / "{name}" / "began").exists():
        break
    time.sleep(0.1)
else:
    sys.exit(1)
"""


def test_at_once_they_run_side_by_side(tmp_path: Path) -> None:
    """Each waits for the other's beginning: one after the other, neither would end."""
    jobs = [job(name, tmp_path, WAITS.format(name=other)) for name, other in ("ab", "ba")]
    assert train_all(jobs, at_once=2) == 0


def test_one_that_fails_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = "print('the disk is full', file=sys.stderr)\nsys.exit(1)"
    jobs = [
        job("a", tmp_path, fails),
        job("b", tmp_path, "pass"),
        job("c", tmp_path, "sys.exit('no shards')"),
    ]
    assert train_all(jobs, at_once=1) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in lines[-3:]] == [
        ["a", "failed"],
        ["b", "finished"],
        ["c", "failed"],
    ]
    assert lines[-3].endswith(": the disk is full")
    assert "step 0 of 3" in lines[-2]


def test_a_refused_job_makes_the_exit_code_2(tmp_path: Path) -> None:
    jobs = [job("a", tmp_path, "sys.exit(2)"), job("b", tmp_path, "pass")]
    assert train_all(jobs, at_once=1) == 2


SAVES = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
(run_dir / "ready").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_signal_reaches_running_jobs_and_no_more_begin(at_once: int, tmp_path: Path) -> None:
    jobs = [job(name, tmp_path, SAVES) for name in "abc"]

    def send() -> None:
        for _ in range(300):
            if len(list(tmp_path.glob("*/ready"))) == at_once:
                break
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    assert train_all(jobs, at_once) == 75
    sender.join()
    assert [each.exit_code for each in jobs] == [75] * at_once + [None] * (3 - at_once)
    assert not list(tmp_path.glob("*/ended"))


def test_output_of_several_has_the_name_before_each_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [job(name, tmp_path, "print('hello')") for name in "ab"]
    assert train_all(jobs, at_once=2) == 0
    assert {"[a] hello", "[b] hello"} <= set(capsys.readouterr().err.splitlines())


def test_the_plan_is_a_train_command_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    jobs = plan_jobs("configs/tiny/cascade.yaml", ["train.steps=7"])
    assert [each.name for each in jobs] == ["base", "sr256", "sr1024"]
    assert [str(each.run_dir) for each in jobs] == [
        f"runs/demo/{name}" for name in ("base64", "sr256", "sr1024")
    ]
    assert jobs[0].argv == [
        sys.executable,
        "-m",
        "launch",
        "train",
        "configs/tiny/base64.yaml",
        "train.steps=7",
    ]


def test_two_stages_in_one_folder_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(
        UserError, match="base and another stage have the run folder x; give each its own"
    ):
        plan_jobs("configs/tiny/cascade.yaml", ["run=x"])


def test_the_command_says_which_stage_was_refused(tmp_path: Path) -> None:
    """One stage: each is a process that imports MindSpore."""
    entry = {"name": "base", "config": "configs/tiny/base64.yaml"}
    cascade = tmp_path / "cascade.yaml"
    cascade.write_text(yaml.safe_dump({"folder": str(tmp_path / "cascade"), "stages": [entry]}))
    argv = [sys.executable, "-m", "launch", "train-all", str(cascade), "data.shards=none.tar"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2
    last_line = done.stderr.splitlines()[-1]
    assert last_line.split()[:2] == ["base", "refused"]
    assert "data.shards: none.tar: no such file" in last_line
