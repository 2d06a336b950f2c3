"""Measure the pixels of data sets: the mean and the standard deviation of each channel, as a
stage's `pixels:` wants.

    python -m tools.pixels 'runs/classic/shapes/*.tar'

In [-1, 1], over all pixels of the pictures as they lie there; shrinking them for a stage leaves the
mean and takes a little from the deviation. What is summed is how often each of 256 values occurs,
in whole numbers: so the answer is exact, and does not depend on the order.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.terminal import Parser, run

if TYPE_CHECKING:
    from pipeline.data.shards import Shards

VALUES = 256


def histogram(shards: "Shards") -> tuple[np.ndarray, Counter[str]]:
    """How often each value occurs in each channel, int64 (3, 256), and why pictures were left out."""
    from pipeline.data.decode import MAX_SIDE, BadImage, decode
    from pipeline.data.shards import DamagedSample

    counts_CV, out = np.zeros((3, VALUES), np.int64), Counter[str]()
    for number in tqdm(range(len(shards)), unit=" images"):
        try:
            pixels = decode(shards.image(number), size=MAX_SIDE).pixels
        except (BadImage, DamagedSample) as error:
            out[str(error)] += 1
            continue
        for channel in range(3):
            counts_CV[channel] += np.bincount(pixels[..., channel].ravel(), minlength=VALUES)
    return counts_CV, out


def moments(counts_CV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (3,) in [-1, 1], float64."""
    values = np.arange(VALUES) / 127.5 - 1
    mean = counts_CV @ values / counts_CV.sum(axis=1)
    return mean, np.sqrt(
        (counts_CV * (values - mean[:, None]) ** 2).sum(axis=1) / counts_CV.sum(axis=1)
    )


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m tools.pixels", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="tars, with {00000..00127} and *; file: and http(s): URLs too",
    )
    arguments = parser.parse_args(argv)

    from pipeline.data.shards import DataConfig, Shards
    from pipeline.log import setup_logging

    setup_logging()
    shards = Shards.open(DataConfig(shards=tuple(arguments.shards), captions={}, max_damage=1.0))
    counts, out = histogram(shards)
    if not counts.any():
        raise UserError(
            f"{' '.join(arguments.shards)}: no picture can be decoded ({', '.join(out)})"
        )
    mean, std = ([round(number, 4) for number in each.tolist()] for each in moments(counts))
    for reason, number in out.most_common():
        print(f"# left out: {number:,} that {reason}")
    print(f"pixels: {{mean: {mean}, std: {std}}}")


if __name__ == "__main__":
    run(main)
