"""Atomic writes and locks: the writer is stopped at every call to the operating system in turn."""

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
    lock,
    lock_holder,
    replace_folder,
    sha256_file,
    try_lock,
    write_atomically,
    write_tensors,
    write_tensors_atomically,
)

# Every access to the disk of the code under test goes through one of these functions.
CALLS = [
    (os, name)
    for name in ("open", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "chmod")
]
CALLS += [(io, "open"), (safetensors.numpy, "save_file")]
FINISHED = 3  # exit code of a child process that was not killed


@contextlib.contextmanager
def fault_at(number: int, fault: Callable[[], None]) -> Iterator[list[str]]:
    """Calls `fault` before the call with this number; yields the growing list of calls."""
    calls: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if len(calls) == number + 1:
                fault()
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in CALLS:
            patch.setattr(module, name, counted(name, getattr(module, name)))
        yield calls


def in_child(action: Callable[[], object]) -> int:
    """The exit code of a fork of this process that runs `action` and exits."""
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
    """Runs `prepare`, then `action` in a process that is killed before its n-th call; yields each
    n, until `action` finishes.
    """

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def run(number: int) -> None:
        with fault_at(number, die):
            action()

    for number in range(1000):
        prepare()
        code = in_child(lambda: run(number))  # noqa: B023
        assert code in (FINISHED, -signal.SIGKILL)
        yield number
        if code == FINISHED:
            return
    raise AssertionError("the action does not finish")


def failed_at_each_call(
    prepare: Callable[[], object], action: Callable[[], object]
) -> Iterator[Exception | None]:
    """The same with a full disk: yields the exception that `action` raised, or None if it raised
    none.
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
    raise AssertionError("the action does not finish")


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_killed_writer_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    contents = set()
    for _ in killed_at_each_call(
        lambda: path.write_bytes(b"old"), lambda: write_atomically(path, b"new")
    ):
        contents.add(path.read_bytes())

    assert contents == {b"old", b"new"}


def test_a_full_disk_leaves_the_old_or_the_new_file_and_no_temporary_file(
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


def test_a_file_has_the_mode_of_the_umask(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", b"")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


OLD = {"a": b"old", "sub/b": b"old"}
NEW = {"a": b"new", "sub/c": b"new"}


def write_tree(folder: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.fixture
def two_folders(tmp_path: Path) -> Callable[[], None]:
    def prepare() -> None:
        shutil.rmtree(tmp_path / ".old-stage", ignore_errors=True)
        write_tree(tmp_path / "stage", OLD)
        write_tree(tmp_path / ".tmp-stage", NEW)

    return prepare


def test_a_killed_writer_leaves_a_complete_folder(
    tmp_path: Path, two_folders: Callable[[], None]
) -> None:
    source = tmp_path / ".tmp-stage"
    target = tmp_path / "stage"
    old = tmp_path / ".old-stage"
    targets = []

    for _ in killed_at_each_call(two_folders, lambda: replace_folder(source, target)):
        targets.append(tree(target) if target.exists() else None)
        assert tree(target if target.exists() else old) in (OLD, NEW)
        write_tree(source, NEW)
        replace_folder(source, target)
        assert tree(tmp_path) == {f"stage/{name}": data for name, data in NEW.items()}

    assert targets.count(None) == 1  # between the two renames
    assert OLD in targets
    assert NEW in targets


def test_a_failing_disk_leaves_a_complete_folder(
    tmp_path: Path, two_folders: Callable[[], None]
) -> None:
    target = tmp_path / "stage"
    for error in failed_at_each_call(
        two_folders, lambda: replace_folder(tmp_path / ".tmp-stage", target)
    ):
        assert tree(target) in (OLD, NEW)
        assert isinstance(error, OSError) or tree(target) == NEW


def test_recovery_after_a_kill_is_safe_on_a_failing_disk(
    tmp_path: Path, two_folders: Callable[[], None]
) -> None:
    target, old = tmp_path / "stage", tmp_path / ".old-stage"

    def between_the_renames() -> None:
        two_folders()
        target.rename(old)

    for _ in failed_at_each_call(
        between_the_renames, lambda: replace_folder(tmp_path / ".tmp-stage", target)
    ):
        assert tree(target if target.exists() else old) in (OLD, NEW)
    assert tree(target) == NEW
    assert not old.exists()


def test_a_folder_is_moved_to_a_new_name(tmp_path: Path) -> None:
    write_tree(tmp_path / ".tmp-stage", NEW)
    replace_folder(tmp_path / ".tmp-stage", tmp_path / "stage")
    assert tree(tmp_path / "stage") == NEW


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_file(tmp_path / "a") == expected


def test_views_of_tensors_are_written_in_their_own_order(tmp_path: Path) -> None:
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


def test_a_tensor_file_has_the_mode_of_the_umask(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_tensors(folder / "x.safetensors", {"x": np.zeros(1)})
    (folder / "plain").touch()
    assert (folder / "x.safetensors").stat().st_mode == (folder / "plain").stat().st_mode


def test_tensors_that_cannot_be_written_raise_an_oserror_with_the_path(tmp_path: Path) -> None:
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


def test_a_folder_that_cannot_be_created_is_a_user_error(tmp_path: Path) -> None:
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
        f"{tmp_path}: not locked, as its file system has no locks (Function not implemented): "
        "start one run only"
    ]


# try_lock.


def test_only_one_caller_holds_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"

    with try_lock(path) as first:
        with try_lock(path) as second, try_lock(tmp_path / "other") as elsewhere:
            assert (first, second, elsewhere) == (True, False, True)
        with try_lock(path) as third:
            assert not third

    with try_lock(path) as again:
        assert again
    assert list(path.parent.iterdir()) == []


def test_an_exception_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), try_lock(tmp_path / "file"):
        raise ZeroDivisionError
    with try_lock(tmp_path / "file") as again:
        assert again


def test_a_lock_on_a_file_that_was_removed_is_not_acquired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The previous holder removed the file before our lock, and another process may have created a
    new one.
    """
    flock = fcntl.flock

    def remove_then_lock(descriptor: int, operation: int) -> None:
        (tmp_path / ".file.lock").unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_then_lock)
    with try_lock(tmp_path / "file") as acquired:
        assert not acquired


