"""The index of a shard: what a tar holds and where, so that any sample can be read by itself.

Training wants sample number i in any order; streaming a tar gives none of that. So each tar is read
once, all of it, and what was found is kept in `00000.index.safetensors` beside it or in a cache
folder: places, sizes and CRC-32 of each sample's files, width and height from the picture's header,
the texts themselves, which are small beside the pictures, and all that is wrong.
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
from pipeline.data.tar import ABSENT, Fault, scan
from pipeline.errors import JobError, UserError
from pipeline.files import try_lock, write_tensors_atomically

FORMAT = "2"  # since KEY.cls counts
FILES = ("image", "txt", "json")  # the columns of offset, size and crc32
TEXTS = ("key", "files", "txt", "json")  # the columns of ends
THREADS = 8  # that look at shards: they wait for disks and servers
MANY = 2**28  # bytes from which on shards are indexed by several processes
SPOT = (
    8  # samples whose checksums tell whether a shard that was copied or touched is still the same
)


@dataclass(frozen=True)
class Index:
    """The index of one shard in `path`; columns are read when they are asked for."""

    path: Path
    location: str  # of the shard
    stat: Stat  # of the shard when it was indexed
    num_samples: int
    faults: tuple[Fault, ...]
    digest: str  # SHA-256 of keys and texts
    content: str  # SHA-256 of all checksums

    def column(self, name: str) -> np.ndarray:
        """offset, size (bytes, -1 where there is no such file), crc32: (N, 3) by FILES; pixels: (N,
        2), width and height; caption_length: (N,), characters of KEY.txt; ends: (N, 4) by TEXTS;
        texts: bytes.
        """
        with safe_open(
            self.path, "numpy"
        ) as file:  # opened anew: ten thousand maps at once are too many
            return file.get_tensor(name)

    def texts(self, rows: np.ndarray) -> Iterator[dict[str, str]]:
        """Key, files, txt and json of some rows, which are in order."""
        if not len(rows):
            return
        begin, stop = (
            int(rows[0]),
            int(rows[-1]) + 1,
        )  # no more is read: a training batch asks row by row
        with safe_open(self.path, "numpy") as file:
            ends = file.get_slice("ends")[max(begin - 1, 0) : stop]
            first = int(ends[0, -1]) if begin else 0
            blob = file.get_slice("texts")[first : int(ends[-1, -1])].tobytes()
        ends = ends[begin > 0 :] - first
        starts = np.concatenate([[0], ends.ravel()])[:-1].reshape(ends.shape)
        for start, end in zip(
            starts[rows - begin].tolist(), ends[rows - begin].tolist(), strict=True
        ):
            yield {
                name: blob[a:b].decode(errors="surrogateescape")
                for name, a, b in zip(TEXTS, start, end, strict=True)
            }

    def fault(self, sources: Sources) -> str | None:
        """Why the shard is no longer the one that was indexed, or None.

        One that only looks touched (it was copied, say) is believed if a few samples in it have
        their checksums.
        """
        now = sources.stat(self.location)
        if now.size != self.stat.size:
            return f"has {now.size:,} bytes and had {self.stat.size:,} when it was indexed"
        if now.stamp == self.stat.stamp:
            return None
        rows = (
            np.unique(np.linspace(0, self.num_samples - 1, SPOT).astype(int))
            if self.num_samples
            else []
        )
        offsets, sizes, sums = (self.column(name)[rows] for name in ("offset", "size", "crc32"))
        for offset, size, crc32 in zip(offsets.ravel(), sizes.ravel(), sums.ravel(), strict=True):
            if (
                size > 0
                and zlib.crc32(sources.read(self.location, int(offset), int(size))) != crc32
            ):
                return f"has changed at byte {offset:,} since it was indexed"
        return None


def index_path(location: str, cache: Path | None) -> Path:
    """Where the index of a shard is, or is to be written: see `sidecar_path`."""
    return sidecar_path(location, "index", cache)


def sidecar_path(location: str, what: str, cache: Path | None) -> Path:
    """The file that keeps `what` of a shard: next to it, or in the cache folder, if there is one,
    unless it already lies next to it.

    In the cache, shards of one name in different folders are told apart by a digest of the whole
    location.
    """
    name = f"{location.rpartition('/')[2].removesuffix('.tar')}.{what}.safetensors"
    local = None if is_remote(location) else Path(location).with_name(name)
    if local and (cache is None or local.exists()):
        return local
    if cache is None:
        raise UserError(
            f"{location}: what is known of remote shards is kept in a folder: name one in data.cache"
        )
    return cache / "shards" / f"{hashlib.sha256(location.encode()).hexdigest()[:12]}-{name}"


def read_index(path: Path, location: str) -> Index | None:
    """The index in `path`, or None if it is not there or not whole."""
    try:
        with safe_open(path, "numpy") as file:
            facts = file.metadata()
        if facts["format"] != FORMAT:
            return None
        faults = tuple(Fault(*fault) for fault in json.loads(facts["faults"]))
        stat = Stat(int(facts["size"]), facts["stamp"])
        return Index(
            path, location, stat, int(facts["samples"]), faults, facts["digest"], facts["content"]
        )
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return None


def build(
    locations: Sequence[str],
    sources: Sources,
    cache: Path | None,
    workers: int,
    outdated: bool = False,
    progress: bool = True,
) -> None:
    """Writes the indexes that are missing or damaged and, if `outdated`, those that no longer fit
    their shards.

    In `workers` processes if there is much to read, and beside other jobs that do the same: none is
    written twice. UserError where the files cannot be written.
    """
    with ThreadPoolExecutor(THREADS) as threads:
        needed = threads.map(
            lambda location: needs_rebuild(location, sources, cache, outdated), locations
        )
        left = [location for location, need in zip(locations, needed, strict=True) if need]
        many = sum(stat.size for stat in threads.map(sources.stat, left)) > MANY
    one = partial(build_one, cache=cache, outdated=outdated)
    # New processes rather than forked ones: a caller may have threads (MindSpore's), which do not
    # survive a fork.
    pool = (
        ProcessPoolExecutor(workers, get_context("spawn"))
        if many and min(workers, len(left)) > 1
        else None
    )
    try:
        with (
            pool or nullcontext(),
            tqdm(total=len(left), unit="shard", disable=not (progress and left)) as bar,
        ):
            while left:
                others = []
                for each, done in zip(left, (pool.map if pool else map)(one, left), strict=True):
                    bar.update(done)
                    others += [] if done else [each]
                left = others
                time.sleep(1 if left else 0)  # another process has them; if it dies, they are ours
    except BrokenProcessPool:
        raise JobError(
            "a process that indexed shards was killed, for its memory perhaps; the same command goes on"
        ) from None


def needs_rebuild(location: str, sources: Sources, cache: Path | None, outdated: bool) -> bool:
    """Whether a shard's index has to be made: it is missing or damaged or, if that counts,
    `outdated`.
    """
    index = read_index(index_path(location, cache), location)
    return index is None or (outdated and index.fault(sources) is not None)


def build_one(location: str, cache: Path | None, outdated: bool) -> bool:
    """False if another process is at it."""
    path, sources = index_path(location, cache), Sources()
    with try_lock(path, fix="name another folder in data.cache") as mine:
        if (
            mine
            and needs_rebuild(location, sources, cache, outdated)
            and not reuse_index(sources, location, path)
        ):
            write_index(sources, location, path)
        return mine


def reuse_index(sources: Sources, location: str, path: Path) -> bool:
    """Takes the index that lies beside a shard, on its server say, if there is one that fits; it is
    dated anew.
    """
    data = sources.fetch(f"{location.removesuffix('.tar')}.index.safetensors")
    if data is None:
        return False
    with TemporaryDirectory(dir=path.parent) as folder:
        found = Path(folder) / path.name
        found.write_bytes(data)
        index = read_index(found, location)
        if index is None or index.fault(sources) is not None:
            return False
        with safe_open(found, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
            facts = {**file.metadata(), "stamp": sources.stat(location).stamp}
    write_tensors_atomically(path, arrays, facts)
    return True


def write_index(sources: Sources, location: str, path: Path) -> None:
    """Reads a shard from its first byte to its last and writes its index."""
    stat = sources.stat(location)
    with sources.open(location) as file:
        samples, faults = scan(file, stat.size)
    texts: list[bytes] = []
    for key, files in samples.items():
        made = (
            {"image"} if files.get("json", ABSENT).size >= 0 else {"image", "json"}
        )  # not files of the tar
        names = " ".join(name for name in files if name not in made)
        texts += [name.encode(errors="surrogateescape") for name in (key, names)]
        texts += [files.get(name, ABSENT).data for name in FILES[1:]]
    shape = (len(samples), len(FILES))
    found = [files.get(name, ABSENT) for files in samples.values() for name in FILES]
    blob = b"".join(texts)
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64).reshape(-1, len(TEXTS))
    captions = [len(files.get("txt", ABSENT).data.decode()) for files in samples.values()]
    arrays: dict[str, np.ndarray] = {
        "offset": np.array([file.offset for file in found], np.int64).reshape(shape),
        "size": np.array([file.size for file in found], np.int64).reshape(shape),
        "crc32": np.array([file.crc32 for file in found], np.uint32).reshape(shape),
        "pixels": np.array([file.pixels for file in found[:: len(FILES)]], np.uint32).reshape(
            -1, 2
        ),
        "caption_length": np.array(captions, np.int32),
        "ends": ends,
        "texts": np.frombuffer(blob, np.uint8),
    }
    facts = {
        "format": FORMAT,
        "size": str(stat.size),
        "stamp": stat.stamp,
        "samples": str(len(samples)),
        "faults": json.dumps(faults),
        "digest": hashlib.sha256(ends.tobytes() + blob).hexdigest(),
        "content": hashlib.sha256(arrays["crc32"].tobytes()).hexdigest(),
    }
    write_tensors_atomically(path, arrays, facts)
