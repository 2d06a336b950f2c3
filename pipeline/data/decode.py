"""Image files to pixels: size and orientation from the header, and scaled decoding of JPEG.

The type of a file is determined by its bytes, not by its name. The treatment of what crawls
contain, each covered by a test:

    JPEG, PNG, WebP, GIF, BMP     RGB; embedded colour profiles are not applied
    Exif orientation              applied to JPEG, PNG and WebP, as browsers do (CSS
                                  `image-orientation: from-image`); damaged Exif, Exif after a PNG's
                                  pixels, and XMP's orientation are ignored
    progressive JPEG              like baseline
    CMYK, YCCK JPEG               RGB; inks are assumed inverted, as Adobe writes them
    grey                          three equal channels
    16 bits per channel           the upper 8
    palette, 1 bit                their colours
    alpha, a transparent colour   composited on white
    animated GIF, WebP, PNG       the first frame; of PNG the still image
    truncated                     BadImage (what follows the last pixel of a PNG, WebP, GIF or BMP
                                  may be missing)
    flipped bits in a JPEG        BadImage, or another image where the code remains valid
    PNG with pixels missing       BadImage; surplus ones are not read
    other types, HTML, empty      BadImage
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

from pipeline.data.png import is_complete_png, may_lack_pixels, still_png

MAX_SIDE = 65_535  # pixels of a JPEG's side

# A larger header is a mistake or an attack: 270 MB decoded, and Pillow begins to warn.
MAX_PIXELS = 89_000_000

# The formats that occur in crawls. Each further one of Pillow's would run more third-party code.
FORMATS = "JPEG, PNG, WEBP, GIF, BMP"

NUM_SCALES = 8  # a JPEG can be decoded at 1/8, 2/8, ... of its size

# Frames with scaled decoding: baseline, extended, progressive. A lossless one would crash libjpeg.
SCALABLE = (0xC0, 0xC1, 0xC2)

# JPEG markers (ITU-T T.81, table B.1), by their second byte.
EXIF = 0xE1  # APP1
STANDALONE = (0x00, 0x01, *range(0xD0, 0xD8))  # markers without a length
END_OF_HEADER = (0xDA, 0xD9)  # SOS, EOI
NO_FRAME = (0xC4, 0xC8, 0xCC)  # DHT, JPG, DAC, among the frames 0xC0 to 0xCF

ORIENTATION_TAG = 274  # TIFF 6.0

# Exif's orientations: which of the stored axes are reversed, and whether they are then exchanged.
UPSIDE_DOWN = (3, 4, 6, 7)
MIRRORED = (2, 3, 7, 8)
TRANSPOSED = (5, 6, 7, 8)


class BadImage(ValueError):
    """The bytes are no image, a damaged one, or one of a forbidden size; the message is the
    reason.
    """


class DecodedImage(NamedTuple):
    """A decoded image as its file stores it; the orientation is not yet applied, which is cheaper
    after resizing.

    A scaled decode rounds its last row and column up, so the image ends within them, at `height`
    and `width`. (If the 129 columns of 1025 px at 1/8 counted as 129 rather than 128.125, the image
    would be stretched: 25 dB instead of 39 from the exact result at 64 px.)
    """

    pixels: np.ndarray  # uint8 (H, W, 3), RGB
    height: float  # pixels
    width: float  # pixels
    orientation: int = 1  # Exif's, 1 to 8

    def upright(self) -> np.ndarray:
        """The pixels in their orientation for display."""
        return apply_orientation(self.pixels, self.orientation)


def apply_orientation(stored: np.ndarray, orientation: int) -> np.ndarray:
    """A view of (H, W, 3) as Exif's `orientation` says that it is to be displayed."""
    row_step = -1 if orientation in UPSIDE_DOWN else 1
    column_step = -1 if orientation in MIRRORED else 1
    flipped = stored[::row_step, ::column_step]
    return flipped.swapaxes(0, 1) if orientation in TRANSPOSED else flipped


@contextmanager
def _bad_image_errors() -> Iterator[None]:
    """Any exception as BadImage: damaged bytes raise OSError, SyntaxError, struct.error, ..."""
    try:
        yield
    except BadImage:
        raise
    except Exception as error:
        message = str(error).strip() or type(error).__name__
        raise BadImage(f"cannot be decoded ({message})") from error


