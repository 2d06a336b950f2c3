"""Each unusable sample is listed once, and too many of them stop the run."""

import json
from pathlib import Path

import pytest

from pipeline.data.quarantine import Quarantine
from pipeline.errors import UserError

LAST = {"shard": "0.tar", "key": "last", "reason": "is broken"}


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_sample_once_over_processes_and_runs(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    first, second = (Quarantine(path, 100, 1.0) for _ in range(2))
    for quarantine in (first, second, first, Quarantine(path, 100, 1.0)):
        quarantine.add("0.tar", "a", "is broken")
        quarantine.write(("0.tar", "", "cut short"))
    assert lines(path) == [
        {"shard": "0.tar", "key": "a", "reason": "is broken"},
        {"shard": "0.tar", "key": "", "reason": "cut short"},
    ]


def test_a_truncated_last_line_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    for key in "ab":
        Quarantine(path, 9, 1.0).write(("0.tar", key, "is broken"))
    complete = path.read_text()
    path.write_text(complete[:-9])
    Quarantine(path, 9, 1.0).write(("0.tar", "b", "is broken"))
    assert path.read_text() == complete


@pytest.mark.parametrize(
    ("num_samples", "drawn", "limit"),
    [
        (20, 20, 2),  # a small data set: the fraction of all its samples
        (20, 500, 2),  # drawn many times
        (10**8, 10, 100),  # a large one: the fraction of at least a thousand samples,
        (10**8, 20_000, 2000),  # then of those that were drawn
    ],
)
def test_the_limit(num_samples: int, drawn: int, limit: int, tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    entries = [{"shard": "0.tar", "key": str(i), "reason": "is broken"} for i in range(limit)]
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in [*entries, LAST]))

    quarantine = Quarantine(path, num_samples, 0.1)
    quarantine.count_drawn(drawn)
    for entry in entries:
        quarantine.add(**entry)
        quarantine.add(**entries[0])  # again: no second sample
    with pytest.raises(UserError) as caught:
        quarantine.add(**LAST)
    assert str(caught.value) == (
        f"data.max_damage: {limit + 1} of about {limit * 10} drawn samples are unusable, more than "
        f"10.0%; the last: 0.tar:last, is broken; the others are listed in {path}; repair or "
        "remove the shards, or raise it"
    )


def test_samples_of_earlier_runs_do_not_count(tmp_path: Path) -> None:
    """The shards may have been repaired since."""
    path = tmp_path / "quarantine.jsonl"
    for key in "abcd":
        Quarantine(path, 10, 0.1).add("0.tar", key, "is broken")
    assert len(lines(path)) == 4


def test_many_samples_are_written_at_once(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(path, 9, 1.0)
    quarantine.write()
    assert not path.exists()
    quarantine.write(("0.tar", "a", "is broken"))
    samples = [("0.tar", key, "is broken") for key in "abcb"]
    Quarantine(path, 9, 1.0).write(*samples)
    quarantine.write(*samples)
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b", "c"]
