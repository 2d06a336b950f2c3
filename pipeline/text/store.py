"""Text embeddings of a data set, computed once and stored next to its shards.

The text encoder is frozen and far larger than a stage, so its outputs are stored before training:
one file for each shard and caption field, `00000.tar` -> `00000.text-0123456789ab.safetensors`,
where the hexadecimal digits are the start of the recipe's fingerprint. A file contains the
embeddings of all captions one after the other without padding (a caption of 12 tokens takes 12
rows, not 128), the start of each caption, checksums, and the recipe's fingerprint. A file that does
not match its shard and its recipe is refused.

Shapes: N samples of a shard's index, C their captions, T all tokens, L tokens per caption after
padding, D text width.
"""

import hashlib
import json
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from pipeline.data.index import THREADS, sidecar_path
from pipeline.data.shards import Shards
from pipeline.errors import JobError, UserError
from pipeline.files import try_lock, write_tensors_atomically
from pipeline.text.captions import CLEANING, clean

MAX_OPEN = 128  # files
CACHE_TEXT = "run `cascade cache-text CONFIG`"  # what mends a store


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the embeddings of a caption depend on, besides the caption."""

    # The names of these fields are hashed: see `fingerprint`.
    encoder: str  # fingerprint of configuration, weights and tokenizer
    width: int
    length: int  # maximal tokens per caption
    clean: bool  # whether captions are cleaned first

    def fingerprint(self, field: str) -> str:
        """SHA-256, in hexadecimal, of the recipe and the caption field."""
        facts = {**asdict(self), "clean": self.clean and CLEANING, "field": field}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def text(self, caption: str) -> str:
        """The encoder's input for a caption."""
        return clean(caption) if self.clean else caption


class Encoder(Protocol):
    """The part of `pipeline.text.encoder.TextEncoder` that `build` uses."""

    def encode_ragged(
        self, captions: Sequence[str], progress: Callable[[int], object] | None = None
    ) -> tuple[np.ndarray, np.ndarray]: ...


class EmbeddingFile(NamedTuple):
    """An open file."""

    embeddings: Any  # (T, D), float16, read from disk where it is sliced
    offsets: np.ndarray  # (C + 1,): caption c is rows offsets[c] to offsets[c + 1]
    firsts: np.ndarray  # (N + 1,): sample n has the captions firsts[n] to firsts[n + 1]
    crc32: np.ndarray  # (C,)


class StoreFault(NamedTuple):
    """A file that cannot be used."""

    path: Path
    shard: int
    field: str  # caption field
    reason: str


