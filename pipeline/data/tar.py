"""The content of a shard, read from its first byte to its last, with all damage reported.

A shard is a plain tar as img2dataset writes it: the files of a sample share the part of their name
up to the first dot, the key, and differ in the rest, `KEY.jpg` (or jpeg, png, webp), `KEY.txt` with
a caption and `KEY.json`. Every kind of damage has a defined outcome:

    damaged header, garbage         a fault with its size; samples before and after it are used
    cut in a file, in a header or   a fault; samples before the cut are used
      between files, no end mark
    empty file, no tar, compressed  one fault, no samples
    no image, or HTML in its place, the sample is left out, with the reason
      or an image whose header
      shows that it is unusable
    a file twice, a link, a name    the sample is left out
      with .. or an absolute one
    KEY.json that is no object      the sample is left out
    KEY.cls that is no number       the sample is left out; a number becomes field `cls` of KEY.json
    no caption, or not UTF-8        a sample; the run's configuration decides whether it is used
    files of a sample apart         one sample, as if they were adjacent
    KEY.a.jpg                       the key ends at the first dot, so `a.jpg` is no image: left out,
                                    and the reason says so

`tarfile` alone, like WebDataset's readers, takes a damaged header for the end of the archive and
silently drops the rest.
"""

import json
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from pipeline.data.decode import BadImage, dimensions

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp")
BLOCK = 512  # bytes; a tar consists of blocks
MAX_IMAGE = 2**28  # bytes; a larger file is a mistake or an attack
MAX_TEXT = 2**24  # bytes
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class Fault(NamedTuple):
    """Damage of a sample, or of a range of the tar (then `key` is empty)."""

    key: str
    reason: str
    size: int = 0  # of the range, bytes


class SampleFile(NamedTuple):
    """One file of a sample."""

    offset: int  # in the tar, bytes
    size: int  # bytes; -1 if there is no such file
    crc32: int
    data: bytes  # of texts; empty for images
    pixels: tuple[int, int] = (0, 0)  # width and height of images


ABSENT = SampleFile(0, -1, 0, b"")

Sample = dict[str, SampleFile]  # by file type, and the image under "image" too


class ShardContent(NamedTuple):
    """What `scan` finds in a tar."""

    samples: dict[str, Sample]  # by key, in the order of their first files
    faults: list[Fault]


def decode_caption(data: bytes) -> str:
    """KEY.txt as text; empty if it is not UTF-8."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return ""


def scan(file: BinaryIO, size: int) -> ShardContent:
    """The usable samples of a tar of `size` bytes, and its faults."""
    samples: dict[str, Sample] = {}
    rejected: dict[str, str] = {}
    faults: list[Fault] = []

    for member in iter_members(file, size, faults):
        folder, slash, name = member.name.rpartition("/")
        stem, _, file_type = name.partition(".")
        file_type = file_type.lower()
        if member.isdir() or not (stem and file_type):
            continue  # a hidden file, or one without a type, belongs to no sample

        # Files of a sample may be anywhere in the tar.
        key = folder + slash + stem
        sample = samples.setdefault(key, {})
        try:
            if file_type in sample:
                raise ValueError(f"has {file_type} twice")
            # Before the checks: a second file of this type is a fault even if the first is bad.
            sample[file_type] = ABSENT
            sample[file_type] = check_member(file, size, member, file_type)
        except ValueError as error:
            rejected.setdefault(key, str(error))

    for key, sample in samples.items():
        if key not in rejected and (reason := complete(sample)):
            rejected[key] = reason

    faults += [Fault(key, reason) for key, reason in rejected.items()]
    usable = {key: sample for key, sample in samples.items() if key not in rejected}
    return ShardContent(usable, faults)


def complete(sample: Sample) -> str | None:
    """Adds "image" to a sample and the class of KEY.cls to its "json". The reason if it has no
    image.
    """
    image_type = next((file_type for file_type in IMAGE_TYPES if file_type in sample), None)
    if image_type is None:
        is_dotted = any("." in file_type for file_type in sample)
        hint = "; a key ends at the first dot of the name" if is_dotted else ""
        return f"no image ({', '.join(IMAGE_TYPES)}) among its {', '.join(sample)}{hint}"

    # The formats of IMAGE_TYPES in their order, should a sample have several.
    sample["image"] = sample[image_type]
    if "cls" in sample:
        json_file = sample.get("json", ABSENT)
        fields = json.loads(json_file.data or "{}") | {"cls": int(sample["cls"].data)}
        sample["json"] = json_file._replace(data=json.dumps(fields).encode())
    return None


def check_member(file: BinaryIO, size: int, member: tarfile.TarInfo, file_type: str) -> SampleFile:
    """A file of a sample, read if its type is used. ValueError if it is not allowed or damaged."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise ValueError("its name leads out of the archive")
    if not member.isfile():
        raise ValueError(f"its {file_type} is a link or a device, not a file")
    if member.offset_data + member.size > size:
        raise ValueError(f"its {file_type} is cut short by the end of the tar")
    if file_type in (*IMAGE_TYPES, "txt", "json", "cls"):
        return read_member(file, member, file_type)
    return ABSENT


