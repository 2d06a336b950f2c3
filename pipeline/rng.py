"""Randomness as data: every draw is a pure function of (seed, purpose, counters).

NumPy's Philox is a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1,
2, 3", SC 2011): a 128-bit key and a 256-bit counter select a stream. The seed and the purpose are
the key; up to three counters, such as step, position in the global batch or image id, are the high
words of the counter. A draw therefore does not depend on the rank that makes it, on the batch size,
or on how often the job was restarted.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

MAX_COUNTERS = 3

# One number per purpose, so that no two kinds of draw share a stream. Names and numbers are part of
# a run's identity: never change or reuse one.
PURPOSES = {
    "order": 1,  # permutation of the samples of some shards
    "crop": 2,  # position of a crop
    "time": 3,  # diffusion time
    "noise": 4,  # Gaussian noise of a training sample
    "drop": 5,  # whether a condition is dropped
    "augment": 6,  # level and noise of conditioning augmentation
    "replace": 7,  # substitute for an unreadable sample
    "init": 8,  # initial parameters
    "sample": 9,  # noise of sampling, by image id, image size and step
    "shapes": 10,  # synthetic shapes
    "window": 11,  # position of a window within a crop
    "shards": 12,  # permutation of the shards of an epoch
    "mix": 13,  # which data set a sample comes from
    "caption": 14,  # which of a sample's captions is used
    "damage": 15,  # degradation of an image
    "photographs": 16,  # crops of photographs
    "glyphs": 17,  # handwritten digits
    "dropout": 18,  # seed of a sample's dropout masks
    "validation": 19,  # all draws of a validation sample, by purpose
}


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """The stream of `purpose` under `seed` at up to three `counters`, each in [0, 2**64).

    Counters that are left out are 0. KeyError for a purpose that is not in `PURPOSES`.
    """
    padding = [0] * (MAX_COUNTERS - len(counters))

    # The lowest word is Philox's own: it counts the draws within the stream.
    words = [0, *counters, *padding]

    key = np.array([seed, PURPOSES[purpose]], np.uint64)
    counter = np.array(words, np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def unit_noise(streams: Sequence[np.random.Generator], shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise, float32 (B, *shape), one stream per image."""
    noise = np.empty((len(streams), *shape), np.float32)
    for stream, image in zip(streams, noise, strict=True):
        fill_with_noise(stream, image)
    return noise


def fill_with_noise(stream: np.random.Generator, out: np.ndarray) -> None:
    stream.standard_normal(dtype=np.float32, out=out)


def sampling_noise(
    seed: int, image_ids: Sequence[int], shape: tuple[int, ...], step: int
) -> np.ndarray:
    """Standard normal noise for sampling, float32 (B, *shape), with `shape` ending in the width.

    The width is a counter of the stream, so that models of different resolution draw different
    noise for the same image id. Drawn in threads: at 1024 px, drawing a batch takes as long as
    evaluating a small network. (In training the loader's threads draw already.)
    """
    width = shape[-1]
    streams = [generator(seed, "sample", image_id, width, step) for image_id in image_ids]

    noise = np.empty((len(streams), *shape), np.float32)
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as threads:
        # The list waits for all of them, and raises what one of them raised.
        list(threads.map(fill_with_noise, streams, noise))
    return noise


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The randomness of a training batch: each position of the global batch has streams of its own.

    So a sample's draws depend neither on the rank nor on the other samples.
    """

    seed: int
    step: int
    positions: Sequence[int]

    def streams(self, purpose: str) -> list[np.random.Generator]:
        return [generator(self.seed, purpose, self.step, place) for place in self.positions]

    def uniform(self, purpose: str) -> np.ndarray:
        """float64 (B,) in [0, 1)."""
        return np.array([stream.random() for stream in self.streams(purpose)])

    def noise(self, purpose: str, shape: tuple[int, ...]) -> np.ndarray:
        """Unit noise, float32 (B, *shape)."""
        return unit_noise(self.streams(purpose), shape)

    def uniform_and_noise(
        self, purpose: str, shape: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Both, the noise from what follows the first draw of each stream."""
        streams = self.streams(purpose)
        uniform = np.array([stream.random() for stream in streams])
        return uniform, unit_noise(streams, shape)
