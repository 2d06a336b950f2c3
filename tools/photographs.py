"""Crop squares from photographs into WebDataset tars: a small real data set for restoration,
without a download.

    python -m tools.photographs runs/palette/photographs --size 64 --num 16384

The photographs are the colour ones that scikit-image ships. The middle third of each is held out:
no pixel of OUT/held_out is in OUT/train. Eight photographs teach edges, textures and their own
colours, not what the world looks like: when whole scenes were held out, a network that was trained
on the six others coloured the cat well and the rocket's blue sky not at all.

Square i of a folder depends on the seed and i alone, which draw the photograph and its third, the
side (log-uniform, from a quarter of the shorter side, but at least `size`, to all of it), the place
and, for training only, one of the eight flips and rotations.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from pipeline.data.decode import MAX_SIDE, DecodedImage, decode
from pipeline.data.image import crop, crop_resize
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
)

# File and subject. motorcycle_right.png is left out: it shows the scene of motorcycle_left.png.
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
SMALLEST = 1 / 4  # a square's least side, as a fraction of the shorter side
NUM_ORIENTATIONS = 8  # of Exif; 1 is upright


class Region(NamedTuple):
    """The part of a photograph that one folder may show."""

    name: str  # the photograph's file
    pixels: np.ndarray  # uint8 (H, W, 3)


def read(name: str) -> np.ndarray:
    """The pixels of a file of scikit-image, uint8 (H, W, 3)."""
    # Only located: of scikit-image nothing but the files is used.
    package = find_spec("skimage")
    if package is None or package.origin is None:
        raise UserError(
            "skimage: not installed, and the photographs are part of it; "
            "pip install 'imagen-cascade[restoration]'"
        )

    path = Path(package.origin).parent / "data" / name
    # For a smaller size a JPEG would be decoded at a fraction of its own.
    return decode(path.read_bytes(), size=MAX_SIDE).pixels


def split(pixels: np.ndarray, folder: str) -> list[np.ndarray]:
    """The thirds of (H, W, 3) that belong to the folder: left and right to train, middle to hold
    out.
    """
    width = pixels.shape[1]
    first = width // 3
    last = width * 2 // 3
    return [pixels[:, :first], pixels[:, last:]] if folder == "train" else [pixels[:, first:last]]


def crop_square(
    pixels: np.ndarray, size: int, rng: np.random.Generator, orientation: int = 1
) -> np.ndarray:
    """uint8 (size, size, 3): a random square of (H, W, 3), shrunk, in one of Exif's eight
    orientations.
    """
    longest = min(pixels.shape[:2])
    # At least the size of the output, so that no square is enlarged.
    shortest = max(size, longest * SMALLEST)
    # Log-uniform: a doubling of the side is as likely at any scale.
    side = round(np.exp(rng.uniform(np.log(shortest), np.log(longest))))

    square = crop(pixels, side, *rng.random(2))
    # The place has been drawn: of a square, 0.5 and 0.5 are all of it.
    return crop_resize(DecodedImage(square, side, side, orientation), size, 0.5, 0.5)


def samples(
    regions: Sequence[Region], size: int, seed: int, folder: str
) -> Iterator[CaptionedImage]:
    """Squares of these regions, without end; the two folders draw from separate streams."""
    for index in count():
        # A stream for each square, which so does not depend on those before it.
        rng = generator(seed, "photographs", FOLDERS.index(folder), index)
        region = regions[rng.integers(len(regions))]
        # Only training is augmented; held-out squares stay upright.
        orientation = int(rng.integers(1, NUM_ORIENTATIONS + 1)) if folder == "train" else 1

        yield CaptionedImage(
            crop_square(region.pixels, size, rng, orientation),
            f"a photograph of {PHOTOGRAPHS[region.name]}",
            {"photograph": region.name},
        )


def read_regions(size: int) -> dict[str, list[Region]]:
    """The regions of each folder. UserError if one is smaller than `size`."""
    photographs = {name: read(name) for name in PHOTOGRAPHS}
    regions = {
        folder: [
            Region(name, part)
            for name, pixels in photographs.items()
            for part in split(pixels, folder)
        ]
        for folder in FOLDERS
    }

    smallest = min(min(region.pixels.shape[:2]) for each in regions.values() for region in each)
    if size > smallest:
        raise UserError(
            f"size: {size} px does not fit into the smallest third of a photograph; "
            f"take at most {smallest}"
        )
    return regions


def write_squares(
    target: Path, *, counts: Mapping[str, int], size: int, seed: int, shard_size: int
) -> DatasetSize:
    """Writes `counts` squares into each folder of `target`."""
    regions = read_regions(size)
    total = DatasetSize(0, 0)

    with tqdm(total=sum(counts.values()), unit=" images") as bar:
        for folder, num in counts.items():
            (target / folder).mkdir()
            # One iterator for the whole folder: each tar takes the next squares from it.
            squares = samples(regions[folder], size, seed, folder)

            for shard, first in enumerate(range(0, num, shard_size)):
                shard_num = min(shard_size, num - first)
                path = target / folder / f"{shard:05d}.tar"
                size_bytes = write_captioned_tar(path, first, islice(squares, shard_num))

                total = DatasetSize(total.shards + 1, total.bytes + size_bytes)
                bar.update(shard_num)

    return total


def write(out: Path, *, num: int, held_out: int, size: int, seed: int, shard_size: int) -> str:
    """Writes the data set into the folder `out`, unless it is there; a line that says which.

    Raises:
        UserError: `out` holds anything else or cannot be written, scikit-image is not installed,
            or a photograph is smaller than `size`.
    """
    arguments = {
        "num": num,
        "held_out": held_out,
        "size": size,
        "seed": seed,
        "shard_size": shard_size,
        "split": "thirds",  # a folder that an older version split by scenes is another data set
    }
    counts = dict(zip(FOLDERS, (num, held_out), strict=True))

    return write_once(
        out,
        "photographs.json",
        arguments,
        description=f"{num:,} + {held_out:,} squares of {size} px, seed {seed}",
        write=partial(write_squares, counts=counts, size=size, seed=seed, shard_size=shard_size),
    )


def main(argv: Sequence[str]) -> None:
    parser = dataset_parser(
        "photographs",
        "Crop squares from photographs into WebDataset tars.",
        contents="train/00000.tar ..., held_out/ and photographs.json",
    )
    add_options(parser, size=None, num=None, held_out=128, seed=0, shard_size=128)
    print(write(**vars(parser.parse_args(argv))))


if __name__ == "__main__":
    run(main)
