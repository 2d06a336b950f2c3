"""Text embeddings of a data set, computed once and kept beside its shards.

The text encoder is frozen and far larger than a stage, so its answers are stored ahead of training:
one file a shard and caption field, `00000.tar` -> `00000.text-0123456789ab.safetensors`, the
hexadecimal digits being the start of the recipe's fingerprint. A file holds the embeddings of all
captions one after the other without padding (a caption of 12 tokens takes 12 rows, not 128), where
each caption starts, their checksums, and what all was made from. A file that does not match its
shard and its recipe is refused, never used in silence.

Shapes: N samples of a shard's index, C their captions, T all tokens, L tokens a caption after
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

OPEN = 128  # files held open


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the embeddings of a caption depend on, beside the caption."""

    encoder: str  # fingerprint of configuration, weights and tokenizer
    width: int
    length: int  # tokens a caption at most
    clean: bool  # whether captions are cleaned before

    def fingerprint(self, field: str) -> str:
        """SHA-256, in hexadecimal, of the recipe and the caption field."""
        facts = {**asdict(self), "clean": self.clean and CLEANING, "field": field}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def text(self, caption: str) -> str:
        """What the encoder is given of a caption."""
        return clean(caption) if self.clean else caption


class Encoder(Protocol):
    """What `build` needs of `pipeline.text.encoder.TextEncoder`."""

    def encode_ragged(
        self, captions: Sequence[str], progress: Callable[[int], object] | None = None
    ) -> tuple[np.ndarray, np.ndarray]: ...


class Stored(NamedTuple):
    """An open file."""

    embeddings: Any  # (T, D), float16, read where it is sliced
    offsets: np.ndarray  # (C + 1,): caption c is rows offsets[c] to offsets[c + 1]
    firsts: np.ndarray  # (N + 1,): sample n has the captions firsts[n] to firsts[n + 1]
    crc32: np.ndarray  # (C,)


