"""Shards for tests, valid and damaged, as bytes."""

import io
import tarfile
from collections.abc import Sequence

import numpy as np
from PIL import Image

BLOCK = 512  # bytes
Members = Sequence[tuple[str, bytes]]  # name and content


def jpeg(width: int = 12, height: int = 8, seed: int = 0) -> bytes:
    """Coarse noise, different at every position."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (3, 5, 3)).astype(np.uint8)
    Image.fromarray(noise).resize((width, height)).save(buffer, "JPEG")
    return buffer.getvalue()


def sample(key: str, seed: int = 0, **more: bytes) -> list[tuple[str, bytes]]:
    """The files of a sample: jpg and txt, replaced and extended by `more`."""
    files = {"jpg": jpeg(seed=seed), "txt": f"caption of {key}".encode()} | more
    return [(f"{key}.{kind}", data) for kind, data in files.items()]


def tar(members: Members, *links: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
        for link in links:
            file.addfile(link)
    return buffer.getvalue()


def link(name: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    member.linkname = "/etc/passwd"
    return member


def headers(data: bytes) -> list[int]:
    """The offsets of the members' headers."""
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        return [member.offset for member in file.getmembers()]


def flipped(data: bytes, offset: int, bit: int = 0) -> bytes:
    """With one bit changed."""
    return data[:offset] + bytes([data[offset] ^ 1 << bit]) + data[offset + 1 :]


def with_header(data: bytes, offset: int, field: slice, value: bytes) -> bytes:
    """With a field of the header at `offset` replaced, and the checksum corrected."""
    header = bytearray(data[offset : offset + BLOCK])
    header[field] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:offset] + bytes(header) + data[offset + BLOCK :]
