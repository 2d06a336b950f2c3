"""What a rank says of itself to a watcher."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import JobError
from pipeline.train import heartbeat
from pipeline.train.heartbeat import Heartbeat


def said(folder: Path) -> dict[str, Any]:
    facts = json.loads((folder / "rank_3.json").read_text())
    assert isinstance(facts, dict)
    return facts


def test_the_file_is_what_the_launcher_expects(tmp_path: Path) -> None:
    Heartbeat(tmp_path, 3).beat("training", 7)
    facts = said(tmp_path)
    assert list(facts) == ["rank", "pid", "host", "phase", "step", "time", "error"]
    assert (facts["rank"], facts["pid"], facts["phase"], facts["step"]) == (
        3,
        os.getpid(),
        "training",
        7,
    )
    assert facts["error"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["rank_3.json"]


def test_phases_are_told_at_once_and_steps_once_in_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    heart = Heartbeat(tmp_path, 3)
    heart.beat("compiling", 4)
    heart.beat("training", 5)
    heart.beat("training", 6)
    assert (said(tmp_path)["phase"], said(tmp_path)["step"]) == ("training", 5)
    now += heartbeat.EVERY
    heart.beat("training", 7)
    assert said(tmp_path)["step"] == 7
    heart.beat("checkpoint")
    assert (said(tmp_path)["phase"], said(tmp_path)["step"]) == ("checkpoint", 7)


def test_an_error_is_one_line(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path, 3)
    heart.beat("failed", error=JobError("the disk is full\nand more"))
    assert said(tmp_path)["error"] == "JobError: the disk is full"
    heart.beat("starting")
    heart.beat("failed", error=KeyboardInterrupt())
    assert said(tmp_path)["error"] == "KeyboardInterrupt"


def test_without_a_folder_nothing_is_said() -> None:
    Heartbeat(None, 0).beat("training", 1)


def test_a_folder_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heart = Heartbeat(tmp_path / "gone", 3)
    for phase in ("starting", "training"):
        heart.beat(phase)  # type: ignore[arg-type]
    assert [record[1] for record in caplog.record_tuples] == [logging.WARNING]
