"""Pictures as arrays: one size to another, uint8 to the network's floats and back.

Two kinds of resizing, for two kinds of data. A training picture (uint8, HWC) is shrunk by `decode`
and `crop_resize`. The low resolution that conditions a stage (float32, CHW or BCHW) is made and
enlarged by the two plain maps below, average and bilinear, in NumPy: the same numbers in training
and sampling on every machine, whatever the batch.

Shape suffixes: B batch, C channels, H height, W width; `...` any axes before.
"""

import numpy as np
from PIL import Image

from pipeline.data.decode import MIRRORED, TRANSPOSED, UPSIDE_DOWN, Picture, turned


def window(image: np.ndarray, size: int, u: float, v: float) -> np.ndarray:
    """The window (size, size, 3) of (H, W, 3) at the fraction `u` of the free columns and `v` of
    the free rows.

    0.5, 0.5 is the centre; with `u` uniform in [0, 1) each of the whole-pixel places is equally
    likely. Raises ValueError if the picture is smaller than the window.
    """
    height, width = image.shape[:2]
    if min(height, width) < size:
        raise ValueError(f"a window of {size} pixels does not fit into {width} x {height}")
    top, left = _place(v, height - size), _place(u, width - size)
    return image[top : top + size, left : left + size]


def _place(share: float, room: int) -> int:
    return min(int(share * (room + 1)), room)


def crop_resize(picture: Picture, size: int, u: float, v: float) -> np.ndarray:
    """uint8 (size, size, 3): upright, the shorter side brought to `size`, then the `window` at `u`,
    `v`.

    Pixels stay square: what the longer side has beyond a whole number of them is left out. A
    picture smaller than `size` is enlarged, softly (bicubic); whoever does not want that leaves it
    out by its size.

    It is to look like the mean of the area that each pixel covers in the whole picture. Measured
    against that, in float64, on 20 photographs at shorter sides of 960 to 1100 px: this is 36.7 dB
    or closer at 64 px and 42.4 at 256 px (median 40 to 44 and 50 to 58). The kernel decides; the
    worst photograph, of 1024 px behind the decode at 1/8:

        pixels for one    1.004   1.1     1.5     1.75    2       2.67  | contrast left at 0.5 and 1.5 of Nyquist
        Hamming           28.0    29.5    34.2    36.1    39.3    38.6  | .88   .29
        bicubic           29.5    30.8    32.6    32.8    32.8    33.6  | .94   .06
        box               24.2    26.1    29.9    30.2    50.7    33.1  | .90   .30
        Lanczos           29.6    30.9    31.9    31.3    31.4    31.8  | 1.01  .01, and rings

    Hence the 7/4 in `decode`, and its whole multiples: at one pixel for one there is nothing to
    resize. (Who wants the mean of the area has box's aliasing, nearly; box itself is right only at
    whole multiples.) From 1024 px to 64 | 256 on one core of an EPYC: 476 | 456 pictures a second,
    99 % of the bare decode and resize; whole and bicubic 92 | 68.
    """
    pixels, height, width, orientation = picture
    short = min(height, width)
    if orientation in TRANSPOSED:
        u, v = v, u
    top = _place(v, int(height * size / short) - size) * short / size
    left = _place(u, int(width * size / short) - size) * short / size
    if orientation in UPSIDE_DOWN:
        top = height - short - top
    if orientation in MIRRORED:
        left = width - short - left
    if short == size and top % 1 == left % 1 == 0:
        square = pixels[int(top) : int(top) + size, int(left) : int(left) + size]
    else:
        kernel = Image.Resampling.HAMMING if short >= size else Image.Resampling.BICUBIC
        box = (left, top, min(left + short, width), min(top + short, height))
        square = np.asarray(Image.fromarray(pixels).resize((size, size), kernel, box))
    return turned(square, orientation)


def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 (..., H, W, C) to float32 (..., C, H, W) in [-1, 1]; 0 is -1 and 255 is 1."""
    return np.ascontiguousarray(np.moveaxis(image, -1, -3), dtype=np.float32) / np.float32(
        127.5
    ) - np.float32(1)


def to_uint8(x: np.ndarray) -> np.ndarray:
    """float (..., C, H, W) to uint8 (..., H, W, C), clipped to [-1, 1] and rounded; undoes
    `to_float` exactly.
    """
    levels = np.rint((np.clip(x, -1, 1) + 1) * 127.5).astype(np.uint8)
    return np.ascontiguousarray(np.moveaxis(levels, -3, -1))


def downsample(x: np.ndarray, size: int) -> np.ndarray:
    """float32 (..., C, H, H) to (..., C, size, size): each pixel the mean of the square it covers.

    Raises ValueError unless H is a multiple of `size`.
    """
    *before, height, width = x.shape
    if height != width or height % size:
        raise ValueError(
            f"a {height} x {width} picture is not cut into {size} x {size} equal squares"
        )
    factor = height // size
    return x.reshape(*before, size, factor, size, factor).mean(axis=(-3, -1), dtype=np.float32)


def upsample(x: np.ndarray, size: int) -> np.ndarray:
    """float32 (..., C, H, W) to (..., C, size, size), bilinear.

    Pixels are squares: output pixel i is centred at (i + 1/2) H / size - 1/2 of the input and mixes
    the two input centres around it; beyond the outermost centres the border value stays. Raises
    ValueError for a smaller `size`, where this would alias.
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
    share = (centre - low).astype(np.float32).reshape((-1,) + (1,) * (-1 - axis))
    left, mixed = x.take(low, axis), x.take(np.minimum(low + 1, length - 1), axis)
    mixed -= left  # in place: these arrays are large
    mixed *= share
    mixed += left
    return mixed