class TextStore:
    """The embeddings of `shards` under a recipe, complete or not."""

    def __init__(self, shards: Shards, recipe: Recipe) -> None:
        self.shards = shards
        self.recipe = recipe
        self.fields = tuple(shards.config.captions)
        self._open = lru_cache(MAX_OPEN)(self.open)

    def path(self, shard: int, field: str) -> Path:
        location = self.shards.indexes[shard].location
        name = f"text-{self.recipe.fingerprint(field)[:12]}"
        return sidecar_path(location, name, self.shards.config.cache_folder)

    def open(self, shard: int, field: str) -> EmbeddingFile:
        file = safe_open(self.path(shard, field), "numpy")
        return EmbeddingFile(
            embeddings=file.get_slice("embeddings"),
            offsets=file.get_tensor("offsets"),
            firsts=file.get_tensor("firsts"),
            crc32=file.get_tensor("crc32"),
        )

    def read(self, shard: int, row: int, field: str, caption: int) -> np.ndarray:
        """float16 (tokens, D): one of the captions, from 0, of a row of the shard's index.
        UserError if it is damaged.
        """
        file = self._open(shard, field)

        # The captions of a sample are adjacent.
        entry = int(file.firsts[row]) + caption
        start, stop = file.offsets[entry : entry + 2].tolist()
        # Read from disk now, hence the checksum.
        embedding: np.ndarray = file.embeddings[start:stop]
        if zlib.crc32(embedding.tobytes()) != file.crc32[entry]:
            raise UserError(
                f"{self.path(shard, field)} is damaged (caption {caption} of sample {row} has "
                f"another checksum); remove it and {CACHE_TEXT}"
            )
        return embedding

    def fault(self, shard: int, field: str) -> str | None:
        """Why the file of a shard cannot be used; None if it can."""
        path = self.path(shard, field)
        index = self.shards.indexes[shard]
        if not path.is_file():
            return self._why_missing(path)

        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                done = file.get_tensor("done")
                offsets = file.get_tensor("offsets")
                firsts = file.get_tensor("firsts")
                num_tokens, width = file.get_slice("embeddings").get_shape()
        except (SafetensorError, OSError, ValueError) as error:
            return f"is damaged ({error})"

        if metadata.get("fingerprint") != self.recipe.fingerprint(field):
            return "was made with another recipe"
        if metadata.get("digest") != index.digest:
            return "was made from other captions than the shard's"

        # Arrays that disagree would give another caption's embeddings.
        sizes = (len(firsts), len(offsets), num_tokens, width)
        expected = (len(done) + 1, firsts[-1] + 1, offsets[-1], self.recipe.width)
        if sizes != expected:
            return "is damaged (the sizes of its arrays do not match)"
        if not done[self.shards.passing_rows(shard)].all():
            return "lacks samples that pass the present filters"
        return None

    def _why_missing(self, path: Path) -> str:
        # A hint for a changed configuration: a file of another recipe.
        stem = path.name.partition(".text-")[0]
        others = sorted(other.name for other in path.parent.glob(f"{stem}.text-*.safetensors"))
        if not others:
            return "is missing"
        difference = "is of another text encoder, length, caption field or cleaning"
        return f"is missing ({others[0]} {difference})"

    def faults(self) -> list[StoreFault]:
        """The files that cannot be used."""
        entries = list(product(range(len(self.shards.indexes)), self.fields))

        # Each check waits for the disk.
        with ThreadPoolExecutor(THREADS) as threads:
            reasons = list(threads.map(lambda entry: self.fault(*entry), entries))
        return [
            StoreFault(self.path(shard, field), shard, field, reason)
            for (shard, field), reason in zip(entries, reasons, strict=True)
            if reason
        ]

    def build(self, load_encoder: Callable[[], Encoder], progress: bool = True) -> int:
        """Writes the files that are missing, stale or damaged; returns their number.

        Run again after an interruption, it continues. Other processes, on other machines too, may
        build the same store at the same time and share the work by shard. The encoder is loaded
        only if there is work.
        """
        pending = [(fault.shard, fault.field) for fault in self.faults()]
        if not pending:
            return 0

        encoder = load_encoder()
        num_written = 0

        # One caption for each sample, until `write` has counted them.
        total = sum(len(self.shards.passing_rows(shard)) for shard, _ in pending)
        with tqdm(total=total, unit="caption", disable=not progress) as bar:
            while pending:
                locked_by_others = []
                for shard, field in pending:
                    path = self.path(shard, field)
                    with try_lock(path, fix="name another folder in data.cache") as locked:
                        if not locked:
                            locked_by_others.append((shard, field))
                        elif self.fault(shard, field):
                            self.write(shard, field, encoder, bar)
                            num_written += 1
                        else:  # another process has written it
                            bar.update(len(self.shards.passing_rows(shard)))

                # Look again: should the other process die, these become ours.
                pending = locked_by_others
                time.sleep(1 if pending else 0)
        return num_written

    def write(self, shard: int, field: str, encoder: Encoder, bar: tqdm) -> None:
        """Encodes one caption field of a shard, writes the file and verifies it."""
        index = self.shards.indexes[shard]
        path = self.path(shard, field)
        # Of both parts: training and validation read one file.
        rows = self.shards.passing_rows(shard)

        texts: list[str] = []
        counts = np.zeros(index.num_samples, np.int64)
        for row, captions in zip(rows, self.shards.captions(shard, rows), strict=True):
            texts += map(self.recipe.text, captions[field])
            counts[row] = len(captions[field])

        # Wider filters later need samples that this file lacks.
        done = np.zeros(index.num_samples, np.uint8)
        done[rows] = 1

        # `build` has counted one caption per sample.
        bar.total = (bar.total or 0) + len(texts) - len(rows)

        embeddings, lengths = encoder.encode_ragged(texts, bar.update)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        checksums = [
            zlib.crc32(embeddings[start:stop].tobytes())
            for start, stop in pairwise(offsets.tolist())
        ]

        arrays = {
            "embeddings": embeddings,
            "offsets": offsets,
            "firsts": np.concatenate([[0], np.cumsum(counts)]),
            "crc32": np.array(checksums, np.uint32),
            "done": done,
        }
        metadata = {"fingerprint": self.recipe.fingerprint(field), "digest": index.digest}
        write_tensors_atomically(path, arrays, metadata)
        _verify(path, arrays)


def _verify(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """JobError, and removes the file, if it does not contain these arrays."""
    with safe_open(path, "numpy") as file:
        is_equal = all(
            np.array_equal(file.get_tensor(name), array) for name, array in arrays.items()
        )
    if not is_equal:
        path.unlink()
        raise JobError(f"{path}: reading it back gives other values; check the disk")
