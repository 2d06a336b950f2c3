"""Draw digits into WebDataset tars: a data set like MNIST, in seconds and without a download.

    python -m tools.glyphs runs/classic/glyphs --num 8192 --seed 0

An image is 28 px, one white digit on black in Pillow's default font, as KEY.png beside KEY.cls, the
digit's class; there is no caption. Position, height, width, stroke, rotation and shear are drawn at
random, as handwriting varies. Digit i depends on the seed and i alone, and the same command writes
the same bytes, whatever the number of workers.
"""

import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.rng import generator
from pipeline.terminal import run
from tools.dataset import (
    DatasetSize,
    add_options,
    dataset_parser,
    write_once,
    write_shards,
    write_tar,
)

SIDE = 28  # pixels
SUPERSAMPLING = 4  # a digit is drawn this much larger, then averaged, for smooth edges

# Ranges of the random draws.
HEIGHT = (13.0, 18.0)  # of the upright digit without stroke, in pixels
WIDTH = (0.8, 1.15)  # of the digit, as a fraction of the font's
STROKE = (0.0, 1.0)  # pixels added to the font's lines on each side
ROTATION = 12.0  # degrees, to either side
SHEAR = 0.25  # columns per row, to either side
SHIFT = 1.5  # pixels, in each direction


class Digit(NamedTuple):
    """A digit and its image, 8-bit grey of SIDE x SIDE."""

    label: int
    image: Image.Image


def draw(rng: np.random.Generator) -> Digit:
    """A random digit."""
    label = int(rng.integers(10))
    height = rng.uniform(*HEIGHT)
    width = rng.uniform(*WIDTH)
    stroke = rng.uniform(*STROKE)
    angle = np.radians(rng.uniform(-ROTATION, ROTATION))
    shear = rng.uniform(-SHEAR, SHEAR)
    shift = rng.uniform(-SHIFT, SHIFT, 2)

    # The upright digit, in the middle, as large as the font draws it; `scale` shrinks it to its
    # height.
    side = SIDE * SUPERSAMPLING
    font = ImageFont.load_default(size=side / 2)
    left, top, right, bottom = font.getbbox(str(label))
    scale = (bottom - top) / (height * SUPERSAMPLING)
    corner = ((side - left - right) / 2, (side - top - bottom) / 2)

    upright = Image.new("L", (side, side))
    ImageDraw.Draw(upright).text(
        corner, str(label), 255, font, stroke_width=stroke * scale * SUPERSAMPLING
    )

    # The digit is scaled, stretched, sheared and rotated. Pillow wants the inverse map, from pixels
    # of the result to those of the upright digit.
    rotate = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    unshear = np.array([[1, shear], [0, 1]])
    unstretch = np.array([[1 / width, 0], [0, 1]])
    inverse = scale * unstretch @ unshear @ rotate

    middle = np.full(2, side / 2)
    origin = middle - inverse @ (middle + shift * SUPERSAMPLING)
    matrix = (*inverse[0].tolist(), float(origin[0]), *inverse[1].tolist(), float(origin[1]))

    transformed = upright.transform(
        (side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
    )
    return Digit(label, transformed.reduce(SUPERSAMPLING))


def sample(seed: int, index: int) -> dict[str, bytes]:
    """Sample `index` of the data set `seed`, {extension: bytes}."""
    digit = draw(generator(seed, "glyphs", index))
    buffer = io.BytesIO()
    digit.image.save(buffer, "PNG")
    return {"png": buffer.getvalue(), "cls": str(digit.label).encode()}


def write_shard(seed: int, path: Path, indices: range) -> int:
    """Writes the digits `indices` into one tar; its size in bytes."""
    return write_tar(path, indices.start, (sample(seed, index) for index in indices))


def write(out: Path, *, num: int, seed: int, shard_size: int, workers: int) -> str:
    """Writes the data set into the folder `out`, unless it is there; a line that says which.

    Raises:
        UserError: `out` holds anything else, or cannot be written.
    """

    def write_digits(folder: Path) -> DatasetSize:
        return write_shards(
            folder, num, shard_size=shard_size, workers=workers, write=partial(write_shard, seed)
        )

    return write_once(
        out,
        "glyphs.json",
        {"num": num, "seed": seed, "shard_size": shard_size},
        description=f"{num:,} digits of {SIDE} px, seed {seed}",
        write=write_digits,
    )


def main(argv: Sequence[str]) -> None:
    parser = dataset_parser(
        "glyphs", "Draw digits into WebDataset tars.", contents="00000.tar ... and glyphs.json"
    )
    add_options(parser, num=None, seed=None, shard_size=1024, workers=2)
    print(write(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    run(main)
