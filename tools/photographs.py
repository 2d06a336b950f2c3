"""Cut squares from photographs into WebDataset tars: a data set to restore, small, real, and
without a download.

    python -m tools.photographs runs/restore/photographs --size 64 --num 4096

The photographs are those in colour that come inside scikit-image. The middle third of each is held
out: no pixel of OUT/held_out is in OUT/train. Eight photographs teach edges and textures and their
own colours, not what the world looks like: of scenes held out whole a network that had seen six
others coloured the cat well and the rocket's blue sky not at all. Squares to train on are turned
and mirrored too. Square i of a folder depends on the seed and i alone: which third of which
photograph, a side from a quarter to all of its shorter one (evenly in log scale, at least `size`),
where, and which way up.
"""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline.data.decode import MAX_SIDE, DecodedImage, decode
from pipeline.data.image import crop, crop_resize
from pipeline.errors import UserError
from pipeline.rng import generator
from pipeline.terminal import Parser, positive, run
from tools.dataset import Sample, write_tar, writing, written

# The file, and what it shows. (motorcycle_right.png is motorcycle_left.png seen from beside it.)
PHOTOGRAPHS = {
    "astronaut.png": "an astronaut",
    "chelsea.png": "a cat",
    "coffee.png": "coffee",
    "hubble_deep_field.jpg": "galaxies",
    "ihc.png": "tissue",
    "motorcycle_left.png": "a motorcycle",
    "retina.jpg": "a retina",
    "rocket.jpg": "a rocket",
}
FOLDERS = ("train", "held_out")
CLOSEST = 4  # a square is at least this part of the shorter side


def read(name: str) -> np.ndarray:
    """The pixels of a file of scikit-image, uint8 (H, W, 3)."""
    package = find_spec("skimage")
    if package is None or package.origin is None:
        raise UserError(
            "photographs come with scikit-image, which is not here; pip install 'imagen-cascade[restoration]'"
        )
    return decode((Path(package.origin).parent / "data" / name).read_bytes(), size=MAX_SIDE).pixels


def parts(pixels: np.ndarray, folder: str) -> list[np.ndarray]:
    """What the folder shows of (H, W, 3): the left and the right third, or the middle one."""
    first, last = pixels.shape[1] // 3, pixels.shape[1] * 2 // 3
    return [pixels[:, :first], pixels[:, last:]] if folder == "train" else [pixels[:, first:last]]


def square(
    pixels: np.ndarray, size: int, rng: np.random.Generator, orientation: int = 1
) -> np.ndarray:
    """uint8 (size, size, 3): a random square of (H, W, 3), shrunk, and laid in one of Exif's eight
    orientations.
    """
    short = min(pixels.shape[:2])
    side = round(np.exp(rng.uniform(np.log(max(size, short / CLOSEST)), np.log(short))))
    return crop_resize(
        DecodedImage(crop(pixels, side, *rng.random(2)), side, side, orientation), size, 0.5, 0.5
    )


def samples(
    photographs: Sequence[tuple[str, np.ndarray]], size: int, seed: int, folder: str
) -> Iterator[Sample]:
    """Squares of these files' pixels, without end; the folders' draws are not the same."""
    for number in count():
        rng = generator(seed, "photographs", FOLDERS.index(folder), number)
        name, pixels = photographs[rng.integers(len(photographs))]
        orientation = int(rng.integers(1, 9)) if folder == "train" else 1
        yield (
            square(pixels, size, rng, orientation),
            f"a photograph of {PHOTOGRAPHS[name]}",
            {"photograph": name},
        )


def write(out: Path, *, num: int, held_out: int, size: int, seed: int, shard_size: int) -> str:
    """Write the data set into the folder `out`, all or nothing; a line that says what is there now.

    If `out` holds the same data set already, nothing is done. Raises UserError if it holds anything
    else, or if a photograph is smaller than `size`.
    """
    arguments: dict[str, Any] = {
        "num": num,
        "held_out": held_out,
        "size": size,
        "seed": seed,
        "shard_size": shard_size,
    }
    arguments["split"] = (
        "thirds"  # a folder that an older version split in another way is not this data set
    )
    if not 0 <= seed < 2**64:
        raise UserError(f"--seed {seed}: outside [0, 2**64)")
    if written(out, "photographs.json", arguments):
        return f"{out}: already there, {num:,} + {held_out:,} squares of {size} px with seed {seed}"
    whole = {name: read(name) for name in PHOTOGRAPHS}
    photographs = {
        folder: [(name, part) for name, pixels in whole.items() for part in parts(pixels, folder)]
        for folder in FOLDERS
    }
    smallest = min(min(pixels.shape[:2]) for some in photographs.values() for _, pixels in some)
    if size > smallest:
        raise UserError(
            f"--size {size}: of a photograph only {smallest} pixels are held out; take at most that"
        )
    total = 0
    with (
        writing(out, "photographs.json", arguments) as target,
        tqdm(total=num + held_out, unit=" images") as bar,
    ):
        for folder, wanted in zip(FOLDERS, (num, held_out), strict=True):
            (target / folder).mkdir()
            squares = samples(photographs[folder], size, seed, folder)
            for shard, first in enumerate(range(0, wanted, shard_size)):
                some = min(shard_size, wanted - first)
                total += write_tar(
                    target / folder / f"{shard:05d}.tar", first, islice(squares, some)
                )
                bar.update(some)
    return f"{out}: {num:,} squares of {size} px to train, {held_out:,} held out, {total:,} bytes"


def main(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="python -m tools.photographs", description="Cut squares from photographs into tars."
    )
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="folder to make, for train/00000.tar ... and held_out/",
    )
    parser.add_argument("--size", type=positive, required=True, help="width and height in pixels")
    parser.add_argument("--num", type=positive, required=True, help="number of squares to train on")
    parser.add_argument(
        "--held-out", type=positive, default=128, help="number of squares held out (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which data set (%(default)s)")
    parser.add_argument(
        "--shard-size", type=positive, default=128, help="squares a tar (%(default)s)"
    )
    print(write(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    run(main)
