"""The index of a shard: what a tar holds and where, so that any sample can be read by itself.

A shard is a plain tar as img2dataset writes it: the files of a sample share their name up to the first dot and differ
in what follows, `KEY.jpg` (or jpeg, png, webp), `KEY.txt` with a caption and `KEY.json`. Training wants sample number i
in any order; streaming a tar gives none of that. So each tar is read once, all of it, and what was found is kept in
`00000.index.safetensors` beside it or in a cache folder: places, sizes and CRC-32 of each sample's files, width and
height from the picture's header, and the texts themselves, which are small beside the pictures.

What is wrong is found here, and has one outcome each:

    damaged header, garbage         the stretch is a fault with its bytes; samples before and after it are used
    cut in a file, in a header or   the cut is a fault; samples before it are used
      between files, no end mark
    empty file, no tar, compressed  one fault, no samples
    no picture, or HTML in its      the sample is left out, with the reason
      place, or one that its header
      shows to be unusable
    a file twice, a link, a name    the sample is left out
      with .. or from the root
    KEY.json that is no object      the sample is left out
    no caption, or not UTF-8        indexed; whether a sample needs one is the run's to say
    files of a sample apart         one sample, as if they were together
    KEY.a.jpg                       the key ends at the first dot, so `a.jpg` is no picture: left out, and the reason
                                    says so

`tarfile`, like WebDataset's own readers, takes a damaged header for the end and drops the rest in silence.
"""

import hashlib
import json
import tarfile
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from pipeline.data.image import BadImage, dimensions
from pipeline.data.source import Sources, Stat, is_remote
from pipeline.errors import UserError
from pipeline.files import claim, write_tensors_atomically

FORMAT = "1"
IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
FILES = ("image", "txt", "json")  # the columns of offset, size and crc32
TEXTS = ("key", "files", "txt", "json")  # the columns of ends
BLOCK = 512  # bytes; all of a tar is made of blocks
MAX_IMAGE, MAX_TEXT = 2**28, 2**24  # bytes: larger files are a mistake or an attack
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
SPOT = 8  # samples whose checksums tell whether a shard that was copied or touched is still the same


class Fault(NamedTuple):
    """What is wrong with a sample, or with a stretch of the tar (then `key` is empty)."""

    key: str
    reason: str
    size: int = 0  # of a stretch, in bytes


class File(NamedTuple):
    offset: int
    size: int
    crc32: int
    data: bytes  # of texts
    pixels: tuple[int, int] = (0, 0)


ABSENT = File(0, -1, 0, b"")


@dataclass(frozen=True)
class Index:
    """The index of one shard in `path`; columns are read when they are asked for."""

    path: Path
    location: str  # of the shard
    stat: Stat  # of the shard when it was indexed
    num_samples: int
    faults: tuple[Fault, ...]
    digest: str  # SHA-256 of keys and texts

    def column(self, name: str) -> np.ndarray:
        """offset, size (bytes, -1 where there is no such file), crc32: (N, 3) by FILES; pixels: (N, 2), width and
        height; caption_length: (N,), characters of KEY.txt; ends: (N, 4) by TEXTS; texts: bytes.
        """
        with safe_open(self.path, "numpy") as file:  # opened anew: ten thousand maps at once are too many
            return file.get_tensor(name)

    def texts(self, rows: np.ndarray) -> Iterator[dict[str, str]]:
        """Key, files, txt and json of some rows, which are in order."""
        if not len(rows):
            return
        ends = self.column("ends")
        starts = np.concatenate([[0], ends.ravel()])[:-1].reshape(ends.shape)
        first, last = int(starts[rows[0], 0]), int(ends[rows[-1], -1])
        with safe_open(self.path, "numpy") as file:
            blob = file.get_slice("texts")[first:last].tobytes()
        for start, end in zip((starts[rows] - first).tolist(), (ends[rows] - first).tolist(), strict=True):
            yield {
                name: blob[a:b].decode(errors="surrogateescape") for name, a, b in zip(TEXTS, start, end, strict=True)
            }

    def fault(self, sources: Sources) -> str | None:
        """Why the shard is no longer the one that was indexed, or None.

        One that only looks touched (it was copied, say) is believed if a few samples in it have their checksums.
        """
        now = sources.stat(self.location)
        if now.size != self.stat.size:
            return f"has {now.size:,} bytes and had {self.stat.size:,} when it was indexed"
        if now.stamp == self.stat.stamp:
            return None
        rows = np.unique(np.linspace(0, self.num_samples - 1, SPOT).astype(int)) if self.num_samples else []
        offsets, sizes, sums = (self.column(name)[rows] for name in ("offset", "size", "crc32"))
        for offset, size, crc32 in zip(offsets.ravel(), sizes.ravel(), sums.ravel(), strict=True):
            if size > 0 and zlib.crc32(sources.read(self.location, int(offset), int(size))) != crc32:
                return f"has changed at byte {offset:,} since it was indexed"
        return None


