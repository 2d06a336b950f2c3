"""How the tools that make data sets write them: WebDataset tars, in a folder that is whole or not
there.
"""

import json
import multiprocessing
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from tqdm import tqdm

from pipeline.errors import UserError

QUALITY = 92  # of the JPEG files

Sample = tuple[
    np.ndarray, str, Mapping[str, Any]
]  # uint8 (H, W, 3), its caption, and what else is known of it


def write_tar(path: Path, first: int, samples: Iterable[Sample]) -> int:
    """One tar of captioned pictures as JPEG, its keys counted from `first`; how many bytes it has."""
    return write_files(path, first, (captioned(*sample) for sample in samples))


def captioned(picture: np.ndarray, caption: str, facts: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a sample, by what follows the key in their names."""
    fields = {**facts, "width": picture.shape[1], "height": picture.shape[0]}
    return {
        # full colour resolution (4:4:4): edges between strong colours are all that drawn pictures
        # have
        "jpg": simplejpeg.encode_jpeg(
            np.ascontiguousarray(picture), QUALITY, colorsubsampling="444"
        ),
        "txt": caption.encode(),
        "json": json.dumps(fields).encode(),
    }


def write_files(path: Path, first: int, samples: Iterable[Mapping[str, bytes]]) -> int:
    """One tar of samples, their keys counted from `first`; how many bytes it has. The same samples,
    the same bytes.
    """
    from webdataset import (
        TarWriter,
    )  # late: webdataset imports torch where that is installed, and --help need not wait

    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for number, files in enumerate(samples, first):
            tar.write({"__key__": f"{number:08d}", **files})
    return path.stat().st_size


def write_shards(
    folder: Path, num: int, shard_size: int, workers: int, write: Callable[[Path, range], int]
) -> tuple[int, int]:
    """Samples 0 to `num` - 1 as 00000.tar and so on, each by one `write` of its path and samples;
    tars and bytes.
    """
    ranges = [range(first, min(first + shard_size, num)) for first in range(0, num, shard_size)]
    paths = [folder / f"{number:05d}.tar" for number in range(len(ranges))]
    total = 0
    # New processes rather than forked ones: a caller may have threads (MindSpore's), which do not
    # survive a fork.
    spawn = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(min(workers, len(paths)), spawn) as pool,
        tqdm(total=num, unit=" images") as bar,
    ):
        sizes = (pool.map if workers > 1 else map)(write, paths, ranges)
        for numbers, size in zip(ranges, sizes, strict=True):
            total += size
            bar.update(len(numbers))
    return len(paths), total


def written(out: Path, name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether `out` is this very data set, as its file `name` says; UserError if it is something
    else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        there = json.loads((out / name).read_text())
    except (OSError, ValueError):
        there = "something else"
    if there != arguments:
        raise UserError(
            f"{out}: holds {there}, not {arguments}; remove it or choose another folder"
        )
    return True


@contextmanager
def writing(out: Path, name: str, arguments: Mapping[str, Any]) -> Iterator[Path]:
    """A folder that becomes `out` if the body succeeds, and vanishes if not; `name` then says what
    was asked for.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent)
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror}); choose another folder"
        ) from error
    with temporary as side:
        folder = Path(side) / out.name
        folder.mkdir()
        yield folder
        (folder / name).write_text(json.dumps(arguments) + "\n")
        folder.rename(out)
