"""A picture's file to pixels: its header's size, its upright side, and no more of a JPEG than is
wanted.

A file's type is told by its bytes, not by its name. What becomes of what crawls bring, each held by
a test:

    JPEG, PNG, WebP, GIF, BMP     RGB; embedded colour profiles are not applied
    Exif orientation              applied to JPEG, PNG and WebP, as browsers do (CSS `image-orientation: from-image`);
                                  damaged Exif, one after a PNG's pixels, and XMP's orientation count as none
    progressive JPEG              as baseline
    CMYK, YCCK JPEG               RGB; inks are taken as inverted, as Adobe writes them and readers assume
    grey                          three equal channels
    16 bits a channel             the upper 8
    palette, 1 bit                their colours
    alpha, a transparent colour   on white
    animated GIF, WebP, PNG       the first frame; of PNG the still picture
    cut short                     BadImage (a PNG, WebP, GIF or BMP may lack what follows its last pixel)
    flipped bits in a JPEG        BadImage, or another picture where the code stays a valid one
    PNG with pixels missing       BadImage; surplus ones are not read
    other types, HTML, nothing    BadImage
    no pixels, too many           BadImage, by the header: nothing of that size is allocated
"""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from pipeline.data.png import is_whole_png, seems_short, still_png

MAX_SIDE = 65_535  # of a JPEG
MAX_PIXELS = 89_000_000  # a larger header is a mistake or an attack: 270 MB decoded, and Pillow begins to warn
FORMATS = "JPEG, PNG, WEBP, GIF, BMP"  # what crawled files turn out to be; Pillow's others run more foreign code
NUM_SCALES = 8  # a JPEG can be decoded at 1/8, 2/8, ... of its size
STANDALONE = (
    b"\0",
    b"\1",
    *(bytes([0xD0 + n]) for n in range(8)),
)  # second bytes of markers without a length
SCALABLE = (
    0xC0,
    0xC1,
    0xC2,
)  # frames that can: baseline, extended, progressive. A lossless one would crash libjpeg


class BadImage(ValueError):
    """These bytes are no picture, a damaged one, or one too large; says which."""


class Picture(NamedTuple):
    """A decoded picture as its file stores it, not yet turned upright: turning is cheaper when it
    is small.

    The last row and column of a scaled decode are rounded up, so the picture ends within them, at
    `height` and `width`. (To take the 129 columns of 1025 px at 1/8 for 128.125 stretches it: 25 dB
    from the right 64 px instead of 39.)
    """

    pixels: np.ndarray  # uint8 (H, W, 3), RGB
    height: float
    width: float
    orientation: int = 1  # Exif's

    def upright(self) -> np.ndarray:
        """The pixels as they are to be seen."""
        return turned(self.pixels, self.orientation)


# Exif's orientations: which of the stored axes run backwards, and whether they are then exchanged
# (TIFF 6.0, tag 274).
UPSIDE_DOWN, MIRRORED, TRANSPOSED = (3, 4, 6, 7), (2, 3, 7, 8), (5, 6, 7, 8)


def turned(stored: np.ndarray, orientation: int) -> np.ndarray:
    seen = stored[
        :: -1 if orientation in UPSIDE_DOWN else 1, :: -1 if orientation in MIRRORED else 1
    ]
    return seen.swapaxes(0, 1) if orientation in TRANSPOSED else seen


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except BadImage:
        raise
    except (
        Exception
    ) as error:  # damaged bytes surface as almost anything: OSError, SyntaxError, struct.error, ...
        raise BadImage(
            f"cannot be decoded ({str(error).strip() or type(error).__name__})"
        ) from error


