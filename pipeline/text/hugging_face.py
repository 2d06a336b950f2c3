"""Hugging Face folders: JSON files, and weights in safetensors, single or sharded.

Tensors are read one at a time. The `safetensors` package has no bfloat16 for NumPy and maps whole
files, which would count twice in the memory of a large model; so the file's header is parsed here,
and each tensor is read at its offset. NumPy has no bfloat16 either: here these values are uint16,
the upper halves of float32.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import UserError

DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # of safetensors


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file, not yet read."""

    path: Path
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]
    start: int  # in the file, bytes
    size: int  # bytes

    def pieces(self, length: int = 1 << 22) -> Iterator[bytes]:
        """The bytes as stored, `length` at a time."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            for position in range(0, self.size, length):
                yield file.read(min(length, self.size - position))

    def read(self) -> np.ndarray:
        """The values in their own type: float32, float16 or, for bfloat16, uint16. float64 becomes
        float32.
        """
        if self.dtype not in DTYPES:
            raise UserError(
                f"{self.path}: tensors of type {self.dtype}; use one of {', '.join(DTYPES)}"
            )

        # int64: the product of a large tensor's sides exceeds int32 on some platforms.
        count = int(np.prod(self.shape, dtype=np.int64))
        values = np.fromfile(self.path, DTYPES[self.dtype], count, offset=self.start)
        values = values.reshape(self.shape)
        return values.astype(np.float32) if self.dtype == "F64" else values


def as_float32(values: np.ndarray) -> np.ndarray:
    """The result of `StoredTensor.read` as float32, exactly."""
    if values.dtype == np.uint16:
        # bfloat16 is the upper half of a float32.
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def stored_files(folder: Path) -> list[Path]:
    """model.safetensors; or model.safetensors.index.json and the files that it names."""
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]

    # The index is one of the files: a fingerprint depends on it.
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        return [index, *(folder / name for name in names)]

    raise UserError(
        f"{folder}: neither model.safetensors nor {index.name} exists; save the T5 with "
        "`T5EncoderModel.from_pretrained(...).save_pretrained(folder)`"
    )


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors files, by name."""
    paths = [path for path in stored_files(folder) if path.suffix != ".json"]
    return {name: tensor for path in paths for name, tensor in read_header(path).items()}


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file: 8 bytes for the header's size, the header in JSON, then the values.
    UserError if the file is damaged.
    """
    try:
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            length = path.stat().st_size

            # A damaged size would ask for an absurd amount of memory.
            header: dict[str, Any] = json.loads(file.read(start - 8)) if start <= length else {}

        tensors = {}
        end = start
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            tensors[name] = StoredTensor(
                path,
                entry["dtype"],
                shape=tuple(entry["shape"]),
                start=start + first,
                size=last - first,
            )
            end = max(end, start + last)

        # A truncated file would be noticed only at its last tensor.
        if length != end:
            raise ValueError(f"its {length} bytes differ from what its header says")
        return tensors
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not a complete safetensors file ({error}); copy or download it again"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, a file of a Hugging Face folder."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: not readable ({error}); give a T5 in a Hugging Face folder"
        ) from error
