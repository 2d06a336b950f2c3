"""Checkpoints: bit for bit what was saved, and never a damaged one taken for a good one, however
the writer ends.
"""

import errno
import logging
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.train.checkpoint import (
    CheckpointError,
    Tensors,
    Writer,
    load,
    newest,
    save,
    steps,
    verify,
)
from tests.ground.test_files import FINISHED, failed_at_each_call, in_child, killed_at_each_call

pytestmark = pytest.mark.slow

PATIENCE = 60  # seconds to wait for what happens at once


def content(step: int) -> tuple[Tensors, dict[str, Any]]:
    rng = np.random.default_rng(step)
    model: dict[str, np.ndarray] = {
        "conv.weight": rng.standard_normal((3, 4)).astype(np.float32),
        "half": rng.standard_normal(5).astype(np.float16),
        "counts": rng.integers(-9, 9, (2, 2), dtype=np.int32),
        "odd": np.array([np.nan, np.inf, -0.0, 1e-45], np.float32),
        "scalar": np.array(step, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }
    ema = {"conv.weight": rng.standard_normal((4, 3)).astype(np.float32).T}
    state = {"step": step, "lr": 0.1 + step / 3, "order": [1, 2], "note": None}
    return {"model": model, "ema": ema, "optimizer": {}}, state


def write(folder: Path, step: int, keep: int = 9) -> Path:
    tensors, state = content(step)
    return save(folder, step, tensors, state, keep=keep)


def assert_holds(path: Path | None, step: int) -> None:
    """What is loaded from `path` is bit for bit the content of `step`."""
    assert path is not None
    verify(path)
    tensors, state = load(path)
    expected, expected_state = content(step)
    assert state == expected_state
    assert tensors.keys() == expected.keys()
    for file, arrays in expected.items():
        assert tensors[file].keys() == arrays.keys()
        for name, array in arrays.items():
            loaded = tensors[file][name]
            assert (loaded.dtype, loaded.shape, loaded.tobytes()) == (
                array.dtype,
                array.shape,
                array.tobytes(),
            )


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints", 1000)
    assert path == tmp_path / "checkpoints" / "step_0001000" == newest(tmp_path / "checkpoints")
    names = [
        "COMPLETE",
        "ema.safetensors",
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert sorted(file.name for file in path.iterdir()) == names
    assert_holds(path, 1000)


def test_the_newest_is_the_one_of_the_highest_step(tmp_path: Path) -> None:
    for step in (999_999, 12_345_678, 9_999_999):
        write(tmp_path, step)
    assert steps(tmp_path) == [999_999, 9_999_999, 12_345_678]
    assert_holds(newest(tmp_path), 12_345_678)


def test_there_is_no_newest_where_nothing_was_saved(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") is None
    (tmp_path / ".tmp-step_0000010").mkdir()  # of a run killed in its first save
    (tmp_path / "step_10").mkdir()  # not written by `save`
    assert newest(tmp_path) is None
    assert steps(tmp_path) == []


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in range(10, 60, 10):
        write(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000040", "step_0000050"]
    with pytest.raises(ValueError, match="keep=0"):
        write(tmp_path, 60, keep=0)


def test_a_damaged_later_step_does_not_count_among_those_kept(tmp_path: Path) -> None:
    for step in (10, 30):
        write(tmp_path, step)
    (tmp_path / "step_0000030" / "state.json").write_text("{}")
    write(tmp_path, 20, keep=1)
    assert_holds(newest(tmp_path), 20)

    # It is written again when the run gets there.
    write(tmp_path, 30, keep=1)
    assert_holds(newest(tmp_path), 30)
    assert steps(tmp_path) == [30]


def test_a_good_step_is_not_written_again(tmp_path: Path) -> None:
    path = write(tmp_path, 10)
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    assert write(tmp_path, 10) == path
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


NOT_IN_MANIFEST = "its sha256 is not the one in the manifest"
NOT_IN_COMPLETE = "its sha256 is not the one in COMPLETE"


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        *[
            (name, Path.unlink, f"{name}: is missing")
            for name in ("model.safetensors", "state.json", "manifest.json")
        ],
        ("COMPLETE", Path.unlink, "COMPLETE: is missing"),
        ("COMPLETE", flip, f"manifest.json: {NOT_IN_COMPLETE}"),
        ("COMPLETE", empty, f"manifest.json: {NOT_IN_COMPLETE}"),
        ("manifest.json", flip, f"manifest.json: {NOT_IN_COMPLETE}"),
        ("manifest.json", empty, f"manifest.json: {NOT_IN_COMPLETE}"),
        *[
            (f"{name}.safetensors", flip, f"{name}.safetensors: {NOT_IN_MANIFEST}")
            for name in ("model", "ema", "optimizer")
        ],
        ("state.json", flip, f"state.json: {NOT_IN_MANIFEST}"),
        ("ema.safetensors", truncate, "ema.safetensors: has 127 bytes, the manifest says 128"),
        ("ema.safetensors", empty, "ema.safetensors: has 0 bytes, the manifest says 128"),
    ],
)
def test_damage_is_named_and_the_older_step_is_used(
    tmp_path: Path,
    name: str,
    damage: Callable[[Path], None],
    problem: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write(tmp_path, 10)
    path = write(tmp_path, 20)
    damage(path / name)
    with pytest.raises(CheckpointError) as error:
        verify(path)
    assert str(error.value) == f"{path}/{problem}"
    assert_holds(newest(tmp_path), 10)
    assert caplog.record_tuples == [
        ("cascade", logging.WARNING, f"damaged checkpoint skipped: {path}/{problem}")
    ]
    write(tmp_path, 20)
    assert_holds(newest(tmp_path), 20)


def test_a_disk_that_cannot_be_read_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, 10)

    def fail(file: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))

    monkeypatch.setattr("pipeline.train.checkpoint.sha256_file", fail)
    with pytest.raises(
        CheckpointError, match=r"step_0000010/ema\.safetensors: cannot be read: Input/output error$"
    ):
        verify(path)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(tmp_path: Path) -> None:
    for step in (10, 20):
        flip(write(tmp_path, step) / "state.json")
    (tmp_path / "step_0000030").mkdir()
    with pytest.raises(UserError) as error:
        newest(tmp_path)
    damage = f"{tmp_path}/step_0000010/state.json: {NOT_IN_MANIFEST}"
    assert str(error.value) == (
        f"{tmp_path}: every checkpoint is damaged ({damage}); move the folder away to start from "
        "step 0"
    )


def test_what_is_not_a_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(tmp_path)


@pytest.fixture
def before(tmp_path: Path) -> Callable[[str], Callable[[], None]]:
    """Sets `tmp_path/run` to one of three states, quickly enough to do it a hundred times."""
    write(tmp_path / "good", 10)
    write(tmp_path / "good", 20)
    shutil.copytree(tmp_path / "good", tmp_path / "damaged")
    write(tmp_path / "damaged", 30)
    flip(tmp_path / "damaged" / "step_0000030" / "model.safetensors")
    (tmp_path / "nothing").mkdir()

    def prepare(state: str) -> None:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / state, tmp_path / "run")

    return lambda state: lambda: prepare(state)


