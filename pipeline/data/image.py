"""Pictures as arrays: bytes to uint8, one size to another, uint8 to the network's floats and back.

Two kinds of resizing, for two kinds of data. A training picture (uint8, HWC) is shrunk by Pillow, antialiased. The low
resolution that conditions a stage (float32, CHW or BCHW) is made and enlarged by the two plain maps below, average and
bilinear, in NumPy: the same numbers in training and sampling on every machine, whatever the batch.

Shape suffixes: B batch, C channels, H height, W width; `...` any axes before.
"""

import io

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 100_000_000  # a larger header is a mistake or an attack: 300 MB decoded
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
)  # what crawled files turn out to be; Pillow's others run more foreign code


class BadImage(ValueError):
    """These bytes are no picture, a damaged one, or one too large; says which."""


def decode(data: bytes, min_side: int) -> np.ndarray:
    """The picture in `data` as uint8 (H, W, 3), RGB; the file's type is told by its bytes, not by its name.

    A JPEG is decoded at the smallest of its scales (eighths) whose shorter side still has `min_side` pixels, or whole
    if it has fewer: much cheaper than decoding 1024 pixels for 64. Other formats are decoded whole; where there is
    alpha the picture is laid on white. Raises BadImage.
    """
    try:
        if data[:2] == b"\xff\xd8":
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            _check_size(height, width)
            if colours not in ("CMYK", "YCCK"):  # libjpeg-turbo does not turn inks into RGB
                # Strict: a missing end or lost synchronisation would otherwise pass as a grey or smeared region. (About
                # one in four single flipped bits breaks the stream; the others make another valid picture.)
                return simplejpeg.decode_jpeg(data, min_height=min_side, min_width=min_side, strict=True)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.height, image.width)
            return np.asarray(_rgb(image))
    except BadImage:
        raise
    except UnidentifiedImageError:  # its own words name an address in memory
        raise BadImage(f"is none of {', '.join(FORMATS)}") from None
    except Exception as error:  # damaged bytes surface as almost anything: OSError, SyntaxError, struct.error, ...
        raise BadImage(f"cannot be decoded ({str(error).strip() or type(error).__name__})") from error


def _check_size(height: int, width: int) -> None:
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels; from 1 to {MAX_PIXELS:,} in all are taken")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # 16-bit grey, which Pillow would clip rather than scale
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W, 3) with its shorter side at `size` and its shape kept (the longer side rounded).

    Pillow's bicubic widens with the reduction, so it does not alias. Measured on gratings from 1024 to 64 px, share of
    the contrast left at 0.5 of the new Nyquist frequency (should stay) | at 1.5 (should go): bicubic .94 | .06, box
    .90 | .30, bilinear .81 | .09, Lanczos 1.01 | .01 but ringing. Behind a scaled JPEG decode its cost is small.
    """
    height, width = image.shape[:2]
    if min(height, width) == size:
        return image
    scale = size / min(height, width)
    shape = (max(size, round(width * scale)), max(size, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(shape, Image.Resampling.BICUBIC))


def window(image: np.ndarray, size: int, u: float, v: float) -> np.ndarray:
    """The window (size, size, 3) of (H, W, 3) at the fraction `u` of the free columns and `v` of the free rows.

    0.5, 0.5 is the centre; with `u` uniform in [0, 1) each of the whole-pixel places is equally likely. Raises
    ValueError if the picture is smaller than the window.
    """
    height, width = image.shape[:2]
    if min(height, width) < size:
        raise ValueError(f"a window of {size} pixels does not fit into {width} x {height}")
    top, left = (min(int(share * (room + 1)), room) for share, room in ((v, height - size), (u, width - size)))
    return image[top : top + size, left : left + size]


def crop_resize(image: np.ndarray, size: int, u: float, v: float) -> np.ndarray:
    """uint8 (size, size, 3): the shorter side brought to `size`, then the window at `u`, `v` of what is left over.

    A picture smaller than `size` is enlarged, softly; whoever does not want that leaves it out by its size.
    """
    return window(resize(image, size), size, u, v)


def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 (..., H, W, C) to float32 (..., C, H, W) in [-1, 1]; 0 is -1 and 255 is 1."""
    return np.ascontiguousarray(np.moveaxis(image, -1, -3), dtype=np.float32) / np.float32(127.5) - np.float32(1)


def to_uint8(x: np.ndarray) -> np.ndarray:
    """float (..., C, H, W) to uint8 (..., H, W, C), clipped to [-1, 1] and rounded; undoes `to_float` exactly."""
    levels = np.rint((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(levels, -3, -1))


def downsample(x: np.ndarray, size: int) -> np.ndarray:
    """float32 (..., C, H, H) to (..., C, size, size): each pixel the mean of the square it covers.

    Raises ValueError unless H is a multiple of `size`.
    """
    *before, height, width = x.shape
    if height != width or height % size:
        raise ValueError(f"a {height} x {width} picture is not cut into {size} x {size} equal squares")
    factor = height // size
    return x.reshape(*before, size, factor, size, factor).mean(axis=(-3, -1), dtype=np.float32)


def upsample(x: np.ndarray, size: int) -> np.ndarray:
    """float32 (..., C, H, W) to (..., C, size, size), bilinear.

    Pixels are squares: output pixel i is centred at (i + 1/2) H / size - 1/2 of the input and mixes the two input
    centres around it; beyond the outermost centres the border value stays. Raises ValueError for a smaller `size`,
    where this would alias.
    """
    height, width = x.shape[-2:]
    if size < max(height, width):
        raise ValueError(f"upsample from {height} x {width} to {size}; use downsample")
    return _stretch(_stretch(x.astype(np.float32, copy=False), size, axis=-1), size, axis=-2)


def _stretch(x: np.ndarray, size: int, axis: int) -> np.ndarray:
    """`upsample` along one axis. (Two gathers: 2.5 times as fast as a product with the matrix at 256 to 1024 px.)"""
    length = x.shape[axis]
    centre = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
    low = np.floor(centre).astype(int)
    share = (centre - low).astype(np.float32).reshape((-1,) + (1,) * (-1 - axis))
    left, mixed = x.take(low, axis), x.take(np.minimum(low + 1, length - 1), axis)
    mixed -= left  # in place: these arrays are large
    mixed *= share
    mixed += left
    return mixed
