"""Captions to embeddings: T5's tokenizer, the frozen T5 encoder and a fixed number of tokens.

What comes out is already what a cache of half-precision numbers gives back, so that a stage trained
from the cache and a cascade that encodes its prompts live see the same text.

Captions are short beside `length`, so they are encoded in company of their own number of tokens,
padded to the next of a few: a call takes about `TOKENS` tokens, always in the same shape for
captions of one number of tokens. Padding is then a sixth of the work rather than three quarters,
few graphs are compiled, and a caption's embedding does not depend on the others in its call: it is
the same to the last bit.

Shapes: N captions, T tokens of all captions, L tokens a caption after padding, B captions a call, D
text width.
"""

import logging
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from pipeline.config import ConfigError
from pipeline.errors import UserError
from pipeline.text.t5 import T5Encoder
from pipeline.text.t5_folder import load_tokenizer

TOKENS = 512  # a call: enough to keep a CPU's matrix products busy, few enough for a single prompt
HALF = float(np.finfo(np.float16).max)

log = logging.getLogger("cascade")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text that a stage is conditioned on."""

    encoder: str  # Hugging Face folder of a T5: config.json, safetensors, spiece.model
    width: int = 4096  # of its embeddings; T5-XXL's
    length: int = 128  # tokens a caption, padded or cut
    clean: bool = False  # captions and prompts: see pipeline/text/captions.py
    cond_drop_prob: float = 0.1  # share of captions that training replaces by nothing, for guidance

    def __post_init__(self) -> None:
        for name in ("width", "length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not positive; give 1 or more")
        if not 0 <= self.cond_drop_prob < 1:
            raise ConfigError(
                f"cond_drop_prob: {self.cond_drop_prob} is not in [0, 1); Imagen has 0.1"
            )


class TextEncoder:
    """`encode` turns captions into `length` embeddings of `width` each, and the mask of those that
    are there.
    """

    def __init__(self, encoder: T5Encoder, tokenizer: Any, length: int) -> None:
        self.encoder, self.tokenizer, self.length = encoder, tokenizer, length
        self.num_truncated = 0  # captions that did not fit, so far

    @classmethod
    def load(cls, encoder_folder: str | Path, tokenizer_folder: str | Path, length: int) -> Self:
        """From Hugging Face folders (one may be both), without network; `UserError` says what is
        missing.
        """
        if length < 1:
            raise UserError(f"text length is {length}; a caption needs at least 1 token, its end")
        tokenizer = load_tokenizer(Path(tokenizer_folder))
        encoder = T5Encoder.load(encoder_folder)
        if tokenizer.vocab_size > encoder.config.vocab_size:
            raise UserError(
                f"{tokenizer_folder}: the tokenizer has {tokenizer.vocab_size} tokens where the encoder in "
                f"{encoder_folder} knows {encoder.config.vocab_size}; give the tokenizer of the same model"
            )
        return cls(encoder, tokenizer, length)

    @property
    def width(self) -> int:
        return self.encoder.config.d_model

    def encode(
        self, captions: Sequence[str], progress: Callable[[int], object] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """text (N, L, D) float32, zero where the mask is not set, and mask (N, L) bool:
        `encode_ragged`, padded.
        """
        rows_TD, counts_N = self.encode_ragged(captions, progress)
        mask_NL = np.arange(self.length) < counts_N[:, None]
        text_NLD = np.zeros((*mask_NL.shape, self.width), np.float32)
        text_NLD[mask_NL] = rows_TD
        return text_NLD, mask_NL

    def encode_ragged(
        self, captions: Sequence[str], progress: Callable[[int], object] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The embeddings of all tokens, caption after caption, (T, D) float16, and the captions'
        tokens (N,) int64.

        Values are rounded to float16 within its finite range, which is how a cache stores them:
        live and stored embeddings are equal. A caption of more than `length` tokens loses its last
        ones, keeping the end token; one line of the log says how many, and `num_truncated` counts
        them. `progress` is told the captions done, by the call, as `tqdm.update` wants it.
        """
        ids_NL, mask_NL = self.tokenize(captions)
        counts_N = mask_NL.sum(axis=1, dtype=np.int64)
        starts_N = np.cumsum(counts_N) - counts_N
        rows_TD = np.empty((counts_N.sum(), self.width), np.float16)
        for chosen, shape in calls(counts_N, self.length):
            num, length = len(chosen), shape[1]
            ids_BL, mask_BL = np.zeros(shape, np.int32), np.zeros(shape, bool)
            ids_BL[:num], mask_BL[:num] = ids_NL[chosen, :length], mask_NL[chosen, :length]
            half_BLD = np.clip(self.encoder(ids_BL, mask_BL)[:num], -HALF, HALF).astype(np.float16)
            for row, caption in enumerate(chosen):
                start, count = starts_N[caption], counts_N[caption]
                rows_TD[start : start + count] = half_BLD[row, :count]
            if progress is not None:
                progress(num)
        return rows_TD, counts_N

    def tokenize(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """ids (N, L) int32, padded with 0, and mask (N, L) bool, as `transformers` has them with
        truncation.
        """
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
                *(
                    len(too_long),
                    len(captions),
                    self.length,
                    num_tokens,
                    textwrap.shorten(caption, 100),
                ),
            )
        return ids_NL, mask_NL


def padded(counts_N: np.ndarray, length: int) -> np.ndarray:
    """Tokens to which captions of `counts_N` tokens are padded: 8, 16, 24, 32, 48, 64, 96, 128, ...
    to `length`.
    """
    step_N = np.where(counts_N <= 32, 8, np.where(counts_N <= 64, 16, 32))
    return np.minimum(-(-counts_N // step_N) * step_N, length)


def calls(counts_N: np.ndarray, length: int) -> Iterator[tuple[np.ndarray, tuple[int, int]]]:
    """The captions of each call and its shape (B, L), which follows from the captions' own numbers
    of tokens alone.
    """
    padded_N = padded(counts_N, length)
    for tokens in map(int, np.unique(padded_N)):
        (members,), batch = np.nonzero(padded_N == tokens), max(1, TOKENS // tokens)
        for start in range(0, len(members), batch):
            yield members[start : start + batch], (batch, tokens)
