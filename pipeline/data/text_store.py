"""Text embeddings of a data set, computed once and kept beside its shards.

The text encoder is frozen and far larger than a stage, so its answers are stored ahead of training: one file a shard,
`00000.tar` -> `00000.text-0123456789ab.safetensors`, the hexadecimal digits being the start of the encoder's
fingerprint. A file holds the embeddings of all captions one after the other without padding (a caption of 12 tokens
takes 12 rows, not 128), where each caption starts, and what it was made from: the whole fingerprint, the length at
which captions were cut, and a digest of keys and captions. A file that does not match its shard and its encoder is
refused, never used in silence.

Shapes: N captions of a shard, T their tokens, L tokens a caption after padding, D text width.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from pipeline.errors import UserError

CHUNK = 512  # captions encoded at a time: bounds the padded embeddings, 1 GB at T5-XXL's width and 128 tokens


@dataclass(frozen=True)
class ShardCaptions:
    """What a shard's embeddings are made from: its samples' keys and captions, in order."""

    path: Path
    keys: tuple[str, ...]
    captions: tuple[str, ...]

    @property
    def digest(self) -> str:
        pairs = list(zip(self.keys, self.captions, strict=True))
        return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


class Encoder(Protocol):
    """What `build` needs of `pipeline.nn.text_encoder.TextEncoder`."""

    length: int

    @property
    def fingerprint(self) -> str: ...
    @property
    def width(self) -> int: ...
    def encode(
        self, captions: Sequence[str], progress: Callable[[int], object] | None = None
    ) -> tuple[np.ndarray, np.ndarray]: ...


def store_path(shard: Path, fingerprint: str) -> Path:
    return shard.with_name(f"{shard.stem}.text-{fingerprint[:12]}.safetensors")


def build(captions_per_shard: Sequence[ShardCaptions], encoder: Encoder, progress: bool = True) -> list[Path]:
    """Writes the files that are missing, stale or damaged, and answers which; the same call again goes on."""
    todo = [shard for shard in captions_per_shard if fault(shard, encoder.fingerprint, encoder.length)]
    written = []
    total = sum(len(shard.captions) for shard in todo)
    with tqdm(total=total, unit="caption", disable=not (progress and todo)) as bar:
        for shard in todo:
            path = store_path(shard.path, encoder.fingerprint)
            sizes = {"width": str(encoder.width), "length": str(encoder.length)}
            metadata = {"fingerprint": encoder.fingerprint, "captions": shard.digest, **sizes}
            write(path, pack(shard.captions, encoder, bar.update), metadata)
            written.append(path)
    return written


def pack(captions: Sequence[str], encoder: Encoder, progress: Callable[[int], object]) -> dict[str, np.ndarray]:
    """embeddings (T, D) float16 and offsets (N + 1,) int64: caption n is rows offsets[n] to offsets[n + 1]."""
    parts, counts = [np.zeros((0, encoder.width), np.float16)], [np.zeros(1, np.int64)]
    for start in range(0, len(captions), CHUNK):
        text_NLD, mask_NL = encoder.encode(captions[start : start + CHUNK], progress=progress)
        parts.append(text_NLD[mask_NL].astype(np.float16))
        counts.append(mask_NL.sum(axis=1, dtype=np.int64))
    return {"embeddings": np.concatenate(parts), "offsets": np.cumsum(np.concatenate(counts))}


def write(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Whole or not at all: a file under another name, on disk, then renamed."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        save_file(arrays, partial, metadata)
        partial.chmod(0o644)  # safetensors leaves it to the owner alone
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def fault(shard: ShardCaptions, fingerprint: str, length: int) -> str | None:
    """Why the shard's file cannot be used, or None."""
    path = store_path(shard.path, fingerprint)
    if not path.is_file():
        others = sorted(other.name for other in path.parent.glob(f"{shard.path.stem}.text-*.safetensors"))
        return f"is missing ({others[0]} is of another text encoder)" if others else "is missing"
    try:
        with safe_open(path, "numpy") as file:
            metadata, offsets = file.metadata() or {}, file.get_tensor("offsets")
            tokens, width = file.get_slice("embeddings").get_shape()
    except (SafetensorError, OSError, ValueError) as error:
        return f"is damaged ({error})"
    if metadata.get("fingerprint") != fingerprint:
        return "was made by another text encoder"
    if metadata.get("length") != str(length):
        return f"was made with {metadata.get('length')} tokens a caption instead of {length}"
    if metadata.get("captions") != shard.digest:
        return "was made from other captions than the shard's"
    ordered = len(offsets) == len(shard.captions) + 1 and offsets[0] == 0 and (np.diff(offsets) >= 0).all()
    if not ordered or offsets[-1] != tokens or metadata.get("width") != str(width):
        return "is damaged (its parts do not fit together)"
    return None


class TextStore:
    """`store[shard, row]` is the caption's text (L, D) float32, zero beyond its tokens, and mask (L,) bool."""

    def __init__(self, files: Sequence[Any], fingerprint: str, length: int) -> None:
        self.files, self.fingerprint, self.length = files, fingerprint, length

    @classmethod
    def open(cls, captions_per_shard: Sequence[ShardCaptions], fingerprint: str, length: int) -> Self:
        """Checks every shard's file, `UserError` at the first that cannot be used; embeddings are read when needed."""
        for shard in captions_per_shard:
            if reason := fault(shard, fingerprint, length):
                path = store_path(shard.path, fingerprint)
                raise UserError(f"{path} {reason}; run `python -m tools.cache_text CONFIG`")
        files = [safe_open(store_path(shard.path, fingerprint), "numpy") for shard in captions_per_shard]
        return cls(files, fingerprint, length)

    def __getitem__(self, place: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        shard, row = place
        start, stop = (int(offset) for offset in self.files[shard].get_slice("offsets")[row : row + 2])
        embeddings = self.files[shard].get_slice("embeddings")
        text_LD = np.zeros((self.length, embeddings.get_shape()[1]), np.float32)
        if start < stop:  # safetensors refuses an empty slice
            text_LD[: stop - start] = embeddings[start:stop]
        return text_LD, np.arange(self.length) < stop - start
