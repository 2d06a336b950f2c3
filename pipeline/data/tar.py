"""What a shard holds, read from its first byte to its last, whatever has happened to it.

A shard is a plain tar as img2dataset writes it: the files of a sample share their name up to the
first dot, the key, and differ in what follows, `KEY.jpg` (or jpeg, png, webp), `KEY.txt` with a
caption and `KEY.json`. What is wrong has one outcome each:

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
    KEY.cls that is no number       the sample is left out; else the number counts as field `cls` of KEY.json
    no caption, or not UTF-8        a sample all the same; whether it needs one is the run's to say
    files of a sample apart         one sample, as if they were together
    KEY.a.jpg                       the key ends at the first dot, so `a.jpg` is no picture: left
                                    out, and the reason says so

`tarfile`, like WebDataset's own readers, takes a damaged header for the end and drops the rest in
silence.
"""

import json
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from pipeline.data.decode import BadImage, dimensions

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
BLOCK = 512  # bytes; all of a tar is made of blocks
MAX_IMAGE, MAX_TEXT = 2**28, 2**24  # bytes: larger files are a mistake or an attack
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


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


def caption(data: bytes) -> str:
    """KEY.txt as text; nothing if it is not UTF-8."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return ""


def scan(file: BinaryIO, size: int) -> tuple[dict[str, dict[str, File]], list[Fault]]:
    """The usable samples of a tar in the order of their first files, each as {"image", "txt",
    "json", file type: ...}, and all that is wrong.
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
            if kind in (*IMAGE_TYPES, "txt", "json", "cls"):
                files[kind] = read(file, member, kind)
        except ValueError as error:
            bad.setdefault(key, str(error))
    for key, files in samples.items():
        image = next((kind for kind in IMAGE_TYPES if kind in files), None)
        if image:
            files["image"] = files[image]
            if "cls" in files and key not in bad:
                label = {"cls": int(files["cls"].data)}
                json_file = files.get("json", ABSENT)
                files["json"] = json_file._replace(
                    data=json.dumps(json.loads(json_file.data or "{}") | label).encode()
                )
        elif key not in bad:
            dotted = (
                "; a key ends at the first dot of the name"
                if any("." in kind for kind in files)
                else ""
            )
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
    if kind == "cls" and not data.strip().isdigit():
        raise ValueError(f"its cls is {data[:20]!r}, no whole number from 0 on")
    return File(
        member.offset_data,
        member.size,
        zlib.crc32(data),
        caption(data).encode() if kind == "txt" else data,
    )


def walk(file: BinaryIO, size: int, faults: list[Fault]) -> Iterator[tarfile.TarInfo]:
    """The members of a tar. Bytes that belong to none and are not zero, and an early end, are added
    to `faults`.
    """
    start = end = 0  # of the part that tarfile is given; of what is accounted for
    while start < size:
        file.seek(start)
        try:
            # `ignore_zeros` is meant for tars joined by `cat`; with it tarfile looks on after what
            # is no header.
            with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                    if member.size < 0:
                        raise tarfile.ReadError(f"{member.size} bytes")
                    faults += gap(file, end, member.offset)
                    end = tar.offset
                    yield member
            break
        except (
            tarfile.TarError,
            ValueError,
            OverflowError,
        ):  # what a damaged extended header sets off
            start = max(start + BLOCK, end, file.tell() // BLOCK * BLOCK)
    if not end:
        file.seek(0)
        kind = COMPRESSED.get(file.read(2))
        reason = (
            f"compressed by {kind}: unpack it, samples are read by their place"
            if kind
            else "no tar with files"
        )
        faults[:] = [Fault("", reason if size else "empty", size)]
    elif end >= size:
        faults.append(Fault("", f"cut short at byte {size:,}"))
    else:
        faults += gap(file, end, size)


def gap(file: BinaryIO, start: int, end: int) -> list[Fault]:
    """The fault of the bytes between two members, or between the last one and the end, unless all
    are zero.
    """
    file.seek(start)
    while (position := file.tell()) < end:
        if any(file.read(min(end - position, 2**20))):
            return [Fault("", f"damaged from byte {start:,} to {end:,}", end - start)]
    return []