def index_path(location: str, cache: Path | None) -> Path:
    """Where the index of a shard is, or is to be written: see `beside`."""
    return beside(location, "index", cache)


def beside(location: str, what: str, cache: Path | None) -> Path:
    """The file that keeps `what` of a shard: next to it, or in the cache folder, if there is one, unless it already
    lies next to it.

    In the cache, shards of one name in different folders are told apart by a digest of the whole location.
    """
    name = f"{location.rpartition('/')[2].removesuffix('.tar')}.{what}.safetensors"
    local = None if is_remote(location) else Path(location).with_name(name)
    if local and (cache is None or local.exists()):
        return local
    if cache is None:
        raise UserError(f"{location}: what is known of a remote shard needs a folder; set data.cache")
    return cache / "shards" / f"{hashlib.sha256(location.encode()).hexdigest()[:12]}-{name}"


def read_index(path: Path, location: str) -> Index | None:
    """The index in `path`, or None if it is not there or not whole."""
    try:
        with safe_open(path, "numpy") as file:
            facts = file.metadata() or {}
    except (SafetensorError, OSError):
        return None
    if facts.get("format") != FORMAT:
        return None
    faults = tuple(Fault(*fault) for fault in json.loads(facts["faults"]))
    stat = Stat(int(facts["size"]), facts["stamp"])
    return Index(path, location, stat, int(facts["samples"]), faults, facts["digest"])


def build(
    locations: Sequence[str], cache: Path | None, workers: int, outdated: bool = False, progress: bool = True
) -> None:
    """Writes the indexes that are missing or damaged and, if `outdated`, those that no longer fit their shards.

    In `workers` processes, and beside other jobs that do the same: none is written twice. UserError where the files
    cannot be written.
    """
    sources = Sources()
    left = [location for location in locations if unfit(location, sources, cache, outdated)]
    one = partial(build_one, cache=cache, outdated=outdated)
    # New processes rather than forked ones: a caller may have threads (MindSpore's), which do not survive a fork.
    pool = ProcessPoolExecutor(workers, get_context("spawn")) if min(workers, len(left)) > 1 else None
    with pool or nullcontext(), tqdm(total=len(left), unit="shard", disable=not (progress and left)) as bar:
        while left:
            others = []
            for each, done in zip(left, (pool.map if pool else map)(one, left), strict=True):
                bar.update(done)
                others += [] if done else [each]
            left = others
            time.sleep(1 if left else 0)  # another process has them; if it dies, they are ours


def unfit(location: str, sources: Sources, cache: Path | None, outdated: bool) -> bool:
    """Whether a shard's index has to be made: it is missing or damaged or, if that counts, `outdated`."""
    index = read_index(index_path(location, cache), location)
    return index is None or (outdated and index.fault(sources) is not None)


def build_one(location: str, cache: Path | None, outdated: bool) -> bool:
    """False if another process is at it."""
    path = index_path(location, cache)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with claim(path) as mine:
            if mine and unfit(location, sources := Sources(), cache, outdated):
                write_index(sources, location, path)
            return mine
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name another folder in data.cache") from None


def write_index(sources: Sources, location: str, path: Path) -> None:
    """Reads a shard from its first byte to its last and writes its index."""
    stat = sources.stat(location)
    with sources.open(location) as file:
        samples, faults = scan(file, stat.size)
    texts: list[bytes] = []
    for key, files in samples.items():
        names = " ".join(name for name in files if name != "image")
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
        "pixels": np.array([file.pixels for file in found[:: len(FILES)]], np.uint32).reshape(-1, 2),
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
    }
    write_tensors_atomically(path, arrays, facts)


