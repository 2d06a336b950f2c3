"""Where the bytes of a shard come from: a disk, or a web server.

A location is a path or an `http:`/`https:` URL, and both are read in any order, from any thread.
Nothing else is spoken here: `pipe:` runs a program, and each of `s3:`, `gs:`, `hdfs:` wants a
client, an account and a way to fail of its own, while every object store speaks HTTP as well.
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
from pipeline.data.web import Stat, Web
from pipeline.errors import UserError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PIECE = 4 << 20  # bytes of a range when a file is read from end to end


def is_remote(location: str) -> bool:
    return re.match(r"https?://[^/?#]", location, re.IGNORECASE) is not None


def expand(patterns: tuple[str, ...]) -> list[str]:
    """The locations that `patterns` name, in their order (those of a `*` sorted), each once; local
    ones are there.

    UserError for a pattern that names nothing, a missing file, a URL of another kind than http,
    https and file.
    """
    from webdataset.shardlists import (
        expand_urls,
    )  # late: webdataset imports torch where that is installed

    locations: list[str] = []
    for pattern in patterns:
        try:
            names = expand_urls(pattern)
        except (
            ValueError,
            AssertionError,
        ) as error:  # unbalanced braces; ${NAME} without WDS_NAME in the environment
            raise UserError(
                f"data.shards: {pattern}: {error}; write it like {{00000..00127}}.tar"
            ) from error
        for name in names:
            if not is_remote(name):
                locations += _files(name)
            elif "*" in name:
                raise UserError(
                    f"data.shards: {name}: a server lists nothing; write the numbers as {{00000..00127}}"
                )
            else:
                locations.append(name)
    if not locations:
        raise UserError("data.shards: empty; name the tars, for example shards/{00000..00127}.tar")
    distinct(locations, "named twice")
    return locations


def distinct(locations: Sequence[str], fault: str) -> None:
    """UserError with this `fault` if two are the same."""
    ordered = sorted(
        location if is_remote(location) else str(Path(location)) for location in locations
    )
    for one, next_one in pairwise(ordered):
        if one == next_one:
            raise UserError(
                f"data.shards: {one}: {fault}, so that its samples would be seen twice; name it once"
            )


def _files(name: str) -> list[str]:
    """The files that a path, a `file:` URL or a pattern with `*` names."""
    scheme = re.match(r"[A-Za-z][\w+.-]+:", name)
    kind, path = (scheme[0].lower(), name) if scheme else ("", name)
    if kind == "file:":
        path = unquote(re.sub(r"^//(localhost)?(?=/)", "", name[len(kind) :], flags=re.IGNORECASE))
        if path.startswith("//"):
            raise UserError(
                f"data.shards: {name}: is on another host; write file:///PATH for a file here"
            )
    elif kind in ("http:", "https:"):
        raise UserError(f"data.shards: {name}: names no server; write {kind}//HOST/PATH")
    elif kind == "pipe:":
        raise UserError(
            f"data.shards: {name}: runs a program, which data may not; serve the tar by https or copy it"
        )
    elif kind:
        raise UserError(
            f"data.shards: {name}: {kind} is not read; serve the tar by https or copy it to a disk"
        )
    wild = any(sign in path for sign in "*?[") and not Path(path).exists()
    found = sorted(glob.glob(path)) if wild else [path]  # noqa: PTH207  (Path.glob takes no absolute pattern)
    if not found:
        raise UserError(f"data.shards: {name}: matches no file (looked from {Path.cwd()})")
    for path in found:
        if not Path(path).is_file():
            what = (
                "a folder; add /*.tar"
                if Path(path).is_dir()
                else f"no such file (looked from {Path.cwd()})"
            )
            raise UserError(f"data.shards: {path}: {what}")
    return found


class Sources:
    """Reads locations, from any thread. Ranges from servers are kept in the folder `cache`, of at
    most `limit` bytes.

    All methods raise UserError for what is not there or is refused, and JobError where a server
    stays away.
    """

    def __init__(self, cache: Path | None = None, limit: int = 0) -> None:
        self._cache = RangeCache(cache, limit) if cache and limit else None
        self._web = Web()

    def stat(self, location: str) -> Stat:
        """Size and version; of a remote location as first seen, and another one later is an error."""
        if is_remote(location):
            return self._web.stat(location)
        try:
            stat = Path(location).stat()
        except OSError as error:
            raise _unreadable(location, error) from error
        return Stat(stat.st_size, str(stat.st_mtime_ns))

    def read(self, location: str, offset: int, size: int) -> bytes:
        """Exactly the bytes [offset, offset + size)."""
        if not size:
            return b""
        if not is_remote(location):
            data = _pread(location, offset, size)
        elif self._cache and (
            stamp := self.stat(location).stamp
        ):  # without one, old bytes would pass for new ones
            key = (location, stamp, offset, size)
            data = self._cache.get(*key) or b""
            if not data and len(data := self._web.part(location, offset, size)) == size:
                self._cache.put(data, *key)
        else:
            data = self._web.part(location, offset, size)
        if len(data) < size:
            raise UserError(
                f"{location}: ends before byte {offset + size}, unlike before; put the whole file back"
            )
        return data

    def open(self, location: str) -> BinaryIO:
        """To read from end to end, seeking at will: in large pieces and not through the cache."""
        if is_remote(location):
            return io.BufferedReader(_Remote(self._web, location), PIECE)
        try:
            return Path(location).open("rb")
        except OSError as error:
            raise _unreadable(location, error) from error

    def fetch(self, location: str) -> bytes | None:
        """A small file as a whole; None if it is not there."""
        if is_remote(location):
            return self._web.fetch(location)
        try:
            return Path(location).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unreadable(location, error) from error


class _Remote(io.RawIOBase):
    """A file on a server as Python's buffered reader wants it: each `readinto` is one range, of a
    piece at most.
    """

    def __init__(self, web: Web, url: str) -> None:
        self._web, self._url, self._size, self._position = web, url, web.stat(url).size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        )
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        with memoryview(buffer) as view:
            size = min(len(view), PIECE, self._size - self._position)
            data = self._web.part(self._url, self._position, size) if size > 0 else b""
            view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def readall(self) -> bytes:  # inherited, it would ask for 8 KiB at a time
        return b"".join(iter(lambda: self.read(PIECE), b""))


def _pread(path: str, offset: int, size: int) -> bytes:
    # To keep descriptors open would save 4 us of the milliseconds that a picture takes, and run out
    # of them.
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
        f"{path}: cannot be read: {error.strerror}; see that it is there and may be read"
    )
