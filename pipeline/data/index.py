"""The index of a shard: the samples of a tar and their offsets, for random access.

Training reads sample i in any order, which a streamed tar does not allow. So each tar is read once
from end to end, and the result is stored in `00000.index.safetensors` next to it or in a cache
folder: offset, size and CRC-32 of each sample's files, width and height from the image's header,
the texts themselves, which are small compared with the images, and all faults.
"""

import hashlib
import json
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from pipeline.data.source import Sources, Stat, is_remote
from pipeline.data.tar import ABSENT, Fault, Sample, scan
from pipeline.errors import JobError, UserError
from pipeline.files import try_lock, write_tensors_atomically

FORMAT = "2"  # 2: KEY.cls becomes a field of KEY.json
FILES = ("image", "txt", "json")  # the columns of offset, size and crc32
TEXTS = ("key", "files", "txt", "json")  # the columns of ends
THREADS = 8  # that check shards: they wait for disks and servers
PARALLEL_BYTES = 2**28  # shards of this size in total are indexed by several processes
SPOT_CHECKS = 8  # samples whose checksums are compared when a shard has a new date


@dataclass(frozen=True)
class Index:
    """The index of one shard; columns are read from `path` on demand."""

    path: Path
    location: str  # of the shard
    stat: Stat  # of the shard when it was indexed
    num_samples: int
    faults: tuple[Fault, ...]
    digest: str  # SHA-256 of keys and texts
    content: str  # SHA-256 of all checksums

    def column(self, name: str) -> np.ndarray:
        """One column of N rows, one per sample.

        offset, size (bytes, -1 if there is no such file), crc32: (N, 3), by FILES
        pixels: (N, 2), width and height
        caption_length: (N,), characters of KEY.txt
        ends: (N, 4), by TEXTS, where each text ends in `texts`, bytes
        """
        # Opened for each read: ten thousand memory maps at once would exceed the system's limit.
        with safe_open(self.path, "numpy") as file:
            return file.get_tensor(name)

    def texts(self, rows: np.ndarray) -> Iterator[dict[str, str]]:
        """Key, files, txt and json of some rows, which are sorted."""
        blob, starts, ends = self._spans(rows)
        for row_starts, row_ends in zip(starts.tolist(), ends.tolist(), strict=True):
            yield {
                name: blob[start:end].decode(errors="surrogateescape")
                for name, start, end in zip(TEXTS, row_starts, row_ends, strict=True)
            }

    def keys(self, rows: np.ndarray) -> list[bytes]:
        """The keys of some rows, which are sorted."""
        blob, starts, ends = self._spans(rows)
        column = TEXTS.index("key")
        spans = zip(starts[:, column].tolist(), ends[:, column].tolist(), strict=True)
        return [blob[start:end] for start, end in spans]

    def _spans(self, rows: np.ndarray) -> tuple[bytes, np.ndarray, np.ndarray]:
        """The bytes that hold the texts of some rows, and where each of them starts and ends
        there, (N, 4) by TEXTS.
        """
        if not len(rows):
            return b"", np.zeros((0, len(TEXTS)), int), np.zeros((0, len(TEXTS)), int)
        # Only this range is read: a training batch asks for one row at a time.
        begin = int(rows[0])
        stop = int(rows[-1]) + 1
        with safe_open(self.path, "numpy") as file:
            # A text starts where the one before it ends, so the row before is read too.
            ends = file.get_slice("ends")[max(begin - 1, 0) : stop]
            first = int(ends[0, -1]) if begin else 0
            blob = file.get_slice("texts")[first : int(ends[-1, -1])].tobytes()

        ends = ends[begin > 0 :] - first
        starts = np.concatenate([[0], ends.ravel()])[:-1].reshape(ends.shape)
        chosen = rows - begin
        return blob, starts[chosen], ends[chosen]

    def fault(self, sources: Sources) -> str | None:
        """Why the shard is no longer the one that was indexed; None if it is.

        A shard of the same size with a new date (a copy, for example) is accepted if a few of its
        samples have their checksums.
        """
        now = sources.stat(self.location)
        if now.size != self.stat.size:
            return f"has {now.size:,} bytes and had {self.stat.size:,} when it was indexed"
        if now.version == self.stat.version or not self.num_samples:
            return None

        # The same size and another date: compare the bytes of a few samples.
        rows = np.unique(np.linspace(0, self.num_samples - 1, SPOT_CHECKS).astype(int))
        offsets, sizes, checksums = (
            self.column(name)[rows].ravel().tolist() for name in ("offset", "size", "crc32")
        )
        for offset, size, crc32 in zip(offsets, sizes, checksums, strict=True):
            if size > 0 and zlib.crc32(sources.read(self.location, offset, size)) != crc32:
                return f"has changed at byte {offset:,} since it was indexed"
        return None


