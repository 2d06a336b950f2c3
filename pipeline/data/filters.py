"""Which samples of the shards a run takes, and how many were left out for what.

All is decided from the indexes, before a picture is read: sizes from the pictures' headers,
captions and the fields of `KEY.json` from the texts that the index holds.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from textwrap import shorten
from typing import Any

import numpy as np

from pipeline.config import ConfigError
from pipeline.data.index import Index
from pipeline.text.captions import captions

BOUNDS = {"min", "max"}


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """What a sample must be; what is not set is not asked."""

    min_size: int = 1  # pixels of the shorter side
    max_aspect: float | None = None  # longer side over shorter
    min_caption: int = 1  # characters of its first caption
    max_caption: int | None = None
    fields: dict[str, Any] = field(
        default_factory=dict, hash=False
    )  # of KEY.json: a value, several, or {min, max}

    def __post_init__(self) -> None:
        if self.max_aspect is not None and self.max_aspect < 1:
            raise ConfigError(
                f"max_aspect: {self.max_aspect} is less than 1, a square's; no picture is so narrow"
            )
        if self.max_caption is not None and self.max_caption < self.min_caption:
            raise ConfigError(
                f"max_caption: {self.max_caption} is less than min_caption, {self.min_caption}"
            )
        for name, wanted in self.fields.items():
            if isinstance(wanted, dict) and (not wanted or wanted.keys() - BOUNDS):
                raise ConfigError(
                    f"fields.{name}: {wanted} is no range; write {{min: 0.3}}, {{max: 1}} or both"
                )


def select(
    index: Index, config: FilterConfig, weights: Mapping[str, float]
) -> tuple[np.ndarray, Counter[str]]:
    """The rows of an index that pass, int64, and of each filter how many samples it was the first
    to remove.

    `weights` names the caption fields of the run, unless there are none; a sample without any
    caption is removed.
    """
    passing: dict[str, np.ndarray] = {}
    if config.min_size > 1 or config.max_aspect is not None:
        pixels = index.column("pixels").astype(np.int64)
        short, long = pixels.min(axis=1), pixels.max(axis=1)
        passing[f"shorter side under {config.min_size} px"] = short >= config.min_size
        if config.max_aspect is not None:
            passing[f"aspect over {config.max_aspect:g}"] = long <= config.max_aspect * short
    metas: list[dict[str, Any]] = []
    lengths = index.column("caption_length")
    if config.fields or list(weights) not in ([], ["txt"]):
        texts = list(index.texts(np.arange(index.num_samples)))
        metas = [json.loads(text["json"] or "{}") for text in texts]
        pairs = zip(texts, metas, strict=True)
        firsts = (
            next((c for name in weights for c in captions(text["txt"], meta, name)), "")
            for text, meta in pairs
        )
        lengths = np.array([len(first) for first in firsts], int)
    if weights:
        passing["no caption"] = lengths > 0
        passing[f"caption under {config.min_caption} characters"] = lengths >= config.min_caption
        if config.max_caption is not None:
            passing[f"caption over {config.max_caption} characters"] = lengths <= config.max_caption
    for name, wanted in config.fields.items():
        fits = fitting(wanted)
        passing[shorten(f"{name} not {wanted}", 80)] = np.array(
            [fits(meta.get(name)) for meta in metas], bool
        )
    left, removed = np.ones(index.num_samples, bool), Counter[str]()
    for reason, passes in passing.items():
        if gone := int((left & ~passes).sum()):
            removed[reason] = gone
        left &= passes
    return np.flatnonzero(left), removed


def fitting(wanted: Any) -> Callable[[Any], bool]:
    """Whether a field has the wanted value, one of a list of values, or lies in a range (which only
    a number can).

    As a function of the field: a million samples may be asked for one of a thousand classes.
    """
    if isinstance(wanted, dict):
        least, most = wanted.get("min", -math.inf), wanted.get("max", math.inf)
        return lambda value: (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and least <= value <= most
        )
    known = {(type(one), repr(one)) for one in (wanted if isinstance(wanted, list) else [wanted])}
    return lambda value: (type(value), repr(value)) in known
