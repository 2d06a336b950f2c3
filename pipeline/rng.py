"""Randomness as data: every draw is a pure function of (seed, purpose, counters).

NumPy's Philox is a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1,
2, 3", SC 2011): a key and a 256-bit counter name a stream. The seed and the purpose are the key;
step, position in the global batch or image number are the high words of the counter. A draw
therefore depends neither on the rank that makes it, nor on the size of the batch it is part of, nor
on how often the job was restarted.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

# One number a purpose, so that two kinds of draw never share a stream. Part of a run's identity:
# never reuse one.
PURPOSES = {
    "order": 1,  # permutation of the samples of a window
    "crop": 2,  # which square of a picture
    "time": 3,  # diffusion time of a training sample
    "noise": 4,  # eps of a training sample
    "drop": 5,  # which captions are dropped
    "augment": 6,  # level and noise of the low resolution
    "replace": 7,  # stand-in for a sample that cannot be decoded
    "init": 8,  # parameters
    "sample": 9,  # noise of sampling, by image number and stage
    "shapes": 10,  # synthetic scenes
    "window": 11,  # which window of the square, for super-resolution
    "shards": 12,  # permutation of the shards of an epoch
    "mix": 13,  # which data set, in a block of places
    "caption": 14,  # which of a sample's captions
    "damage": 15,  # what becomes of a picture that is to be restored
    "photographs": 16,  # crops of photographs
    "glyphs": 17,  # handwriting of digits
    "dropout": 18,  # what a network's dropout is seeded with, for each sample
}


def generator(seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """The stream of `purpose` under `seed` at up to three `counters` (each in [0, 2**64)): step,
    position, ...
    """
    words = [
        0,
        *counters,
        *[0] * (3 - len(counters)),
    ]  # the lowest word counts the draws within the stream
    key, counter = np.array([seed, PURPOSES[purpose]], np.uint64), np.array(words, np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def unit_noise(streams: Sequence[np.random.Generator], shape: tuple[int, ...]) -> np.ndarray:
    """float32 (B, *shape). Drawn in threads: at 1024 px a batch's draws take as long as a small
    network's call.
    """
    noise = np.empty((len(streams), *shape), np.float32)

    def draw(stream: np.random.Generator, out: np.ndarray) -> None:
        stream.standard_normal(dtype=np.float32, out=out)

    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as threads:
        list(threads.map(draw, streams, noise))
    return noise


def sampling_noise(
    seed: int, numbers: Sequence[int], shape: tuple[int, ...], step: int
) -> np.ndarray:
    """Unit noise float32 (B, *shape); the size of the picture tells the stages of a cascade apart."""
    return unit_noise(
        [generator(seed, "sample", number, shape[-1], step) for number in numbers], shape
    )


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
