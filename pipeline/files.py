"""Atomic writes and locks: a file or folder is complete or absent, whatever stops the writer (a
kill, a full disk, a power failure).

Every write takes the same steps: write beside the target under a temporary name, fsync what was
written, rename it over the target (atomic within a file system), fsync the parent folder, which
holds the name. What a crash leaves behind has a name that starts with a dot, and is never read.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from pipeline.errors import JobError, UserError

log = logging.getLogger("cascade")


# Atomic writes.


def fsync(path: Path) -> None:
    """Waits until the file's content, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256, read in blocks, as a file may be larger than the memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; on exit that file replaces `path`.

    At every moment `path` is the complete old file or the complete new one. After an exception it
    is the old one, and the temporary file is removed.
    """
    # A random suffix, so that two writers do not share a temporary file.
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")

    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

    fsync(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` to `path`, see `atomic_replace`."""
    with atomic_replace(path) as temporary:
        temporary.write_bytes(data)


def replace_folder(source: Path, target: Path) -> None:
    """Moves the complete folder `source` to `target`, of the same parent, replacing what is there.

    For one writer at a time. A folder cannot be renamed over another, so between two renames there
    is no `target`: a crash there leaves the old folder as `.old-NAME`, and the next call restores
    it before anything else.
    """
    for path in sorted(source.rglob("*")):
        fsync(path)
    fsync(source)

    # Finish what an earlier call left.
    old = target.with_name(f".old-{target.name}")
    if old.exists() and not target.exists():
        old.rename(target)
    remove_folder(old)

    if target.exists():
        target.rename(old)
    try:
        source.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise

    fsync(target.parent)
    remove_folder(old)


def remove_folder(path: Path) -> None:
    """Removes a folder if it exists; one that cannot be removed is a warning, not an error.

    It is renamed to `.old-NAME` first, so that a half-removed folder is never read.
    """
    if not path.exists():
        return

    try:
        if not path.name.startswith("."):
            path = path.rename(path.with_name(f".old-{path.name}"))
        shutil.rmtree(path)
    except OSError as error:
        log.warning("%s: cannot be removed: %s", path, error.strerror)


# Tensors.


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file; not atomic and not synced. OSError if it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        # save_file writes an array's memory in the order in which it is stored, which is wrong for
        # a transposed view.
        arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
        save_file(arrays, path, None if metadata is None else dict(metadata))
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None

    # save_file sets mode 0600. The folder's mode shows the umask.
    path.chmod(0o666 & path.parent.stat().st_mode)


def write_tensors_atomically(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes a safetensors file, see `atomic_replace`. JobError if it cannot be written."""
    try:
        with atomic_replace(path) as temporary:
            write_tensors(temporary, tensors, metadata)
    except OSError as error:
        reason = error.strerror or error
        raise JobError(
            f"{path}: cannot be written ({reason}); run the same command again to continue"
        ) from None


# Locks.


@contextlib.contextmanager
def try_lock(path: Path, fix: str = "choose another folder") -> Iterator[bool]:
    """Yields whether this process holds the lock for writing `path`, without waiting for it.

    At most one process holds it at a time, across machines too if their file system supports locks.
    It is released on exit, and when the process dies. The lock is a hidden file beside `path`,
    which is removed with the lock.

    Raises UserError if the parent folder, which is created if missing, cannot be written; `fix`
    ends the message.
    """
    lock_path = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); {fix}") from None

    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            # The file system has no locks: two processes may do the same work, and each still
            # writes atomically.
            yield True
            return

        # The previous holder may have removed the file between our open and our lock. Then another
        # process may have created and locked a new one, and this lock excludes nobody.
        try:
            acquired = os.path.samestat(os.fstat(descriptor), lock_path.stat())
        except FileNotFoundError:
            acquired = False

        try:
            yield acquired
        finally:
            if acquired:
                lock_path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Locks `folder`, which is created if missing, for this process until exit or its death.

    Processes that share the folder use a `name` each. Raises UserError if another process holds
    the lock, or if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written: {error.strerror}; choose another folder"
        ) from None

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = _read_pid(descriptor)
        os.close(descriptor)
        raise UserError(
            f"{folder}: in use by another run (pid {pid}); stop it or choose another folder"
        ) from None
    except OSError as error:
        # Some cluster file systems are mounted without locks.
        log.warning(
            "%s: not locked, as its file system has no locks (%s): start one run only",
            folder,
            error.strerror,
        )

    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def lock_holder(folder: Path, name: str = ".lock") -> str | None:
    """The pid of the process that holds `lock(folder, name)`; None if there is none, or if the file
    system has no locks.
    """
    try:
        descriptor = os.open(folder / name, os.O_RDONLY)
    except FileNotFoundError:
        return None

    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read_pid(descriptor)
    except OSError:
        return None
    finally:
        os.close(descriptor)

    return None


def _read_pid(descriptor: int) -> str:
    return os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
