"""Ranges of remote files on a local disk, so that what was read once is not fetched again.

Each range is a file of its own: the CRC-32 of the bytes, then the bytes. Its name is the SHA-256 of
what it is a range of and of which version, so that a file that has changed on its server is simply
not found here. Nothing is fsynced, and need not be: whatever a crash or a bad disk leaves fails its
CRC and is fetched again.

The folder is bounded, least recently used first (a file's time is that of its last use), by one
rule that keeps nothing in memory however many files there are: for every sixteenth of `limit` that
is written, look through the folder once and make room for it. A process alone thus stays within
`limit`, but for what its threads are writing at the moment, and looks at 16 files for each that it
writes. Processes that share a folder see each other's files whenever they look; in between, each
after the first may exceed `limit` by its sixteenth.
"""

import contextlib
import hashlib
import logging
import os
import secrets
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("cascade")
PARTS = 16  # of the limit; more of them bound several processes tighter and look more often
CRC = 4  # bytes


class RangeCache:
    """For any number of threads and processes. It never fails: on a full or broken disk it warns
    once and does less.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit  # bytes
        self._room = 0  # bytes that may be written before the folder is looked through
        self._lock = threading.Lock()
        self._warned = False

    def get(self, *key: str | int) -> bytes | None:
        """What was put under `key`, whole, or None."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(error)
            return None
        if len(data) <= CRC or zlib.crc32(memoryview(data)[CRC:]) != int.from_bytes(
            data[:CRC], "big"
        ):
            return None  # the next put replaces it
        with contextlib.suppress(
            OSError
        ):  # gone in between, or a folder to read only: the bytes are good
            os.utime(path, ns=(time.time_ns(),) * 2)
        return data[CRC:]

    def put(self, data: bytes, *key: str | int) -> None:
        """Keeps `data` for a later `get`, unless it exceeds the limit by itself."""
        path, size = self._path(key), len(data) + CRC
        if size > self.limit:
            return
        side = path.with_name(
            f".tmp-{secrets.token_hex(8)}"
        )  # what a kill leaves grows old and goes like the others
        try:
            self._make_room(size)
            path.parent.mkdir(parents=True, exist_ok=True)
            side.write_bytes(zlib.crc32(data).to_bytes(CRC, "big") + data)
            os.utime(
                side, ns=(time.time_ns(),) * 2
            )  # the kernel's own clock ticks too slowly to tell uses apart
            side.replace(path)
        except FileNotFoundError:  # somebody empties the folder
            return
        except OSError as error:
            self.limit = 0  # nothing more is put, as it would most likely fail again, slowly
            with contextlib.suppress(OSError):
                side.unlink(missing_ok=True)
            self._warn(error)

    def _path(self, key: tuple[str | int, ...]) -> Path:
        name = hashlib.sha256("\n".join(map(str, key)).encode()).hexdigest()
        return self.folder / name[:2] / name

    def _make_room(self, size: int) -> None:
        with self._lock:
            if size > self._room:
                room = max(size, self.limit // PARTS)
                files = sorted(self._files())
                excess = sum(size for _, size, _ in files) + room - self.limit
                for _, freed, path in files:
                    if excess <= 0:
                        break
                    Path(path).unlink(missing_ok=True)
                    excess -= freed
                self._room = room
            self._room -= size

    def _files(self) -> Iterator[tuple[int, int, str]]:
        """(time of the last use, bytes, path) of each file; only folders of our own making are
        looked into.
        """
        for number in range(256):
            with (
                contextlib.suppress(FileNotFoundError),
                os.scandir(self.folder / f"{number:02x}") as entries,
            ):
                for entry in entries:
                    with contextlib.suppress(
                        FileNotFoundError
                    ):  # another process is making room too
                        stat = entry.stat()
                        yield stat.st_mtime_ns, stat.st_size, entry.path

    def _warn(self, error: OSError) -> None:
        with self._lock:
            warned, self._warned = self._warned, True
        if not warned:
            log.warning(
                "%s: the cache of remote shards fails (%s); going on without",
                self.folder,
                error.strerror,
            )
