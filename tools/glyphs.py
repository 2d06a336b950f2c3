"""Draw digits into WebDataset tars: a data set like MNIST, in seconds and without a download.

    python -m tools.glyphs runs/classic/glyphs --num 8192 --seed 0

A picture is 28 px, white on black, one digit in Pillow's own font, as KEY.png beside KEY.cls, the
digit's number; there is no caption. What a hand varies is drawn at random: where the digit stands,
how large, how wide, how thick and how tilted and slanted it is. Digit i depends on the seed and i
alone, and the same command writes the same bytes, whatever the number of workers.
"""

import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.errors import UserError
from pipeline.rng import generator
from pipeline.terminal import Parser, positive, run
from tools.dataset import write_files, write_shards, writing, written

SIDE = 28  # pixels
SUPERSAMPLING = 4  # a digit is drawn this much larger, then averaged, for smooth edges
HEIGHT = (13.0, 18.0)  # of the digit, upright and thin, in pixels
WIDTH = (0.8, 1.15)  # of the digit, as a share of the font's
STROKE = (0.0, 1.0)  # pixels added to the font's lines on each side
TILT = 12.0  # degrees to either side
SLANT = 0.25  # columns a row, to either side
SHIFT = 1.5  # pixels to each side


def draw(rng: np.random.Generator) -> tuple[int, Image.Image]:
    """A random digit and its picture, of grey values."""
    digit = int(rng.integers(10))
    height, width, stroke = rng.uniform(*HEIGHT), rng.uniform(*WIDTH), rng.uniform(*STROKE)
    tilt, slant = np.radians(rng.uniform(-TILT, TILT)), rng.uniform(-SLANT, SLANT)
    shift = rng.uniform(-SHIFT, SHIFT, 2)
    side = SIDE * SUPERSAMPLING
    font = ImageFont.load_default(size=side / 2)
    left, top, right, bottom = font.getbbox(str(digit))
    scale = (bottom - top) / (
        height * SUPERSAMPLING
    )  # from here it is an upright digit, to be shrunk by this
    upright = Image.new("L", (side, side))
    corner = (
        (side - left - right) / 2,
        (side - top - bottom) / 2,
    )  # so that the digit's middle is the picture's
    ImageDraw.Draw(upright).text(
        corner, str(digit), 255, font, stroke_width=stroke * scale * SUPERSAMPLING
    )
    # Pillow asks where in the upright picture each pixel comes from, so this is the inverse of what
    # happens to it.
    turn = np.array([[np.cos(tilt), np.sin(tilt)], [-np.sin(tilt), np.cos(tilt)]])
    back = scale * np.array([[1 / width, 0], [0, 1]]) @ np.array([[1, slant], [0, 1]]) @ turn
    middle = np.full(2, side / 2)
    start = middle - back @ (middle + shift * SUPERSAMPLING)
    matrix = (*back[0].tolist(), float(start[0]), *back[1].tolist(), float(start[1]))
    picture = upright.transform(
        (side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC
    )
    return digit, picture.reduce(SUPERSAMPLING)


def files(seed: int, number: int) -> dict[str, bytes]:
    """Sample `number` of the data set `seed`: its picture and its class."""
    digit, picture = draw(generator(seed, "glyphs", number))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return {"png": buffer.getvalue(), "cls": str(digit).encode()}


def write_shard(seed: int, path: Path, numbers: range) -> int:
    """Write the digits `numbers` into one tar; how many bytes it has."""
    return write_files(path, numbers.start, (files(seed, number) for number in numbers))


def write(out: Path, *, num: int, seed: int, shard_size: int, workers: int) -> str:
    """Write the data set into the folder `out`, all or nothing; a line that says what is there now.

    If `out` holds the same data set already, nothing is done. Raises UserError if it holds anything
    else.
    """
    arguments = {"num": num, "seed": seed, "shard_size": shard_size}
    if not 0 <= seed < 2**64:
        raise UserError(f"--seed {seed}: outside [0, 2**64)")
    if written(out, "glyphs.json", arguments):
        return f"{out}: already there, {num:,} digits with seed {seed}"
    with writing(out, "glyphs.json", arguments) as folder:
        tars, total = write_shards(folder, num, shard_size, workers, partial(write_shard, seed))
    return f"{out}: {num:,} digits of {SIDE} px in {tars:,} shards, {total:,} bytes"


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m tools.glyphs", description="Draw digits into WebDataset tars.")
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="folder to make, for 00000.tar ... and glyphs.json"
    )
    parser.add_argument("--num", type=positive, required=True, help="number of images")
    parser.add_argument("--seed", type=int, required=True, help="which data set")
    parser.add_argument(
        "--shard-size", type=positive, default=1024, help="images a tar (%(default)s)"
    )
    parser.add_argument("--workers", type=positive, default=2, help="processes (%(default)s)")
    print(write(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    run(main)
