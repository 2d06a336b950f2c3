"""Captioned images in WebDataset tars, read by number.

A shard is a plain tar as img2dataset writes it: the files of a sample share their name up to the first dot and differ
in what follows, `KEY.jpg` (or jpeg, png, webp), `KEY.txt` with the caption and, if there is one, `KEY.json`. Training
wants sample number i, in any order, from any thread, and the same i after a restart; streaming a tar gives none of
that. So each tar is walked once, header by header, for the place of every sample, and a sample is then read by its
offset.

Nothing is lost in silence. A tar that ends early or turns into garbage is an error (`tarfile` just stops there, as do
WebDataset's own readers), and each sample that cannot be used is listed in `Shards.skipped`.
"""

import glob
import json
import os
import re
import tarfile
from bisect import bisect_right
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from pipeline.data.text_store import ShardCaptions
from pipeline.errors import UserError

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
BLOCK = 512  # bytes; all of a tar is made of blocks
SCAN_THREADS = 4  # overlap the waits for a slow disk; in Python more only get in each other's way


class Sample(NamedTuple):
    key: str
    image: bytes  # the file as it lies in the shard, not decoded
    caption: str  # never empty
    meta: dict[str, Any]  # KEY.json; empty if there is none


class Rejected(NamedTuple):
    shard: str
    key: str
    reason: str


Span = tuple[int, int]  # offset and size of a file in its tar, in bytes
NOWHERE: Span = (0, 0)


@dataclass(frozen=True)
class Shard:
    """The usable samples of one tar, in tar order; the same row of each column is one sample."""

    path: Path
    keys: tuple[str, ...]
    captions: tuple[str, ...]
    spans: np.ndarray  # int64 (rows, 4): offset and size of the image, then of KEY.json (size 0: none)


