"""Filters: which samples of the shards a run uses, and how many each filter removes.

Decided from the indexes alone, before an image is read: sizes from the images' headers, captions
and the fields of `KEY.json` from the texts in the index.
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
    """Conditions on samples."""

    min_size: int = 1  # pixels of the shorter side
    max_aspect: float | None = None  # longer side over shorter
    min_caption: int = 1  # characters of its first caption
    max_caption: int | None = None  # characters
    # Fields of KEY.json and their values: one, a list, or {min, max}.
    fields: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.max_aspect is not None and self.max_aspect < 1:
            raise ConfigError(
                f"max_aspect: {self.max_aspect} is less than 1, the aspect of a square; no image "
                "passes"
            )
        if self.max_caption is not None and self.max_caption < self.min_caption:
            raise ConfigError(
                f"max_caption: {self.max_caption} is less than min_caption, {self.min_caption}"
            )
        for name, condition in self.fields.items():
            if isinstance(condition, dict) and (not condition or condition.keys() - BOUNDS):
                raise ConfigError(
                    f"fields.{name}: {condition} is no range; write {{min: 0.3}}, {{max: 1}} or "
                    "both"
                )


def select(
    index: Index, config: FilterConfig, weights: Mapping[str, float]
) -> tuple[np.ndarray, Counter[str]]:
    """The rows of an index that pass all filters, int64, and for each filter the number of samples
    that it is the first to remove.

    `weights` are those of the run's caption fields; if there are any, a sample without a caption is
    removed.
    """
    passing = _size_filters(index, config)
    passing |= _text_filters(index, config, weights)

    # In order: a sample that several filters reject counts for the first.
    retained = np.ones(index.num_samples, bool)
    removed = Counter[str]()
    for reason, passes in passing.items():
        num_removed = int((retained & ~passes).sum())
        if num_removed:
            removed[reason] = num_removed
        retained &= passes
    return np.flatnonzero(retained), removed


def _size_filters(index: Index, config: FilterConfig) -> dict[str, np.ndarray]:
    """For each condition on the size, which rows meet it."""
    if config.min_size <= 1 and config.max_aspect is None:
        return {}

    # int64: the product with an integer aspect could overflow uint32.
    pixels = index.column("pixels").astype(np.int64)
    short = pixels.min(axis=1)

    passing = {f"shorter side under {config.min_size} px": short >= config.min_size}
    if config.max_aspect is not None:
        long = pixels.max(axis=1)
        passing[f"aspect over {config.max_aspect:g}"] = long <= config.max_aspect * short
    return passing


def _text_filters(
    index: Index, config: FilterConfig, weights: Mapping[str, float]
) -> dict[str, np.ndarray]:
    """For each condition on captions and fields, which rows meet it."""
    metas: list[dict[str, Any]] = []
    lengths = index.column("caption_length")

    # Texts are read only where the length of KEY.txt does not suffice.
    if config.fields or list(weights) not in ([], ["txt"]):
        texts = list(index.texts(np.arange(index.num_samples)))
        metas = [json.loads(text["json"] or "{}") for text in texts]
        lengths = np.array(
            [
                len(_first_caption(text["txt"], meta, weights))
                for text, meta in zip(texts, metas, strict=True)
            ],
            int,
        )

    passing: dict[str, np.ndarray] = {}
    if weights:
        passing["no caption"] = lengths > 0
        passing[f"caption under {config.min_caption} characters"] = lengths >= config.min_caption
        if config.max_caption is not None:
            passing[f"caption over {config.max_caption} characters"] = lengths <= config.max_caption

    for name, condition in config.fields.items():
        matches = matcher(condition)
        passing[shorten(f"{name} not {condition}", 80)] = np.array(
            [matches(meta.get(name)) for meta in metas], bool
        )
    return passing


def _first_caption(txt: str, meta: Mapping[str, Any], names: Mapping[str, float]) -> str:
    """The first caption in the first of the fields that has one; empty if none has."""
    return next((caption for name in names for caption in captions(txt, meta, name)), "")


def matcher(condition: Any) -> Callable[[Any], bool]:
    """A function of a field's value: whether it equals `condition`, is in it (a list), or lies in
    its range ({min, max}; numbers only).

    A set is built once, as a million samples may be compared with a thousand classes.
    """
    if isinstance(condition, dict):
        low = condition.get("min", -math.inf)
        high = condition.get("max", math.inf)

        def in_range(value: Any) -> bool:
            # bool is a subclass of int.
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            return is_number and low <= value <= high

        return in_range

    values = condition if isinstance(condition, list) else [condition]
    # With their types: True is not 1. By repr: YAML allows lists, which cannot be hashed.
    allowed = {(type(value), repr(value)) for value in values}

    def is_allowed(value: Any) -> bool:
        return (type(value), repr(value)) in allowed

    return is_allowed
