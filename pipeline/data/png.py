"""Two checks of PNG files that Pillow lacks: damaged animations, and missing pixels.

A PNG is an 8-byte signature and then chunks (PNG specification, third edition, section 5.3)

    length: 4 bytes | type: 4 | data: `length` bytes | checksum: 4

The IDAT chunks together are one zlib stream: for each row a byte for its filter, then its pixels.
An interlaced image is stored as seven smaller ones (Adam7). An animation has chunks of its own:
acTL, fcTL, fdAT.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL.ImageFile import ImageFile

SIGNATURE = 8  # bytes
ANIMATION = (b"acTL", b"fcTL", b"fdAT")
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
PIECE = 2**16  # bytes decompressed at a time

# The first column and row of each pass, and the steps to its next column and row.
ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)


class Chunk(NamedTuple):
    """A chunk by its place in the file."""

    type: bytes
    start: int  # of the length, bytes
    stop: int  # after the checksum

    @property
    def data(self) -> slice:
        return slice(self.start + 8, self.stop - 4)


def _chunks(data: bytes) -> Iterator[Chunk]:
    # Checksums are not verified here.
    start = SIGNATURE
    while start < len(data):
        stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
        yield Chunk(data[start + 4 : start + 8], start, stop)
        start = stop


def still_png(data: bytes) -> bytes:
    """An animated PNG without its animation: Pillow warns of damaged ones."""
    retained = [
        data[chunk.start : chunk.stop] for chunk in _chunks(data) if chunk.type not in ANIMATION
    ]
    return b"".join([data[:SIGNATURE], *retained])


def may_lack_pixels(image: ImageFile) -> bool:
    """Whether one of the last two rows is all zero, which Pillow leaves if the compressed data end
    early. Interlaced images may lack pixels anywhere.
    """
    last_rows = np.asarray(image.crop((0, max(0, image.height - 2), *image.size)))
    has_zero_row = not last_rows.reshape(len(last_rows), -1).any(axis=1).all()
    return "interlace" in image.info or has_zero_row


def is_complete_png(data: bytes) -> bool:
    """Whether the compressed data have as many bytes as the header requires. Counts them without
    storing them.
    """
    missing = _uncompressed_size(data)
    inflate = zlib.decompressobj()

    # In pieces, as a small chunk may decompress to gigabytes.
    for chunk in _chunks(data):
        remaining = data[chunk.data] if chunk.type == b"IDAT" else b""
        while remaining and missing > 0:
            missing -= len(inflate.decompress(remaining, PIECE))
            remaining = inflate.unconsumed_tail
    return missing <= 0


def _uncompressed_size(data: bytes) -> int:
    """Bytes of all rows with their filters."""
    width, height, depth, colour_type, _, _, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits = depth * CHANNELS[colour_type]

    # Rows are padded to whole bytes and start with a byte for their filter.
    if not interlaced:
        return height * (1 + _ceil_div(width * bits, 8))

    size = 0
    for x, y, step_x, step_y in ADAM7:
        columns = _ceil_div(width - x, step_x)
        rows = _ceil_div(height - y, step_y)
        # A pass without columns has no rows either, not even their filters.
        if columns:
            size += rows * (1 + _ceil_div(columns * bits, 8))
    return size


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
