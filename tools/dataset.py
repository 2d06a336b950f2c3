"""How the tools that make data sets write them: WebDataset tars, in a folder that is whole or not there."""

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from pipeline.errors import UserError

QUALITY = 92  # of the JPEG files

Sample = tuple[np.ndarray, str, Mapping[str, Any]]  # uint8 (H, W, 3), its caption, and what else is known of it


def write_tar(path: Path, first: int, samples: Iterable[Sample]) -> int:
    """One tar, its keys counted from `first`; how many bytes it has. The same samples give the same bytes."""
    from webdataset import TarWriter  # late: webdataset imports torch where that is installed, and --help need not wait

    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for number, (picture, caption, facts) in enumerate(samples, first):
            fields = {**facts, "width": picture.shape[1], "height": picture.shape[0]}
            tar.write(
                {
                    "__key__": f"{number:08d}",
                    # full colour resolution (4:4:4): edges between strong colours are all that drawn pictures have
                    "jpg": simplejpeg.encode_jpeg(np.ascontiguousarray(picture), QUALITY, colorsubsampling="444"),
                    "txt": caption.encode(),
                    "json": json.dumps(fields).encode(),
                }
            )
    return path.stat().st_size


def written(out: Path, name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether `out` is this very data set, as its file `name` says; UserError if it is something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        there = json.loads((out / name).read_text())
    except (OSError, ValueError):
        there = "something else"
    if there != arguments:
        raise UserError(f"{out}: holds {there}, not {arguments}; remove it or choose another folder")
    return True


@contextmanager
def writing(out: Path, name: str, arguments: Mapping[str, Any]) -> Iterator[Path]:
    """A folder that becomes `out` if the body succeeds, and vanishes if not; `name` then says what was asked for."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another folder") from error
    with temporary as side:
        folder = Path(side) / out.name
        folder.mkdir()
        yield folder
        (folder / name).write_text(json.dumps(arguments) + "\n")
        folder.rename(out)