def index_path(location: str, cache: Path | None) -> Path:
    """The file of a shard's index, see `sidecar_path`."""
    return sidecar_path(location, "index", cache)


def sidecar_path(location: str, name: str, cache: Path | None) -> Path:
    """The file `name` of a shard: next to it, or in the cache folder if there is one, unless the
    file already exists next to the shard.

    In the cache, a digest of the whole location separates shards of one name in different folders.
    UserError for a remote shard without a cache folder.
    """
    file_name = f"{location.rpartition('/')[2].removesuffix('.tar')}.{name}.safetensors"

    # A file next to the shard takes precedence over the cache: it may have come with the data set.
    local = None if is_remote(location) else Path(location).with_name(file_name)
    if local and (cache is None or local.exists()):
        return local
    if cache is None:
        raise UserError(
            f"{location}: indexes of remote shards need a folder: name one in data.cache"
        )

    digest = hashlib.sha256(location.encode()).hexdigest()[:12]
    return cache / "shards" / f"{digest}-{file_name}"


def read_index(path: Path, location: str) -> Index | None:
    """The index in `path`; None if it is missing, damaged or of another format."""
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata()
        if metadata["format"] != FORMAT:
            return None
        return Index(
            path=path,
            location=location,
            stat=Stat(int(metadata["size"]), metadata["stamp"]),
            num_samples=int(metadata["samples"]),
            faults=tuple(Fault(*fault) for fault in json.loads(metadata["faults"])),
            digest=metadata["digest"],
            content=metadata["content"],
        )
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return None


def build_indexes(
    locations: Sequence[str],
    sources: Sources,
    cache: Path | None,
    workers: int,
    *,
    rebuild_outdated: bool = False,
    progress: bool = True,
    parallel_bytes: int = PARALLEL_BYTES,
) -> None:
    """Writes the indexes that are missing or damaged and, with `rebuild_outdated`, those that no
    longer fit their shards.

    From `parallel_bytes` on, in `workers` processes. Other jobs may do the same at the same time:
    each index is written once. UserError if the files cannot be written.
    """

    def is_needed(location: str) -> bool:
        return needs_rebuild(location, sources, cache, rebuild_outdated)

    # Reading thousands of indexes, and asking servers for sizes, is slow one by one.
    with ThreadPoolExecutor(THREADS) as threads:
        needed = list(threads.map(is_needed, locations))
        pending = [location for location, need in zip(locations, needed, strict=True) if need]
        num_bytes = sum(stat.size for stat in threads.map(sources.stat, pending))

    build = partial(build_index, cache=cache, rebuild_outdated=rebuild_outdated)

    # Starting processes costs more than indexing a few small shards.
    parallel = num_bytes > parallel_bytes and min(workers, len(pending)) > 1
    # Spawned rather than forked: the caller may have threads (MindSpore's), which do not survive a
    # fork.
    pool = ProcessPoolExecutor(workers, get_context("spawn")) if parallel else None
    try:
        with (
            pool or nullcontext(),
            tqdm(total=len(pending), unit="shard", disable=not (progress and pending)) as bar,
        ):
            while pending:
                locked_by_others = []
                results = (pool.map if pool else map)(build, pending)
                for location, built in zip(pending, results, strict=True):
                    bar.update(built)
                    if not built:
                        locked_by_others.append(location)

                # Look again: should the other process die, these become ours.
                pending = locked_by_others
                time.sleep(1 if pending else 0)
    except BrokenProcessPool:
        raise JobError(
            "a process that indexed shards was killed, possibly for lack of memory; run the same "
            "command again to continue"
        ) from None


