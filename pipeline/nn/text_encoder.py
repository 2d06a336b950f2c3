"""Captions to embeddings: T5's tokenizer, the frozen T5 encoder and a fixed number of tokens.

What comes out is already what a cache of half-precision numbers gives back, so that a stage trained from the cache and
a cascade that encodes its prompts live see the same text.

Shapes: N captions, L tokens, D text width.
"""

import logging
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from pipeline.config import ConfigError
from pipeline.errors import UserError
from pipeline.nn.fingerprint import fingerprint
from pipeline.nn.t5 import T5Encoder
from pipeline.nn.t5_folder import load_tokenizer

BATCH = 8  # captions a call, always: one shape to compile, and values that do not depend on how many are asked for
HALF = float(np.finfo(np.float16).max)

log = logging.getLogger("cascade")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text that a stage is conditioned on."""

    encoder: str  # Hugging Face folder of a T5: config.json, safetensors, spiece.model
    width: int = 4096  # of its embeddings; T5-XXL's
    length: int = 128  # tokens a caption, padded or cut
    drop: float = 0.1  # share of captions that training replaces by nothing, for guidance

    def __post_init__(self) -> None:
        for name in ("width", "length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not positive; give 1 or more")
        if not 0 <= self.drop < 1:
            raise ConfigError(f"drop: {self.drop} is not in [0, 1); Imagen has 0.1")


class TextEncoder:
    """`encode` turns captions into `length` embeddings of `width` each, and the mask of those that are there."""

    def __init__(self, encoder: T5Encoder, tokenizer: Any, folders: tuple[Path, Path], length: int) -> None:
        """`folders` are the encoder's and the tokenizer's, for the fingerprint."""
        self.encoder, self.tokenizer, self.folders, self.length = encoder, tokenizer, folders, length
        self.num_truncated = 0  # captions that did not fit, so far

    @classmethod
    def load(cls, encoder_folder: str | Path, tokenizer_folder: str | Path, length: int) -> Self:
        """From Hugging Face folders (one may be both), without network; `UserError` says what is missing."""
        if length < 1:
            raise UserError(f"text length is {length}; a caption needs at least 1 token, its end")
        tokenizer = load_tokenizer(Path(tokenizer_folder))
        encoder = T5Encoder.load(encoder_folder)
        if tokenizer.vocab_size > encoder.config.vocab_size:
            raise UserError(
                f"{tokenizer_folder}: the tokenizer has {tokenizer.vocab_size} tokens where the encoder in "
                f"{encoder_folder} knows {encoder.config.vocab_size}; give the tokenizer of the same model"
            )
        return cls(encoder, tokenizer, (Path(encoder_folder), Path(tokenizer_folder)), length)

    @property
    def width(self) -> int:
        return self.encoder.config.d_model

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what a token's embedding depends on: configuration, weights and tokenizer, but not `length`."""
        return fingerprint(*self.folders)

    def encode(
        self, captions: Sequence[str], progress: Callable[[int], object] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """text (N, L, D) float32, zero where the mask is not set, and mask (N, L) bool.

        Values are rounded to float16 within its finite range, which is how a cache stores them: live and stored
        embeddings are equal. A caption of more than `length` tokens loses its last ones, keeping the end token; one
        line of the log says how many, and `num_truncated` counts them. `progress` is told the captions done, by the
        batch, as `tqdm.update` wants it.
        """
        ids_NL, mask_NL = self.tokenize(captions)
        text_NLD = np.empty((*ids_NL.shape, self.width), np.float32)
        for start in range(0, len(captions), BATCH):
            part = slice(start, min(start + BATCH, len(captions)))
            count = part.stop - part.start
            rest = ((0, BATCH - count), (0, 0))
            out = self.encoder(np.pad(ids_NL[part], rest), np.pad(mask_NL[part], rest))[:count]
            text_NLD[part] = np.where(mask_NL[part, :, None], np.clip(out, -HALF, HALF).astype(np.float16), 0)
            if progress is not None:
                progress(count)
        return text_NLD, mask_NL

    def tokenize(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """ids (N, L) int32, padded with 0, and mask (N, L) bool, as `transformers` has them with truncation."""
        end = self.tokenizer.eos_token_id
        ids_NL = np.full((len(captions), self.length), self.tokenizer.pad_token_id, np.int32)
        mask_NL = np.zeros((len(captions), self.length), bool)
        too_long: list[tuple[str, int]] = []
        for row, caption in enumerate(captions):
            ids = self.tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"]
            if not ids or ids[-1] != end:  # a caption may spell "</s>" itself
                ids.append(end)
            if len(ids) > self.length:
                too_long.append((caption, len(ids)))
                ids[self.length - 1 :] = [end]
            ids_NL[row, : len(ids)] = ids
            mask_NL[row, : len(ids)] = True
        if ids_NL.max(initial=0) >= self.encoder.config.vocab_size:
            row = int(ids_NL.max(axis=1).argmax())
            raise UserError(
                f"caption {captions[row]!r}: token {ids_NL.max()} where the encoder knows "
                f"{self.encoder.config.vocab_size}; give the tokenizer of the same model"
            )
        if too_long:
            self.num_truncated += len(too_long)
            caption, num_tokens = too_long[0]
            log.warning(
                "%d of %d captions have more than %d tokens and were cut; the first has %d: '%s'",
                *(len(too_long), len(captions), self.length, num_tokens, textwrap.shorten(caption, 100)),
            )
        return ids_NL, mask_NL
