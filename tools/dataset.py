"""Shared by the tools that write data sets: command-line options, WebDataset tars, output folders.

A data set folder appears whole or not at all. Beside its tars it holds a JSON file with the
arguments that made it, so that the same command again does nothing and another one is refused.
"""

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.terminal import Parser, positive

JPEG_QUALITY = 92


class CaptionedImage(NamedTuple):
    """A sample before it is encoded."""

    image: np.ndarray  # uint8 (H, W, 3)
    caption: str
    fields: Mapping[str, Any]  # for KEY.json, beside width and height


class DatasetSize(NamedTuple):
    """Size of a data set on disk."""

    shards: int
    bytes: int


# Command line.


def seed(text: str) -> int:
    """An argparse type: an integer in [0, 2**64), as a key of Philox is."""
    value = int(text)
    if not 0 <= value < 2**64:
        raise argparse.ArgumentTypeError(f"{value} is outside [0, 2**64)")
    return value


OPTIONS: dict[str, tuple[Callable[[str], int], str]] = {
    "size": (positive, "width and height in pixels"),
    "num": (positive, "number of images"),
    "held_out": (positive, "number of images held out"),
    "seed": (seed, "seed of all random draws"),
    "shard_size": (positive, "images per tar"),
    "workers": (positive, "number of processes"),
}


def dataset_parser(tool: str, description: str, contents: str) -> Parser:
    """The parser of `python -m tools.TOOL OUT ...`; `contents` names the files that OUT gets."""
    parser = Parser(prog=f"python -m tools.{tool}", description=description)
    parser.add_argument("out", type=Path, metavar="OUT", help=f"folder to make, for {contents}")
    return parser


def add_options(parser: Parser, **defaults: int | None) -> None:
    """Adds these of `OPTIONS`, each with its default; one whose default is None is required."""
    for name, default in defaults.items():
        convert, text = OPTIONS[name]
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=convert,
            default=default,
            required=default is None,
            help=text if default is None else f"{text} (%(default)s)",
        )


# Tars.


def write_captioned_tar(path: Path, first: int, samples: Iterable[CaptionedImage]) -> int:
    """One tar of KEY.jpg, KEY.txt and KEY.json, as `write_tar` does; its size in bytes."""
    return write_tar(path, first, map(encode_sample, samples))


def encode_sample(sample: CaptionedImage) -> dict[str, bytes]:
    """The files of a sample, by their extensions."""
    height, width, _ = sample.image.shape
    fields = {**sample.fields, "width": width, "height": height}

    # Full colour resolution (4:4:4), as drawn images have edges between strong colours.
    image = np.ascontiguousarray(sample.image)
    jpeg = simplejpeg.encode_jpeg(image, JPEG_QUALITY, colorsubsampling="444")

    return {
        "jpg": jpeg,
        "txt": sample.caption.encode(),
        "json": json.dumps(fields).encode(),
    }


def write_tar(path: Path, first: int, samples: Iterable[Mapping[str, bytes]]) -> int:
    """One tar of samples {extension: bytes}, its keys counted from `first`; its size in bytes.

    The same samples give the same bytes: members have no time of modification.
    """
    # Imported here because webdataset imports torch where that is installed, and --help must not
    # wait for it.
    from webdataset import TarWriter

    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for index, files in enumerate(samples, first):
            tar.write({"__key__": f"{index:08d}", **files})

    return path.stat().st_size


def write_shards(
    folder: Path, num: int, *, shard_size: int, workers: int, write: Callable[[Path, range], int]
) -> DatasetSize:
    """Writes samples 0 to `num` - 1 as 00000.tar, 00001.tar, ... of `shard_size` samples each.

    Args:
        folder: where the tars go; it exists.
        num: number of samples.
        shard_size: samples per tar; the last one may have fewer.
        workers: processes.
        write: writes the samples of a range into a path, and returns the size in bytes. It is
            pickled if there are several workers.
    """
    ranges = [range(first, min(first + shard_size, num)) for first in range(0, num, shard_size)]
    paths = [folder / f"{shard:05d}.tar" for shard in range(len(ranges))]
    total_bytes = 0

    # Processes are spawned, not forked: a caller may have threads (MindSpore's), which do not
    # survive a fork.
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(min(workers, len(paths)), spawn) as pool,
        tqdm(total=num, unit=" images") as bar,
    ):
        sizes = pool.map(write, paths, ranges) if workers > 1 else map(write, paths, ranges)

        for indices, size in zip(ranges, sizes, strict=True):
            total_bytes += size
            bar.update(len(indices))

    return DatasetSize(len(paths), total_bytes)


# Folders.


def write_once(
    out: Path,
    info_name: str,
    arguments: Mapping[str, Any],
    *,
    description: str,
    write: Callable[[Path], DatasetSize],
) -> str:
    """Makes the data set `out` by `write`, unless it is there already; a line that says which.

    Args:
        out: the folder to make.
        info_name: the JSON file in it that records the arguments.
        arguments: the arguments that identify the data set.
        description: the data set in a few words, for the line that is returned.
        write: fills the folder that it is given.

    Raises:
        UserError: `out` holds anything else, or cannot be written.
    """
    if holds_dataset(out, info_name, arguments):
        return f"{out}: already there, {description}"

    with new_dataset(out, info_name, arguments) as folder:
        size = write(folder)

    return f"{out}: {description}; {size.shards:,} shards, {size.bytes:,} bytes"


def holds_dataset(out: Path, info_name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether `out` is the data set of these arguments. UserError if it holds anything else."""
    # An empty folder is replaced by the rename at the end.
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False

    try:
        present = json.loads((out / info_name).read_text())
    except (OSError, ValueError):
        present = "something else"

    if present != arguments:
        raise UserError(
            f"{out}: holds {present}, not {arguments}; remove it or choose another folder"
        )
    return True


@contextmanager
def new_dataset(out: Path, info_name: str, arguments: Mapping[str, Any]) -> Iterator[Path]:
    """A folder that becomes `out`, with the file of arguments, if the body succeeds; else it is
    removed.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside `out`, as only within a file system a rename is atomic.
        temporary = tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror}); choose another folder"
        ) from error

    with temporary as parent:
        folder = Path(parent) / out.name
        folder.mkdir()
        yield folder

        (folder / info_name).write_text(json.dumps(arguments) + "\n")
        folder.rename(out)
