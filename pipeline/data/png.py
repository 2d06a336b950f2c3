"""What Pillow leaves open of PNG: a damaged animation, and pixels that are missing without a word.

A PNG is an 8-byte signature and then chunks (PNG specification, third edition, section 5.3)

    length: 4 bytes | kind: 4 | data: `length` bytes | checksum: 4

The IDAT chunks together are one zlib stream: for each row a byte that names its filter, and then
its pixels. An interlaced picture comes as seven smaller ones, by Adam7. An animation lies in chunks
of its own: acTL, fcTL, fdAT.
"""

import struct
import zlib

import numpy as np
from PIL.ImageFile import ImageFile

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


def still_png(data: bytes) -> bytes:
    """An animated PNG without its animation, of which Pillow warns where it is damaged."""
    place, kept = 8, [data[:8]]
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] not in (b"acTL", b"fcTL", b"fdAT"):
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def seems_short(image: ImageFile) -> bool:
    """Whether a row at the end is all zero, as Pillow leaves those for which a PNG's sound data did
    not suffice.
    """
    end = np.asarray(image.crop((0, max(0, image.height - 2), *image.size)))
    return "interlace" in image.info or not end.reshape(len(end), -1).any(axis=1).all()


def is_whole_png(data: bytes) -> bool:
    """Whether the compressed data have a byte for each that the header asks for. Counts them, and
    keeps none.
    """
    width, height, bits, colours, *_, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    bits *= {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colours]
    passes = [(-(-(height - y) // down), -(-(width - x) // across)) for x, y, across, down in ADAM7]
    missing = sum(
        rows * (1 + -(-columns * bits // 8))
        for rows, columns in (passes if interlaced else [(height, width)])
        if columns
    )
    place, inflate = 8, zlib.decompressobj()
    while place < len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        tail = data[place + 8 : end] if data.startswith(b"IDAT", place + 4) else b""
        while tail and missing > 0:
            missing -= len(inflate.decompress(tail, 2**16))
            tail = inflate.unconsumed_tail
        place = end + 4
    return missing <= 0