def test_without_file_locks_everyone_proceeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work may then be done twice, and is still written atomically."""

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with try_lock(tmp_path / "file") as first, try_lock(tmp_path / "file") as second:
        assert first
        assert second


def test_a_lock_that_cannot_be_created_ends_with_the_callers_fix(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "folder" / "locked"

    with pytest.raises(UserError) as error, try_lock(path, fix="name another folder in cache"):
        pass

    assert str(error.value) == (
        f"{path}: cannot be written (Not a directory); name another folder in cache"
    )


def test_tensors_on_a_full_disk(tmp_path: Path) -> None:
    """The old file stays, no temporary file is left, and the error names the fix."""
    path = tmp_path / "a.safetensors"
    calls = 0

    def write(value: float) -> None:
        write_tensors_atomically(path, {"a": np.full(4, value)}, {"value": str(value)})

    for error in failed_at_each_call(lambda: write(0), lambda: write(1)):
        calls += 1
        assert list(tmp_path.iterdir()) == [path]
        assert isinstance(error, JobError)
        assert str(error) == (
            f"{path}: cannot be written (No space left on device); "
            "run the same command again to continue"
        )
        assert safetensors.numpy.load_file(path)["a"][0] in (0, 1)

    assert calls > 4


def test_the_pid_of_the_process_that_holds_a_folder(tmp_path: Path) -> None:
    assert lock_holder(tmp_path) is None
    with lock(tmp_path):
        assert lock_holder(tmp_path) == str(os.getpid())
    assert lock_holder(tmp_path) is None
