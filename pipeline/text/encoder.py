"""Captions to embeddings: T5's tokenizer, the frozen T5 encoder and a fixed number of tokens.

The embeddings are rounded to float16 as the stored ones are, so a stage that was trained from
stored embeddings and a cascade that encodes its prompts have the same inputs.

Captions are short compared with `length`, so captions of about the same number of tokens are
encoded together, padded to the next of a few lengths: a call has about `TOKENS` tokens, and the
shape of a caption's call depends on its own number of tokens alone. Padding is then a sixth of the
work rather than three quarters, few graphs are compiled, and a caption's embedding does not depend
on the other captions of its call, to the last bit.

Shapes: N captions, T tokens of all captions, L tokens per caption after padding, B captions per
call, D text width.
"""

import logging
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from pipeline.config import ConfigError
from pipeline.errors import UserError
from pipeline.text.t5 import T5Encoder
from pipeline.text.t5_folder import load_tokenizer

# Tokens per call: enough to keep a CPU's matrix products busy, few enough for a single prompt.
TOKENS = 512

HALF_MAX = float(np.finfo(np.float16).max)

log = logging.getLogger("cascade")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text conditioning of a stage."""

    encoder: str  # Hugging Face folder of a T5: config.json, safetensors, spiece.model
    width: int = 4096  # of its embeddings; T5-XXL's
    length: int = 128  # tokens per caption, padded or truncated
    clean: bool = False  # captions and prompts: see pipeline/text/captions.py
    cond_drop_prob: float = 0.1  # probability of dropping a caption in training, for guidance

    def __post_init__(self) -> None:
        for name in ("width", "length"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name}: {value} is not positive; give 1 or more")

        if not 0 <= self.cond_drop_prob < 1:
            raise ConfigError(
                f"cond_drop_prob: {self.cond_drop_prob} is not in [0, 1); Imagen has 0.1"
            )


class Call(NamedTuple):
    """The captions that are encoded together."""

    members: np.ndarray  # indices of captions
    batch: int  # captions after padding, B
    length: int  # tokens per caption after padding, L


class TextEncoder:
    """Encodes captions as `length` embeddings of `width` each, with a mask of the valid ones.

    Attributes:
        num_truncated: captions that had too many tokens, so far.
    """

    def __init__(self, encoder: T5Encoder, tokenizer: Any, length: int) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.length = length
        self.num_truncated = 0

    @classmethod
    def load(cls, encoder_folder: str | Path, tokenizer_folder: str | Path, length: int) -> Self:
        """From Hugging Face folders (both may be the same), without network; `UserError` names what
        is missing.
        """
        if length < 1:
            raise UserError(
                f"text length is {length}; a caption has at least 1 token, the end token"
            )

        # The tokenizer first: it loads faster, so its errors come early.
        tokenizer = load_tokenizer(Path(tokenizer_folder))
        encoder = T5Encoder.load(encoder_folder)
        if tokenizer.vocab_size > encoder.config.vocab_size:
            raise UserError(
                f"{tokenizer_folder}: the tokenizer has {tokenizer.vocab_size} tokens and the "
                f"encoder in {encoder_folder} only {encoder.config.vocab_size}; give the tokenizer "
                "of the same model"
            )
        return cls(encoder, tokenizer, length)

    @property
    def width(self) -> int:
        return self.encoder.config.d_model

    def encode(
        self, captions: Sequence[str], progress: Callable[[int], object] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """text (N, L, D) float32, zero where the mask is False, and mask (N, L) bool: the padded
        result of `encode_ragged`.
        """
        rows_TD, counts_N = self.encode_ragged(captions, progress)

        # Tokens are at the front, so the mask follows from their number.
        mask_NL = np.arange(self.length) < counts_N[:, None]
        text_NLD = np.zeros((*mask_NL.shape, self.width), np.float32)
        text_NLD[mask_NL] = rows_TD
        return text_NLD, mask_NL

    def encode_ragged(
        self, captions: Sequence[str], progress: Callable[[int], object] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The embeddings of all tokens, caption after caption, (T, D) float16, and the number of
        tokens of each caption (N,) int64.

        Values are rounded to float16 within its finite range, as in the store. A caption of more
        than `length` tokens is truncated and keeps its end token; one warning in the log counts
        these captions. `progress` is called with the number of captions of each finished call.
        """
        ids_NL, mask_NL = self.tokenize(captions)
        counts_N = mask_NL.sum(axis=1, dtype=np.int64)
        starts_N = np.cumsum(counts_N) - counts_N
        rows_TD = np.empty((counts_N.sum(), self.width), np.float16)

        for call in calls(counts_N, self.length):
            num = len(call.members)

            # Fixed shapes: the last call of a length is filled with empty captions.
            ids_BL = np.zeros((call.batch, call.length), np.int32)
            mask_BL = np.zeros((call.batch, call.length), bool)
            ids_BL[:num] = ids_NL[call.members, : call.length]
            mask_BL[:num] = mask_NL[call.members, : call.length]

            text_BLD = self.encoder(ids_BL, mask_BL)[:num]
            # Clipped: values beyond the range of float16 would become infinite.
            half_BLD = np.clip(text_BLD, -HALF_MAX, HALF_MAX).astype(np.float16)

            for row, caption in enumerate(call.members):
                start = starts_N[caption]
                count = counts_N[caption]
                rows_TD[start : start + count] = half_BLD[row, :count]
            if progress is not None:
                progress(num)
        return rows_TD, counts_N

    def tokenize(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """ids (N, L) int32, padded with 0, and mask (N, L) bool, equal to those of `transformers`
        with truncation. UserError for a token that the encoder does not have.
        """
        ids_NL = np.full((len(captions), self.length), self.tokenizer.pad_token_id, np.int32)
        mask_NL = np.zeros((len(captions), self.length), bool)
        truncated: list[tuple[str, int]] = []

        for row, caption in enumerate(captions):
            ids = self._token_ids(caption)
            if len(ids) > self.length:
                truncated.append((caption, len(ids)))
                ids[self.length - 1 :] = [self.tokenizer.eos_token_id]
            ids_NL[row, : len(ids)] = ids
            mask_NL[row, : len(ids)] = True

        # The lookup of the embedding would fail without naming the caption.
        vocab_size = self.encoder.config.vocab_size
        if ids_NL.max(initial=0) >= vocab_size:
            row = int(ids_NL.max(axis=1).argmax())
            raise UserError(
                f"caption {captions[row]!r}: token {ids_NL.max()} and the encoder has only "
                f"{vocab_size}; give the tokenizer of the same model"
            )
        if truncated:
            self._report_truncated(truncated, len(captions))
        return ids_NL, mask_NL

    def _token_ids(self, caption: str) -> list[int]:
        """All tokens of a caption with the end token, which a caption may contain as "</s>"."""
        ids = self.tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids or ids[-1] != self.tokenizer.eos_token_id:
            ids.append(self.tokenizer.eos_token_id)
        return ids

    def _report_truncated(self, truncated: Sequence[tuple[str, int]], num_captions: int) -> None:
        # One line for all: a data set may have millions of them.
        self.num_truncated += len(truncated)
        caption, num_tokens = truncated[0]
        log.warning(
            "%d of %d captions have more than %d tokens and were truncated; the first has %d: '%s'",
            len(truncated),
            num_captions,
            self.length,
            num_tokens,
            textwrap.shorten(caption, 100),
        )


def padded_lengths(counts_N: np.ndarray, length: int) -> np.ndarray:
    """The length to which captions of `counts_N` tokens are padded: 8, 16, 24, 32, 48, 64, 96, 128,
    ... up to `length`.
    """
    # Steps that grow with the length: padding stays a small fraction of the work.
    step_N = np.where(counts_N <= 32, 8, np.where(counts_N <= 64, 16, 32))
    return np.minimum(-(-counts_N // step_N) * step_N, length)


def calls(counts_N: np.ndarray, length: int) -> Iterator[Call]:
    """The calls for captions of `counts_N` tokens. The shape of a caption's call depends on its own
    number of tokens alone.
    """
    lengths_N = padded_lengths(counts_N, length)
    for tokens in map(int, np.unique(lengths_N)):
        (members,) = np.nonzero(lengths_N == tokens)
        batch = max(1, TOKENS // tokens)
        for start in range(0, len(members), batch):
            yield Call(members[start : start + batch], batch, tokens)
