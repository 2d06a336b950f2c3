"""Draw captioned scenes into WebDataset tars: a data set small enough for a laptop, whose truth is
known.

    python -m tools.shapes runs/demo/shards --num 4096 --size 128 --seed 0

A scene is one shape on a plain background, and its caption says all that matters in a fixed
grammar,

    a {size} {colour} {shape} on {background}[, at the left | right | top | bottom]

so that a program can read a caption (`parse`), draw what it says (`draw`) and judge whether a
generated picture shows it (tools/agreement.py). Scene i depends on the seed and i alone, and the
same command writes the same bytes, whatever the number of workers.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pipeline.errors import UserError
from pipeline.rng import generator
from pipeline.terminal import Parser, positive, run
from tools.dataset import write_shards, write_tar, writing, written

SIZES = {"small": 0.25, "large": 0.5}  # width of the shape, as a share of the picture's
COLOURS = {
    "red": (220, 20, 30),
    "green": (0, 150, 50),
    "blue": (30, 60, 220),
    "yellow": (250, 220, 0),
    "purple": (130, 0, 160),
    "orange": (250, 130, 0),
}
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "grey": (128, 128, 128)}
POSITIONS = {
    "center": (0.5, 0.5),
    "left": (0.29, 0.5),
    "right": (0.71, 0.5),
    "top": (0.5, 0.29),
    "bottom": (0.5, 0.71),
}
JITTER = 0.03  # how far a shape strays from its position, as a share of the picture's width
SUPERSAMPLING = 4  # a shape is drawn this much larger, then averaged, for smooth edges

PLACES = [name for name in POSITIONS if name != "center"]  # the centre goes without saying
WORDS = ", ".join("|".join(names) for names in (SIZES, COLOURS, SHAPES, BACKGROUNDS, PLACES))
GRAMMAR = re.compile("a ({}) ({}) ({}) on ({})(?:, at the ({}))?".format(*WORDS.split(", ")))


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a picture shows. Scenes are equal if their captions are: the jitter is a detail that no
    caption tells.
    """

    size: str
    colour: str
    shape: str
    background: str
    position: str = "center"
    jitter: tuple[float, float] = field(
        default=(0.0, 0.0), compare=False
    )  # right, down; each in [-1, 1] of JITTER


def random_scene(seed: int, number: int) -> Scene:
    """Scene `number` of the data set `seed`; each choice is uniform and independent of the others."""
    rng = generator(seed, "shapes", number)
    size, colour, shape, background, position = (
        list(names)[rng.integers(len(names))]
        for names in (SIZES, COLOURS, SHAPES, BACKGROUNDS, POSITIONS)
    )
    right, down = rng.uniform(-1, 1, 2).tolist()
    return Scene(
        size=size,
        colour=colour,
        shape=shape,
        background=background,
        position=position,
        jitter=(right, down),
    )


def caption(scene: Scene) -> str:
    """The scene in words."""
    where = "" if scene.position == "center" else f", at the {scene.position}"
    return f"a {scene.size} {scene.colour} {scene.shape} on {scene.background}{where}"


def parse(text: str) -> Scene:
    """The scene of a caption, without jitter: `caption(parse(text)) == text`. UserError for
    anything else.
    """
    match = GRAMMAR.fullmatch(text)
    if not match:
        raise UserError(
            f"caption {text!r}: not like 'a small red circle on white, at the left'; the words: {WORDS}"
        )
    size, colour, shape, background, position = match.groups()
    return Scene(
        size=size, colour=colour, shape=shape, background=background, position=position or "center"
    )


def draw(scene: Scene, pixels: int) -> Image.Image:
    """The scene as an RGB picture of `pixels` x `pixels`."""
    x, y = (p + JITTER * j for p, j in zip(POSITIONS[scene.position], scene.jitter, strict=True))
    radius = SIZES[scene.size] / 2
    side = pixels * SUPERSAMPLING
    mask = Image.new("L", (side, side))
    _fill(ImageDraw.Draw(mask), scene.shape, x * side, y * side, radius * side)
    return Image.composite(
        Image.new("RGB", (pixels, pixels), COLOURS[scene.colour]),
        Image.new("RGB", (pixels, pixels), BACKGROUNDS[scene.background]),
        mask.reduce(SUPERSAMPLING),
    )


def _fill(canvas: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float) -> None:
    """Fill `shape` around (x, y); each is 2r wide and high."""
    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "square":
        canvas.rectangle((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "triangle":
        canvas.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=255)
    else:
        canvas.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=255)
        canvas.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=255)


def write_shard(seed: int, pixels: int, path: Path, numbers: range) -> int:
    """Write the scenes `numbers` into one tar; how many bytes it has."""
    scenes = (random_scene(seed, number) for number in numbers)
    return write_tar(
        path,
        numbers.start,
        ((np.asarray(draw(scene, pixels)), caption(scene), asdict(scene)) for scene in scenes),
    )


def write(out: Path, *, num: int, size: int, seed: int, shard_size: int, workers: int) -> str:
    """Write the data set into the folder `out`, all or nothing; a line that says what is there now.

    If `out` holds the same data set already, nothing is done. Raises UserError if it holds anything
    else.
    """
    arguments = {"num": num, "size": size, "seed": seed, "shard_size": shard_size}
    if not 0 <= seed < 2**64:
        raise UserError(f"--seed {seed}: outside [0, 2**64)")
    if written(out, "shapes.json", arguments):
        return f"{out}: already there, {num:,} images of {size} px with seed {seed}"
    with writing(out, "shapes.json", arguments) as folder:
        tars, total = write_shards(
            folder, num, shard_size, workers, partial(write_shard, seed, size)
        )
    return f"{out}: {num:,} images of {size} px in {tars:,} shards, {total:,} bytes"


def main(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="python -m tools.shapes", description="Draw captioned scenes into WebDataset tars."
    )
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="folder to make, for 00000.tar ... and shapes.json"
    )
    parser.add_argument("--num", type=positive, required=True, help="number of images")
    parser.add_argument("--size", type=positive, required=True, help="width and height in pixels")
    parser.add_argument("--seed", type=int, required=True, help="which data set")
    parser.add_argument(
        "--shard-size", type=positive, default=128, help="images a tar (%(default)s)"
    )
    parser.add_argument("--workers", type=positive, default=2, help="processes (%(default)s)")
    print(write(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    run(main)
