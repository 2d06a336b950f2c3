"""`MODE FOLDER DECODED SIZE CORES AMOUNT`: reads images from the tars of FOLDER on CORES cores.

MODE is one of the three ways to read, or `memory`. Images are decoded at a shorter side of at least
DECODED pixels and given out as squares of SIZE: resized, or cropped where the two differ. AMOUNT is
seconds, or, of `memory`, the number of samples over which the loader's resident memory is watched.
"""

import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np

from tools.bench.workers.timing import print_answer

BATCH = 64
NUM_READINGS = 5  # of resident memory
MANY = 1000  # epochs: more than any measurement takes
MANY_STEPS = 10**9
WARM_UP = 0.25  # of the measured time


@dataclass(frozen=True, kw_only=True)
class ReadTask:
    """How images are read."""

    folder: Path  # of tars
    decoded: int  # least side at which a JPEG is decoded, in pixels
    size: int  # side of the squares, in pixels
    cores: int

    @property
    def crops(self) -> bool:
        """Whether squares are cropped, rather than resized."""
        return self.decoded != self.size

    @property
    def tars(self) -> list[str]:
        return sorted(map(str, self.folder.glob("*.tar")))


# Ways to read. Each yields the number of images that it has just read.


def webdataset(task: ReadTask, worker: int) -> Iterator[int]:
    """Reads this worker's tars in sequence, decodes with "pilrgb" and resizes with Pillow."""
    import webdataset as wds
    from PIL import Image

    # Repeated, so that no measurement comes to their end.
    tars = task.tars[worker :: task.cores] * MANY
    images = wds.WebDataset(tars, shardshuffle=False).decode("pilrgb").to_tuple("jpg")

    for (image,) in images:
        if task.crops:
            left, top = np.random.default_rng().integers(0, min(image.size) - task.size, 2)
            square = image.crop((left, top, left + task.size, top + task.size))
        else:
            square = image.resize((task.size, task.size), Image.Resampling.BICUBIC)
        # A batch would need the pixels as an array.
        np.asarray(square)
        yield 1


def decode_only(task: ReadTask, worker: int) -> Iterator[int]:
    """Decodes files that are in memory, scaled, with simplejpeg, and resizes with Pillow."""
    import tarfile

    import simplejpeg
    from PIL import Image

    with tarfile.open(task.tars[0]) as tar:
        # In memory, as this is the time without any reading.
        members = [member for member in tar if member.name.endswith(".jpg")][:BATCH]
        files = [file.read() for file in map(tar.extractfile, members) if file]

    for data in itertools.cycle(files):
        image = simplejpeg.decode_jpeg(data, min_height=task.decoded, min_width=task.decoded)
        if task.crops:
            top, left = np.random.default_rng().integers(0, task.decoded - task.size, 2)
            np.ascontiguousarray(image[top : top + task.size, left : left + task.size])
        elif len(image) != task.size:
            square = (task.size, task.size)
            # With the kernel of the loader's own resizing.
            np.asarray(Image.fromarray(image).resize(square, Image.Resampling.HAMMING))
        yield 1


def ours(task: ReadTask) -> Iterator[int]:
    """The whole loader: index, order, checksums, decoding, cropping, batches."""
    from pipeline.data.config import DataConfig
    from pipeline.data.image import ImageSize
    from pipeline.data.loader import Loader
    from pipeline.data.shards import Shards
    from pipeline.rng import Draws
    from pipeline.stage.inputs import Arrays
    from pipeline.text.prompts import NoPrompts

    def images_alone(images: np.ndarray, prompt: Arrays, draws: Draws) -> Arrays:
        return {"images": images}

    config = DataConfig(
        shards=f"{task.folder}/*.tar", global_batch=BATCH, shuffle_shards=2, workers=task.cores
    )
    loader = Loader(
        Shards.open(config, progress=False),
        NoPrompts(),
        seed=0,
        size=ImageSize(side=task.decoded, window=task.size),
        make_inputs=images_alone,
        quarantine=task.folder / "quarantine.jsonl",
        share=range(BATCH),
    )
    for batch in loader.batches(0, MANY_STEPS):
        assert batch["images"].shape == (BATCH, task.size, task.size, 3)
        yield BATCH


PEERS = {"webdataset": webdataset, "decode": decode_only}


# Measurements.


def measure_rate(reader: Iterator[int], seconds: float) -> tuple[int, float]:
    """Images read, and the seconds that they took, after a warm-up."""
    end = time.perf_counter() + WARM_UP * seconds
    while time.perf_counter() < end:
        next(reader)

    num_images = 0
    start = time.perf_counter()
    while time.perf_counter() < start + seconds:
        num_images += next(reader)

    # Measured, as the last read ends later than `seconds`.
    return num_images, time.perf_counter() - start


def peer_rate(mode: str, task: ReadTask, seconds: float, worker: int) -> float:
    """Images per second of one worker of a peer."""
    num_images, taken = measure_rate(PEERS[mode](task, worker), seconds)
    return num_images / taken


def measure_peer(mode: str, task: ReadTask, seconds: float) -> dict[str, Any]:
    """The summed rate of one worker per core: processes of `webdataset`, threads of `decode`."""
    pool = multiprocessing.get_context("fork").Pool if mode == "webdataset" else ThreadPool
    with pool(task.cores) as workers:
        rates = workers.map(partial(peer_rate, mode, task, seconds), range(task.cores))
    return {"images": sum(rates), "seconds": 1.0}


def measure_ours(task: ReadTask, seconds: float) -> dict[str, Any]:
    num_images, taken = measure_rate(ours(task), seconds)
    return {"images": num_images, "seconds": taken}


def measure_memory(task: ReadTask, samples: int) -> dict[str, Any]:
    """Resident memory of the loader's process in bytes, at NUM_READINGS numbers of samples."""
    num_read = 0
    readings: list[tuple[int, int]] = []

    for num_images in ours(task):
        num_read += num_images
        # The next of NUM_READINGS numbers at equal distances.
        if num_read >= (len(readings) + 1) * samples / NUM_READINGS:
            readings.append((num_read, resident_memory()))
        if len(readings) == NUM_READINGS:
            break
    return {"resident": readings}


def resident_memory() -> int:
    """Bytes of this process that are in memory."""
    # The second field of proc_pid_statm(5) is the resident set, in pages.
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main(mode: str, task: ReadTask, amount: int) -> dict[str, Any]:
    # Before the first thread or process starts, as each inherits it.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.cores])
    if mode == "memory":
        return measure_memory(task, amount)
    if mode == "ours":
        return measure_ours(task, amount)
    return measure_peer(mode, task, amount)


if __name__ == "__main__":
    mode, folder, *counts = sys.argv[1:]
    decoded, size, cores, amount = map(int, counts)
    task = ReadTask(folder=Path(folder), decoded=decoded, size=size, cores=cores)
    print_answer(main(mode, task, amount))
