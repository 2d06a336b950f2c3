"""`cascade status`: the state of every kind of run, from its folder, without MindSpore."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch.jobs.plan import NODE_LOCK
from launch.jobs.status import as_text, duration, status
from pipeline.errors import UserError
from pipeline.files import lock
from tests.helpers.jobs import ROOT

CONFIG = {"train": {"steps": 100}, "data": {"global_batch": 32}}


def report(step: int, seconds: float = 0.5) -> str:
    return json.dumps({"step": step, "loss": 1 / step, "seconds": seconds}) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 100 steps that was started twice and is at step 40."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "metrics.jsonl").write_text(
        "".join(report(step) for step in range(1, 41)) + '{"step": 41, "lo'
    )
    for step in (10, 30):
        (tmp_path / f"checkpoints/step_{step:07d}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step_{step:07d}/COMPLETE").touch()
    for attempt in range(11):
        (tmp_path / f"logs/attempt-{attempt}").mkdir(parents=True)
    for rank in range(2):
        beat = {
            "rank": rank,
            "pid": 1,
            "host": "here",
            "phase": "training",
            "step": 40,
            "time": 0.0,
            "error": None,
        }
        (tmp_path / f"logs/attempt-10/rank_{rank}.json").write_text(json.dumps(beat))
    (tmp_path / "logs/attempt-10/rank_1.end.json").write_text(
        '{"code": 0, "error": null, "time": 0.0}'
    )
    (tmp_path / "quarantine.jsonl").write_text("{}\n{}\n")
    return tmp_path


def test_the_report_of_a_stopped_run(run: Path) -> None:
    hour_ago = time.time() - 3600
    os.utime(run / "checkpoints/step_0000030", (hour_ago, hour_ago))
    found = status(run)
    assert {name: found[name] for name in ("state", "pid", "step", "steps", "checkpoint")} == {
        "state": "stopped",
        "pid": None,
        "step": 40,
        "steps": 100,
        "checkpoint": 30,
    }
    assert (found["images_per_second"], found["seconds_left"]) == (64.0, 30.0)
    assert (found["restarts"], found["quarantined"]) == (10, 2)
    assert [(beat["rank"], beat["phase"]) for beat in found["ranks"]] == [
        (0, "training"),
        (1, "training"),
    ]
    assert found["saved"] == pytest.approx(3600, abs=60)
    text = as_text(found)
    assert "step          40 of 100\n" in text
    assert "64.0 images/s, 30 s left" in text
    assert "checkpoint    step 30, written 1 h" in text
    assert "rank 0-1      training, step 40, here, " in text


def test_the_validation_now_and_at_its_best(run: Path) -> None:
    assert status(run)["validation"] is None

    def validate(*losses: float | None) -> str:
        rows = [
            json.dumps({"step": 10 * step, "validation_loss": loss}) + "\n"
            for step, loss in enumerate(losses, 1)
        ]
        # Each after its step, and the last line is being written.
        reports = "".join(report(step) for step in range(1, 41))
        (run / "metrics.jsonl").write_text("".join(rows) + reports + rows[0][:-1])
        found = status(run)
        assert (found["step"], found["loss"]) == (40, 1 / 40)
        (line,) = [line for line in as_text(found).splitlines() if line.startswith("validation")]
        return line.removeprefix("validation").strip()

    assert validate(0.5, 0.25) == "loss 0.25 at step 20, the best"
    assert validate(0.5, 0.25, 0.75) == "loss 0.75 at step 30; the best 0.25 at step 20"
    assert validate(0.5, None) == "loss not finite at step 20; the best 0.5 at step 10"


def test_ranks_that_do_the_same_are_one_line(run: Path) -> None:
    states = [
        (0, "a", "training", 40),
        (1, "a", "training", 41),
        (3, "a", "training", 41),
        (4, "b", "training", 40),
        (5, "b", "checkpoint", 40),
    ]
    beats = [
        {"rank": rank, "host": host, "phase": phase, "step": step, "age": rank}
        for rank, host, phase, step in states
    ]
    lines = [
        line
        for line in as_text(status(run) | {"ranks": beats}).splitlines()
        if line.startswith("rank")
    ]
    assert lines == [
        "rank 0-1      training, step 40-41, a, 1 s ago",
        "rank 3        training, step 41, a, 3 s ago",
        "rank 4        training, step 40, b, 4 s ago",
        "rank 5        checkpoint, step 40, b, 5 s ago",
    ]


def test_a_run_that_is_alive(run: Path) -> None:
    with lock(run):
        assert (status(run)["state"], status(run)["pid"]) == ("running", str(os.getpid()))
    assert status(run)["state"] == "stopped"


def test_a_supervised_run_is_alive_between_its_attempts(run: Path) -> None:
    with lock(run, NODE_LOCK.format(0)):  # and no rank has .lock
        assert (status(run)["state"], status(run)["pid"]) == ("running", str(os.getpid()))
    assert status(run)["state"] == "stopped"


def test_the_speed_is_the_median_of_the_last_reports(run: Path) -> None:
    (run / "metrics.jsonl").write_text(
        "".join(report(step, 9.0 if step < 3000 else 0.25) for step in range(1, 3030))
    )
    assert status(run)["images_per_second"] == 128.0


def test_a_run_before_its_begin_and_after_its_end(run: Path) -> None:
    (run / "metrics.jsonl").write_text(report(100))
    assert status(run)["state"] == "stopped"
    (run / "stage").mkdir()
    (run / "stage/stage.json").touch()
    assert status(run)["state"] == "finished"
    for path in (run / "checkpoints").rglob("COMPLETE"):
        path.unlink()
    (run / "metrics.jsonl").unlink()
    found = status(run)
    assert (found["state"], found["step"], found["loss"], found["seconds_left"]) == (
        "not begun",
        0,
        None,
        None,
    )
    assert "speed" not in as_text(found)


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.yaml; give a run folder"):
        status(tmp_path)


def test_the_command_needs_no_mindspore(run: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "launch", "status", str(run), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout)["step"] == 40
    assert "mindspore" not in {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (3600, "1 h"), (273600.0, "3 d 4 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
