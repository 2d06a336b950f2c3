"""Pictures a second from tars of 1024-px JPEGs, beside `webdataset` and beside decoding alone; and
memory.

Three tasks: squares of 64 px, of 256 px, and 256-px crops of the whole 1024. `webdataset` reads in
sequence, decodes with "pilrgb" and Pillow shrinks (bicubic); more cores are more processes, each
with its part of the shards. Decoding alone has the files in memory and does `simplejpeg`'s scaled
decode and Pillow's resize, in threads. Ours is the whole loader: index, order, checksums, decoding,
cropping, batches of 64. Each measurement is a process of its own that keeps to so many processors;
the sides take turns, and medians are told.

The pictures are made here, noise of all scales at a quality that gives a photograph's bytes, unless
--shards names a folder of tars whose pictures have at least 1024 px.
"""

import argparse
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.terminal import positive
from tools.bench import turns

SIDE, QUALITY = 1024, 87  # 4:2:0, about 180 kB a picture
DISTINCT, SHARDS = 32, 8  # pictures, which come again and again; tars
TASKS = {"64px": (64, 64), "256px": (256, 256), "256px_of_1024": (SIDE, 256)}  # decoded for; given
SIDES = ("webdataset", "decode", "ours")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shards", type=Path, metavar="DIR", help="tars to read instead of those made here"
    )
    parser.add_argument(
        "--seconds", type=positive, default=4, metavar="S", help="of each measurement (%(default)s)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=3, metavar="N", help="of all sides (%(default)s)"
    )
    parser.add_argument(
        "--cores", type=positive, nargs="+", default=[1, 2], metavar="N", help="processors (1 2)"
    )
    parser.add_argument(
        "--memory",
        type=positive,
        default=20_000,
        metavar="N",
        help="samples that memory is watched over (%(default)s)",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.shards and not list(arguments.shards.glob("*.tar")):
        raise UserError(
            f"--shards {arguments.shards}: no *.tar there; `python -m tools.shapes` makes some"
        )
    return measure(
        arguments.seconds,
        arguments.rounds,
        arguments.cores,
        arguments.memory,
        shards=arguments.shards,
    )


def measure(
    seconds: int,
    rounds: int,
    cores: list[int],
    memory: int,
    samples: int = 1024,
    shards: Path | None = None,
) -> dict[str, Any]:
    """`rows`: pictures in how many seconds, by task, cores, side and round; resident memory over
    `memory` samples.
    """
    from tqdm import tqdm

    from pipeline.data.shards import DataConfig, Shards

    rows: turns.Rows = {}
    with TemporaryDirectory() as made:
        folder = shards or Path(made)
        if not shards:
            write(folder, samples)
        plan = [(task, num, side) for task in TASKS for num in cores for side in SIDES] * rounds
        for task, num, side in (bar := tqdm(plan, unit="process")):
            row = f"data_{task}_{num}core{'s' if num > 1 else ''}/{side}"
            bar.set_description(row)
            answer = turns.ours("tools.bench.data_side", side, folder, *TASKS[task], num, seconds)
            rows.setdefault(row, []).append(answer)
        last = ("tools.bench.data_side", "memory", folder, *TASKS["64px"], max(cores), memory)
        resident = turns.ours(*last)["resident"]
        indexes = Shards.open(DataConfig(shards=f"{folder}/*.tar"), progress=False).indexes
        size = float(np.mean(np.concatenate([index.column("size")[:, 0] for index in indexes])))
    return {
        **turns.report(rows, of_a_picture, {}, "webdataset", "simplejpeg", "pillow", "numpy"),
        "resident": resident,
        "rounds": rounds,
        "seconds": seconds,
        "kilobytes": size / 1000,
    }


def of_a_picture(rounds: list[dict[str, Any]]) -> float:
    """Median seconds."""
    return median(answer["seconds"] / answer["pictures"] for answer in rounds)


def picture(number: int) -> np.ndarray:
    """uint8 (SIDE, SIDE, 3): noise that falls with the frequency, a little faster than a
    photograph.
    """
    from pipeline.rng import generator

    rng = generator(0, "shapes", number)
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.standard_normal((3, SIDE, SIDE)), axes=(1, 2)) / frequency**1.5
    x = np.fft.irfft2(spectrum, (SIDE, SIDE), axes=(1, 2))
    x = (x - x.mean(axis=(1, 2), keepdims=True)) / x.std(axis=(1, 2), keepdims=True)
    return np.clip(128 + 55 * x, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def write(folder: Path, samples: int) -> None:
    """The tars 0.tar, 1.tar, ..."""
    import simplejpeg
    from webdataset import TarWriter

    pictures = (np.ascontiguousarray(picture(number)) for number in range(DISTINCT))
    files = [simplejpeg.encode_jpeg(each, QUALITY, colorsubsampling="420") for each in pictures]
    for shard in range(SHARDS):
        with (
            (folder / f"{shard}.tar").open("wb") as file,
            TarWriter(file, encoder=False, mtime=0) as tar,
        ):
            for number in range(shard, samples, SHARDS):
                sample = {
                    "__key__": f"{number:08d}",
                    "jpg": files[number % DISTINCT],
                    "txt": b"a picture",
                }
                tar.write({**sample, "json": b'{"width": 1024, "height": 1024}'})


def table(report: dict[str, Any]) -> str:
    """Markdown: the speeds of each task, and memory."""
    lines: list[str] = []
    for case in dict.fromkeys(row.partition("/")[0] for row in report["rows"]):
        rows = {side: report["rows"][f"{case}/{side}"] for side in SIDES}
        speeds = {
            side: [each["pictures"] / each["seconds"] for each in rounds]
            for side, rounds in rows.items()
        }
        headings = (case, "pictures/s", "lowest to highest", "ours is")
        lines += [*turns.speeds(speeds, "ours", headings), ""]
    resident = ", ".join(
        f"{size / 2**20:.0f} MiB after {number:,}" for number, size in report["resident"]
    )
    measured = f"Medians of {report['rounds']} rounds of {report['seconds']} s; pictures of {report['kilobytes']:.0f} kB"
    return "\n".join(
        [
            *lines,
            f"Resident memory of the loader at 64 px: {resident} samples.",
            "",
            turns.footer(report, measured),
        ]
    )
