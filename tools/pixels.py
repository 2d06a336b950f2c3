"""Measure the pixels of data sets: the mean and the standard deviation of each channel, for a
stage's `pixels`.

    python -m tools.pixels 'runs/classic/shapes/*.tar'

In [-1, 1], over all pixels at the size at which they are stored; resizing for a stage keeps the
mean and lowers the deviation a little. The statistics come from integer histograms, so they are
exact and do not depend on the order of the images.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.terminal import Parser, run

if TYPE_CHECKING:
    from pipeline.data.shards import Shards

LEVELS = 256


class Histogram(NamedTuple):
    """Pixel levels of a data set."""

    counts_CL: np.ndarray  # int64 (3, LEVELS): how often each level occurs in each channel
    skipped: Counter[str]  # images that cannot be decoded, by reason


def histogram(shards: "Shards") -> Histogram:
    """Decodes every image."""
    from pipeline.data.decode import MAX_SIDE, BadImage, decode
    from pipeline.data.shards import DamagedSample

    counts_CL = np.zeros((3, LEVELS), np.int64)
    skipped: Counter[str] = Counter()

    for sample in tqdm(range(len(shards)), unit=" images"):
        try:
            pixels = decode(shards.image(sample), size=MAX_SIDE).pixels
        except (BadImage, DamagedSample) as error:
            skipped[str(error)] += 1
            continue

        for channel in range(3):
            counts_CL[channel] += np.bincount(pixels[..., channel].ravel(), minlength=LEVELS)

    return Histogram(counts_CL, skipped)


def moments(counts_CL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation, float64 (3,) each, in [-1, 1]."""
    # As `pipeline.data.image.to_float` maps levels.
    values_L = np.arange(LEVELS) / 127.5 - 1
    num_C = counts_CL.sum(axis=1)

    mean_C = counts_CL @ values_L / num_C
    variance_C = (counts_CL * (values_L - mean_C[:, None]) ** 2).sum(axis=1) / num_C
    return mean_C, np.sqrt(variance_C)


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m tools.pixels", description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="tars, with {00000..00127} and *; file: and http(s): URLs too",
    )
    arguments = parser.parse_args(argv)

    from pipeline.data.config import DataConfig
    from pipeline.data.shards import Shards
    from pipeline.log import setup_logging

    setup_logging()
    # Without captions, and whatever is damaged: it is counted, not refused.
    shards = Shards.open(DataConfig(shards=tuple(arguments.shards), captions={}, max_damage=1.0))
    result = histogram(shards)
    if not result.counts_CL.any():
        raise UserError(
            f"{' '.join(arguments.shards)}: no image can be decoded ({', '.join(result.skipped)})"
        )

    mean, std = ([round(value, 4) for value in each.tolist()] for each in moments(result.counts_CL))
    for reason, num in result.skipped.most_common():
        # As comments, so that the whole output is YAML.
        print(f"# skipped {num:,}: {reason}")
    print(f"pixels: {{mean: {mean}, std: {std}}}")


if __name__ == "__main__":
    run(main)