def needs_rebuild(
    location: str, sources: Sources, cache: Path | None, rebuild_outdated: bool
) -> bool:
    """Whether a shard's index is missing or damaged or, with `rebuild_outdated`, does not fit."""
    index = read_index(index_path(location, cache), location)
    return index is None or (rebuild_outdated and index.fault(sources) is not None)


def build_index(location: str, cache: Path | None, rebuild_outdated: bool) -> bool:
    """Writes a shard's index if that is needed. False if another process is writing it."""
    path = index_path(location, cache)
    sources = Sources()
    with try_lock(path, fix="name another folder in data.cache") as locked:
        if not locked:
            return False
        # Another process may have written it before the lock was acquired.
        needed = needs_rebuild(location, sources, cache, rebuild_outdated)
        if needed and not reuse_index(sources, location, path):
            write_index(sources, location, path)
        return True


def reuse_index(sources: Sources, location: str, path: Path) -> bool:
    """Copies the index next to a shard (on its server, for example) if there is one that fits, with
    the shard's present version.
    """
    data = sources.fetch(f"{location.removesuffix('.tar')}.index.safetensors")
    if data is None:
        return False

    # safetensors reads files only, and this one may not fit.
    with TemporaryDirectory(dir=path.parent) as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(data)
        index = read_index(copy, location)
        if index is None or index.fault(sources) is not None:
            return False
        with safe_open(copy, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            # With the present version, the next check does not read samples again.
            metadata = {**file.metadata(), "stamp": sources.stat(location).version}

    write_tensors_atomically(path, arrays, metadata)
    return True


def write_index(sources: Sources, location: str, path: Path) -> None:
    """Reads a shard from end to end and writes its index."""
    stat = sources.stat(location)
    with sources.open(location) as file:
        samples, faults = scan(file, stat.size)

    arrays = _index_arrays(samples)
    metadata = {
        "format": FORMAT,
        "size": str(stat.size),
        "stamp": stat.version,
        "samples": str(len(samples)),
        "faults": json.dumps(faults),
        "digest": hashlib.sha256(arrays["ends"].tobytes() + arrays["texts"].tobytes()).hexdigest(),
        "content": hashlib.sha256(arrays["crc32"].tobytes()).hexdigest(),
    }
    write_tensors_atomically(path, arrays, metadata)


def _index_arrays(samples: dict[str, Sample]) -> dict[str, np.ndarray]:
    """The columns of an index, see `Index.column`."""
    texts: list[bytes] = []
    for key, sample in samples.items():
        texts += _sample_texts(key, sample)
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64).reshape(-1, len(TEXTS))

    # A row of FILES for each sample, flat.
    files = [sample.get(name, ABSENT) for sample in samples.values() for name in FILES]

    shape = (len(samples), len(FILES))
    pixels = [file.pixels for file in files[:: len(FILES)]]
    caption_lengths = [len(sample.get("txt", ABSENT).data.decode()) for sample in samples.values()]
    return {
        "offset": np.array([file.offset for file in files], np.int64).reshape(shape),
        "size": np.array([file.size for file in files], np.int64).reshape(shape),
        "crc32": np.array([file.crc32 for file in files], np.uint32).reshape(shape),
        "pixels": np.array(pixels, np.uint32).reshape(-1, 2),
        "caption_length": np.array(caption_lengths, np.int32),
        "ends": ends,
        "texts": np.frombuffer(b"".join(texts), np.uint8),
    }


def _sample_texts(key: str, sample: Sample) -> list[bytes]:
    """By TEXTS: the key, the file types in the tar, KEY.txt and KEY.json."""
    # Entries that `scan` adds: the image under its second name, and a json with the class alone.
    added = {"image"} if sample.get("json", ABSENT).size >= 0 else {"image", "json"}
    file_types = " ".join(name for name in sample if name not in added)

    # tarfile decodes names that are not UTF-8 with surrogates.
    return [
        key.encode(errors="surrogateescape"),
        file_types.encode(errors="surrogateescape"),
        *(sample.get(name, ABSENT).data for name in FILES[1:]),
    ]
