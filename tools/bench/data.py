"""Images per second from tars of 1024-px JPEGs, beside `webdataset` and bare decoding; and memory.

Three tasks: squares of 64 px, squares of 256 px, and 256-px crops of the whole 1024. `webdataset`
reads in sequence, decodes with "pilrgb" and Pillow resizes (bicubic); more cores are more
processes, each with its share of the tars. Bare decoding has the files in memory and does
simplejpeg's scaled decode and Pillow's resize, in threads. Ours is the whole loader: index, order,
checksums, decoding, cropping, batches of 64. Each measurement is a process bound to its number of
processors.

The images are made here, noise of all scales with a photograph's size in bytes, unless --shards
names a folder of tars whose images have at least 1024 px.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.terminal import positive
from tools.bench.options import add_count
from tools.bench.process import run_worker
from tools.bench.report import Answer, Rows, footer, markdown, speed_rows, summarize

SIDE = 1024  # pixels
JPEG_QUALITY = 87  # with 4:2:0 chroma, about 180 kB per image
NUM_SAMPLES = 1024
NUM_DISTINCT = 32  # images, which the samples repeat
NUM_SHARDS = 8
IMPLEMENTATIONS = ("webdataset", "decode", "ours")


@dataclass(frozen=True, kw_only=True)
class Task:
    """How each image is read, in pixels."""

    decoded: int  # least side at which it is decoded
    size: int  # side of the square; a crop if it differs from `decoded`


TASKS = {
    "64px": Task(decoded=64, size=64),
    "256px": Task(decoded=256, size=256),
    "256px_of_1024": Task(decoded=SIDE, size=256),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shards", type=Path, metavar="DIR", help="tars to read instead of those made here"
    )
    add_count(parser, "--seconds", 4, "seconds of each measurement", metavar="S")
    add_count(parser, "--rounds", 3, "rounds of all implementations")
    parser.add_argument(
        "--cores", type=positive, nargs="+", default=[1, 2], metavar="N", help="processors (1 2)"
    )
    add_count(parser, "--memory", 20_000, "samples over which memory is watched")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.shards and not list(arguments.shards.glob("*.tar")):
        raise UserError(
            f"shards: {arguments.shards} has no *.tar; `python -m tools.shapes` makes some"
        )
    return measure(
        seconds=arguments.seconds,
        rounds=arguments.rounds,
        cores=arguments.cores,
        memory_samples=arguments.memory,
        shards=arguments.shards,
    )


def measure(
    *,
    seconds: int,
    rounds: int,
    cores: list[int],
    memory_samples: int,
    shards: Path | None = None,
    tasks: dict[str, Task] = TASKS,
) -> dict[str, Any]:
    """`rows`: images read and seconds, by task, cores and implementation; `resident`: memory.

    Args:
        seconds: of each measurement.
        rounds: of all implementations.
        cores: the numbers of processors to measure with.
        memory_samples: samples over which the loader's resident memory is watched.
        shards: a folder of tars to read instead of those made here.
        tasks: how images are read, by name.
    """
    from tqdm import tqdm

    plan = [(task, num, side) for task in tasks for num in cores for side in IMPLEMENTATIONS]
    rows: Rows = {}

    with TemporaryDirectory() as temporary:
        folder = shards or Path(temporary)
        if not shards:
            write_shards(folder)

        # Round after round: a change of the machine's load meets all implementations.
        for name, num, side in (bar := tqdm(plan * rounds, unit="process")):
            row = f"data_{name}_{num}core{'s' if num > 1 else ''}/{side}"
            bar.set_description(row)
            task = tasks[name]
            answer = run_worker("data", side, folder, task.decoded, task.size, num, seconds)
            rows.setdefault(row, []).append(answer)

        smallest = TASKS["64px"]
        sizes = (smallest.decoded, smallest.size)
        # At the smallest size, where samples come fastest.
        memory = run_worker("data", "memory", folder, *sizes, max(cores), memory_samples)
        kilobytes = mean_kilobytes(folder)

    packages = ["webdataset", "simplejpeg", "pillow", "numpy"]
    return {
        **summarize(rows, seconds_per_image, packages=packages),
        "resident": memory["resident"],
        "rounds": rounds,
        "seconds": seconds,
        "kilobytes": kilobytes,
    }


def seconds_per_image(rounds: Sequence[Answer]) -> float:
    """The median."""
    return median(answer["seconds"] / answer["images"] for answer in rounds)


def mean_kilobytes(folder: Path) -> float:
    """Of an image in the tars of a folder."""
    from pipeline.data.config import DataConfig
    from pipeline.data.shards import Shards

    indexes = Shards.open(DataConfig(shards=f"{folder}/*.tar"), progress=False).indexes
    sizes = np.concatenate([index.column("size")[:, 0] for index in indexes])
    return float(np.mean(sizes)) / 1000


def noise_image(index: int) -> np.ndarray:
    """uint8 (SIDE, SIDE, 3): noise whose amplitude falls with frequency to the power of 1.5, a
    little faster than a photograph's.
    """
    from pipeline.rng import generator

    rng = generator(0, "shapes", index)
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None])
    # The mean, which is subtracted below: any number but 0.
    frequency[0, 0] = 1

    spectrum = np.fft.rfft2(rng.standard_normal((3, SIDE, SIDE)), axes=(1, 2)) / frequency**1.5
    x = np.fft.irfft2(spectrum, (SIDE, SIDE), axes=(1, 2))
    x = (x - x.mean(axis=(1, 2), keepdims=True)) / x.std(axis=(1, 2), keepdims=True)
    return np.clip(128 + 55 * x, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def write_shards(
    folder: Path, num_samples: int = NUM_SAMPLES, num_distinct: int = NUM_DISTINCT
) -> None:
    """The tars 0.tar, 1.tar, ..., with captions and the images' sizes."""
    import simplejpeg
    from webdataset import TarWriter

    images = (np.ascontiguousarray(noise_image(index)) for index in range(num_distinct))
    jpegs = [
        simplejpeg.encode_jpeg(image, JPEG_QUALITY, colorsubsampling="420") for image in images
    ]

    for shard in range(NUM_SHARDS):
        with (
            (folder / f"{shard}.tar").open("wb") as file,
            TarWriter(file, encoder=False, mtime=0) as tar,
        ):
            for index in range(shard, num_samples, NUM_SHARDS):
                tar.write(
                    {
                        "__key__": f"{index:08d}",
                        # Few images, repeated: a reader decodes each of them again.
                        "jpg": jpegs[index % num_distinct],
                        "txt": b"an image",
                        "json": b'{"width": 1024, "height": 1024}',
                    }
                )


def table(report: dict[str, Any]) -> str:
    """A table of speeds for each task and number of cores, and memory."""
    lines: list[str] = []
    for case in dict.fromkeys(row.partition("/")[0] for row in report["rows"]):
        speeds = {
            side: [each["images"] / each["seconds"] for each in report["rows"][f"{case}/{side}"]]
            for side in IMPLEMENTATIONS
        }
        headings = (case, "images/s", "lowest to highest", "ours is")
        lines += [*markdown(headings, speed_rows(speeds, "ours")), ""]

    resident = ", ".join(
        f"{size / 2**20:.0f} MiB after {num_samples:,}" for num_samples, size in report["resident"]
    )
    measured = (
        f"Medians of {report['rounds']} rounds of {report['seconds']} s; "
        f"images of {report['kilobytes']:.0f} kB"
    )
    return "\n".join(
        [
            *lines,
            f"Resident memory of the loader at 64 px: {resident} samples.",
            "",
            footer(report, measured),
        ]
    )