def caption(data: bytes) -> str:
    """KEY.txt as text; nothing if it is not UTF-8."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return ""


def scan(file: BinaryIO, size: int) -> tuple[dict[str, dict[str, File]], list[Fault]]:
    """The usable samples of a tar in the order of their first files, each as {"image", "txt", "json", file type: ...},
    and all that is wrong.
    """
    samples: dict[str, dict[str, File]] = {}
    bad: dict[str, str] = {}
    faults: list[Fault] = []
    for member in walk(file, size, faults):
        folder, slash, name = member.name.rpartition("/")
        stem, _, kind = name.partition(".")
        key, kind = folder + slash + stem, kind.lower()
        if member.isdir() or not (stem and kind):
            continue  # a hidden file, or one without a type, belongs to no sample
        files = samples.setdefault(key, {})
        try:
            if kind in files:
                raise ValueError(f"holds {kind} twice")
            files[kind] = ABSENT
            if member.name.startswith("/") or ".." in member.name.split("/"):
                raise ValueError("its name leads out of the archive")
            if not member.isfile():
                raise ValueError(f"its {kind} is a link or a device, not a file")
            if member.offset_data + member.size > size:
                raise ValueError(f"its {kind} is cut short by the end of the tar")
            if kind in (*IMAGE_TYPES, "txt", "json"):
                files[kind] = read(file, member, kind)
        except ValueError as error:
            bad.setdefault(key, str(error))
    for key, files in samples.items():
        image = next((kind for kind in IMAGE_TYPES if kind in files), None)
        if image:
            files["image"] = files[image]
        elif key not in bad:
            dotted = "; a key ends at the first dot of the name" if any("." in kind for kind in files) else ""
            bad[key] = f"no picture ({', '.join(IMAGE_TYPES)}) among its {', '.join(files)}{dotted}"
    faults += [Fault(key, reason) for key, reason in bad.items()]
    return {key: files for key, files in samples.items() if key not in bad}, faults


def read(file: BinaryIO, member: tarfile.TarInfo, kind: str) -> File:
    """A file of a sample. ValueError if it cannot be one."""
    is_image = kind in IMAGE_TYPES
    if member.size > (limit := MAX_IMAGE if is_image else MAX_TEXT):
        raise ValueError(f"its {kind} has {member.size:,} bytes; up to {limit:,} are taken")
    file.seek(member.offset_data)
    data = file.read(member.size)
    if is_image:
        try:
            pixels = dimensions(data)
        except BadImage as error:
            raise ValueError(f"its {kind} {error}") from None
        return File(member.offset_data, member.size, zlib.crc32(data), b"", pixels)
    if kind == "json":
        try:
            meta = json.loads(data)
        except ValueError:
            meta = None
        if not isinstance(meta, dict):
            raise ValueError("its json is no JSON object")
    return File(member.offset_data, member.size, zlib.crc32(data), caption(data).encode() if kind == "txt" else data)


def walk(file: BinaryIO, size: int, faults: list[Fault]) -> Iterator[tarfile.TarInfo]:
    """The members of a tar. Bytes that belong to none and are not zero, and an early end, are added to `faults`."""
    start = end = 0  # of the part that tarfile is given; of what is accounted for
    while start < size:
        file.seek(start)
        try:
            # `ignore_zeros` is meant for tars joined by `cat`; with it tarfile looks on after what is no header.
            with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                    if member.size < 0:
                        raise tarfile.ReadError(f"{member.size} bytes")
                    faults += gap(file, end, member.offset)
                    end = tar.offset
                    yield member
            break
        except (tarfile.TarError, ValueError, OverflowError):  # what a damaged extended header sets off
            start = max(start + BLOCK, end, file.tell() // BLOCK * BLOCK)
    if not end:
        file.seek(0)
        kind = COMPRESSED.get(file.read(2))
        reason = f"compressed by {kind}: unpack it, samples are read by their place" if kind else "no tar with files"
        faults[:] = [Fault("", reason if size else "empty", size)]
    elif end >= size:
        faults.append(Fault("", f"cut short at byte {size:,}"))
    else:
        faults += gap(file, end, size)


def gap(file: BinaryIO, start: int, end: int) -> list[Fault]:
    """The fault of the bytes between two members, or between the last one and the end, unless all are zero."""
    file.seek(start)
    while (position := file.tell()) < end:
        if any(file.read(min(end - position, 2**20))):
            return [Fault("", f"damaged from byte {start:,} to {end:,}", end - start)]
    return []
