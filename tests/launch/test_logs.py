"""Logs that are followed while they grow."""

from pathlib import Path

import pytest

from launch.jobs.logs import Tail, last_lines


def test_lines_are_shown_once_and_whole(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "rank_0.log"
    tail = Tail(log, 0)
    tail.show()  # the log does not exist yet
    for text, shown in (
        ("one\ntw", "one\n"),
        ("o\n[INFO] DISTRIBUTED(1): so\n", "two\n"),
        ("three", ""),
        ("", ""),
    ):
        with log.open("a") as file:
            file.write(text)
        tail.show()
        assert capfd.readouterr().err == shown
    tail.show(final=True)
    tail.show(final=True)
    assert capfd.readouterr().err == "three\n"


def test_warnings_and_errors_of_other_ranks_are_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rank_3.log").write_text("step 1\nwarning: hot\nerror: hotter\n")
    Tail(tmp_path / "rank_3.log", 3).show()
    assert capfd.readouterr().err == "[rank 3] warning: hot\n[rank 3] error: hotter\n"


def test_the_last_lines_of_a_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"a\nb\n 10%\r 20%\n\xff\n\n")
    assert last_lines(tmp_path / "log", 3) == " 10%\n 20%\n\N{REPLACEMENT CHARACTER}"
    assert last_lines(tmp_path / "none") == ""
