"""A run's log: each step once after any interruption, full precision, images, progress."""

import io
import json
import logging
import math
import resource
import signal
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.log import RunLog, setup_logging
from tests.ground.test_files import FINISHED, in_child


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def logger() -> Iterator[logging.Logger]:
    """The "cascade" logger, restored after the test."""
    log = logging.getLogger("cascade")
    handlers, level = log.handlers[:], log.level
    yield log
    log.handlers, log.level = handlers, level


def lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def events(folder: Path) -> list[Any]:
    """The events of all files in order. A record is length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    result = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            result.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return result


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    return [
        (event.step, value.tag, value.simple_value)
        for event in events(folder)
        for value in event.summary.value
    ]


def run(folder: Path, first: int, last: int, total: int = 10) -> None:
    """Reports every step after `first` up to `last`."""
    with RunLog(folder, first, total) as log:
        for step in range(first + 1, last + 1):
            log.report(step, {"loss": 1 / step})
            log.advance(step)


def test_each_step_is_a_line_in_full_precision(tmp_path: Path) -> None:
    metrics: dict[str, Any] = {
        "loss": 0.1 + 0.2,
        "lr": 1e-300,
        "seconds": 3,
        "grad_norm": np.float32(0.1),
        "skipped": np.int64(2),
    }
    with RunLog(tmp_path, 0, 10) as log:
        log.report(1, metrics)
        assert lines(tmp_path) == [{"step": 1, **metrics}]  # while the run is open
    assert scalars(tmp_path) == [
        (1, name, pytest.approx(float(value))) for name, value in metrics.items()
    ]


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with RunLog(tmp_path, 0, 10) as log:
        log.report(1, {"loss": math.nan, "grad_norm": math.inf, "lr": np.float32(-np.inf)})
    assert lines(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "lr": None}]
    assert math.isnan(scalars(tmp_path)[0][2])


@pytest.mark.parametrize("killed_after", [4, 5, 8])
def test_a_resumed_run_has_each_step_once(tmp_path: Path, killed_after: int) -> None:
    run(tmp_path / "whole", 0, 10)
    run(tmp_path / "killed", 0, killed_after)
    run(tmp_path / "killed", 4, 10)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert len(lines(tmp_path / "killed")) == 10


def test_a_truncated_line_is_dropped(tmp_path: Path) -> None:
    run(tmp_path, 0, 3)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    third = whole.rindex(b"\n", 0, -1) + 1
    for end in range(third, len(whole)):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:end])
        RunLog(tmp_path, 3, 10).close()
        all_but_newline = end == len(whole) - 1
        assert [line["step"] for line in lines(tmp_path)] == (
            [1, 2, 3] if all_but_newline else [1, 2]
        )


def test_a_run_that_starts_over_drops_all_lines(tmp_path: Path) -> None:
    run(tmp_path, 0, 3)
    RunLog(tmp_path, 0, 10).close()
    assert lines(tmp_path) == []


def test_a_resumed_run_discards_later_steps_in_tensorboard(tmp_path: Path) -> None:
    from tensorboardX.proto.event_pb2 import SessionLog

    run(tmp_path, 0, 5)
    run(tmp_path, 3, 4)  # within the same second
    starts = [
        event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START
    ]
    assert starts == [1, 4]
    assert [step for step, _, _ in scalars(tmp_path)] == [1, 2, 3, 4, 5, 4]


def test_an_image_is_a_file_and_in_tensorboard(tmp_path: Path) -> None:
    image_HWC = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    with RunLog(tmp_path, 0, 10) as log:
        log.image(1000, image_HWC)
    path = tmp_path / "samples" / "step_0001000.png"
    assert list(path.parent.iterdir()) == [path]
    np.testing.assert_array_equal(np.asarray(Image.open(path)), image_HWC)
    (value,) = events(tmp_path)[-1].summary.value
    assert (value.image.width, value.image.height) == (7, 5)
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(value.image.encoded_image_string))), image_HWC
    )


def test_a_disabled_log_writes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path / "run", 0, 10, enabled=False) as log:
        log.report(1, {"loss": 1.0})
        log.advance(1)
        log.image(1, np.zeros((2, 2, 3), np.uint8))
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_raises_instead_of_hanging(tmp_path: Path) -> None:
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        log = RunLog(tmp_path, 0, 10)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        for step in range(1, 100):
            try:
                log.report(step, {"loss": 1.0})
            except OSError:
                return
        raise AssertionError("nothing was raised")

    assert in_child(limited) == FINISHED


def test_a_terminal_has_a_bar_and_messages_on_separate_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    setup_logging()
    with RunLog(tmp_path, 4, 10) as log:
        log.report(5, {"loss": 0.123456})
        log.advance(5)
        logging.getLogger("cascade").warning("shard %s is short", "a.tar")
        log.bar.refresh()
    written = terminal.getvalue()
    assert "loss=0.1235" in written
    assert " 4/10 " in written
    assert " 5/10 " in written
    assert "\rwarning: shard a.tar is short\n" in written
    assert "step 5/10" not in written


def test_a_file_has_progress_lines_and_no_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    for _ in range(2):
        setup_logging()  # idempotent
    run(tmp_path, 4, 5)
    assert file.getvalue() == "step 5/10: loss 0.2\n"
