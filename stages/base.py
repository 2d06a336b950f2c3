"""The base of a cascade: text to a small picture (Imagen, arXiv 2205.11487, section 2.2; 64 px there)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from mindspore import Tensor

from pipeline.data.loader import Arrays
from stages.stage import Stage, StageConfig, sheet


@dataclass(frozen=True, kw_only=True)
class BaseConfig(StageConfig):
    """Text to pictures of `size`."""

    kind: Literal["base"] = "base"


class Base(Stage):
    """Sees the noisy picture and the text."""

    Config = BaseConfig
    channels_in = 3
    num_levels = 1

    def predict(self, z: Tensor, logsnr_B: Tensor, text: Tensor, mask: Tensor, *condition: Tensor) -> Tensor:
        return self.network(z, logsnr_B.expand_dims(1), text, mask)

    def condition(
        self, low: np.ndarray | None, seed: int, numbers: Sequence[int], augment: float
    ) -> tuple[tuple[int, ...], Arrays]:
        return (3, self.config.size, self.config.size), ()

    def picture(self, pictures: np.ndarray, text_BLD: np.ndarray, mask_BL: np.ndarray) -> np.ndarray:
        """Sample | a picture that has the same caption."""
        made = self.sample(self.config.sample, text_BLD, mask_BL, self.config.seed, range(len(pictures)))
        return sheet(made, pictures)

    def facts(self) -> dict[str, Any]:
        return {"size_in": None, "augment": None}