class Shards:
    """All usable samples of some tars, numbered from 0 in the order of the tars and, within a tar, of its files.

    Reading needs no lock: nothing changes after the scan, and each read opens the file for itself.
    """

    def __init__(self, shards: list[Shard], skipped: list[Rejected]) -> None:
        self.shards = shards
        self.skipped = skipped
        self._starts = [0, *accumulate(len(shard.keys) for shard in shards)]  # number of each shard's first sample

    @classmethod
    def open(cls, patterns: tuple[str, ...]) -> "Shards":
        """Scan the tars that `patterns` name: paths, with braces (`{00000..00127}.tar`) and `*` expanded.

        Raises UserError for a URL, a missing file, a `*` that matches nothing, a tar that is empty, cut short or not a
        tar, and if no sample is usable.
        """
        paths = expand(patterns)
        with ThreadPoolExecutor(SCAN_THREADS) as threads:
            scans = list(threads.map(_scan, paths))
        shards = cls([shard for shard, _ in scans], [reject for _, rejects in scans for reject in rejects])
        if not len(shards):
            shard, key, reason = shards.skipped[0]
            raise UserError(
                f"data.shards: none of the {len(shards.skipped)} samples can be used, the first, {shard}:{key}, "
                f"because it has {reason}; a sample is KEY.jpg (or {', '.join(IMAGE_TYPES[1:])}) beside KEY.txt"
            )
        return shards

    def __len__(self) -> int:
        return self._starts[-1]

    def location(self, i: int) -> tuple[int, int]:
        """(shard, row) of sample `i`: the place of its caption in `captions()[shard].captions[row]`."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard = bisect_right(self._starts, i) - 1
        return shard, i - self._starts[shard]

    def key(self, i: int) -> str:
        """How sample `i` is named in messages and logs: `00000.tar:KEY`."""
        shard, row = self.location(i)
        return f"{self.shards[shard].path.name}:{self.shards[shard].keys[row]}"

    def captions(self) -> list[ShardCaptions]:
        """Keys and captions shard by shard, for the text encoder."""
        return [ShardCaptions(path=shard.path, keys=shard.keys, captions=shard.captions) for shard in self.shards]

    def read(self, i: int) -> Sample:
        """Sample `i` from the disk. Raises UserError if its tar is gone or shorter than when it was scanned."""
        number, row = self.location(i)
        shard = self.shards[number]
        offset, size, meta_offset, meta_size = shard.spans[row].tolist()
        try:
            with shard.path.open("rb", buffering=0) as file:
                image, meta = _read(file, (offset, size)), _read(file, (meta_offset, meta_size))
        except OSError as error:
            raise UserError(f"{shard.path}: {error}, unlike at the start; put it back and start again") from error
        return Sample(shard.keys[row], image, shard.captions[row], json.loads(meta or b"{}"))


def expand(patterns: tuple[str, ...]) -> list[Path]:
    """The files that `patterns` name, in their order (those of a `*` sorted), all of them there and each named once."""
    from webdataset.shardlists import expand_urls  # late: webdataset imports torch where that is installed

    paths: list[Path] = []
    for pattern in patterns:
        try:
            names = expand_urls(pattern)
        except (ValueError, AssertionError) as error:  # unbalanced braces; ${NAME} without WDS_NAME in the environment
            raise UserError(f"data.shards: {pattern}: {error}; write it like {{00000..00127}}.tar") from error
        for name in names:
            if re.match(r"[A-Za-z][\w+.-]+:", name):
                raise UserError(
                    f"data.shards: {name}: a URL; only files can be read in any order, so copy it to a disk"
                )
            if any(sign in name for sign in "*?[") and not Path(name).exists():
                found = sorted(glob.glob(name))  # noqa: PTH207  (Path.glob takes no absolute pattern)
                if not found:
                    raise UserError(f"data.shards: {name}: matches no file (looked from {Path.cwd()})")
                paths += map(Path, found)
            elif not Path(name).is_file():
                what = "a folder; add /*.tar" if Path(name).is_dir() else f"no such file (looked from {Path.cwd()})"
                raise UserError(f"data.shards: {name}: {what}")
            else:
                paths.append(Path(name))
    if not paths:
        raise UserError("data.shards: empty; name the tars, for example shards/{00000..00127}.tar")
    for path, again in zip(sorted(paths), sorted(paths)[1:], strict=False):
        if path == again:
            raise UserError(f"data.shards: {path}: named twice, so that its samples would be seen twice; name it once")
    return paths


def _scan(path: Path) -> tuple[Shard, list[Rejected]]:
    """Walk one tar: its headers, captions and metadata, but no image."""
    keys, captions, spans, rejects = [], [], [], []
    try:
        with path.open("rb") as file:
            for key, files in _files_by_key(file, path).items():
                try:
                    caption, image, meta = _check(file, files)
                except ValueError as reason:
                    rejects.append(Rejected(str(path), key, str(reason)))
                else:
                    keys.append(key)
                    captions.append(caption)
                    spans.append((*image, *meta))
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{path}: cannot be read as a tar ({error}); write or copy it again") from error
    return Shard(path, tuple(keys), tuple(captions), np.array(spans, np.int64).reshape(-1, 4)), rejects


def _files_by_key(file: IO[bytes], path: Path) -> dict[str, dict[str, Span]]:
    """{key: {type: place}} of a tar, in the order in which the keys first appear."""
    samples: dict[str, dict[str, Span]] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            folder, slash, name = member.name.rpartition("/")
            stem, _, kind = name.partition(".")
            if not (member.isfile() and stem and kind):
                continue  # a folder, a hidden file
            files = samples.setdefault(folder + slash + stem, {})
            if kind.lower() in files:
                raise UserError(f"{path}: holds {member.name} twice; write it again")
            files[kind.lower()] = (member.offset_data, member.size)
        end = tar.offset
    # tarfile takes a broken header for the end of the tar. The true end is a block of zeros.
    if os.pread(file.fileno(), BLOCK, end) != bytes(BLOCK):
        raise tarfile.ReadError(f"cut short or damaged at byte {end} of {path.stat().st_size}")
    if not samples:
        raise tarfile.ReadError("no files in it")
    return samples


def _check(file: IO[bytes], files: dict[str, Span]) -> tuple[str, Span, Span]:
    """Caption, place of the image and place of the metadata of a sample, or ValueError with why it cannot be used."""
    image = next((files[kind] for kind in IMAGE_TYPES if kind in files), NOWHERE)
    if not image[1]:
        raise ValueError("no image")
    try:
        caption = _read(file, files.get("txt", NOWHERE)).decode("utf-8").strip()
    except UnicodeDecodeError:
        caption = ""
    if not caption:
        raise ValueError("no caption")
    meta = files.get("json", NOWHERE)
    with suppress(ValueError):
        if isinstance(json.loads(_read(file, meta) or b"{}"), dict):
            return caption, image, meta
    raise ValueError("metadata that is no JSON object")


def _read(file: IO[bytes], span: Span) -> bytes:
    offset, size = span
    data = os.pread(file.fileno(), size, offset) if size else b""
    if len(data) < size:
        raise OSError(f"ends before byte {offset + size}")
    return data
