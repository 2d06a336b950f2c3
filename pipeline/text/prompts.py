"""What conditions a sample, and what guidance drops: its text, its class, or nothing, as arrays of
one row a sample.

A prompt is a tuple of arrays whose rows of zeros mean "nothing said": text (B, L, D) and mask (B,
L), or label (B, K), a one at the sample's class, or no array at all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from pipeline.config import ConfigError, to_dict
from pipeline.data.shards import Shards
from pipeline.errors import UserError
from pipeline.text.caption_embeddings import open_text

if TYPE_CHECKING:
    from pipeline.text.encoder import TextConfig

Conditioning = Literal["text", "class", "none"]
Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True, kw_only=True)
class ClassConfig:
    """The classes that a stage is conditioned on."""

    names: int | tuple[str, ...]  # in the order of their numbers, or how many
    field: str = (
        "cls"  # of KEY.json, a class's name or number; the number in KEY.cls counts as `cls`
    )
    cond_drop_prob: float = 0.1  # share of samples that training tells no class, for guidance

    def __post_init__(self) -> None:
        if self.num < 1:
            raise ConfigError(
                f"names: {self.names} leaves no class; give names, or how many there are"
            )
        if isinstance(self.names, tuple) and len(set(self.names)) < self.num:
            raise ConfigError(
                f"names: {list(self.names)} has a name twice; number the classes by different names"
            )
        if not 0 <= self.cond_drop_prob < 1:
            raise ConfigError(
                f"cond_drop_prob: {self.cond_drop_prob} is not in [0, 1); 0.1 is usual"
            )

    @property
    def num(self) -> int:
        return self.names if isinstance(self.names, int) else len(self.names)

    @property
    def filter(self) -> dict[str, Any]:
        """What a sample's field has to be: see `pipeline.data.filters.FilterConfig.fields`."""
        numbers = list(range(self.num))
        return {self.field: numbers if isinstance(self.names, int) else [*self.names, *numbers]}


class Prompts(Protocol):
    """What the loader asks."""

    threadsafe: bool  # whether any thread may ask
    facts: Mapping[str, Any]  # what a manifest says of it

    def embed(
        self, numbers: Sequence[int], seed: int, step: int, positions: Sequence[int]
    ) -> Arrays:
        """The prompt of each sample in `numbers`, as it is drawn for its place, one of `positions`
        in `step`.
        """


class NoPrompts:
    """Nothing is told."""

    threadsafe = True
    facts: Mapping[str, Any] = MappingProxyType({})

    def embed(
        self, numbers: Sequence[int], seed: int, step: int, positions: Sequence[int]
    ) -> Arrays:
        return ()


class ClassPrompts:
    """Each sample's class, float32 (B, K)."""

    threadsafe = True

    def __init__(self, config: ClassConfig, shards: Shards) -> None:
        self.config, self.shards = config, shards
        self.facts: Mapping[str, Any] = {"classes": to_dict(config.names)}

    def embed(
        self, numbers: Sequence[int], seed: int, step: int, positions: Sequence[int]
    ) -> Arrays:
        fields = (self.shards.meta(number)[self.config.field] for number in numbers)
        return one_hot([number_of(self.config.names, field) for field in fields], self.config.num)


def one_hot(numbers: Sequence[int], num: int) -> Arrays:
    """The prompt that tells these classes of `num`."""
    return (np.eye(num, dtype=np.float32)[np.asarray(numbers, int)],)


def number_of(names: Sequence[str] | int, said: str | int) -> int:
    """The number of a class, by its name or its number; a number may be written as text. UserError
    if there is none.
    """
    known = [] if isinstance(names, int) else list(names)
    num = names if isinstance(names, int) else len(names)
    if said in known:
        return known.index(str(said))
    if str(said).isascii() and str(said).isdigit() and int(said) < num:
        return int(said)
    fix = (
        f"the classes are {', '.join(known)}"
        if known
        else f"classes are numbers from 0 to {num - 1}"
    )
    raise UserError(f"{said!r} is no class; {fix}")


def open_prompts(text: "TextConfig | None", classes: ClassConfig | None, shards: Shards) -> Prompts:
    """What conditions the samples of `shards`: that of the two which is configured."""
    if text is not None:
        return open_text(text, shards)
    return NoPrompts() if classes is None else ClassPrompts(classes, shards)
