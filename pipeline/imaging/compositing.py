"""Around the samples of a picture that is restored: its size, how sure they are, and how they join
what is known.

A hole can be filled in many ways. The `spread` of several samples says where they disagree,
`least_certain` picks those parts to be sampled again, `blend` mixes samples, and `composite` puts
the result into the picture, whose known pixels stay as they were, bit for bit.

The seam between known and painted must not show, so the painting gives way: it is moved by what it
lacks on the border, carried inwards (Perez et al., "Poisson image editing", SIGGRAPH 2003, whose
correction is the membrane, the harmonic function with these values on the border). In place of the
membrane stands Shepard's interpolation with the weight 1 / d^3, which is as smooth, takes a Fourier
transform and no solver, and keeps a constant exactly (Farbman et al., "Convolution pyramids",
SIGGRAPH Asia 2011, section 5). Detail along the border fades within a few pixels; what is wrong
along all of it, a shift of colour, is put right as deep as the hole is.

Shape suffixes: N samples, H height, W width. Pictures are uint8 (H, W, 3), masks bool (H, W), True
where painted.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import fft, ndimage

from pipeline.errors import UserError

BRIGHTEST = 64.0  # the spread in levels that `heat` shows brightest: fixed, so that two pictures can be compared
HEAT = np.array(
    [(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)]
)  # ever lighter
SMOOTH = (
    2.0  # sigma in pixels over which `least_certain` averages: parts are sampled again, not specks
)
MARGIN = 2  # pixels by which those parts grow, so that what is sampled again has room to join
NEAR = 4  # pixels to each side of a seam with which it is compared


def padded(array: np.ndarray, stride: int) -> np.ndarray:
    """(H, W, ...) continued at the bottom and the right to multiples of `stride`; `[:H, :W]` undoes
    it.

    What is added mirrors the picture, the outermost pixels not repeated, so that no edge lies where
    it begins.
    """
    more = [(0, -side % stride) for side in array.shape[:2]]
    return np.pad(array, more + [(0, 0)] * (array.ndim - 2), "reflect")


def spread(samples_NHW3: np.ndarray) -> np.ndarray:
    """float32 (H, W), in levels: the standard deviation of the samples, root mean square of the
    channels'.
    """
    return np.sqrt(samples_NHW3.var(0, np.float32).mean(-1))


def heat(spread_HW: np.ndarray) -> np.ndarray:
    """The spread as a picture uint8 (H, W, 3), from black by purple and orange to a light yellow at
    `BRIGHTEST`.
    """
    places = np.linspace(0, BRIGHTEST, len(HEAT))
    return np.rint(
        np.stack([np.interp(spread_HW, places, colours) for colours in HEAT.T], -1)
    ).astype(np.uint8)


def least_certain(spread_HW: np.ndarray, mask_HW: np.ndarray, share: float) -> np.ndarray:
    """A part of the mask, bool (H, W): its `share` of most spread, on average around each pixel,
    and a margin.
    """
    if not 0 <= share <= 1:
        raise UserError(
            f"share {share}: not in [0, 1]; 0.25 is the least certain quarter of the hole"
        )
    inside = ndimage.gaussian_filter(mask_HW.astype(np.float32), SMOOTH)[mask_HW]
    around = ndimage.gaussian_filter(np.where(mask_HW, spread_HW, 0), SMOOTH)[mask_HW] / inside
    chosen = np.zeros(len(around), bool)
    chosen[np.argsort(-around, kind="stable")[: round(share * len(around))]] = True
    part = np.zeros_like(mask_HW)
    part[mask_HW] = chosen
    return ndimage.binary_dilation(part, iterations=MARGIN) & mask_HW


def blend(samples_NHW3: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """The mean of the samples, uint8 (H, W, 3), each with its share of the weights."""
    shares = np.array(weights, np.float64)
    if shares.shape != (len(samples_NHW3),):
        raise UserError(
            f"weights {list(weights)}: {len(shares)} for {len(samples_NHW3)} samples; give each one"
        )
    if not (np.isfinite(shares).all() and shares.min() >= 0 and shares.max() > 0):
        raise UserError(f"weights {list(weights)}: must be numbers of at least 0, and not all 0")
    return np.rint(np.tensordot(shares / shares.sum(), samples_NHW3, 1)).astype(np.uint8)


def composite(picture: np.ndarray, painted: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """The picture outside of the mask, untouched; inside the painting, moved so that it joins. Only
    there it counts.
    """
    jumps, border = _jumps(picture.astype(np.float64), painted.astype(np.float64), mask_HW)
    moved = painted + membrane(jumps, border) if border.any() else painted
    return np.where(mask_HW[..., None], np.rint(np.clip(moved, 0, 255)).astype(np.uint8), picture)


def membrane(values: np.ndarray, at_HW: np.ndarray) -> np.ndarray:
    """float64 (H, W, C): `values` (H, W, C) where `at_HW` is set, carried to all pixels around, by
    1 / distance^3.
    """
    shape = [
        fft.next_fast_len(2 * side - 1, real=True) for side in at_HW.shape
    ]  # nothing wraps around
    y, x = (np.minimum(np.arange(side), side - np.arange(side)) for side in shape)
    distance = np.hypot(y[:, None], x)
    distance[0, 0] = 1
    kernel = fft.rfft2(distance**-3.0)

    def around(plane: np.ndarray) -> np.ndarray:
        return fft.irfft2(fft.rfft2(plane, shape) * kernel, shape)[
            : at_HW.shape[0], : at_HW.shape[1]
        ]

    weight = around(at_HW.astype(np.float64))
    planes = np.moveaxis(values.astype(np.float64), -1, 0)
    return np.stack([around(np.where(at_HW, plane, 0)) / weight for plane in planes], -1)


def filled(picture: np.ndarray, mask_HW: np.ndarray) -> np.ndarray:
    """The picture (H, W, C) with what is known at the border of its hole carried into it, and 0 if
    nothing is known.
    """
    border = ndimage.binary_dilation(mask_HW) & ~mask_HW
    return np.where(mask_HW[..., None], membrane(picture, border) if border.any() else 0, picture)


def _jumps(
    picture: np.ndarray, painted: np.ndarray, mask_HW: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the painting lacks at each known pixel beside the hole, (H, W, 3), and which pixels
    those are.

    A painting that is right differs from the pixel beside it too, and the steps before and after
    tell by how much: in photographs the one between is half of their mean, give or take. (Five
    photographs at 128 px, holes of all kinds, a wrong colour of 30 levels: the gradient across the
    border becomes 0.52 of that beside it. It would be 0.43 with no step expected, 0.69 with all of
    the mean; in the photographs it is 0.97. What was right is moved by 5.4 levels rms.)
    """
    sums, counts = np.zeros_like(picture), np.zeros(mask_HW.shape)
    for turn in range(4):  # views, in which the hole lies below
        known, made, hole = (np.rot90(array, turn) for array in (picture, painted, mask_HW))
        i, j = np.nonzero(~hole[:-1] & hole[1:])
        before, after = np.maximum(i - 1, 0), np.minimum(i + 2, len(hole) - 1)
        here, there = known[i, j], made[i + 1, j]
        steps = np.stack((here - known[before, j], made[after, j] - there))
        usable = np.stack(((before < i) & ~hole[before, j], (after > i + 1) & hole[after, j]))
        step = (steps * usable[..., None]).sum(0) / np.maximum(usable.sum(0), 1)[:, None]
        np.rot90(sums, turn)[i, j] += here + step / 2 - there
        np.rot90(counts, turn)[i, j] += 1
    return sums / np.maximum(counts, 1)[..., None], counts > 0


class Seam(NamedTuple):
    """Mean absolute differences between neighbouring pixels, in levels; NaN where there are none."""

    across: float  # one known, one painted
    known: float  # both known, within `NEAR` pixels of the hole
    painted: float  # both painted, within `NEAR` pixels of what is known


def seam(picture: np.ndarray, mask_HW: np.ndarray) -> Seam:
    """How much the border shows: it does not, if the gradient across it is no larger than beside
    it.
    """
    near_known = mask_HW & ndimage.binary_dilation(~mask_HW, iterations=NEAR)
    near_hole = ~mask_HW & ndimage.binary_dilation(mask_HW, iterations=NEAR)
    across, known, painted = [], [], []
    for turn in range(2):
        values, hole, inner, outer = (
            np.rot90(array, turn) for array in (picture, mask_HW, near_known, near_hole)
        )
        gradient = np.abs(np.diff(values.astype(np.float64), axis=0)).mean(-1)
        across.append(gradient[hole[1:] != hole[:-1]])
        known.append(gradient[outer[1:] & outer[:-1]])
        painted.append(gradient[inner[1:] & inner[:-1]])
    means = (np.concatenate(parts) for parts in (across, known, painted))
    return Seam(*(float(part.mean()) if part.size else float("nan") for part in means))
