"""Ranges of remote files on a local disk, so that each is fetched once.

Each range is a file: the CRC-32 of the bytes, then the bytes. Its name is the SHA-256 of the key
(location, version, offset, size), so a file that changed on its server is a miss. Nothing is
fsynced: whatever a crash or a bad disk leaves fails its CRC and is fetched again.

The size of the folder is limited; the least recently used files go first (a file's modification
time is that of its last use). No state is kept in memory: each time a sixteenth of `limit` has been
written, the folder is scanned and room is made for the next sixteenth. One process therefore stays
within `limit`, except for what its threads are writing at the moment, and looks at 16 files for
each that it writes. Processes that share a folder see each other's files at their scans; in
between, each process after the first may exceed `limit` by its sixteenth.
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
from typing import NamedTuple

log = logging.getLogger("cascade")

SCANS = 16  # per `limit` bytes written; more bound several processes tighter and cost more
CRC = 4  # bytes


class CachedFile(NamedTuple):
    """A file in the folder; sorts by last use."""

    last_used: int  # ns
    size: int  # bytes
    path: str


class RangeCache:
    """For any number of threads and processes. A full or broken disk is no error: one warning is
    logged, and nothing more is stored.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit  # bytes
        self._room = 0  # bytes that may be written before the next scan
        self._lock = threading.Lock()
        self._warned = False

    def get(self, *key: str | int) -> bytes | None:
        """The bytes stored under `key`; None if there are none or they are damaged."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(error)
            return None

        expected = int.from_bytes(data[:CRC], "big")
        if len(data) <= CRC or zlib.crc32(memoryview(data)[CRC:]) != expected:
            return None  # the next put replaces it

        # Fails if another process removed the file or the folder is read only; the bytes are valid.
        with contextlib.suppress(OSError):
            os.utime(path, ns=(time.time_ns(),) * 2)
        return data[CRC:]

    def put(self, data: bytes, *key: str | int) -> None:
        """Stores `data` for a later `get`, unless it alone exceeds the limit."""
        path = self._path(key)
        size = len(data) + CRC
        if size > self.limit:
            return

        # What a killed process leaves under this name grows old and is evicted like the others.
        temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
        try:
            self._make_room(size)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(zlib.crc32(data).to_bytes(CRC, "big") + data)
            # The kernel's own clock is too coarse to order uses.
            os.utime(temporary, ns=(time.time_ns(),) * 2)
            temporary.replace(path)
        except FileNotFoundError:  # another process empties the folder
            return
        except OSError as error:
            self.limit = 0  # no further puts: they would most likely fail too, slowly
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            self._warn(error)

    def _path(self, key: tuple[str | int, ...]) -> Path:
        # Subfolders by the first byte of the digest, so that no folder lists every range.
        name = hashlib.sha256("\n".join(map(str, key)).encode()).hexdigest()
        return self.folder / name[:2] / name

    def _make_room(self, size: int) -> None:
        """Reserves `size` bytes; evicts files if that needs a scan."""
        with self._lock:
            if size > self._room:
                room = max(size, self.limit // SCANS)
                self._evict(room)
                self._room = room
            self._room -= size

    def _evict(self, room: int) -> None:
        """Removes files, least recently used first, until `room` bytes are free."""
        files = sorted(self._files())
        # `room` counts as used: it is what the writes up to the next scan will take.
        excess = sum(file.size for file in files) + room - self.limit
        for file in files:
            if excess <= 0:
                break
            Path(file.path).unlink(missing_ok=True)
            excess -= file.size

    def _files(self) -> Iterator[CachedFile]:
        """All files in the subfolders that this class creates; other folders are not touched."""
        for prefix in range(256):
            subfolder = self.folder / f"{prefix:02x}"
            with contextlib.suppress(FileNotFoundError), os.scandir(subfolder) as entries:
                for entry in entries:
                    # Another process may be evicting files at the same time.
                    with contextlib.suppress(FileNotFoundError):
                        stat = entry.stat()
                        yield CachedFile(stat.st_mtime_ns, stat.st_size, entry.path)

    def _warn(self, error: OSError) -> None:
        with self._lock:
            warned = self._warned
            self._warned = True

        if not warned:
            log.warning(
                "%s: the cache of remote shards fails (%s); continuing without it",
                self.folder,
                error.strerror,
            )
