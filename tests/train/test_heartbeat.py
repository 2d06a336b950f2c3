"""What a rank reports to its supervisor."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import JobError
from pipeline.train.heartbeat import INTERVAL, Heartbeat


def read(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "rank_3.json").read_text())
    assert isinstance(record, dict)
    return record


def test_the_file_has_the_fields_that_the_supervisor_reads(tmp_path: Path) -> None:
    Heartbeat(tmp_path, 3).beat("training", 7)
    record = read(tmp_path)
    assert isinstance(record.pop("time"), float)
    assert isinstance(record.pop("host"), str)
    assert record == {
        "rank": 3,
        "pid": os.getpid(),
        "phase": "training",
        "step": 7,
        "error": None,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["rank_3.json"]


def test_phases_are_written_at_once_and_steps_at_an_interval(tmp_path: Path) -> None:
    now = 100.0
    heartbeat = Heartbeat(tmp_path, 3, clock=lambda: now)

    def written() -> tuple[str, int]:
        record = read(tmp_path)
        return record["phase"], record["step"]

    heartbeat.beat("compiling", 4)
    heartbeat.beat("training", 5)
    heartbeat.beat("training", 6)
    assert written() == ("training", 5)

    now += INTERVAL
    heartbeat.beat("training", 7)
    assert written() == ("training", 7)
    heartbeat.beat("checkpoint")
    assert written() == ("checkpoint", 7)


def test_an_error_is_one_line(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 3)
    heartbeat.beat("failed", error=JobError("the disk is full\nand more"))
    assert read(tmp_path)["error"] == "JobError: the disk is full"
    heartbeat.beat("starting")
    heartbeat.beat("failed", error=KeyboardInterrupt())
    assert read(tmp_path)["error"] == "KeyboardInterrupt"


def test_without_a_folder_nothing_is_written() -> None:
    Heartbeat(None, 0).beat("training", 1)


def test_a_folder_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heartbeat = Heartbeat(tmp_path / "missing", 3)
    heartbeat.beat("starting")
    heartbeat.beat("training")
    assert [record[1] for record in caplog.record_tuples] == [logging.WARNING]