def read_member(file: BinaryIO, member: tarfile.TarInfo, file_type: str) -> SampleFile:
    """A file of a sample. ValueError if its content does not fit its type."""
    is_image = file_type in IMAGE_TYPES
    limit = MAX_IMAGE if is_image else MAX_TEXT
    if member.size > limit:
        raise ValueError(f"its {file_type} has {member.size:,} bytes; the limit is {limit:,}")

    # The checksum is of the file as stored, the text is normalized.
    file.seek(member.offset_data)
    data = file.read(member.size)
    read = SampleFile(member.offset_data, member.size, zlib.crc32(data), data)

    if is_image:
        try:
            return read._replace(data=b"", pixels=dimensions(data))
        except BadImage as error:
            raise ValueError(f"its {file_type} {error}") from None

    if file_type == "json" and not _is_json_object(data):
        raise ValueError("its json is no JSON object")
    if file_type == "cls" and not data.strip().isdigit():
        raise ValueError(f"its cls is {data[:20]!r}, not an integer from 0 on")
    if file_type == "txt":
        return read._replace(data=decode_caption(data).encode())
    return read


def _is_json_object(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except ValueError:
        return False


def iter_members(file: BinaryIO, size: int, faults: list[Fault]) -> Iterator[tarfile.TarInfo]:
    """The members of a tar. Bytes that belong to none and are not zero, and an early end, are added
    to `faults`.
    """
    start = 0  # of the part that tarfile reads
    end = 0  # of the last member
    while start < size:
        file.seek(start)
        try:
            # `ignore_zeros` is meant for tars joined by `cat`; with it tarfile continues after
            # blocks that are no header.
            with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                    if member.size < 0:
                        raise tarfile.ReadError(f"{member.size} bytes")
                    faults += check_zeros(file, end, member.offset)
                    end = tar.offset
                    yield member
            break
        # Damaged extended headers raise all of these.
        except (tarfile.TarError, ValueError, OverflowError):
            start = max(start + BLOCK, end, file.tell() // BLOCK * BLOCK)

    if not end:
        faults[:] = [Fault("", _why_no_tar(file, size), size)]
    elif end >= size:
        faults.append(Fault("", f"cut short at byte {size:,}"))
    else:
        faults += check_zeros(file, end, size)


def _why_no_tar(file: BinaryIO, size: int) -> str:
    if not size:
        return "empty"
    file.seek(0)
    compression = COMPRESSED.get(file.read(2))
    if compression:
        return f"compressed by {compression}: decompress it, as samples are read at their offsets"
    return "no tar with files"


def check_zeros(file: BinaryIO, start: int, end: int) -> list[Fault]:
    """The fault of the bytes [start, end) between two members, or after the last; none if all are
    zero.
    """
    file.seek(start)
    while (position := file.tell()) < end:
        if any(file.read(min(end - position, 2**20))):
            return [Fault("", f"damaged from byte {start:,} to {end:,}", end - start)]
    return []