@_bad_image_errors()
def dimensions(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels of the image in `data`, as displayed, from its header alone.

    Raises BadImage where `decode` does by the header.
    """
    if _is_jpeg(data):
        height, width, _ = _jpeg_header(data)
        orientation = _jpeg_orientation(data)
    else:
        image = _open(data)
        width, height = image.size
        orientation = _orientation(image.info.get("exif", b""))
    return (height, width) if orientation in TRANSPOSED else (width, height)


@_bad_image_errors()
def decode(data: bytes, size: int) -> DecodedImage:
    """The image in `data`, with enough pixels for `crop_resize` to `size`. Raises BadImage.

    A JPEG is decoded at 1/8, 2/8 or 4/8 where its shorter side then is a whole multiple of `size`,
    or at least 7/4 of it: much cheaper than decoding 1024 pixels for 64. At these scales
    libjpeg-turbo's short transforms give the exact mean of each block of pixels (at 4:2:0 the
    chroma is decoded at twice the scale). At 3/8, 5/8, ... they cut off frequencies instead, and
    are slower than the full size: 203 against 330 images per second at 6/8 of 1024 px. Other
    formats are decoded at full size.
    """
    return _decode_jpeg(data, size) if _is_jpeg(data) else _decode_other(data)


def _decode_other(data: bytes) -> DecodedImage:
    image = _open(data)
    orientation = _orientation(image.info.get("exif", b""))

    # Pillow fills missing rows of a PNG with zeros, without an error.
    if image.format == "PNG" and may_lack_pixels(image) and not is_complete_png(data):
        raise BadImage("its compressed data end before its last pixel")

    return DecodedImage(np.asarray(_rgb(image)), image.height, image.width, orientation)


def _decode_jpeg(data: bytes, size: int) -> DecodedImage:
    height, width, colour_space = _jpeg_header(data)
    scale = _jpeg_scale(data, min(height, width), size)

    # simplejpeg takes the smallest scale that reaches these sides. libjpeg rounds a scaled side up,
    # so this is exactly `scale`.
    minimum = {
        "min_height": -int(-height * scale // 1),
        "min_width": -int(-width * scale // 1),
    }

    # Strict: a missing end or lost synchronisation would otherwise pass as a grey or smeared
    # region. (About one in four single flipped bits breaks the stream; the others give another
    # valid image.)
    if colour_space in ("CMYK", "YCCK"):
        # libjpeg-turbo does not convert inks to RGB.
        inks = simplejpeg.decode_jpeg(data, "CMYK", strict=True, **minimum)
        image = Image.frombytes("CMYK", inks.shape[1::-1], inks.tobytes(), "raw", "CMYK;I")
        pixels = np.asarray(image.convert("RGB"))
    else:
        pixels = simplejpeg.decode_jpeg(data, strict=True, **minimum)

    return DecodedImage(
        pixels,
        height=height * scale,
        width=width * scale,
        orientation=_jpeg_orientation(data),
    )


def _jpeg_scale(data: bytes, short: int, size: int) -> float:
    """The smallest scale of 1/8, 2/8, 4/8 and 1 that suffices for `size`, see `decode`.

    Args:
        short: shorter side of the JPEG, pixels.
    """
    # A side of less than 8 pixels would vanish at 1/8.
    if short < NUM_SCALES or _jpeg_frame(data) not in SCALABLE:
        return 1.0

    for eighths in (1, 2, 4):
        is_multiple = short * eighths % (NUM_SCALES * size) == 0
        is_large_enough = short * eighths >= 14 * size  # 7/4, in eighths
        if is_multiple or is_large_enough:
            return eighths / NUM_SCALES
    return 1.0


def _check_size(height: int, width: int) -> None:
    if min(height, width) < 1 or max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise BadImage(
            f"{width} x {height} pixels; the limits are 1 to {MAX_SIDE:,} a side and "
            f"{MAX_PIXELS:,} in total"
        )


def _is_jpeg(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8")


def _jpeg_header(data: bytes) -> tuple[int, int, str]:
    """(height, width, colour space)"""
    height, width, colour_space, _ = simplejpeg.decode_jpeg_header(data)
    # Before anything of that size is allocated.
    _check_size(height, width)
    return height, width, colour_space


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(second byte of the marker, body) of each segment before the first scan, by libjpeg's
    rules.
    """
    # Behind the marker SOI. Bytes between segments are skipped, as libjpeg does.
    position = data.find(b"\xff", 2)
    while 0 <= position < len(data) - 1:
        marker = data[position + 1]
        if marker in END_OF_HEADER:
            return
        if marker == 0xFF:  # padding
            stop = position + 1
        elif marker in STANDALONE:
            stop = position + 2
        else:
            stop = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
            yield marker, data[position + 4 : stop]
        position = data.find(b"\xff", stop)


