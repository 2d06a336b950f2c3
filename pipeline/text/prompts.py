"""What conditions a sample, and what guidance drops: its text, its class, or nothing.

A prompt is a dict of named arrays, one row per sample, whose rows of zeros mean "no prompt":

    text    text (B, L, D) float32 and text_mask (B, L), 1 at the tokens that are there
    class   label (B, K) float32, one-hot
    none    no array
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from pipeline.config import ConfigError, to_dict
from pipeline.data.shards import Shards
from pipeline.errors import UserError
from pipeline.stage.inputs import Arrays
from pipeline.text.caption_embeddings import open_caption_embeddings

if TYPE_CHECKING:
    from pipeline.text.encoder import TextConfig

Conditioning = Literal["text", "class", "none"]

PROMPT_INPUTS: dict[Conditioning, tuple[str, ...]] = {
    "text": ("text", "text_mask"),
    "class": ("label",),
    "none": (),
}


@dataclass(frozen=True, kw_only=True)
class ClassConfig:
    """The classes that a stage is conditioned on."""

    names: int | tuple[str, ...]  # in the order of their ids, or how many
    field: str = "cls"  # of KEY.json, a class's name or id; the id in KEY.cls counts as `cls`
    cond_drop_prob: float = 0.1  # share of training samples whose class is dropped, for guidance

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ConfigError(
                f"names: {self.names} leaves no class; give names, or how many there are"
            )

        if isinstance(self.names, tuple) and len(set(self.names)) < self.num:
            raise ConfigError(
                f"names: {list(self.names)} has a name twice; give each class a name of its own"
            )

        if not 0 <= self.cond_drop_prob < 1:
            raise ConfigError(
                f"cond_drop_prob: {self.cond_drop_prob} is not in [0, 1); 0.1 is usual"
            )

    @property
    def num(self) -> int:
        """K, how many classes there are."""
        return self.names if isinstance(self.names, int) else len(self.names)

    @property
    def filter(self) -> dict[str, Any]:
        """What a sample's field has to be: see `pipeline.data.filters.FilterConfig.fields`."""
        class_ids = list(range(self.num))
        if isinstance(self.names, int):
            return {self.field: class_ids}

        # A data set may name its classes or number them; `class_id` takes both.
        return {self.field: [*self.names, *class_ids]}


class Prompts(Protocol):
    """The prompts of a data set's samples."""

    threadsafe: bool  # whether any thread may call `embed`
    manifest_fields: Mapping[str, Any]  # what stage.json says of them

    def embed(
        self, sample_ids: Sequence[int], seed: int, step: int, positions: Sequence[int]
    ) -> Arrays:
        """The prompt of each sample, as it is drawn for its position in the batch of `step`."""


class NoPrompts:
    """Unconditional samples."""

    threadsafe = True
    manifest_fields: Mapping[str, Any] = MappingProxyType({})

    def embed(
        self, sample_ids: Sequence[int], seed: int, step: int, positions: Sequence[int]
    ) -> Arrays:
        return {}


class ClassPrompts:
    """Each sample's class."""

    threadsafe = True

    def __init__(self, config: ClassConfig, shards: Shards) -> None:
        self.config = config
        self.shards = shards
        self.manifest_fields: Mapping[str, Any] = {"classes": to_dict(config.names)}

    def embed(
        self, sample_ids: Sequence[int], seed: int, step: int, positions: Sequence[int]
    ) -> Arrays:
        # Every sample has the field: `ClassConfig.filter` has left out the others.
        fields = [self.shards.meta(sample_id)[self.config.field] for sample_id in sample_ids]
        class_ids = [class_id(self.config.names, field) for field in fields]
        return {"label": one_hot(class_ids, self.config.num)}


def one_hot(class_ids: Sequence[int], num_classes: int) -> np.ndarray:
    """float32 (B, K)."""
    return np.eye(num_classes, dtype=np.float32)[np.asarray(class_ids, int)]


def class_id(names: Sequence[str] | int, name_or_id: str | int) -> int:
    """The id of a class, given by its name or its id, which may be written as text.

    Raises:
        UserError: there is no such class.
    """
    known = [] if isinstance(names, int) else list(names)
    num_classes = names if isinstance(names, int) else len(names)
    text = str(name_or_id)

    # Names first, as a class may be called by a number.
    if name_or_id in known:
        return known.index(text)
    # `isdigit` alone is true of superscripts, which `int` refuses.
    if text.isascii() and text.isdigit() and int(text) < num_classes:
        return int(text)

    fix = f"classes are numbers from 0 to {num_classes - 1}"
    if known:
        fix = f"the classes are {', '.join(known)}"
    raise UserError(f"{name_or_id!r} is no class; {fix}")


def open_prompts(
    text: "TextConfig | None", classes: ClassConfig | None, data_sets: Sequence[Shards]
) -> list[Prompts]:
    """The prompts of each data set, by whichever of the two is configured."""
    if text is not None:
        return [*open_caption_embeddings(text, data_sets)]

    return [
        NoPrompts() if classes is None else ClassPrompts(classes, shards) for shards in data_sets
    ]
