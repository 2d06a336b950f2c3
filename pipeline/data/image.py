"""Images as arrays: cropping, resizing, and conversion between uint8 and the network's floats.

Two kinds of resizing, for two kinds of data. A training image (uint8, HWC) is reduced by `decode`
and `crop_resize`. The low-resolution conditioning of a stage (float32, CHW or BCHW) is made and
enlarged by `downsample` (mean) and `upsample` (bilinear) in NumPy: the same values in training and
in sampling on every machine, for every batch size.

Shape suffixes: B batch, C channels, H height, W width; `...` any leading axes.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.data.decode import (
    MIRRORED,
    TRANSPOSED,
    UPSIDE_DOWN,
    DecodedImage,
    apply_orientation,
    decode,
)


@dataclass(frozen=True, kw_only=True)
class ImageSize:
    """The side to which images are brought, and of the window of them that is used, in pixels."""

    side: int
    window: int | None = None  # None: all of the image

    @property
    def used(self) -> int:
        return self.window or self.side


def read_square(
    data: bytes, size: ImageSize, *, u: float = 0.5, v: float = 0.5, x: float = 0.5, y: float = 0.5
) -> np.ndarray:
    """An image file as uint8 (S, S, 3): its square at (u, v), and the window of it at (x, y),
    from 0 to 1 across what is cut off; a view of the square.

    Raises:
        BadImage: it cannot be decoded.
    """
    square = crop_resize(decode(data, size.side), size.side, u, v)
    return crop(square, size.used, x, y)


def crop(image: np.ndarray, size: int, u: float, v: float) -> np.ndarray:
    """A square (size, size, 3) of (H, W, 3), at the fraction `u` of the free columns and `v` of the
    free rows; a view.

    0.5, 0.5 is the centre; with `u` uniform in [0, 1) all whole-pixel positions are equally likely.
    Raises ValueError if the image is smaller than `size`.
    """
    height, width = image.shape[:2]
    if min(height, width) < size:
        raise ValueError(f"a square of {size} pixels does not fit into {width} x {height}")

    top = _offset(v, height - size)
    left = _offset(u, width - size)
    return image[top : top + size, left : left + size]


def _offset(fraction: float, num_free: int) -> int:
    """One of the `num_free` + 1 positions, pixels."""
    # A fraction of 1, or one that rounds to it, would be one position too far.
    return min(int(fraction * (num_free + 1)), num_free)


def crop_resize(image: DecodedImage, size: int, u: float, v: float) -> np.ndarray:
    """uint8 (size, size, 3): upright, the shorter side resized to `size`, then `crop` at `u`, `v`.

    Pixels stay square: the part of the longer side beyond a whole number of them is left out. An
    image smaller than `size` is enlarged (bicubic); `data.filter.min_size` excludes such images.

    The result should equal the mean of the area that each pixel covers in the full image. Measured
    against that, in float64, on 20 photographs with shorter sides of 960 to 1100 px: at least
    36.7 dB at 64 px and 42.4 at 256 px (medians 40 to 44 and 50 to 58). The kernel decides; the
    worst photograph, of 1024 px after the decode at 1/8:

                     dB, at this many pixels for one               contrast left at
                     1.004   1.1     1.5     1.75    2       2.67  0.5 and 1.5 of Nyquist
        Hamming      28.0    29.5    34.2    36.1    39.3    38.6  .88   .29
        bicubic      29.5    30.8    32.6    32.8    32.8    33.6  .94   .06
        box          24.2    26.1    29.9    30.2    50.7    33.1  .90   .30
        Lanczos      29.6    30.9    31.9    31.3    31.4    31.8  1.01  .01, and rings

    Hence the factor 7/4 in `decode`, and its whole multiples: at one pixel for one there is nothing
    to resize. (Hamming aliases nearly as much as box, as a mean of the area does; box itself is
    exact only at whole multiples.) From 1024 px to 64 | 256 on one core of an EPYC: 476 | 456
    images per second, 99 % of the bare decode and resize; full decode and bicubic 92 | 68.
    """
    short = min(image.height, image.width)

    # `u` and `v` refer to the upright image, the box below to the stored one.
    if image.orientation in TRANSPOSED:
        u, v = v, u
    top = _offset(v, int(image.height * size / short) - size) * short / size
    left = _offset(u, int(image.width * size / short) - size) * short / size
    if image.orientation in UPSIDE_DOWN:
        top = image.height - short - top
    if image.orientation in MIRRORED:
        left = image.width - short - left

    # One pixel for one at whole positions: there is nothing to resample.
    if short == size and top % 1 == left % 1 == 0:
        square = image.pixels[int(top) : int(top) + size, int(left) : int(left) + size]
    else:
        kernel = Image.Resampling.HAMMING if short >= size else Image.Resampling.BICUBIC
        # Rounding may put the box a fraction beyond the image, which Pillow refuses.
        box = (left, top, min(left + short, image.width), min(top + short, image.height))
        square = np.asarray(Image.fromarray(image.pixels).resize((size, size), kernel, box))
    return apply_orientation(square, image.orientation)


def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 (..., H, W, C) to float32 (..., C, H, W) in [-1, 1]; 0 is -1 and 255 is 1."""
    channels_first = np.ascontiguousarray(np.moveaxis(image, -1, -3), dtype=np.float32)
    return channels_first / np.float32(127.5) - np.float32(1)


def to_uint8(x: np.ndarray) -> np.ndarray:
    """float (..., C, H, W) to uint8 (..., H, W, C), clipped to [-1, 1] and rounded; the exact
    inverse of `to_float`.
    """
    levels = np.rint((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(levels, -3, -1))


def downsample(x: np.ndarray, size: int) -> np.ndarray:
    """float32 (..., C, H, H) to (..., C, size, size): each pixel the mean of the square it covers.

    Raises ValueError unless H is a multiple of `size`.
    """
    *leading, height, width = x.shape
    if height != width or height % size:
        raise ValueError(
            f"a {height} x {width} image cannot be divided into {size} x {size} equal squares"
        )
    factor = height // size
    blocks = x.reshape(*leading, size, factor, size, factor)
    return blocks.mean(axis=(-3, -1), dtype=np.float32)


def upsample(x: np.ndarray, size: int) -> np.ndarray:
    """float32 (..., C, H, W) to (..., C, size, size), bilinear.

    Pixels are squares: output pixel i has its centre at (i + 1/2) H / size - 1/2 of the input and
    interpolates between the two input centres around it; beyond the outermost centres the border
    value is repeated. Raises ValueError for a smaller `size`, where this would alias.
    """
    height, width = x.shape[-2:]
    if size < max(height, width):
        raise ValueError(f"upsample from {height} x {width} to {size}; use downsample")
    return _stretch(_stretch(x.astype(np.float32, copy=False), size, axis=-1), size, axis=-2)


def _stretch(x: np.ndarray, size: int, axis: int) -> np.ndarray:
    """`upsample` along one axis. (Two gathers: 2.5 times as fast as a product with the matrix at
    256 to 1024 px.)
    """
    length = x.shape[axis]
    centre = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
    low = np.floor(centre).astype(int)
    # `axis` is counted from the last: weight is aligned with it for broadcasting.
    weight = (centre - low).astype(np.float32).reshape((-1,) + (1,) * (-1 - axis))

    # left + weight (right - left), in place: these arrays are large.
    left = x.take(low, axis)
    mixed = x.take(np.minimum(low + 1, length - 1), axis)
    mixed -= left
    mixed *= weight
    mixed += left
    return mixed