@pytest.mark.parametrize("state", ["nothing", "good", "damaged"])
def test_a_kill_at_any_moment_leaves_the_old_newest_or_the_new(
    tmp_path: Path, before: Callable[[str], Callable[[], None]], state: str
) -> None:
    run = tmp_path / "run"
    results: list[int | None] = []
    for _ in killed_at_each_call(before(state), lambda: write(run, 30, keep=2)):
        path = newest(run)
        results.append(path and int(path.name[5:]))
        if path is not None:
            assert_holds(path, int(path.name[5:]))

        # The same command again.
        write(run, 30, keep=2)
        assert_holds(newest(run), 30)
        write(run, 40, keep=2)
        assert sorted(path.name for path in run.iterdir()) == ["step_0000030", "step_0000040"]
    assert len(results) > 20
    assert set(results) == {None if state == "nothing" else 20, 30}
    # From one moment on, the new one is the newest.
    assert results == sorted(results, key=lambda step: step or 0)


@pytest.mark.parametrize("state", ["nothing", "good", "damaged"])
def test_a_full_disk_at_any_moment_leaves_the_old_newest_or_the_new(
    tmp_path: Path, before: Callable[[str], Callable[[], None]], state: str
) -> None:
    run = tmp_path / "run"
    errors: list[BaseException] = []
    for error in failed_at_each_call(before(state), lambda: write(run, 30, keep=2)):
        path = newest(run)
        step = path and int(path.name[5:])
        assert step in (None if state == "nothing" else 20, 30)
        if path is not None:
            assert_holds(path, int(path.name[5:]))
        assert not list(run.glob(".tmp-*"))
        # Only the removal of older steps may fail without an error.
        if error is None:
            assert step == 30
        else:
            errors.append(error)
    assert len(errors) > 15
    assert {type(error) for error in errors} == {CheckpointError}


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(CheckpointError) as error:
            save(tmp_path, 20, {"model": {"x": np.zeros(1000, np.float32)}}, {}, keep=1)
        message = str(error.value)
        assert message.startswith(
            f"{tmp_path}/step_0000020: could not be saved: {tmp_path}/.tmp-step_0000020/model.saf"
        )
        assert "File too large" in message
        assert message.endswith(
            "earlier checkpoints are intact: make room and run the same command again"
        )

    write(tmp_path, 10)
    assert in_child(limited) == FINISHED
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000010"]
    assert_holds(newest(tmp_path), 10)


