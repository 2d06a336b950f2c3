"""What was left out is written down once, and stops the run when it is too much."""

import json
from pathlib import Path

import pytest

from pipeline.data import quarantine as module
from pipeline.data.quarantine import Quarantine
from pipeline.errors import UserError


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_sample_once_over_processes_and_runs(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    first, second = (Quarantine(path, 100, 1.0) for _ in range(2))
    for who in (first, second, first, Quarantine(path, 100, 1.0)):
        who.add("0.tar", "a", "is broken")
        who.write("0.tar", "", "cut short")
    assert lines(path) == [
        {"shard": "0.tar", "key": "a", "reason": "is broken"},
        {"shard": "0.tar", "key": "", "reason": "cut short"},
    ]


def test_a_line_that_a_full_disk_cut_short_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    for key in "ab":
        Quarantine(path, 9, 1.0).write("0.tar", key, "is broken")
    whole = path.read_text()
    path.write_text(whole[:-9])
    Quarantine(path, 9, 1.0).write("0.tar", "b", "is broken")
    assert path.read_text() == whole


@pytest.mark.parametrize(
    ("num_samples", "drawn", "limit"),
    [
        (20, 20, 2),  # a small set: of all its samples
        (20, 500, 2),  # seen many times
        (10**8, 10, 100),  # a large one: of a thousand at least,
        (10**8, 50_000, 5000),  # then of what was looked at
    ],
)
def test_the_limit(
    num_samples: int, drawn: int, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.log, "warning", lambda *words: None)
    monkeypatch.setattr(Quarantine, "write", lambda *words: None)
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", num_samples, 0.1)
    quarantine.look(drawn)
    for number in range(limit):
        quarantine.add("0.tar", str(number), "is broken")
        quarantine.add("0.tar", "0", "is broken")  # again: no second sample
    with pytest.raises(UserError) as caught:
        quarantine.add("0.tar", "last", "is broken")
    assert str(caught.value) == (
        f"data.max_damage: {limit + 1} of about {limit * 10} samples looked at cannot be used, more than 10.0%, the "
        f"last of them 0.tar:last, which is broken; the others are in {tmp_path}/quarantine.jsonl; repair or remove "
        "the shards, or raise it"
    )


def test_what_earlier_runs_found_does_not_count(tmp_path: Path) -> None:
    """The shards may have been repaired since."""
    path = tmp_path / "quarantine.jsonl"
    for key in "abcd":
        Quarantine(path, 10, 0.1).add("0.tar", key, "is broken")
    assert len(lines(path)) == 4
