"""What a run reads: its data sets, what of them is used, and in which order."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipeline.config import ConfigError
from pipeline.data.filters import FilterConfig
from pipeline.data.order import BLOCK, quotas
from pipeline.data.source import Sources

GIB = 2**30  # bytes


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data sets of a run, the order of their samples and the size of a batch."""

    # MindSpore hashes the configurations that it compiles in, hence hash=False for dicts.

    # Tars, with braces and *; or several data sets, each with its weight.
    shards: str | tuple[str, ...] | dict[str, float] = field(hash=False)
    global_batch: int = 2048  # samples per step over all ranks
    shuffle_shards: int = 8  # number of shards whose samples are shuffled together
    crop: Literal["center", "random"] = "center"  # position of the square in the image
    # Caption fields and their weights: txt, or fields of KEY.json; {} for none.
    captions: dict[str, float] = field(default_factory=lambda: {"txt": 1.0}, hash=False)
    filter: FilterConfig = FilterConfig()  # which samples are used
    # Samples for validation: a fraction of the keys, held out of training, or tars of their own.
    validation: float | str | None = None
    max_damage: float = 0.1  # fraction of samples that may be unusable before the run stops
    workers: int = 2  # threads that prepare batches
    # Folder for indexes and embeddings (default: next to the shards) and for ranges from servers.
    cache: str | None = None
    cache_gib: float = 64  # limit of those ranges, GiB

    def __post_init__(self) -> None:
        for name in ("global_batch", "shuffle_shards", "workers"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"{name}: {value} is not positive; give 1 or more")
        if not 0 <= self.max_damage <= 1:
            raise ConfigError(f"max_damage: {self.max_damage} is not a fraction in [0, 1]")
        if isinstance(self.validation, float) and not 0 < self.validation < 1:
            raise ConfigError(
                f"validation: {self.validation} is not a fraction between 0 and 1; give 0.01, for "
                "example, or a pattern of tars, or leave it out"
            )

        self._check_weights("captions", self.captions)
        if isinstance(self.shards, dict):
            if not self.shards:
                raise ConfigError("shards: {}; give at least one data set with its weight")
            self._check_weights("shards", self.shards)
        if 0 in quotas(list(self.sets.values())):
            raise ConfigError(
                f"shards: {self.shards}; a weight is so small that {BLOCK:,} samples have none "
                "of it"
            )

    @staticmethod
    def _check_weights(name: str, weights: Mapping[str, float]) -> None:
        if min(weights.values(), default=1) <= 0:
            raise ConfigError(
                f"{name}: {weights}; give each entry a weight above 0, or remove the entry"
            )

    @property
    def sets(self) -> dict[tuple[str, ...], float]:
        """The patterns of each data set, and its weight."""
        if isinstance(self.shards, dict):
            # Each pattern is a data set of its own.
            return {(pattern,): weight for pattern, weight in self.shards.items()}
        return {(self.shards,) if isinstance(self.shards, str) else self.shards: 1.0}

    @property
    def held_out(self) -> float:
        """The fraction of the keys that is held out of training."""
        return self.validation if isinstance(self.validation, float) else 0.0

    @property
    def cache_folder(self) -> Path | None:
        return Path(self.cache) if self.cache else None

    def sources(self) -> Sources:
        """A new reader of the shards, with connections of its own."""
        ranges = Path(self.cache) / "ranges" if self.cache else None
        return Sources(ranges, int(self.cache_gib * GIB))