@_refusing()
def dimensions(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels of the picture in `data` as it is to be seen, by its header:
    nothing is decoded.

    Raises BadImage for what `decode` refuses by the header.
    """
    if _is_jpeg(data):
        height, width, _ = _jpeg_header(data)
        orientation = _jpeg_orientation(data)
    else:
        image = _open(data)
        (width, height), orientation = image.size, _orientation(image.info.get("exif", b""))
    return (height, width) if orientation in TRANSPOSED else (width, height)


@_refusing()
def decode(data: bytes, size: int) -> Picture:
    """The picture in `data`, with pixels enough for `crop_resize` to `size`. Raises BadImage.

    A JPEG is decoded at 1/8, 2/8 or 4/8 where its shorter side then has a whole multiple of `size`,
    or 7/4 of it: much cheaper than decoding 1024 pixels for 64. At these scales libjpeg-turbo's
    short transforms give the exact mean of each block of pixels (at 4:2:0 the chroma is decoded at
    twice the scale). At 3/8, 5/8, ... they cut off frequencies instead, and take longer than the
    whole: 203 against 330 pictures a second at 6/8 of 1024 px. Other formats are decoded whole.
    """
    if not _is_jpeg(data):
        image = _open(data)
        orientation = _orientation(image.info.get("exif", b""))
        if image.format == "PNG" and seems_short(image) and not is_whole_png(data):
            raise BadImage("its compressed data end before its last pixel")
        return Picture(np.asarray(_rgb(image)), image.height, image.width, orientation)
    height, width, colours = _jpeg_header(data)
    short = min(height, width)
    scale = next(
        (
            eighths / NUM_SCALES
            for eighths in (1, 2, 4)
            if _jpeg_frame(data) in SCALABLE
            and short >= NUM_SCALES
            and (short * eighths % (NUM_SCALES * size) == 0 or short * eighths >= 14 * size)
        ),
        1.0,
    )
    least = {"min_height": -int(-height * scale // 1), "min_width": -int(-width * scale // 1)}
    # Strict: a missing end or lost synchronisation would otherwise pass as a grey or smeared
    # region. (About one in four single flipped bits breaks the stream; the others make another
    # valid picture.)
    if colours in ("CMYK", "YCCK"):  # libjpeg-turbo does not turn inks into RGB
        inks = simplejpeg.decode_jpeg(data, "CMYK", strict=True, **least)
        pixels = np.asarray(
            Image.frombytes("CMYK", inks.shape[1::-1], inks.tobytes(), "raw", "CMYK;I").convert(
                "RGB"
            )
        )
    else:
        pixels = simplejpeg.decode_jpeg(data, strict=True, **least)
    return Picture(pixels, height * scale, width * scale, _jpeg_orientation(data))


def _check_size(height: int, width: int) -> None:
    if min(height, width) < 1 or max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise BadImage(
            f"{width} x {height} pixels; from 1 to {MAX_SIDE:,} a side and {MAX_PIXELS:,} in all are taken"
        )


def _is_jpeg(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8")


def _jpeg_header(data: bytes) -> tuple[int, int, str]:
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    _check_size(height, width)
    return height, width, colours


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(second byte of the marker, body) of each segment before the first scan, found as libjpeg
    finds them.
    """
    place = 2
    while (place := data.find(b"\xff", place)) >= 0:
        marker = data[place + 1 : place + 2]
        if marker == b"\xff":  # padding
            place += 1
            continue
        if marker in STANDALONE:
            place += 2
            continue
        if marker in (b"\xda", b"\xd9", b""):
            return
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        yield marker[0], data[place + 4 : end]
        place = end


def _jpeg_frame(data: bytes) -> int | None:
    """The marker SOFn of the frame: 0xC0 to 0xCF without DHT, JPG and DAC (ITU-T T.81, table B.1)."""
    markers = (marker for marker, _ in _jpeg_segments(data))
    return next(
        (
            marker
            for marker in markers
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)
        ),
        None,
    )


def _jpeg_orientation(data: bytes) -> int:
    """Of the first Exif segment."""
    bodies = (body for marker, body in _jpeg_segments(data) if marker == 0xE1)
    return next((_orientation(body) for body in bodies if body.startswith(b"Exif\0\0")), 1)


def _orientation(exif: bytes) -> int:
    """Tag 274 of an Exif block, a TIFF file of one directory; 1 where it has none or is damaged."""
    tiff = exif.removeprefix(b"Exif\0\0")
    try:
        order = {b"II*\0": "<", b"MM\0*": ">"}[tiff[:4]]
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (num,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(num):
            tag, kind, count, value = struct.unpack_from(
                f"{order}HHIH", tiff, start + 2 + 12 * entry
            )
            if tag == 274:
                return value if (kind, count) == (3, 1) and 1 <= value <= 8 else 1
    except (KeyError, struct.error):
        pass
    return 1


def _open(data: bytes) -> ImageFile:
    """A picture other than a JPEG, not yet decoded. Pillow's readers by name: `Image.open` warns of
    sizes.
    """
    file = io.BytesIO(data)
    image: ImageFile
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        animated = data.find(b"acTL", 0, data.find(b"IDAT")) >= 0
        image = PngImageFile(io.BytesIO(still_png(data)) if animated else file)
    elif data.startswith(b"RIFF") and data.startswith(b"WEBP", 8):
        image = WebPImageFile(file)
    elif data.startswith((b"GIF87a", b"GIF89a")):
        _check_size(*_gif_size(data))
        image = GifImageFile(file)
    elif data.startswith(b"BM"):
        image = BmpImageFile(file)
    else:
        raise BadImage(f"is none of {FORMATS}")
    _check_size(image.height, image.width)
    return image


def _gif_size(data: bytes) -> tuple[int, int]:
    """Height and width of a GIF's canvas, which grows to hold the first frame, as in Pillow, which
    warns of it.
    """
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    place = 13 + (3 * 2 ** (flags % 8 + 1) if flags & 0x80 else 0)
    while (
        data[place] == 0x21
    ):  # an extension: its kind, then blocks with their lengths, the last of length 0
        place += 2
        while data[place]:
            place += data[place] + 1
        place += 1
    left, top, columns, rows = struct.unpack_from("<4H", data, place + 1)
    return max(height, top + rows), max(width, left + columns)


def _rgb(image: ImageFile) -> Image.Image:
    if image.mode.startswith("I;16"):  # 16-bit grey, which Pillow would clip rather than scale
        levels = np.asarray(image)
        grey = np.where(levels == image.info.get("transparency", -1), 255, levels >> 8)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
