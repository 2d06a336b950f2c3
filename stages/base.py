"""The base of a cascade: text to a small image, of 64 px in Imagen (arXiv 2205.11487, section 2.2).

By itself, conditioned on a class or on nothing, it is the classic small diffusion model (DDPM,
arXiv 2006.11239).
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from mindspore import Tensor

from pipeline.diffusion.solvers import SamplerConfig
from pipeline.generate.engine import sample
from pipeline.stage.config import StageConfig
from pipeline.stage.inputs import Arrays
from pipeline.stage.request import SampleRequest
from pipeline.stage.stage import Network, Stage, image_grid


@dataclass(frozen=True, kw_only=True)
class BaseConfig(StageConfig):
    """Text, a class or nothing to images of `size`."""

    kind: Literal["base"] = "base"


class Base(Stage):
    """Inputs: the noisy image and the prompt."""

    Config = BaseConfig
    channels_in = 3
    num_noise_levels = 1

    def predict(
        self, network: Network, z: Tensor, logsnr_B: Tensor, inputs: dict[str, Tensor]
    ) -> Tensor:
        return self.call_network(network, z, logsnr_B.expand_dims(1), inputs)

    def sampling_inputs(self, request: SampleRequest, config: SamplerConfig) -> Arrays:
        return request.prompt

    def sample_grid(self, images: np.ndarray, prompt: Arrays) -> np.ndarray:
        """Sample | an image that has the same prompt."""
        request = SampleRequest(prompt=prompt, seed=self.config.seed, image_ids=range(len(images)))
        return image_grid(sample(self, self.config.sample, request), images)

    def manifest_fields(self) -> dict[str, Any]:
        return {"size_in": None, "aug_range": None}
