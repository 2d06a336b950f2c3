"""Shards as they come, whole and damaged."""

import io
import tarfile
from collections.abc import Sequence

import numpy as np
from PIL import Image

BLOCK = 512
Members = Sequence[tuple[str, bytes]]


def jpeg(width: int = 12, height: int = 8, seed: int = 0) -> bytes:
    """Coarse noise: no two places of it look the same."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (3, 5, 3)).astype(np.uint8)
    Image.fromarray(noise).resize((width, height)).save(buffer, "JPEG")
    return buffer.getvalue()


def sample(key: str, seed: int = 0, **more: bytes) -> list[tuple[str, bytes]]:
    """The files of a sample; `more` by type instead of or beside jpg and txt."""
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
    member.type, member.linkname = kind, "/etc/passwd"
    return member


def headers(data: bytes) -> list[int]:
    """Where the members' headers are."""
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        return [member.offset for member in file.getmembers()]


def flipped(data: bytes, place: int, bit: int = 0) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def with_header(data: bytes, place: int, field: slice, value: bytes) -> bytes:
    """A field of the header at `place` changed, and the checksum put right."""
    header = bytearray(data[place : place + BLOCK])
    header[field] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:place] + bytes(header) + data[place + BLOCK :]
