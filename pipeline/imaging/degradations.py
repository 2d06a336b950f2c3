"""What image-to-image restores: pictures degraded in one of Palette's four ways (Saharia et al.,
arXiv 2111.05826).

    colorization      the grey of the picture
    inpainting        a hole of free-form strokes (60 %) or of one to five rectangles (40 %)
    uncropping        half of the picture is missing, on one side or all around
    jpeg_restoration  a JPEG of quality Q from 5 to 30, P(Q) proportional to exp(-Q / 10)

The network sees the degraded picture, its `source`, and makes the pixels of its `mask`. A hole is
filled with unit Gaussian noise, not clipped: what is known lies in [-1, 1], and nothing of what is
missing shows. Where there is no hole every pixel is made anew, and the mask is all ones. Outside of
`Degraded` a mask is bool (H, W), True where to make.

Training takes pictures of a data set and their damage by `degrade`; what somebody wants restored is
degraded already and becomes a source by `whole` or `with_hole` alone. All draws come from the
generator that is given.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageDraw

from pipeline.data.image import to_float
from pipeline.errors import UserError
from pipeline.imaging.compositing import filled

TaskName = Literal["colorization", "inpainting", "uncropping", "jpeg_restoration"]
Edge = Literal["left", "right", "top", "bottom", "around"]

FREE_FORM = 0.6  # share of strokes among the holes of inpainting; the others are rectangles
HOLE = (0.1, 0.4)  # share of the picture that a hole of inpainting covers
QUALITIES = range(5, 31)
WITH_HOLE: tuple[TaskName, ...] = ("inpainting", "uncropping")
ATTEMPTS = 1000  # holes that are drawn until one covers its share: about two of three do


class Degraded(NamedTuple):
    """What the network is given of a picture, float32."""

    source: np.ndarray  # (3, H, W) in [-1, 1], with unit noise in the hole
    mask: np.ndarray  # (1, H, W), 1 where the picture is to be made and 0 where it is known


def whole(picture: np.ndarray) -> Degraded:
    """All of uint8 (H, W, 3) is seen, and all is made anew."""
    return Degraded(to_float(picture), np.ones((1, *picture.shape[:2]), np.float32))


def with_hole(picture: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> Degraded:
    """uint8 (H, W, 3) with noise where `mask`, bool (H, W), is set; the picture's own pixels there
    do not matter.
    """
    source = to_float(picture)
    for plane in source:  # one by one: 15 times as fast as all three in one assignment
        plane[mask] = rng.standard_normal(np.count_nonzero(mask), np.float32)
    return Degraded(source, mask[None].astype(np.float32))


def prior_mean(task: str, given: Degraded) -> np.ndarray:
    """The source, and where the task has a hole, this smoothly filled; float32 (3, H, W)."""
    if task not in WITH_HOLE:
        return given.source
    return (
        filled(given.source.transpose(1, 2, 0), given.mask[0] == 1)
        .transpose(2, 0, 1)
        .astype(np.float32)
    )


def degrade(task: str, picture: np.ndarray, rng: np.random.Generator) -> Degraded:
    """A square picture, uint8 (S, S, 3), as an example of the task. Raises UserError for an unknown
    one.
    """
    if task not in TASKS:
        raise UserError(f"task {task!r}: not known; the tasks are {', '.join(TASKS)}")
    return TASKS[task](picture, rng)


def colorization(picture: np.ndarray, rng: np.random.Generator) -> Degraded:
    return whole(grey(picture))


def inpainting(picture: np.ndarray, rng: np.random.Generator) -> Degraded:
    hole = strokes if rng.random() < FREE_FORM else rectangles
    return with_hole(picture, hole(len(picture), rng), rng)


def uncropping(picture: np.ndarray, rng: np.random.Generator) -> Degraded:
    """All around half of the time, else on one of the sides."""
    sides: tuple[Edge, ...] = ("left", "right", "top", "bottom")
    edge = "around" if rng.random() < 0.5 else sides[rng.integers(4)]
    return with_hole(picture, half(len(picture), edge), rng)


def jpeg_restoration(picture: np.ndarray, rng: np.random.Generator) -> Degraded:
    likelihood = np.exp(-np.array(QUALITIES) / 10)
    return whole(compressed(picture, int(rng.choice(QUALITIES, p=likelihood / likelihood.sum()))))


TASKS: dict[str, Callable[[np.ndarray, np.random.Generator], Degraded]] = {
    "colorization": colorization,
    "inpainting": inpainting,
    "uncropping": uncropping,
    "jpeg_restoration": jpeg_restoration,
}


def grey(picture: np.ndarray) -> np.ndarray:
    """Luma, 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601) as Pillow's "L" rounds it, in three equal
    channels.
    """
    return np.asarray(Image.fromarray(picture).convert("L").convert("RGB"))


def compressed(picture: np.ndarray, quality: int) -> np.ndarray:
    """What a JPEG (4:2:0) of this quality keeps, decoded as `decode` does a user's."""
    return simplejpeg.decode_jpeg(simplejpeg.encode_jpeg(picture, quality, colorsubsampling="420"))


