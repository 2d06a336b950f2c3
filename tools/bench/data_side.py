"""One side of `python -m tools.bench data`: what it did in how many seconds, as JSON on the last
line of stdout.
"""

import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 64
WATCHED = 5  # times that memory is looked at


def webdataset(
    shards: list[str], decoded: int, given: int, cores: int, number: int
) -> Iterator[int]:
    """One for each picture of this core's shards."""
    import webdataset as wds
    from PIL import Image

    for (image,) in (
        wds.WebDataset(shards[number::cores] * 1000, shardshuffle=False)
        .decode("pilrgb")
        .to_tuple("jpg")
    ):
        if decoded != given:
            left, top = np.random.default_rng().integers(0, min(image.size) - given, 2)
            square = image.crop((left, top, left + given, top + given))
        else:
            square = image.resize((given, given), Image.Resampling.BICUBIC)
        np.asarray(square)
        yield 1


def decode(shards: list[str], decoded: int, given: int, cores: int, number: int) -> Iterator[int]:
    import tarfile

    import simplejpeg
    from PIL import Image

    with tarfile.open(shards[0]) as tar:
        members = [member for member in tar if member.name.endswith(".jpg")][:BATCH]
        files = [file.read() for file in map(tar.extractfile, members) if file]
    for data in itertools.cycle(files):
        image = simplejpeg.decode_jpeg(data, min_height=decoded, min_width=decoded)
        if decoded != given:
            top, left = np.random.default_rng().integers(0, decoded - given, 2)
            np.ascontiguousarray(image[top : top + given, left : left + given])
        elif len(image) != given:
            np.asarray(Image.fromarray(image).resize((given, given), Image.Resampling.HAMMING))
        yield 1


def ours(folder: Path, decoded: int, given: int, cores: int) -> Iterator[int]:
    """The size of each batch."""
    from pipeline.data.loader import Loader
    from pipeline.data.shards import DataConfig, Shards
    from pipeline.text.prompts import Arrays, NoPrompts

    def arrange(step: int, positions: Sequence[int], *arrays: np.ndarray) -> Arrays:
        return arrays

    config = DataConfig(
        shards=f"{folder}/*.tar", global_batch=BATCH, shuffle_shards=2, workers=cores
    )
    shards = Shards.open(config, progress=False)
    loader = Loader(
        shards, NoPrompts(), 0, decoded, given, arrange, folder / "quarantine.jsonl", range(BATCH)
    )
    for pictures, *_ in loader.batches(0, 10**9):
        assert pictures.shape == (BATCH, given, given, 3)
        yield BATCH


def rate(done: Iterator[int], seconds: float) -> tuple[int, float]:
    """How many came in how many seconds, after the first `seconds` / 4."""
    end, number = time.perf_counter() + seconds / 4, 0
    while time.perf_counter() < end:
        next(done)
    start = time.perf_counter()
    while time.perf_counter() < start + seconds:
        number += next(done)
    return number, time.perf_counter() - start


def work(make: Callable[[int], Iterator[int]], seconds: float, number: int) -> float:
    pictures, taken = rate(make(number), seconds)
    return pictures / taken


def together(
    side: str, shards: list[str], decoded: int, given: int, cores: int, seconds: float
) -> dict[str, Any]:
    """The rates of `cores` workers at once, as one: processes of `webdataset`, threads of what
    decodes alone.
    """
    make = partial(
        {"webdataset": webdataset, "decode": decode}[side], shards, decoded, given, cores
    )
    pool = multiprocessing.get_context("fork").Pool if side == "webdataset" else ThreadPool
    with pool(cores) as workers:
        return {
            "pictures": sum(workers.map(partial(work, make, seconds), range(cores))),
            "seconds": 1.0,
        }


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(folder: Path, decoded: int, given: int, cores: int, samples: int) -> dict[str, Any]:
    seen = 0
    found: list[tuple[int, int]] = []
    for number in ours(folder, decoded, given, cores):
        seen += number
        if seen >= (len(found) + 1) * samples / WATCHED:
            found.append((seen, resident()))
        if len(found) == WATCHED:
            return {"resident": found}
    raise AssertionError("the loader ends")


def main(
    side: str, folder: Path, decoded: int, given: int, cores: int, amount: int
) -> dict[str, Any]:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    shards = sorted(map(str, folder.glob("*.tar")))
    if side == "memory":
        return memory(folder, decoded, given, cores, amount)
    if side == "ours":
        number, taken = rate(ours(folder, decoded, given, cores), amount)
        return {"pictures": number, "seconds": taken}
    return together(side, shards, decoded, given, cores, amount)


if __name__ == "__main__":
    side, folder, *numbers = sys.argv[1:]
    print(json.dumps(main(side, Path(folder), *map(int, numbers))))
