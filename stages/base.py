"""The base of a cascade: text to a small picture (Imagen, arXiv 2205.11487, section 2.2; 64 px
there).

By itself, told a class or nothing, it is the classic small diffusion model (DDPM, arXiv
2006.11239).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from mindspore import Tensor

from pipeline.stage.stage import Stage, StageConfig, sheet
from pipeline.text.prompts import Arrays


@dataclass(frozen=True, kw_only=True)
class BaseConfig(StageConfig):
    """Text, a class or nothing to pictures of `size`."""

    kind: Literal["base"] = "base"


class Base(Stage):
    """Sees the noisy picture and the prompt."""

    Config = BaseConfig
    channels_in = 3
    num_levels = 1

    def predict(self, z: Tensor, logsnr_B: Tensor, *told: Tensor) -> Tensor:
        return self.network(z, logsnr_B.expand_dims(1), *told)

    def condition(
        self, given: None, seed: int, numbers: Sequence[int], aug_level: float
    ) -> tuple[tuple[int, ...], Arrays]:
        return (3, self.config.size, self.config.size), ()

    def picture(self, pictures: np.ndarray, *prompt: np.ndarray) -> np.ndarray:
        """Sample | a picture that has the same prompt."""
        made = self.sample(self.config.sample, prompt, self.config.seed, range(len(pictures)))
        return sheet(made, pictures)

    def manifest_fields(self) -> dict[str, Any]:
        return {"size_in": None, "aug_range": None}
