"""Hugging Face folders: JSON, and weights in safetensors, single or sharded, one tensor at a time.

The `safetensors` package gives NumPy no bfloat16 and maps whole files, which would count twice in
the memory of a large model; so the file's header is read here, and then each tensor by its place.
NumPy has no bfloat16 either: here such numbers are uint16, the upper halves of float32.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import UserError

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # of safetensors


class Stored(NamedTuple):
    """A tensor in a safetensors file, not yet read."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # in the file, bytes
    size: int  # bytes

    def pieces(self, length: int = 1 << 22) -> Iterator[bytes]:
        """The bytes as they are stored, a few at a time."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            for done in range(0, self.size, length):
                yield file.read(min(length, self.size - done))

    def read(self) -> np.ndarray:
        """The values in their own type: float32, float16 or, for bfloat16, uint16. float64 becomes
        float32.
        """
        if self.dtype not in DTYPES:
            raise UserError(
                f"{self.path}: tensors of type {self.dtype}; use one of {', '.join(DTYPES)}"
            )
        count = int(np.prod(self.shape, dtype=np.int64))
        values = np.fromfile(self.path, DTYPES[self.dtype], count, offset=self.start).reshape(
            self.shape
        )
        return values.astype(np.float32) if self.dtype == "F64" else values


def as_float32(values: np.ndarray) -> np.ndarray:
    """What `Stored.read` gave, exactly."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def stored_files(folder: Path) -> list[Path]:
    """model.safetensors, or the index and the files that model.safetensors.index.json names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        return [
            index,
            *(
                folder / name
                for name in sorted(set(read_json(index).get("weight_map", {}).values()))
            ),
        ]
    raise UserError(
        f"{folder}: neither model.safetensors nor {index.name} is there; save the T5 with "
        "`T5EncoderModel.from_pretrained(...).save_pretrained(folder)`"
    )


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's safetensors files."""
    paths = [path for path in stored_files(folder) if path.suffix != ".json"]
    return {name: tensor for path in paths for name, tensor in headers(path).items()}


def headers(path: Path) -> dict[str, Stored]:
    """The tensors of one file: 8 bytes of header size, the header in JSON, then the values."""
    try:
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            length = path.stat().st_size
            header: dict[str, Any] = json.loads(file.read(start - 8)) if start <= length else {}
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        if length != start + max(
            (entry["data_offsets"][1] for entry in entries.values()), default=0
        ):
            raise ValueError(f"its {length} bytes are not what its header says")
        return {
            name: Stored(path, entry["dtype"], tuple(entry["shape"]), start + begin, end - begin)
            for name, entry in entries.items()
            for begin, end in [entry["data_offsets"]]
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a whole safetensors file ({error}); copy or download it again"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, which is part of a Hugging Face folder."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: not readable ({error}); give a T5 in a Hugging Face folder"
        ) from error