class TextStore:
    """The embeddings of `shards` under a recipe, whether they are all there or not."""

    def __init__(self, shards: Shards, recipe: Recipe) -> None:
        self.shards, self.recipe = shards, recipe
        self.fields = tuple(shards.config.captions)
        self._open = lru_cache(OPEN)(self.open)

    def path(self, shard: int, field: str) -> Path:
        what = f"text-{self.recipe.fingerprint(field)[:12]}"
        return sidecar_path(
            self.shards.indexes[shard].location, what, self.shards.config.cache_folder
        )

    def open(self, shard: int, field: str) -> Stored:
        file = safe_open(self.path(shard, field), "numpy")
        arrays = (file.get_tensor(name) for name in ("offsets", "firsts", "crc32"))
        return Stored(file.get_slice("embeddings"), *arrays)

    def read(self, shard: int, row: int, field: str, number: int) -> np.ndarray:
        """float16 (tokens, D): caption `number` of a row of the shard's index. UserError if it has
        been damaged.
        """
        stored = self._open(shard, field)
        caption = int(stored.firsts[row]) + number
        start, stop = stored.offsets[caption : caption + 2].tolist()
        embedding: np.ndarray = stored.embeddings[start:stop]
        if zlib.crc32(embedding.tobytes()) != stored.crc32[caption]:
            raise UserError(
                f"{self.path(shard, field)} is damaged (caption {number} of sample {row} has another checksum); remove "
                "it and run `cascade cache-text CONFIG`"
            )
        return embedding

    def fault(self, shard: int, field: str) -> str | None:
        """Why the file of a shard cannot be used, or None."""
        path, index = self.path(shard, field), self.shards.indexes[shard]
        if not path.is_file():
            stem = path.name.partition(".text-")[0]
            others = sorted(other.name for other in path.parent.glob(f"{stem}.text-*.safetensors"))
            what = "of another text encoder, length, caption field or cleaning"
            return f"is missing ({others[0]} is {what})" if others else "is missing"
        try:
            with safe_open(path, "numpy") as file:
                facts, done = file.metadata() or {}, file.get_tensor("done")
                offsets, firsts = file.get_tensor("offsets"), file.get_tensor("firsts")
                tokens, width = file.get_slice("embeddings").get_shape()
        except (SafetensorError, OSError, ValueError) as error:
            return f"is damaged ({error})"
        if facts.get("fingerprint") != self.recipe.fingerprint(field):
            return "was made by another recipe"
        if facts.get("digest") != index.digest:
            return "was made from other captions than the shard's"
        sizes = (len(firsts), len(offsets), tokens, width)
        if sizes != (len(done) + 1, firsts[-1] + 1, offsets[-1], self.recipe.width):
            return "is damaged (its parts do not fit together)"
        if not done[self.shards.rows(shard)].all():
            return "lacks samples that the filters now let pass"
        return None

    def faults(self) -> list[tuple[Path, int, str, str]]:
        """(path, shard, field, reason) of each file that cannot be used."""
        every = list(product(range(len(self.shards.indexes)), self.fields))
        with ThreadPoolExecutor(THREADS) as threads:
            reasons = threads.map(lambda each: self.fault(*each), every)
            return [
                (self.path(*each), *each, reason)
                for each, reason in zip(every, reasons, strict=True)
                if reason
            ]

    def build(self, encoder: Callable[[], Encoder], progress: bool = True) -> int:
        """Writes the files that are missing, stale or damaged, and answers how many.

        The same call again goes on where one was stopped; other processes, on other machines too,
        may do the same at the same time, and share the work shard by shard. The encoder is loaded
        if there is anything to do.
        """
        todo = [(shard, field) for _, shard, field, _ in self.faults()]
        written, loaded = 0, encoder() if todo else None
        total = sum(
            len(self.shards.rows(shard)) for shard, _ in todo
        )  # one a sample, until they have been read
        with tqdm(total=total, unit="caption", disable=not (progress and todo)) as bar:
            while todo and loaded:
                others = []
                for shard, field in todo:
                    path = self.path(shard, field)
                    with try_lock(path) as mine:
                        if not mine:
                            others.append((shard, field))
                            continue
                        if self.fault(shard, field):
                            self.write(shard, field, loaded, bar)
                            written += 1
                        else:  # another process has done it
                            bar.update(len(self.shards.rows(shard)))
                todo = others
                time.sleep(1 if todo else 0)  # another process has them; if it dies, they are ours
        return written

    def write(self, shard: int, field: str, encoder: Encoder, bar: tqdm) -> None:
        """Encodes one caption field of a shard, writes the file and reads it back."""
        index, path = self.shards.indexes[shard], self.path(shard, field)
        rows = self.shards.rows(shard)
        done, counts = np.zeros(index.num_samples, bool), np.zeros(index.num_samples, np.int64)
        done[rows] = True
        words: list[str] = []
        for row, found in zip(rows, self.shards.captions(shard, rows), strict=True):
            words += map(self.recipe.text, found[field])
            counts[row] = len(found[field])
        bar.total = (bar.total or 0) + len(words) - len(rows)
        embeddings, lengths = encoder.encode_ragged(words, bar.update)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        sums = [zlib.crc32(embeddings[a:b].tobytes()) for a, b in pairwise(offsets.tolist())]
        arrays = {
            "embeddings": embeddings,
            "offsets": offsets,
            "firsts": np.concatenate([[0], np.cumsum(counts)]),
            "crc32": np.array(sums, np.uint32),
            "done": done.astype(np.uint8),
        }
        facts = {"fingerprint": self.recipe.fingerprint(field), "digest": index.digest}
        write_tensors_atomically(path, arrays, facts)
        with safe_open(path, "numpy") as file:
            same = all(
                np.array_equal(file.get_tensor(name), array) for name, array in arrays.items()
            )
        if not same:
            path.unlink()
            raise JobError(
                f"{path}: what was written does not read back the same; look at the disk"
            )
