"""Bytes of shards on disks and web servers.

A location is a path or an `http:`/`https:` URL; both are read at any offset, from any thread. No
other scheme is supported: `pipe:` runs a program, and `s3:`, `gs:` and `hdfs:` each need a client,
an account and error handling of their own, while every object store speaks HTTP as well.
"""

import glob
import io
import os
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import unquote

from pipeline.data.cache import RangeCache
from pipeline.data.web import RetryPolicy, Stat, Web
from pipeline.errors import UserError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

READ_SIZE = 4 << 20  # bytes of a range when a file is read from end to end


def is_remote(location: str) -> bool:
    return re.match(r"https?://[^/?#]", location, re.IGNORECASE) is not None


def expand(patterns: tuple[str, ...]) -> list[str]:
    """The locations that `patterns` name, in this order (matches of a `*` sorted), each once; local
    files exist.

    UserError for a pattern without a match, a missing file, a repeated location, or a URL of
    another scheme than http, https and file.
    """
    # Imported here: webdataset imports torch where that is installed.
    from webdataset.shardlists import expand_urls

    locations: list[str] = []
    for pattern in patterns:
        try:
            names = expand_urls(pattern)
        # Unbalanced braces; ${NAME} without WDS_NAME in the environment.
        except (ValueError, AssertionError) as error:
            raise UserError(
                f"data.shards: {pattern}: {error}; write it like {{00000..00127}}.tar"
            ) from error

        for name in names:
            if not is_remote(name):
                locations += _local_files(name)
            elif "*" in name:
                raise UserError(
                    f"data.shards: {name}: * does not work on servers, which list no files; write "
                    "the numbers as {00000..00127}"
                )
            else:
                locations.append(name)

    if not locations:
        raise UserError("data.shards: empty; name the tars, for example shards/{00000..00127}.tar")
    check_unique(locations, f"named twice, {REPEATED}")
    return locations


REPEATED = "so its samples would be repeated; name it once"


def check_unique(locations: Sequence[str], fault: str) -> None:
    """UserError with this `fault`, which says what to do, if two locations are equal."""
    # ./a.tar and a.tar are the same file; URLs are compared as written.
    normalized = sorted(
        location if is_remote(location) else str(Path(location)) for location in locations
    )
    for location, following in pairwise(normalized):
        if location == following:
            raise UserError(f"data.shards: {location}: {fault}")


def _local_files(name: str) -> list[str]:
    """The files that a path, a `file:` URL or a pattern with `*` names."""
    path = _local_path(name)

    # A file may be named like a pattern. (Path.glob takes no absolute pattern.)
    is_pattern = any(sign in path for sign in "*?[") and not Path(path).exists()
    matches = sorted(glob.glob(path)) if is_pattern else [path]  # noqa: PTH207
    if not matches:
        raise UserError(f"data.shards: {name}: matches no file (searched from {Path.cwd()})")

    for match in matches:
        if Path(match).is_dir():
            raise UserError(f"data.shards: {match}: a folder; add /*.tar")
        if not Path(match).is_file():
            raise UserError(f"data.shards: {match}: no such file (searched from {Path.cwd()})")
    return matches


def _local_path(name: str) -> str:
    """`name` without `file:`. UserError for a URL of another scheme."""
    match = re.match(r"[A-Za-z][\w+.-]+:", name)
    if not match:
        return name

    scheme = match[0].lower()
    if scheme in ("http:", "https:"):
        raise UserError(f"data.shards: {name}: names no server; write {scheme}//HOST/PATH")
    if scheme == "pipe:":
        raise UserError(
            f"data.shards: {name}: runs a program, which is not allowed for data; serve the tar by "
            "https or copy it to a disk"
        )
    if scheme != "file:":
        raise UserError(
            f"data.shards: {name}: {scheme} is not supported; serve the tar by https or copy it to "
            "a disk"
        )

    # RFC 8089: file:/PATH, file:///PATH and file://localhost/PATH are local.
    rest = name[len(scheme) :]
    path = unquote(re.sub(r"^//(localhost)?(?=/)", "", rest, flags=re.IGNORECASE))
    if path.startswith("//"):
        raise UserError(
            f"data.shards: {name}: is on another host; write file:///PATH for a local file"
        )
    return path


