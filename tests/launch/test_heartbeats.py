"""What follows from heartbeats: how long a rank may report the same."""

import json
from pathlib import Path

import pytest

from launch.jobs.heartbeats import (
    HANG,
    PHASE_TIMEOUTS,
    HeartbeatRecord,
    RankProgress,
    read_exit_report,
    read_heartbeat,
)
from pipeline.train.heartbeat import Heartbeat, Phase


def beat(phase: Phase, step: int) -> HeartbeatRecord:
    return HeartbeatRecord(rank=0, pid=1, host="h", phase=phase, step=step, time=0.0)


def test_what_ranks_write_is_read(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 3)
    heartbeat.beat("training", 7)
    heartbeat.beat("failed", error=ValueError("too hot"))
    beat = read_heartbeat(tmp_path, 3)
    assert beat is not None
    assert (beat.rank, beat.phase, beat.step) == (3, "failed", 7)
    assert beat.error == "ValueError: too hot"
    assert json.loads((tmp_path / "rank_3.json").read_text()) == vars(beat)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rank": 0}'])
def test_an_invalid_heartbeat_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "rank_0.json").write_text(text)
    assert read_heartbeat(tmp_path, 0) is None
    assert read_heartbeat(tmp_path, 1) is None
    assert read_exit_report(tmp_path, 0) is None


def test_the_limit_of_a_step_follows_from_earlier_steps() -> None:
    progress = RankProgress(since=0.0)
    assert progress.limit() == PHASE_TIMEOUTS["starting"]
    progress.update(beat("compiling", 0), 10.0)
    assert (progress.limit(), progress.trained) == (PHASE_TIMEOUTS["compiling"], False)
    for step in range(1, 6):
        progress.update(beat("training", step), 100.0 + 5 * step)
    assert (progress.median_step, progress.limit(), progress.trained) == (5.0, 100.0, True)
    progress.update(beat("training", 15), 126.0)  # ten fast steps hardly change the median
    assert progress.limit() == 100.0
    progress.update(beat("training", 15), 999.0)
    assert progress.since == 126.0


def test_fast_steps_have_a_limit_of_a_minute() -> None:
    progress = RankProgress(since=0.0)
    for step in range(1, 9):
        progress.update(beat("training", step), float(step))
    assert progress.limit() == HANG
    assert progress.limit(hang=5.0) == 20.0


def test_the_time_of_a_checkpoint_is_not_counted_as_a_step() -> None:
    beats = [beat("training", 1), beat("checkpoint", 1), beat("training", 2), beat("training", 3)]
    progress = RankProgress(since=0.0)
    for index, each in enumerate(beats):
        progress.update(each, 100.0 * index)
    assert list(progress.step_seconds) == [100.0]


def test_a_rank_that_saves_pauses_the_others_for_a_limited_time() -> None:
    progress = RankProgress(since=0.0)
    assert not progress.pausing(0.0)
    progress.update(beat("checkpoint", 3), 10.0)
    assert progress.pausing(PHASE_TIMEOUTS["checkpoint"])
    assert not progress.pausing(10.0 + PHASE_TIMEOUTS["checkpoint"])
