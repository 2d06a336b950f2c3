"""Pictures as they should not come, and some that should, as bytes: the same in every run."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from pipeline.data.decode import Picture


def html() -> bytes:
    """What a server sends for a picture that is gone."""
    return b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>Not Found</body></html>\n"


def chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG: length, kind, content, checksum."""
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(
    width: int,
    height: int,
    compressed: bytes,
    bits: int = 8,
    colours: int = 0,
    interlaced: bool = False,
) -> bytes:
    """A PNG, grey unless told, whose IDAT is taken as it is."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", compressed) + chunk(b"IEND", b"")


def png_bomb(side: int = 30_000) -> bytes:
    """A valid black PNG, 30,000 x 30,000 in 0.9 MB, made in no time: its rows are one compressed
    piece many times.
    """
    piece, total = (
        1_000_000,
        side * (side + 1),
    )  # a row is a filter's number and its pixels, all zero
    flush = zlib.compressobj(9, wbits=-15)
    repeated = flush.compress(bytes(piece)) + flush.flush(zlib.Z_FULL_FLUSH)
    last = zlib.compressobj(9, wbits=-15)
    rest = last.compress(bytes(total % piece)) + last.flush()
    adler32 = struct.pack(">I", (total % 65521) << 16 | 1)
    return png(side, side, b"\x78\xda" + repeated * (total // piece) + rest + adler32)


def encoded(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def quarters(height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 (height, width, 3): red, green over blue, yellow; every turn and mirroring of it is
    another picture.
    """
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2] = 220, 30, 40
    image[: height // 2, width // 2 :] = 20, 200, 60
    image[height // 2 :, : width // 2] = 30, 50, 210
    image[height // 2 :, width // 2 :] = 230, 220, 30
    return image


def lossless_jpeg(side: int) -> bytes:
    """Frame SOF3 (ITU-T T.81, annex H), three components of one colour: every difference is
    category 0, one bit.
    """

    def segment(marker: int, body: bytes) -> bytes:
        return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body

    frame = struct.pack(">BHHB", 8, side, side, 3) + b"".join(
        bytes([name, 0x11, 0]) for name in b"RGB"
    )
    table = b"\0" + bytes([1] + [0] * 15) + b"\0"
    scan = b"\3" + b"".join(bytes([name, 0]) for name in b"RGB") + b"\1\0\0"
    segments = segment(0xC3, frame) + segment(0xC4, table) + segment(0xDA, scan)
    return b"\xff\xd8" + segments + bytes(side * side * 3 // 8) + b"\xff\xd9"


def cmyk_jpeg(image: np.ndarray | None = None) -> bytes:
    """As Adobe writes it, inks inverted. (YCCK is the same in other axes: `ycck_jpeg`.)"""
    return encoded(
        Image.fromarray(quarters() if image is None else image).convert("CMYK"), "JPEG", quality=95
    )


def ycck_jpeg(image: np.ndarray | None = None) -> bytes:
    """The inks' three colours in the axes of YCbCr: a CMYK JPEG whose Adobe marker says 2, YCCK."""
    rgb = 255 - (
        quarters() if image is None else image
    )  # libjpeg: C = 255 - R and so on, and inks are stored inverted
    planes = Image.fromarray(
        255 - np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    ).split()  # Pillow inverts as it saves
    data = encoded(
        Image.merge("CMYK", (*planes, Image.new("L", planes[0].size))), "JPEG", quality=95
    )
    transform = data.index(b"Adobe") + 11
    return data[:transform] + b"\x02" + data[transform + 1 :]


def grey_jpeg(level: int = 90) -> bytes:
    return encoded(Image.new("L", (16, 16), level), "JPEG")


def png16(levels: np.ndarray | None = None) -> bytes:
    """16-bit grey (H, W) or RGB (H, W, 3) from uint16."""
    levels = np.array([[0, 0x1234], [0x8000, 0xFFFF]], np.uint16) if levels is None else levels
    rows = levels.astype(">u2").reshape(len(levels), -1).view(np.uint8)
    data = zlib.compress(np.insert(rows, 0, 0, axis=1).tobytes())
    return png(levels.shape[1], len(levels), data, bits=16, colours=2 if levels.ndim == 3 else 0)


def rgba_png(colour: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    """16 x 16: the left half of this colour, the right transparent black."""
    image = Image.new("RGBA", (16, 16), (*colour, 255))
    image.paste((0, 0, 0, 0), (8, 0, 16, 16))
    return encoded(image, "PNG")


def exif(orientation: int, order: str = "<") -> bytes:
    """An Exif block that says this and nothing else."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(f"{order}HHIHH", 0x112, 3, 1, orientation, 0)
    return b"Exif\0\0" + start + struct.pack(f"{order}IH", 8, 1) + entry + bytes(4)


def rotated_jpeg(orientation: int, image: np.ndarray | None = None) -> bytes:
    """A picture, stored as it is, that asks to be turned."""
    return encoded(
        quarters() if image is None else image, "JPEG", quality=95, exif=exif(orientation)
    )


def smooth(height, width):
    """A picture of slow waves, another in each channel."""
    y, x = np.mgrid[:height, :width] / 200
    waves = [np.sin(3 * x + 2 * y), np.cos(4 * x - y), np.sin(2 * x * y)]
    return (127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def picture(image):
    return Picture(image, *image.shape[:2])
