"""Files that are whole or not there, whatever stops the writer: a kill, a full disk, a power cut.

The order is always the same: write beside the target, fsync what was written, rename over the
target (atomic within a file system), fsync the folder, which holds the name. What a crash leaves
behind starts with a dot and is never read.
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


def sync(path: Path) -> None:
    """Returns when the file, or the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256, read in pieces: the files are larger than a machine's memory is free."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place to write what then takes the place of `path`, which holds the old file or the new one
    at every moment. After an error, the old one.
    """
    side = path.with_name(
        f".tmp-{path.name}-{secrets.token_hex(4)}"
    )  # two writers must not share one
    try:
        yield side
        sync(side)
        side.replace(path)
    except BaseException:
        side.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """See `replacing`."""
    with replacing(path) as side:
        side.write_bytes(data)


def replace_folder(side: Path, target: Path) -> None:
    """Puts the complete folder `side`, from the same parent, in the place of `target`; one writer
    at a time.

    Folders cannot be renamed over one another, so for an instant neither is at `target`: a crash
    there leaves the old one as `.old-NAME`, and the next call starts by putting it back.
    """
    for path in sorted(side.rglob("*")):
        sync(path)
    sync(side)
    old = target.with_name(f".old-{target.name}")
    if old.exists() and not target.exists():
        old.rename(target)
    remove_folder(old)
    if target.exists():
        target.rename(old)
    try:
        side.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    sync(target.parent)
    remove_folder(old)


def remove_folder(path: Path) -> None:
    """Renamed first, so that half a folder is never taken for a whole one. What resists stays, with
    a warning.
    """
    if not path.exists():
        return
    try:
        if not path.name.startswith("."):
            path = path.rename(path.with_name(f".old-{path.name}"))
        shutil.rmtree(path)
    except OSError as error:
        log.warning("%s: cannot be removed: %s", path, error.strerror)


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], facts: Mapping[str, str] | None = None
) -> None:
    """A safetensors file, not yet synced, with `facts` as its metadata. OSError if it cannot be
    written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        # save_file takes an array's memory as it lies, so a transposed view would be written as if
        # it were not one.
        arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
        save_file(arrays, path, None if facts is None else dict(facts))
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from None
    path.chmod(
        0o666 & path.parent.stat().st_mode
    )  # save_file lets only the owner read; the folder knows the umask


def write_tensors_atomically(
    path: Path, tensors: Mapping[str, np.ndarray], facts: Mapping[str, str]
) -> None:
    """As `write_tensors`, see `replacing`. JobError if it cannot be written."""
    try:
        with replacing(path) as side:
            write_tensors(side, tensors, facts)
    except OSError as error:
        raise JobError(
            f"{path}: cannot be written ({error.strerror or error}); the same command goes on"
        ) from None


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Whether making `path` is this process's to do: True for one of all that ask at a time, over
    machines too if their file system has locks. A process that dies lets go.

    The lock is a hidden file beside `path`, which goes with the lock; so after one is got it has
    to be looked whether the file is still the one of that name. UserError if the folder, made if it
    is missing, cannot be written.
    """
    name = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); name another folder, in data.cache"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # no locks here: the work may be done twice, and is still written whole
            yield True
            return
        try:
            mine = os.path.samestat(os.fstat(descriptor), name.stat())
        except FileNotFoundError:
            mine = False
        try:
            yield mine
        finally:
            if mine:
                name.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Keeps `folder`, made if it is missing, to this process. However the process ends, the kernel
    then lets go.

    Each `name` is a lock of its own, for those who share the folder and each take a part of the
    work.

    UserError if another process has it, or if it cannot be written.
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
        pid = _pid(descriptor)
        os.close(descriptor)
        raise UserError(
            f"{folder}: in use by another run (pid {pid}); stop it or choose another folder"
        ) from None
    except OSError as error:  # some cluster file systems are mounted without locks
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


def holder(folder: Path, name: str = ".lock") -> str | None:
    """The process (its pid) that has `folder` by `lock`, if there is one that can be seen."""
    try:
        descriptor = os.open(folder / name, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _pid(descriptor)
    except OSError:  # a file system without locks
        return None
    finally:
        os.close(descriptor)
    return None


def _pid(descriptor: int) -> str:
    return os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