class Sources:
    """Reads locations, from any thread. All methods raise UserError for a location that does not
    exist or is refused, and JobError if a server does not respond.

    Args:
        cache: folder for the ranges read from servers; None stores none.
        limit: of that folder, bytes.
        retry: how often requests are repeated.
    """

    def __init__(
        self, cache: Path | None = None, limit: int = 0, retry: RetryPolicy | None = None
    ) -> None:
        self._cache = RangeCache(cache, limit) if cache and limit else None
        self._web = Web(retry)

    def stat(self, location: str) -> Stat:
        """Size and version; of a remote location as in the first response, and a later difference
        is an error.
        """
        if is_remote(location):
            return self._web.stat(location)

        # The modification time stands for the version of a local file.
        try:
            stat = Path(location).stat()
        except OSError as error:
            raise _unreadable(location, error) from error
        return Stat(stat.st_size, str(stat.st_mtime_ns))

    def read(self, location: str, offset: int, size: int) -> bytes:
        """Exactly the bytes [offset, offset + size)."""
        if not size:
            return b""
        if is_remote(location):
            data = self._read_remote(location, offset, size)
        else:
            data = _pread(location, offset, size)

        # The offset comes from an index: the file was longer when it was indexed.
        if len(data) < size:
            raise UserError(
                f"{location}: ends before byte {offset + size}, though it was longer; restore the "
                "whole file"
            )
        return data

    def _read_remote(self, location: str, offset: int, size: int) -> bytes:
        # Without a version, old bytes would pass for new ones.
        version = self.stat(location).version if self._cache else ""
        if not self._cache or not version:
            return self._web.read_range(location, offset, size)

        key = (location, version, offset, size)
        cached = self._cache.get(*key)
        if cached:
            return cached

        # A short result is an error of the caller's, and no content to keep.
        data = self._web.read_range(location, offset, size)
        if len(data) == size:
            self._cache.put(data, *key)
        return data

    def open(self, location: str) -> BinaryIO:
        """To read from end to end, with seeks: in large ranges and not through the cache."""
        if is_remote(location):
            return io.BufferedReader(_RemoteFile(self._web, location), READ_SIZE)
        try:
            return Path(location).open("rb")
        except OSError as error:
            raise _unreadable(location, error) from error

    def fetch(self, location: str) -> bytes | None:
        """The whole of a small file; None if it does not exist."""
        if is_remote(location):
            return self._web.fetch(location)
        try:
            return Path(location).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unreadable(location, error) from error


class _RemoteFile(io.RawIOBase):
    """A file on a server for Python's buffered reader: each `readinto` is one range request of at
    most READ_SIZE bytes.
    """

    def __init__(self, web: Web, url: str) -> None:
        self._web = web
        self._url = url
        self._size = web.stat(url).size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}
        self._position = offset + origins[whence]
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        with memoryview(buffer) as view:
            # At the end of the file no request is made, as a range must not be empty.
            size = min(len(view), READ_SIZE, self._size - self._position)
            data = self._web.read_range(self._url, self._position, size) if size > 0 else b""
            view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def readall(self) -> bytes:
        # The inherited method would request 8 KiB at a time.
        return b"".join(iter(lambda: self.read(READ_SIZE), b""))


def _pread(path: str, offset: int, size: int) -> bytes:
    # Keeping descriptors open would save 4 us of the milliseconds that an image takes, and could
    # exceed the limit of open files.
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: OSError) -> UserError:
    return UserError(
        f"{path}: cannot be read: {error.strerror}; check that it exists and its permissions"
    )
