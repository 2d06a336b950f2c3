"""Writing that is whole or did not happen: stopped at every call to the operating system in turn."""

import contextlib
import errno
import fcntl
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from pipeline.errors import JobError, UserError
from pipeline.files import (
    holder,
    lock,
    replace_folder,
    sha256_file,
    try_lock,
    write_atomically,
    write_tensors,
    write_tensors_atomically,
)

# Whatever the code under test asks of the disk goes through one of these.
CALLS = [
    (os, name)
    for name in ("open", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "chmod")
]
CALLS += [(io, "open"), (safetensors.numpy, "save_file")]
FINISHED = 3  # exit code of a child that came to its end


@contextlib.contextmanager
def fault_at(number: int, fault: Callable[[], None]) -> Iterator[list[str]]:
    """Does `fault` instead of the call of this number; gives the list of calls, which grows."""
    calls: list[str] = []

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == number + 1:
                fault()
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in CALLS:
            patch.setattr(module, name, watched(name, getattr(module, name)))
        yield calls


def in_child(action: Callable[[], object]) -> int:
    """The exit code of a copy of this process that does `action` and nothing more."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            action()
            os._exit(FINISHED)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_each_call(
    prepare: Callable[[], object], action: Callable[[], object]
) -> Iterator[int]:
    """`prepare`s, then kills a process that does `action` before its first, second, ... call, and
    yields each time.
    """

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def attempt(number: int) -> None:
        with fault_at(number, die):
            action()

    for number in range(1000):
        prepare()
        code = in_child(lambda: attempt(number))  # noqa: B023
        assert code in (FINISHED, -signal.SIGKILL)
        yield number
        if code == FINISHED:
            return
    raise AssertionError("the action does not end")


def failed_at_each_call(
    prepare: Callable[[], object], action: Callable[[], object]
) -> Iterator[Exception | None]:
    """The same with a full disk: yields the exception that `action` let through, or None if it got
    over it.
    """

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for number in range(1000):
        prepare()
        raised = None
        with fault_at(number, full) as calls:
            try:
                action()
            except Exception as error:
                raised = error
            if len(calls) <= number:
                assert raised is None
                return
        yield raised
    raise AssertionError("the action does not end")


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_file_is_old_or_new_when_the_writer_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    seen = set()
    for _ in killed_at_each_call(
        lambda: path.write_bytes(b"old"), lambda: write_atomically(path, b"new")
    ):
        seen.add(path.read_bytes())
    assert seen == {b"old", b"new"}


def test_a_file_is_old_or_new_when_the_disk_is_full_and_nothing_is_left_beside_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.txt"
    errors = []
    for error in failed_at_each_call(
        lambda: path.write_bytes(b"old"), lambda: write_atomically(path, b"new")
    ):
        errors.append(error)
        assert path.read_bytes() in (b"old", b"new")
        assert list(tmp_path.iterdir()) == [path]
    assert len(errors) >= 6
    assert all(isinstance(error, OSError) for error in errors)


def test_a_file_has_the_rights_that_the_umask_gives(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


OLD = {"a": b"old", "in/b": b"old"}
NEW = {"a": b"new", "in/c": b"new"}


def make(folder: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.fixture
def stage(tmp_path: Path) -> Callable[[], None]:
    def prepare() -> None:
        shutil.rmtree(tmp_path / ".old-stage", ignore_errors=True)
        make(tmp_path / "stage", OLD)
        make(tmp_path / ".tmp-stage", NEW)

    return prepare


def test_a_folder_replaced_is_whole_whenever_the_writer_is_killed(
    tmp_path: Path, stage: Callable[[], None]
) -> None:
    side, target, old = tmp_path / ".tmp-stage", tmp_path / "stage", tmp_path / ".old-stage"
    seen = []
    for _ in killed_at_each_call(stage, lambda: replace_folder(side, target)):
        seen.append(tree(target) if target.exists() else None)
        assert tree(target if target.exists() else old) in (OLD, NEW)
        make(side, NEW)
        replace_folder(side, target)
        assert tree(tmp_path) == {f"stage/{name}": data for name, data in NEW.items()}
    assert seen.count(None) == 1  # between the two renames
    assert OLD in seen
    assert NEW in seen


def test_a_folder_replaced_is_whole_when_the_disk_fails(
    tmp_path: Path, stage: Callable[[], None]
) -> None:
    target = tmp_path / "stage"
    for error in failed_at_each_call(
        stage, lambda: replace_folder(tmp_path / ".tmp-stage", target)
    ):
        assert tree(target) in (OLD, NEW)
        assert isinstance(error, OSError) or tree(target) == NEW


def test_the_next_call_after_a_kill_risks_nothing_either(
    tmp_path: Path, stage: Callable[[], None]
) -> None:
    target, old = tmp_path / "stage", tmp_path / ".old-stage"

    def between_the_renames() -> None:
        stage()
        target.rename(old)

    for _ in failed_at_each_call(
        between_the_renames, lambda: replace_folder(tmp_path / ".tmp-stage", target)
    ):
        assert tree(target if target.exists() else old) in (OLD, NEW)
    assert tree(target) == NEW
    assert not old.exists()


def test_a_folder_is_put_where_there_was_none(tmp_path: Path) -> None:
    make(tmp_path / ".tmp-stage", NEW)
    replace_folder(tmp_path / ".tmp-stage", tmp_path / "stage")
    assert tree(tmp_path / "stage") == NEW


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert sha256_file(tmp_path / "a") == expected


def test_tensors_are_written_as_they_look_and_not_as_they_lie(tmp_path: Path) -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    views = {
        "as is": x,
        "transposed": x.T,
        "strided": x[:, ::2, ::-1],
        "broadcast": np.broadcast_to(x[0], (5, 3, 4)),
    }
    views |= {"scalar": np.float32(7).reshape(()), "empty": x[:0], "big endian": x.astype(">f4")}
    write_tensors(tmp_path / "x.safetensors", views)
    loaded = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    for name, view in views.items():
        np.testing.assert_array_equal(loaded[name], view, err_msg=name, strict=name != "big endian")


def test_tensors_may_be_read_by_whom_the_umask_says(tmp_path: Path) -> None:
    folder = tmp_path / "made under the umask"
    folder.mkdir()
    write_tensors(folder / "x.safetensors", {"x": np.zeros(1)})
    (folder / "plain").touch()
    assert (folder / "x.safetensors").stat().st_mode == (folder / "plain").stat().st_mode


def test_tensors_that_cannot_be_written_are_an_oserror_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"none/x\.safetensors: .*No such file"):
        write_tensors(tmp_path / "none" / "x.safetensors", {"x": np.zeros(1)})


def test_a_folder_is_locked_until_the_other_process_dies(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from pipeline.files import lock\n"
    code += "with lock(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    folder = tmp_path / "runs" / "a"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError) as error, lock(folder):
            pass
        expected = (
            f"{folder}: in use by another run (pid {other.pid}); stop it or choose another folder"
        )
        assert str(error.value) == expected
        other.kill()
        other.wait()
    for _ in range(2):
        with lock(folder):
            assert (folder / ".lock").read_text() == f"{os.getpid()}\n"


def test_a_folder_that_cannot_be_made_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as error, lock(tmp_path / "file" / "run"):
        pass
    expected = (
        f"{tmp_path / 'file' / 'run'}: cannot be written: Not a directory; choose another folder"
    )
    assert str(error.value) == expected


def test_a_file_system_without_locks_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock(tmp_path):
        pass
    assert caplog.messages == [
        f"{tmp_path}: not locked, as its file system has no locks (Function not implemented): start one run only"
    ]


# Claims.


def test_one_of_all_that_ask_has_the_claim(tmp_path: Path) -> None:
    path = tmp_path / "new" / "made"
    with try_lock(path) as first:
        with try_lock(path) as second, try_lock(tmp_path / "other") as elsewhere:
            assert (first, second, elsewhere) == (True, False, True)
        with try_lock(path) as third:
            assert not third
    with try_lock(path) as again:
        assert again
    assert list(path.parent.iterdir()) == []


def test_a_claim_is_given_up_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), try_lock(tmp_path / "made"):
        raise ZeroDivisionError
    with try_lock(tmp_path / "made") as again:
        assert again


def test_one_that_waited_for_a_claim_that_went_asks_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the lock of a file that its holder has just removed, and another process may have made
    the next one.
    """
    flock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        (tmp_path / ".made.lock").unlink()
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with try_lock(tmp_path / "made") as mine:
        assert not mine


def test_without_locks_everyone_has_the_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work may then be done twice, and is still written whole."""

    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with try_lock(tmp_path / "made") as first, try_lock(tmp_path / "made") as second:
        assert first
        assert second


def test_a_claim_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"cannot be written \(.*\); name another folder, in data\.cache"
    ):
        try_lock(tmp_path / "file" / "made").__enter__()


def test_tensors_on_a_full_disk(tmp_path: Path) -> None:
    """The old file stays, nothing is left beside it, and the error says what to do."""
    path, calls = tmp_path / "a.safetensors", 0

    def put(value: float) -> None:
        write_tensors_atomically(path, {"a": np.full(4, value)}, {"fact": str(value)})

    for error in failed_at_each_call(lambda: put(0), lambda: put(1)):
        calls += 1
        assert list(tmp_path.iterdir()) == [path]
        assert isinstance(error, JobError)
        assert "cannot be written (No space left on device); the same command goes on" in str(error)
        assert safetensors.numpy.load_file(path)["a"][0] in (0, 1)
    assert calls > 4


def test_the_holder_of_a_folder(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    with lock(tmp_path):
        assert holder(tmp_path) == str(os.getpid())
    assert holder(tmp_path) is None
