"""Super-resolution: a picture and its text to the same picture at a multiple of its size.

The low resolution, enlarged, is concatenated to the noisy picture. It carries noise of its own: in
training of a level drawn anew for each sample, which the network is told, so that it learns not to
trust the low resolution more than that level allows and forgives the faults of the stage before (Ho
et al., arXiv 2106.15282; Imagen, section 2.4). A stage for large pictures trains on windows of them
and samples them whole (Imagen, appendix F).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from mindspore import Tensor, ops

from pipeline.config import ConfigError
from pipeline.data.image import downsample, upsample
from pipeline.diffusion.process import add_noise
from pipeline.rng import sampling_noise, unit_noise
from pipeline.stage.stage import Stage, StageConfig, sheet
from pipeline.text.prompts import Arrays

AUGMENT_STEP = (
    2**32
)  # names the low resolution's noise among the draws of sampling; no sampler takes as many steps


@dataclass(frozen=True, kw_only=True)
class LowResConfig:
    """The picture that is enlarged."""

    size: int  # side in pixels
    max_aug_level: float = 1.0  # training draws levels, as diffusion times, from [0, max_aug_level]
    window: int | None = None  # train on windows of the large picture with this side

    def __post_init__(self) -> None:
        if not 0 <= self.max_aug_level <= 1:
            raise ConfigError(
                f"max_aug_level: {self.max_aug_level} is not a diffusion time in [0, 1]; Imagen has 1.0"
            )


@dataclass(frozen=True, kw_only=True)
class SuperResolutionConfig(StageConfig):
    """Pictures of `low_res.size` to pictures of `size`."""

    kind: Literal["super_resolution"] = "super_resolution"
    low_res: LowResConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % self.low_res.size or self.size == self.low_res.size:
            raise ConfigError(
                f"low_res.size: {self.low_res.size} does not divide {self.size}, the stage's size"
            )
        if not 0 <= self.sample.aug_level <= self.low_res.max_aug_level:
            raise ConfigError(
                f"sample.aug_level: {self.sample.aug_level} is not in [0, low_res.max_aug_level = {self.low_res.max_aug_level}]"
            )
        side = self.low_res.window
        if side is not None and (
            side > self.size or side % (self.size // self.low_res.size) or side % self.unet.stride
        ):
            raise ConfigError(
                f"low_res.window: {side} is no multiple of {self.size // self.low_res.size} (the enlargement) and of "
                f"{self.unet.stride} (by which this U-Net shrinks a picture) up to the size {self.size}"
            )


class SuperResolution(Stage):
    """Sees the noisy picture, the noisy low resolution, its level, and the text."""

    Config = SuperResolutionConfig
    config: SuperResolutionConfig
    channels_in = 6
    num_levels = 2

    @property
    def window(self) -> int | None:
        return self.config.low_res.window

    @property
    def scale(self) -> int:
        return self.config.size // self.config.low_res.size

    def batch(
        self, step: int, positions: Sequence[int], pictures: np.ndarray, *prompt: np.ndarray
    ) -> Arrays:
        """Adds the enlarged low resolution, its noise and its level."""
        x, *rest = super().batch(step, positions, pictures, *prompt)
        low = upsample(downsample(x, x.shape[-1] // self.scale), x.shape[-1])
        streams = self.streams("augment", step, positions)
        level = (
            np.array([stream.random() for stream in streams]) * self.config.low_res.max_aug_level
        )
        return x, *rest, low, unit_noise(streams, x.shape[1:]), self.augment_logsnr(level)

    def augment_logsnr(self, level: np.ndarray) -> np.ndarray:
        """A level of augmentation is a time of the stage's own schedule."""
        return self.config.diffusion.logsnr(level).astype(np.float32)

    def predict(self, z: Tensor, logsnr_B: Tensor, *told: Tensor) -> Tensor:
        low, eps, low_logsnr_B = told[-3:]
        seen = ops.cat((z, add_noise(low, eps, low_logsnr_B)), 1)
        return self.network(seen, ops.stack((logsnr_B, low_logsnr_B), 1), *told[:-3])

    def condition(
        self, given: np.ndarray | None, seed: int, numbers: Sequence[int], aug_level: float
    ) -> tuple[tuple[int, ...], Arrays]:
        if given is None:
            raise ValueError("super-resolution needs low-resolution pictures")
        side = given.shape[1] * self.scale
        level = np.full(len(given), aug_level)
        noise = sampling_noise(seed, numbers, (3, side, side), AUGMENT_STEP)
        return (3, side, side), (
            upsample(self.from_pictures(given), side),
            noise,
            self.augment_logsnr(level),
        )

    def picture(self, pictures: np.ndarray, *prompt: np.ndarray) -> np.ndarray:
        """True low resolution, enlarged | sample | truth."""
        side = pictures.shape[1]
        low = downsample(self.from_pictures(pictures), side // self.scale)
        made = self.sample(
            self.config.sample, prompt, self.config.seed, range(len(low)), self.to_pictures(low)
        )
        return sheet(self.to_pictures(upsample(low, side)), made, pictures)

    def manifest_fields(self) -> dict[str, Any]:
        return {
            "size_in": self.config.low_res.size,
            "aug_range": [0.0, self.config.low_res.max_aug_level],
        }