def test_all_is_on_the_disk_before_it_has_its_name_and_before_older_ones_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 10)
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(descriptor: int) -> None:
        events.append(
            f"sync {Path(f'/proc/self/fd/{descriptor}').readlink().relative_to(tmp_path)}"
        )
        fsync(descriptor)

    def watched_rename(source: Path, target: Path) -> None:
        events.append(f"rename {source.name} {target.name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    path = write(tmp_path, 20, keep=1)
    side = ".tmp-step_0000020"
    assert events == [
        *[f"sync {side}/{name}" for name in sorted(file.name for file in path.iterdir())],
        f"sync {side}",
        f"rename {side} step_0000020",
        "sync .",
        "rename step_0000010 .old-step_0000010",
    ]


# In the background.


class SlowSave:
    """`save`, but each call waits until `allowed` is set."""

    def __init__(self) -> None:
        self.allowed = threading.Event()
        self.steps: list[int] = []

    def __call__(
        self, folder: Path, step: int, tensors: Tensors, state: dict[str, Any], keep: int
    ) -> Path:
        self.steps.append(step)
        assert self.allowed.wait(PATIENCE)
        return save(folder, step, tensors, state, keep)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    slow = SlowSave()
    with Writer(tmp_path, keep=2, save_step=slow) as writer:
        tensors, state = content(10)
        writer.save(10, tensors, state)
        # Not done, and no error.
        writer.check()
        assert newest(tmp_path) is None

        # The next training step.
        for arrays in tensors.values():
            for array in arrays.values():
                array[...] = 0
        slow.allowed.set()
    assert_holds(newest(tmp_path), 10)


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    slow = SlowSave()
    with Writer(tmp_path, keep=2, save_step=slow) as writer:
        writer.save(10, *content(10))
        threading.Timer(0.2, slow.allowed.set).start()
        writer.save(20, *content(20))
        assert_holds(tmp_path / "step_0000010", 10)
    assert steps(tmp_path) == slow.steps == [10, 20]


def check_until_it_fails(writer: Writer) -> None:
    """As training does, at each step."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        writer.check()


@pytest.mark.parametrize(
    "next_call",
    [
        check_until_it_fails,
        Writer.join,
        lambda writer: writer.save(20, *content(20)),
        lambda writer: None,
    ],
    ids=["check", "join", "save", "exit"],
)
def test_a_failure_is_raised_by_the_next_call(
    tmp_path: Path, next_call: Callable[[Writer], None]
) -> None:
    (tmp_path / "checkpoints").write_text("not a folder")
    with (  # noqa: PT012
        pytest.raises(CheckpointError, match="step_0000010: could not be saved"),
        Writer(tmp_path / "checkpoints", keep=2) as writer,
    ):
        writer.save(10, *content(10))
        next_call(writer)


def test_another_error_takes_precedence(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("not a folder")
    with pytest.raises(ZeroDivisionError), Writer(tmp_path / "checkpoints", keep=2) as writer:  # noqa: PT012
        writer.save(10, *content(10))
        raise ZeroDivisionError
