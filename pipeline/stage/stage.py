"""What every stage is: a configuration, a network, its named inputs, a loss and a prediction.

A kind of stage (`stages/`) differs from another in what conditions its network beside the noise
level. These inputs have one name each: `extra_inputs` lists them, `training_inputs` computes them
from images, `sampling_inputs` from a request, and `predict` passes them to the network. The
training loop and the sampling engine know a stage by this class alone.

Shapes: B images, C channels, S side, T noise levels per image.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np
from mindspore import Tensor

from pipeline.config import build
from pipeline.data.image import ImageSize, to_float, to_uint8
from pipeline.diffusion.objective import diffusion_loss
from pipeline.diffusion.process import add_noise
from pipeline.diffusion.schedule import ScheduleConfig
from pipeline.diffusion.solvers import SamplerConfig
from pipeline.nn.tiling import LIMIT
from pipeline.nn.unet import UNet
from pipeline.rng import Draws
from pipeline.stage.config import PixelConfig, StageConfig
from pipeline.stage.inputs import Arrays, Inputs
from pipeline.stage.request import SampleRequest
from pipeline.text.prompts import PROMPT_INPUTS

Network = Callable[..., Tensor]  # the U-Net, or what answers like it (`pipeline.nn.tiling`)


class Stage(ABC):
    """A diffusion model of a cascade.

    Attributes:
        config: of its run.
        network: the U-Net.
        inputs: what conditions the network, in sampling.
        loss_inputs: what `loss` takes: x, eps, logsnr, `inputs` and, with dropout, its seeds.
        tile_limit: larger images, in elements at full resolution, are sampled in tiles.
        compiled_steps: of sampling, see `pipeline.generate.engine`.
    """

    Config: ClassVar[type[StageConfig]] = StageConfig
    num_noise_levels: ClassVar[int]  # T
    extra_inputs: ClassVar[tuple[str, ...]] = ()  # beside the prompt

    def __init__(self, config: StageConfig) -> None:
        self.config = config
        self.inputs = Inputs(prompt=self.prompt_inputs, others=self.extra_inputs)

        seeds = ("dropout_seeds",) if config.unet.dropout else ()
        self.loss_inputs = Inputs(
            leading=("x", "eps", "logsnr"),
            prompt=self.inputs.prompt,
            others=(*seeds, *self.inputs.others),
        )

        self.network = UNet(
            config.unet,
            channels_in=self.channels_in,
            num_levels=self.num_noise_levels,
            text_width=config.text.width if config.text else 0,
            num_classes=self.num_classes,
        )
        self.tile_limit = LIMIT
        self.compiled_steps: dict[tuple[Any, ...], Callable[..., tuple[Tensor, Tensor]]] = {}

        # The identity where nothing is configured, so that both conversions have one form.
        pixels = config.pixels or PixelConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        self.mean = np.array(pixels.mean, np.float32).reshape(3, 1, 1)
        self.std = np.array(pixels.std, np.float32).reshape(3, 1, 1)

    @classmethod
    def from_config(cls, raw: dict[str, Any]) -> Self:
        """The stage of a resolved configuration, as a manifest holds it."""
        return cls(build(cls.Config, raw))

    @property
    @abstractmethod
    def channels_in(self) -> int:
        """Channels of the network's input: 3, and those that are concatenated."""

    @property
    def num_classes(self) -> int:
        """K, the width of the network's label; 0: it has none."""
        return self.config.classes.num if self.config.classes else 0

    @property
    def prompt_inputs(self) -> tuple[str, ...]:
        """The inputs that are the prompt, which guidance drops."""
        return PROMPT_INPUTS[self.config.conditioning]

    @property
    def image_size(self) -> ImageSize:
        """The images of training, or the windows of them."""
        return ImageSize(side=self.config.size)

    # Images.

    def from_images(self, images: np.ndarray) -> np.ndarray:
        """uint8 (B, S, S, 3) as the network's input, float32 (B, 3, S, S)."""
        return (to_float(images) - self.mean) / self.std

    def to_images(self, x: np.ndarray) -> np.ndarray:
        """The inverse of `from_images`, clipped to [0, 255]."""
        return to_uint8(x * self.std + self.mean)

    # Training.

    def training_inputs(self, images: np.ndarray, prompt: Arrays, draws: Draws) -> Arrays:
        """Named arrays of a batch, float32, every random draw in them (dropout_seeds: int32).

        Args:
            images: uint8 (B, S, S, 3).
            prompt: named arrays of B rows, dropped here at the rate `cond_drop_prob`.
            draws: of the batch's positions.
        """
        x = self.from_images(images)

        # Every draw is named by purpose and position: the order of these lines has no influence.
        logsnr = self.config.diffusion.logsnr(draws.uniform("time")).astype(np.float32)
        eps = draws.noise("noise", x.shape[1:])

        keep_mask = (draws.uniform("drop") >= self.config.cond_drop_prob).astype(np.float32)
        arrays = self.inputs.drop_prompt(prompt, keep_mask)

        if "dropout_seeds" in self.loss_inputs.names:
            seeds = [stream.integers(2**31) for stream in draws.streams("dropout")]
            arrays["dropout_seeds"] = np.array(seeds, np.int32)

        return {"x": x, "eps": eps, "logsnr": logsnr, **arrays}

    def loss(self, *tensors: Tensor) -> Tensor:
        """The loss of each image (B,), given what `loss_inputs` names. Runs compiled."""
        return self.named_loss(self.loss_inputs.unpack(tensors))

    def named_loss(self, inputs: dict[str, Tensor]) -> Tensor:
        """The loss of each image (B,) from its inputs, which a kind of stage may override."""
        x = inputs["x"]
        eps = inputs["eps"]
        logsnr_B = inputs["logsnr"]
        output = self.predict(self.network, add_noise(x, eps, logsnr_B), logsnr_B, inputs)
        return diffusion_loss(self.config.diffusion, output, x, eps, logsnr_B)

    # Prediction, in training and in sampling.

    @abstractmethod
    def predict(
        self, network: Network, z: Tensor, logsnr_B: Tensor, inputs: dict[str, Tensor]
    ) -> Tensor:
        """What `network` predicts (`diffusion.prediction`) for noisy images z (B, 3, S, S). Runs
        compiled.
        """

    def call_network(
        self,
        network: Network,
        x_BCHW: Tensor,
        logsnr_BT: Tensor,
        inputs: dict[str, Tensor],
        label: Tensor | None = None,
    ) -> Tensor:
        """The network's output, conditioned on the prompt among `inputs`, or on another label."""
        # By position, None for what this stage does not have: its graph has no such input.
        return network(
            x_BCHW,
            logsnr_BT,
            inputs.get("text"),
            inputs.get("text_mask"),
            inputs.get("label") if label is None else label,
            inputs.get("dropout_seeds"),
        )

    # Sampling.

    @abstractmethod
    def sampling_inputs(self, request: SampleRequest, config: SamplerConfig) -> Arrays:
        """Named arrays, as `inputs` lists them."""

    def sample_shape(self, request: SampleRequest) -> tuple[int, int, int]:
        """(3, H, W) of the images that a request is for."""
        return (3, self.config.size, self.config.size)

    def sampling_schedule(self, request: SampleRequest, config: SamplerConfig) -> ScheduleConfig:
        """The noise levels of sampling: the sampler's, or else training's."""
        return config.schedule or self.config.diffusion

    @abstractmethod
    def sample_grid(self, images: np.ndarray, prompt: Arrays) -> np.ndarray:
        """Samples beside true images, uint8 (B, S, S, 3), as one uint8 image for TensorBoard."""

    @abstractmethod
    def manifest_fields(self) -> dict[str, Any]:
        """What stage.json says of the kind: `size_in`, `aug_range`, ..."""


def image_grid(*columns: np.ndarray) -> np.ndarray:
    """uint8 (B, S, S, 3) arrays side by side, one row per image."""
    return np.concatenate([np.concatenate(list(column)) for column in columns], axis=1)