def _jpeg_frame(data: bytes) -> int | None:
    """The marker SOFn of the frame (ITU-T T.81, table B.1)."""
    for marker, _ in _jpeg_segments(data):
        if 0xC0 <= marker <= 0xCF and marker not in NO_FRAME:
            return marker
    return None


def _jpeg_orientation(data: bytes) -> int:
    """Of the first Exif segment; 1 if there is none."""
    for marker, body in _jpeg_segments(data):
        if marker == EXIF and body.startswith(b"Exif\0\0"):
            return _orientation(body)
    return 1


def _orientation(exif: bytes) -> int:
    """Tag 274 of an Exif block, a TIFF file of one directory; 1 where it has none or is damaged."""
    tiff = exif.removeprefix(b"Exif\0\0")
    try:
        order = {b"II*\0": "<", b"MM\0*": ">"}[tiff[:4]]
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (num_entries,) = struct.unpack_from(f"{order}H", tiff, start)

        # An entry: tag, type, number of values, value (a short is stored in place).
        for entry in range(num_entries):
            offset = start + 2 + 12 * entry
            tag, kind, count, value = struct.unpack_from(f"{order}HHIH", tiff, offset)
            if tag == ORIENTATION_TAG:
                # Type 3 is a 16-bit integer. Any other type or count is damage.
                is_short = (kind, count) == (3, 1)
                return value if is_short and 1 <= value <= 8 else 1
    except (KeyError, struct.error):
        pass
    return 1


def _open(data: bytes) -> ImageFile:
    """An image other than a JPEG, not yet decoded. By Pillow's own classes, as `Image.open` warns
    of large sizes.
    """
    file = io.BytesIO(data)
    image: ImageFile

    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        # The chunk acTL precedes the pixels (PNG specification, third edition, section 11.3.6).
        is_animated = data.find(b"acTL", 0, data.find(b"IDAT")) >= 0
        image = PngImageFile(io.BytesIO(still_png(data)) if is_animated else file)
    elif data.startswith(b"RIFF") and data.startswith(b"WEBP", 8):
        image = WebPImageFile(file)
    elif data.startswith((b"GIF87a", b"GIF89a")):
        # Pillow enlarges the canvas, and warns of its size, when it opens the file.
        _check_size(*_gif_size(data))
        image = GifImageFile(file)
    elif data.startswith(b"BM"):
        image = BmpImageFile(file)
    else:
        raise BadImage(f"is none of {FORMATS}")

    _check_size(image.height, image.width)
    return image


def _gif_size(data: bytes) -> tuple[int, int]:
    """Height and width of a GIF's canvas, extended to hold the first frame, as Pillow does (with a
    warning).
    """
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    # After 6 bytes of signature and 7 of the screen descriptor.
    position = 13
    if flags & 0x80:  # a colour table of 3 bytes a colour
        position += 3 * 2 ** (flags % 8 + 1)

    # Extensions: two bytes, then blocks with their lengths, the last of length 0.
    while data[position] == 0x21:
        position += 2
        while data[position]:
            position += data[position] + 1
        position += 1

    # The frame's rectangle follows the separator of its descriptor, one byte.
    left, top, columns, rows = struct.unpack_from("<4H", data, position + 1)
    return max(height, top + rows), max(width, left + columns)


def _rgb(image: ImageFile) -> Image.Image:
    """The image in mode RGB, transparent parts on white."""
    if image.mode.startswith("I;16"):
        # 16-bit grey, which Pillow would clip instead of scaling.
        # Its transparent level, if there is one, becomes white.
        levels = np.asarray(image)
        grey = np.where(levels == image.info.get("transparency", -1), 255, levels >> 8)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")

    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
