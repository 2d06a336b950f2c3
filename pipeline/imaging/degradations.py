"""Degraded images for the four image-to-image tasks of Palette (Saharia et al., arXiv 2111.05826).

    colorization      the grayscale image
    inpainting        a hole: free-form strokes (60 %) or one to five rectangles (40 %)
    uncropping        half of the image is missing, on one side or all around
    jpeg_restoration  a JPEG of quality Q from 5 to 30, P(Q) proportional to exp(-Q / 10)

The network is conditioned on `source`, the degraded image, and `mask`, which is 1 where pixels are
to be generated. A hole in the source is filled with standard normal noise, not clipped: known
pixels lie in [-1, 1], and nothing of the missing ones is left. Tasks without a hole generate every
pixel, and their mask is all ones. Outside of `Degraded` a mask is bool (H, W), True where pixels
are to be generated.

Training degrades clean images by `degrade`. A user's image is degraded already, and becomes a
source by `with_hole` or `without_hole` alone. All randomness comes from the generator argument.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageDraw

from pipeline.data.image import to_float
from pipeline.errors import UserError
from pipeline.imaging.compositing import fill_hole

TaskName = Literal["colorization", "inpainting", "uncropping", "jpeg_restoration"]
Edge = Literal["left", "right", "top", "bottom", "around"]

HOLE_TASKS: tuple[TaskName, ...] = ("inpainting", "uncropping")
FREE_FORM_PROB = 0.6  # of strokes in inpainting, rather than rectangles
HOLE_AREA = (0.1, 0.4)  # least and greatest share of the image that an inpainting hole covers
JPEG_QUALITIES = range(5, 31)
MAX_DRAWS = 1000  # holes drawn until one has a permitted area; about two of three have


class Degraded(NamedTuple):
    """A degraded image, as the network is conditioned on it; float32."""

    source: np.ndarray  # (3, H, W) in [-1, 1], with standard normal noise in the hole
    mask: np.ndarray  # (1, H, W), 1 where pixels are to be generated, 0 where they are known


def without_hole(image: np.ndarray) -> Degraded:
    """uint8 (H, W, 3) as a source without a hole, of which every pixel is generated anew."""
    mask = np.ones((1, *image.shape[:2]), np.float32)
    return Degraded(to_float(image), mask)


def with_hole(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> Degraded:
    """uint8 (H, W, 3) as a source with noise where `mask`, bool (H, W), is True.

    The image's own pixels there have no influence.
    """
    source = to_float(image)

    # One channel at a time: 15 times as fast as all three in one assignment.
    for channel in source:
        channel[mask] = rng.standard_normal(np.count_nonzero(mask), np.float32)

    return Degraded(source, mask[None].astype(np.float32))


def prior_mean(task: str, degraded: Degraded) -> np.ndarray:
    """A deterministic first estimate of the clean image, float32 (3, H, W): the source, with its
    hole, if the task has one, filled smoothly from the border.
    """
    if task not in HOLE_TASKS:
        return degraded.source

    filled_HWC = fill_hole(degraded.source.transpose(1, 2, 0), degraded.mask[0] == 1)
    return filled_HWC.transpose(2, 0, 1).astype(np.float32)


# Tasks.


def degrade(task: str, image: np.ndarray, rng: np.random.Generator) -> Degraded:
    """A training example of the task from a clean square image, uint8 (S, S, 3).

    UserError for an unknown task.
    """
    if task not in TASKS:
        raise UserError(f"task {task!r}: not known; the tasks are {', '.join(TASKS)}")
    return TASKS[task](image, rng)


def colorization(image: np.ndarray, rng: np.random.Generator) -> Degraded:
    return without_hole(to_grayscale(image))


def inpainting(image: np.ndarray, rng: np.random.Generator) -> Degraded:
    draw_mask = stroke_mask if rng.random() < FREE_FORM_PROB else rectangle_mask
    return with_hole(image, draw_mask(len(image), rng), rng)


def uncropping(image: np.ndarray, rng: np.random.Generator) -> Degraded:
    """The hole is all around half of the time, else on one of the sides."""
    sides: tuple[Edge, ...] = ("left", "right", "top", "bottom")
    edge = "around" if rng.random() < 0.5 else sides[rng.integers(4)]
    return with_hole(image, half_mask(len(image), edge), rng)


def jpeg_restoration(image: np.ndarray, rng: np.random.Generator) -> Degraded:
    weights = np.exp(-np.array(JPEG_QUALITIES) / 10)
    quality = int(rng.choice(JPEG_QUALITIES, p=weights / weights.sum()))
    return without_hole(compress_jpeg(image, quality))


TASKS: dict[str, Callable[[np.ndarray, np.random.Generator], Degraded]] = {
    "colorization": colorization,
    "inpainting": inpainting,
    "uncropping": uncropping,
    "jpeg_restoration": jpeg_restoration,
}


def to_grayscale(image: np.ndarray) -> np.ndarray:
    """The luma 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), as Pillow's mode "L" rounds it, in three
    equal channels; uint8 (H, W, 3).
    """
    return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))


def compress_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """The image after JPEG compression (4:2:0) of this quality, decoded as a user's file is."""
    data = simplejpeg.encode_jpeg(image, quality, colorsubsampling="420")
    return simplejpeg.decode_jpeg(data)


