"""Super-resolution: an image and its text to the same image at a multiple of its size.

The low resolution, enlarged, is concatenated to the noisy image. It is noise-augmented: in training
at a level drawn anew for each sample, on which the network is conditioned, so that it learns not to
trust the low resolution more than that level allows and tolerates the artifacts of the stage before
(Ho et al., arXiv 2106.15282; Imagen, arXiv 2205.11487, section 2.4). A stage for large images
trains on windows of them and samples them whole (Imagen, appendix F).
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from mindspore import Tensor, ops

from pipeline.config import ConfigError
from pipeline.data.image import ImageSize, downsample, upsample
from pipeline.diffusion.process import add_noise
from pipeline.diffusion.solvers import SamplerConfig
from pipeline.generate.engine import sample
from pipeline.rng import Draws, sampling_noise
from pipeline.stage.config import StageConfig
from pipeline.stage.inputs import Arrays
from pipeline.stage.request import SampleRequest
from pipeline.stage.stage import Network, Stage, image_grid

# Names the augmentation noise among the draws of sampling; no solver takes as many steps.
AUGMENTATION_DRAW = 2**32


@dataclass(frozen=True, kw_only=True)
class LowResConfig:
    """The image that is enlarged."""

    size: int  # side in pixels
    max_aug_level: float = 1.0  # training draws levels, as diffusion times, from [0, max_aug_level]
    window: int | None = None  # train on windows of the large image with this side, in pixels

    def __post_init__(self) -> None:
        if not 0 <= self.max_aug_level <= 1:
            raise ConfigError(
                f"max_aug_level: {self.max_aug_level} is not a diffusion time in [0, 1]; Imagen "
                "has 1.0"
            )


@dataclass(frozen=True, kw_only=True)
class SuperResolutionConfig(StageConfig):
    """Images of `low_res.size` to images of `size`."""

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
                f"sample.aug_level: {self.sample.aug_level} is not in [0, low_res.max_aug_level = "
                f"{self.low_res.max_aug_level}]"
            )

        window = self.low_res.window
        if window is not None and (
            window > self.size or window % self.scale or window % self.unet.stride
        ):
            raise ConfigError(
                f"low_res.window: {window} is no multiple of {self.scale} (the enlargement) and of "
                f"{self.unet.stride} (by which this U-Net divides an image's sides) up to the size "
                f"{self.size}"
            )

    @property
    def scale(self) -> int:
        """By how much a side grows."""
        return self.size // self.low_res.size


class SuperResolution(Stage):
    """Inputs: the noisy image, the noise-augmented low resolution, its level, and the prompt."""

    Config = SuperResolutionConfig
    config: SuperResolutionConfig
    channels_in = 6
    num_noise_levels = 2
    extra_inputs = ("low_res", "low_res_noise", "low_res_logsnr")

    @property
    def image_size(self) -> ImageSize:
        return ImageSize(side=self.config.size, window=self.config.low_res.window)

    def training_inputs(self, images: np.ndarray, prompt: Arrays, draws: Draws) -> Arrays:
        """Adds the enlarged low resolution, its noise and its level."""
        arrays = super().training_inputs(images, prompt, draws)
        x = arrays["x"]
        side = x.shape[-1]

        low_res = upsample(downsample(x, side // self.config.scale), side)

        uniform, noise = draws.uniform_and_noise("augment", x.shape[1:])
        level = uniform * self.config.low_res.max_aug_level
        return {
            **arrays,
            "low_res": low_res,
            "low_res_noise": noise,
            "low_res_logsnr": self.aug_logsnr(level),
        }

    def aug_logsnr(self, level: np.ndarray) -> np.ndarray:
        """A level of augmentation is a time of the stage's own schedule; float32."""
        return self.config.diffusion.logsnr(level).astype(np.float32)

    def predict(
        self, network: Network, z: Tensor, logsnr_B: Tensor, inputs: dict[str, Tensor]
    ) -> Tensor:
        low_logsnr_B = inputs["low_res_logsnr"]
        # Augmented in the graph, so that training and sampling do it alike.
        low_res = add_noise(inputs["low_res"], inputs["low_res_noise"], low_logsnr_B)
        # Both levels: how noisy z is, and how far the low resolution can be trusted.
        levels_BT = ops.stack((logsnr_B, low_logsnr_B), 1)
        return self.call_network(network, ops.cat((z, low_res), 1), levels_BT, inputs)

    def sampling_inputs(self, request: SampleRequest, config: SamplerConfig) -> Arrays:
        if request.low_res is None:
            raise ValueError("low_res: missing; super-resolution needs images to enlarge")

        shape = self.sample_shape(request)
        level = np.full(request.num_images, config.aug_level)
        return {
            **request.prompt,
            "low_res": upsample(self.from_images(request.low_res), shape[-1]),
            "low_res_noise": sampling_noise(
                request.seed, request.image_ids, shape, AUGMENTATION_DRAW
            ),
            "low_res_logsnr": self.aug_logsnr(level),
        }

    def sample_shape(self, request: SampleRequest) -> tuple[int, int, int]:
        """That of the low resolution, enlarged: a stage trained on windows runs at full size."""
        if request.low_res is None:
            return super().sample_shape(request)

        side = request.low_res.shape[1] * self.config.scale
        return (3, side, side)

    def sample_grid(self, images: np.ndarray, prompt: Arrays) -> np.ndarray:
        """True low resolution, enlarged | sample | truth."""
        side = images.shape[1]
        low_res = downsample(self.from_images(images), side // self.config.scale)

        request = SampleRequest(
            prompt=prompt,
            seed=self.config.seed,
            image_ids=range(len(images)),
            # Rounded to uint8, as the images of the stage before are.
            low_res=self.to_images(low_res),
        )

        samples = sample(self, self.config.sample, request)
        return image_grid(self.to_images(upsample(low_res, side)), samples, images)

    def manifest_fields(self) -> dict[str, Any]:
        return {
            "size_in": self.config.low_res.size,
            "aug_range": [0.0, self.config.low_res.max_aug_level],
        }
