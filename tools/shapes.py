"""Draw captioned scenes into WebDataset tars: a small data set with known ground truth.

    python -m tools.shapes runs/demo/shards --num 4096 --size 128 --seed 0

A scene is one shape on a plain background. Its caption describes it in a fixed grammar,

    a {size} {colour} {shape} on {background}[, at the left | right | top | bottom]

so that a program can read a caption (`parse`), draw the scene (`draw`) and judge whether a
generated image shows it (tools/agreement.py). Scene i depends on the seed and i alone, and the same
command writes the same bytes, whatever the number of workers.
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
from pipeline.terminal import run
from tools.dataset import (
    CaptionedImage,
    DatasetSize,
    add_options,
    dataset_parser,
    write_captioned_tar,
    write_once,
    write_shards,
)

# The words of a caption, in their order.
SIZES = {"small": 0.25, "large": 0.5}  # width of the shape, as a fraction of the image's
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

JITTER = 0.03  # largest offset of a shape from its position, as a fraction of the image's width
SUPERSAMPLING = 4  # a shape is drawn this much larger, then averaged, for smooth edges

# "center" is not written in a caption: it is the default.
NAMED_POSITIONS = [name for name in POSITIONS if name != "center"]
VOCABULARY = ["|".join(names) for names in (SIZES, COLOURS, SHAPES, BACKGROUNDS, NAMED_POSITIONS)]
GRAMMAR = re.compile("a ({}) ({}) ({}) on ({})(?:, at the ({}))?".format(*VOCABULARY))


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The content of an image.

    Two scenes are equal if their captions are: the jitter is not compared.
    """

    size: str
    colour: str
    shape: str
    background: str
    position: str = "center"
    # To the right and down, each in [-1, 1] times JITTER.
    jitter: tuple[float, float] = field(default=(0.0, 0.0), compare=False)


def random_scene(seed: int, index: int) -> Scene:
    """Scene `index` of the data set `seed`; its choices are uniform and independent."""
    rng = generator(seed, "shapes", index)
    # The order of these draws, and of the words, is part of what a seed means.
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
    """The scene's caption."""
    suffix = "" if scene.position == "center" else f", at the {scene.position}"
    return f"a {scene.size} {scene.colour} {scene.shape} on {scene.background}{suffix}"


def parse(text: str) -> Scene:
    """The scene of a caption, without jitter: `caption(parse(text)) == text`.

    Raises:
        UserError: the text is no caption of the grammar.
    """
    match = GRAMMAR.fullmatch(text)
    if not match:
        raise UserError(
            f"caption {text!r}: not in the grammar 'a small red circle on white, at the left'; "
            f"its words are {', '.join(VOCABULARY)}"
        )

    size, colour, shape, background, position = match.groups()
    return Scene(
        size=size, colour=colour, shape=shape, background=background, position=position or "center"
    )


def draw(scene: Scene, pixels: int) -> Image.Image:
    """The scene as an RGB image of `pixels` x `pixels`."""
    # Centre and radius as fractions of the side.
    x, y = (p + JITTER * j for p, j in zip(POSITIONS[scene.position], scene.jitter, strict=True))
    radius = SIZES[scene.size] / 2

    # The shape as an antialiased mask.
    side = pixels * SUPERSAMPLING
    mask = Image.new("L", (side, side))
    _fill(ImageDraw.Draw(mask), scene.shape, x=x * side, y=y * side, r=radius * side)

    return Image.composite(
        Image.new("RGB", (pixels, pixels), COLOURS[scene.colour]),
        Image.new("RGB", (pixels, pixels), BACKGROUNDS[scene.background]),
        mask.reduce(SUPERSAMPLING),
    )


def _fill(canvas: ImageDraw.ImageDraw, shape: str, *, x: float, y: float, r: float) -> None:
    """Fills a shape centred at (x, y), 2r wide and high."""
    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "square":
        canvas.rectangle((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "triangle":
        canvas.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=255)
    else:
        # Two bars, a third of the width thick.
        canvas.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=255)
        canvas.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=255)


def sample(seed: int, pixels: int, index: int) -> CaptionedImage:
    """Sample `index` of the data set `seed`."""
    scene = random_scene(seed, index)
    return CaptionedImage(np.asarray(draw(scene, pixels)), caption(scene), asdict(scene))


def write_shard(seed: int, pixels: int, path: Path, indices: range) -> int:
    """Writes the scenes `indices` into one tar; its size in bytes."""
    samples = (sample(seed, pixels, index) for index in indices)
    return write_captioned_tar(path, indices.start, samples)


def write(out: Path, *, num: int, size: int, seed: int, shard_size: int, workers: int) -> str:
    """Writes the data set into the folder `out`, unless it is there; a line that says which.

    Raises:
        UserError: `out` holds anything else, or cannot be written.
    """

    def write_scenes(folder: Path) -> DatasetSize:
        return write_shards(
            folder,
            num,
            shard_size=shard_size,
            workers=workers,
            write=partial(write_shard, seed, size),
        )

    return write_once(
        out,
        "shapes.json",
        {"num": num, "size": size, "seed": seed, "shard_size": shard_size},
        description=f"{num:,} images of {size} px, seed {seed}",
        write=write_scenes,
    )


def main(argv: Sequence[str]) -> None:
    parser = dataset_parser(
        "shapes",
        "Draw captioned scenes into WebDataset tars.",
        contents="00000.tar ... and shapes.json",
    )
    add_options(parser, num=None, size=None, seed=None, shard_size=128, workers=2)
    print(write(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    run(main)