# Masks of holes: bool (side, side), True in the hole.


def center_mask(side: int) -> np.ndarray:
    """The middle half of the rows and columns, a quarter of the image. For evaluation; training
    does not use it.
    """
    mask = np.zeros((side, side), bool)
    middle = slice(side // 4, side // 4 + side // 2)
    mask[middle, middle] = True
    return mask


def half_mask(side: int, edge: Edge) -> np.ndarray:
    """Half of the image, rounded to whole rows or columns: at one edge, or as a frame around a
    square in the middle.
    """
    if edge == "around":
        # A square of half the area.
        known_side = round(side / 2**0.5)
        begin = (side - known_side) // 2
        middle = slice(begin, begin + known_side)
        mask = np.ones((side, side), bool)
        mask[middle, middle] = False
        return mask

    mask = np.zeros((side, side), bool)
    # A view of the mask in which the hole is at the top.
    view = mask if edge in ("top", "bottom") else mask.T
    view = view if edge in ("top", "left") else view[::-1]
    view[: side // 2] = True
    return mask


def stroke_mask(
    side: int, rng: np.random.Generator, area: tuple[float, float] = HOLE_AREA
) -> np.ndarray:
    """A free-form hole (Yu et al., arXiv 1806.03589, algorithm 1): one to four zigzag brush
    strokes.

    A stroke has 4 to 11 segments, each about 1/8 of the diagonal long, which point 48 to 96 degrees
    to alternating sides of its course. At 256 px the brush is 12 to 40 px wide; all lengths are
    proportional to the side. Drawn again until its share of the image is within `area`.
    """

    def draw() -> np.ndarray:
        canvas = Image.new("L", (side, side))
        for _ in range(rng.integers(1, 5)):
            _draw_stroke(ImageDraw.Draw(canvas), side, rng)

        # Transposed and flipped at random, so that strokes run in all directions.
        mask = np.asarray(canvas, bool)
        transpose, flip_columns, flip_rows = rng.random(3) < 0.5
        mask = mask.T if transpose else mask
        return mask[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]

    return _draw_until_area(area, draw)


def _draw_stroke(canvas: ImageDraw.ImageDraw, side: int, rng: np.random.Generator) -> None:
    num_segments = rng.integers(4, 12)
    mean_length = side * 2**0.5 / 8

    # Around 72 degrees, to alternating sides of a course to the right.
    deviations = np.array([-1, 1]) * rng.uniform(0, 2 * np.pi / 15, 2)
    min_angle, max_angle = 2 * np.pi / 5 + deviations
    signs = (-1) ** np.arange(num_segments)
    angles = rng.uniform(min_angle, max_angle, num_segments) * signs
    lengths = np.clip(rng.normal(mean_length, mean_length / 2, num_segments), 0, 2 * mean_length)

    corners = [rng.uniform(0, side, 2)]
    for move in lengths[:, None] * np.stack((np.cos(angles), np.sin(angles)), 1):
        corners.append(np.clip(corners[-1] + move, 0, side))

    width = max(1, round(rng.uniform(12, 40) * side / 256))
    canvas.line([tuple(corner) for corner in corners], 1, width)

    # Round ends and joints.
    radius = width / 2
    for x, y in corners:
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), 1)


def rectangle_mask(
    side: int, rng: np.random.Generator, area: tuple[float, float] = HOLE_AREA
) -> np.ndarray:
    """One to five rectangles of aspect ratios from 1:2 to 2:1, which may overlap.

    Drawn again until their share of the image is within `area`.
    """
    num_rectangles = rng.integers(1, 6)

    def draw() -> np.ndarray:
        mask = np.zeros((side, side), bool)
        weights = rng.uniform(1, 3, num_rectangles)

        # One draw for all rectangles, divided among them; where they overlap it becomes less.
        for share in rng.uniform(*area) * weights / weights.sum():
            # Height over width is stretch^2, from 1/2 to 2.
            stretch = 2 ** rng.uniform(-0.5, 0.5)
            height = max(1, round(side * share**0.5 * stretch))
            width = max(1, round(side * share**0.5 * (1 / stretch)))
            top, left = rng.integers((side - height + 1, side - width + 1))
            mask[top : top + height, left : left + width] = True

        return mask

    return _draw_until_area(area, draw)


def _draw_until_area(area: tuple[float, float], draw: Callable[[], np.ndarray]) -> np.ndarray:
    """The first drawn mask whose share of the image is within `area`."""
    for _ in range(MAX_DRAWS):
        mask = draw()
        if area[0] <= mask.mean() <= area[1]:
            return mask

    raise ValueError(
        f"no hole covers {area[0]:.0%} to {area[1]:.0%} of an image {mask.shape[0]} pixels wide"
    )