# Holes: bool (side, side).


def centre(side: int) -> np.ndarray:
    """The middle half of the rows and columns, a quarter of the picture: a hole to measure with,
    not to train on.
    """
    mask = np.zeros((side, side), bool)
    middle = slice(side // 4, side // 4 + side // 2)
    mask[middle, middle] = True
    return mask


def half(side: int, edge: Edge) -> np.ndarray:
    """Half of the picture, to the nearest line of pixels: at one edge, or a frame around a square
    in the middle.
    """
    if edge == "around":
        known = round(side / 2**0.5)
        middle = slice((side - known) // 2, (side - known) // 2 + known)
        mask = np.ones((side, side), bool)
        mask[middle, middle] = False
        return mask
    mask = np.zeros((side, side), bool)
    lines = mask if edge in ("top", "bottom") else mask.T
    lines = lines if edge in ("top", "left") else lines[::-1]
    lines[: side // 2] = True
    return mask


def strokes(side: int, rng: np.random.Generator, share: tuple[float, float] = HOLE) -> np.ndarray:
    """Free-form holes (Yu et al., arXiv 1806.03589, algorithm 1): one to four strokes of a brush
    that goes to and fro.

    A stroke has 4 to 11 pieces, which turn 48 to 96 degrees to either side of its course and are
    about 1/8 of the diagonal long; at 256 px it is 12 to 40 px wide. Lengths grow with the side.
    What covers another part of the picture than `share` allows is drawn anew.
    """

    def draw() -> np.ndarray:
        canvas = Image.new("L", (side, side))
        for _ in range(rng.integers(1, 5)):
            _stroke(ImageDraw.Draw(canvas), side, rng)
        mask = np.asarray(canvas, bool)
        across, left, up = rng.random(3) < 0.5
        mask = mask.T if across else mask
        return mask[:: -1 if up else 1, :: -1 if left else 1]

    return _covering(share, draw)


def _stroke(canvas: ImageDraw.ImageDraw, side: int, rng: np.random.Generator) -> None:
    num, step = rng.integers(4, 12), side * 2**0.5 / 8
    lowest, highest = 2 * np.pi / 5 + np.array([-1, 1]) * rng.uniform(0, 2 * np.pi / 15, 2)
    angles = rng.uniform(lowest, highest, num) * (-1) ** np.arange(num)
    lengths = np.clip(rng.normal(step, step / 2, num), 0, 2 * step)
    corners = [rng.uniform(0, side, 2)]
    for move in lengths[:, None] * np.stack((np.cos(angles), np.sin(angles)), 1):
        corners.append(np.clip(corners[-1] + move, 0, side))
    width = max(1, round(rng.uniform(12, 40) * side / 256))
    canvas.line([tuple(corner) for corner in corners], 1, width)
    for x, y in corners:  # round ends and joints
        canvas.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), 1)


def rectangles(
    side: int, rng: np.random.Generator, share: tuple[float, float] = HOLE
) -> np.ndarray:
    """One to five rectangles, up to twice as long as wide, which together cover a share between
    these two.
    """
    num = rng.integers(1, 6)

    def draw() -> np.ndarray:
        mask = np.zeros((side, side), bool)
        weights = rng.uniform(1, 3, num)
        for area in rng.uniform(*share) * weights / weights.sum():
            stretch = 2 ** rng.uniform(-0.5, 0.5)
            height, width = (
                max(1, round(side * area**0.5 * factor)) for factor in (stretch, 1 / stretch)
            )
            top, left = rng.integers((side - height + 1, side - width + 1))
            mask[top : top + height, left : left + width] = True
        return mask

    return _covering(share, draw)


def _covering(share: tuple[float, float], draw: Callable[[], np.ndarray]) -> np.ndarray:
    for _ in range(ATTEMPTS):
        mask = draw()
        if share[0] <= mask.mean() <= share[1]:
            return mask
    raise ValueError(
        f"no hole covers {share[0]:.0%} to {share[1]:.0%} of a picture {mask.shape[0]} pixels wide"
    )
