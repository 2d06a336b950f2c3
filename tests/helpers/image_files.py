"""Encoded images for tests, valid and damaged; the same bytes in every run."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from pipeline.data.decode import DecodedImage


def html() -> bytes:
    """What a server sends instead of an image that was removed."""
    head = b"<head><title>404 Not Found</title></head>"
    return b"<!DOCTYPE html>\n<html>" + head + b"<body>Not Found</body></html>\n"


def chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG: length, type, content, checksum."""
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png(
    width: int,
    height: int,
    compressed: bytes,
    *,
    bits: int = 8,
    colours: int = 0,
    interlaced: bool = False,
) -> bytes:
    """A PNG with this content of IDAT; grey by default."""
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, interlaced)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", compressed) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def png_bomb(side: int = 30_000) -> bytes:
    """A valid black PNG, 30,000 x 30,000 in 0.9 MB, built quickly: its rows are one compressed
    piece, repeated.
    """
    piece = 1_000_000  # bytes before compression
    total = side * (side + 1)  # a row is a byte for the filter and its pixels, all zero

    flush = zlib.compressobj(9, wbits=-15)
    repeated = flush.compress(bytes(piece)) + flush.flush(zlib.Z_FULL_FLUSH)
    last = zlib.compressobj(9, wbits=-15)
    rest = last.compress(bytes(total % piece)) + last.flush()
    adler32 = struct.pack(">I", (total % 65521) << 16 | 1)
    return png(side, side, b"\x78\xda" + repeated * (total // piece) + rest + adler32)


def encoded(image: Image.Image | np.ndarray, kind: str, **options: object) -> bytes:
    """The file of an image, in a format of Pillow with its options."""
    file = io.BytesIO()
    pillow = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    pillow.save(file, kind, **options)
    return file.getvalue()


def quarters(height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 (height, width, 3): red, green over blue, yellow; different in each orientation."""
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

    components = b"".join(bytes([name, 0x11, 0]) for name in b"RGB")
    frame = struct.pack(">BHHB", 8, side, side, 3) + components
    table = b"\0" + bytes([1] + [0] * 15) + b"\0"
    scan = b"\3" + b"".join(bytes([name, 0]) for name in b"RGB") + b"\1\0\0"
    segments = segment(0xC3, frame) + segment(0xC4, table) + segment(0xDA, scan)
    return b"\xff\xd8" + segments + bytes(side * side * 3 // 8) + b"\xff\xd9"


def cmyk_jpeg(image: np.ndarray | None = None) -> bytes:
    """As Adobe writes it, inks inverted."""
    rgb = Image.fromarray(quarters() if image is None else image)
    return encoded(rgb.convert("CMYK"), "JPEG", quality=95)


def ycck_jpeg(image: np.ndarray | None = None) -> bytes:
    """A CMYK JPEG with the inks as YCbCr, whose Adobe marker has transform 2, YCCK."""
    # libjpeg: C = 255 - R and so on, and inks are stored inverted, as Pillow does on saving.
    inverted = 255 - (quarters() if image is None else image)
    ycc = 255 - np.asarray(Image.fromarray(inverted).convert("YCbCr"))
    planes = Image.fromarray(ycc).split()
    black = Image.new("L", planes[0].size)

    data = encoded(Image.merge("CMYK", (*planes, black)), "JPEG", quality=95)
    transform = data.index(b"Adobe") + 11
    return data[:transform] + b"\x02" + data[transform + 1 :]


def grey_jpeg(level: int = 90) -> bytes:
    """16 x 16 pixels of one level."""
    return encoded(Image.new("L", (16, 16), level), "JPEG")


def png16(levels: np.ndarray | None = None) -> bytes:
    """16-bit grey (H, W) or RGB (H, W, 3) from uint16."""
    if levels is None:
        levels = np.array([[0, 0x1234], [0x8000, 0xFFFF]], np.uint16)
    rows = levels.astype(">u2").reshape(len(levels), -1).view(np.uint8)
    data = zlib.compress(np.insert(rows, 0, 0, axis=1).tobytes())
    colours = 2 if levels.ndim == 3 else 0
    return png(levels.shape[1], len(levels), data, bits=16, colours=colours)


def rgba_png(colour: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    """16 x 16: the left half of this colour, the right half transparent black."""
    image = Image.new("RGBA", (16, 16), (*colour, 255))
    image.paste((0, 0, 0, 0), (8, 0, 16, 16))
    return encoded(image, "PNG")


def exif(orientation: int, order: str = "<") -> bytes:
    """An Exif block with an orientation and nothing else."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(f"{order}HHIHH", 0x112, 3, 1, orientation, 0)
    return b"Exif\0\0" + start + struct.pack(f"{order}IH", 8, 1) + entry + bytes(4)


def rotated_jpeg(orientation: int, image: np.ndarray | None = None) -> bytes:
    """An image stored as it is, with an orientation."""
    stored = quarters() if image is None else image
    return encoded(stored, "JPEG", quality=95, exif=exif(orientation))


def smooth(height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3): slow waves, different in each channel."""
    y, x = np.mgrid[:height, :width] / 200
    waves = [np.sin(3 * x + 2 * y), np.cos(4 * x - y), np.sin(2 * x * y)]
    return (127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB, of values in [0, 255]."""
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def decoded(image: np.ndarray) -> DecodedImage:
    """An upright image of these pixels."""
    return DecodedImage(image, *image.shape[:2])
