"""What every stage is: a configuration, a network, a batch, a loss and a way to sample.

A stage differs from another in what its network sees beside the noisy picture: its `condition`. All else stands here.
`train.loop` and the orchestrator use a stage through its methods alone and never name a kind.

Shapes: B images, C channels, S side, L text tokens, D text width, T noise levels an image.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, cast

import numpy as np
from mindspore import Tensor, ops

from pipeline import runtime
from pipeline.config import ConfigError, build
from pipeline.data.image import to_float, to_uint8
from pipeline.data.loader import Arrays
from pipeline.data.shards import DataConfig
from pipeline.diffusion.guidance import guide, threshold
from pipeline.diffusion.loss import DiffusionConfig
from pipeline.diffusion.loss import loss as score  # in a compiled method `loss` would be the method itself
from pipeline.diffusion.process import add_noise, x_from
from pipeline.diffusion.sampler import TERMS, SamplerConfig, combine, levels, sample
from pipeline.diffusion.schedule import SCHEDULES
from pipeline.nn.bands import in_bands
from pipeline.nn.text_encoder import TextConfig
from pipeline.nn.unet import UNet, UNetConfig
from pipeline.rng import generator
from pipeline.train.optimizer import OptimizerConfig
from pipeline.train.trainee import TrainConfig


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A run of one stage. Kinds of stage add what they need."""

    kind: str
    run: str  # the run's folder
    seed: int = 0
    size: int  # side of the pictures that the stage makes, in pixels
    text: TextConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    unet: UNetConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    sample: SamplerConfig = SamplerConfig()

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed: {self.seed} is not in [0, 2**63)")
        if self.size % self.unet.stride:
            raise ConfigError(
                f"size: {self.size} is not a multiple of {self.unet.stride}, by which this U-Net shrinks a picture"
            )


class Stage:
    """Shared by all stages; a kind says `channels_in`, `num_levels`, `condition` and `predict`."""

    Config: ClassVar[type[StageConfig]] = StageConfig
    channels_in: ClassVar[int]
    num_levels: ClassVar[int]

    def __init__(self, config: StageConfig) -> None:
        self.config = config
        self.network = UNet(config.unet, self.channels_in, self.num_levels, config.text.width)
        self.graphs: dict[tuple[Any, ...], Callable[..., tuple[Tensor, Tensor]]] = {}  # of sampling, see `advance`

    @classmethod
    def from_config(cls, raw: dict[str, Any]) -> "Stage":
        """The stage of a resolved configuration, as a manifest holds it."""
        return cls(build(cls.Config, raw))

    # Training.

    @property
    def window(self) -> int | None:
        """Side of the window of each picture that training sees, in pixels; None: all of it."""
        return None

    def batch(
        self, step: int, positions: Sequence[int], pictures: np.ndarray, text_BLD: np.ndarray, mask_BL: np.ndarray
    ) -> Arrays:
        """Pictures uint8 (B, S, S, 3) and text -> what `loss` takes, with every random draw in it."""
        x = to_float(pictures)
        t = np.array([stream.random() for stream in self.streams("time", step, positions)])
        logsnr = SCHEDULES[self.config.diffusion.schedule](t).astype(np.float32)
        eps = unit_noise(self.streams("noise", step, positions), x.shape[1:])
        keep = [stream.random() >= self.config.text.drop for stream in self.streams("drop", step, positions)]
        kept = np.array(keep, np.float32)[:, None]
        return x, eps, logsnr, text_BLD * kept[:, :, None], mask_BL * kept

    def streams(self, purpose: str, step: int, positions: Sequence[int]) -> list[np.random.Generator]:
        """The randomness of each place of a step's global batch."""
        return [generator(self.config.seed, purpose, step, position) for position in positions]

    def loss(self, x: Tensor, eps: Tensor, logsnr_B: Tensor, text: Tensor, mask: Tensor, *condition: Tensor) -> Tensor:
        """The loss of each image (B,)."""
        output = self.predict(add_noise(x, eps, logsnr_B), logsnr_B, text, mask, *condition)
        return score(self.config.diffusion, output, x, eps, logsnr_B)

    # Sampling.

    def predict_guided(
        self, weight: Tensor, z: Tensor, logsnr_B: Tensor, text: Tensor, mask: Tensor, *condition: Tensor
    ) -> Tensor:
        """The network's answer with guidance; with and without text in one call."""
        twice: tuple[Tensor, ...] = ()
        for part in condition:
            twice = (*twice, ops.cat((part, part)))
        output = self.predict(
            ops.cat((z, z)),
            ops.cat((logsnr_B, logsnr_B)),
            ops.cat((text, ops.zeros_like(text))),
            ops.cat((mask, ops.zeros_like(mask))),
            *twice,
        )
        with_text, without = ops.chunk(output, 2)
        return guide(with_text, without, weight)

    def sample(
        self,
        config: SamplerConfig,
        text_BLD: np.ndarray,
        mask_BL: np.ndarray,
        seed: int,
        numbers: Sequence[int],
        low: np.ndarray | None = None,
        progress: Callable[[], object] = bool,
    ) -> np.ndarray:
        """Pictures uint8 (B, S, S, 3); each depends on the seed, its number and its own inputs alone.

        Args:
            config: usually the stage's own, `self.config.sample`.
            seed, numbers: name the noise of each image.
            low: uint8 (B, s, s, 3), what a super-resolution stage enlarges; S is then `scale` times s.
            progress: called after each step.
        """
        shape, condition = self.condition(low, seed, numbers, config.augment)
        fixed = [Tensor(np.asarray(array, np.float32)) for array in (text_BLD, mask_BL, *condition)]
        weight, compiled = Tensor(np.float32(config.guidance)), self.bounded.advance(config)

        def advance(level: float, factors: tuple[float, ...], *tensors: Tensor) -> tuple[Tensor, Tensor]:
            logsnr_B = Tensor(np.full(len(numbers), level, np.float32))
            z, x = compiled(weight, Tensor(np.array(factors, np.float32)), logsnr_B, *tensors, *fixed)
            progress()
            return z, x

        def noise(step: int) -> Tensor:
            return Tensor(sampling_noise(seed, numbers, shape, step))

        logsnrs = levels(self.config.diffusion.schedule, config.steps)
        return to_uint8(sample(advance, noise, config.sampler, logsnrs).asnumpy())

    @cached_property
    def bounded(self) -> "Stage":
        """This stage, for sampling: what its network is asked about large pictures is answered in bounded memory."""

        def network(*tensors: Tensor) -> Tensor:  # no `partial`, as an attribute of that kind would not be compiled
            return in_bands(self.network, *tensors)

        stage: Any = copy(self)
        stage.network = network
        return cast(Stage, stage)

    def advance(self, config: SamplerConfig) -> Callable[..., tuple[Tensor, Tensor]]:
        """(weight, numbers, logsnr_B, z, terms and what `predict` takes) -> z', x: a step of sampling as one graph.

        Compiled once for whatever agrees in all that shapes it. See `diffusion.sampler.sample`.
        """
        guided, num = config.guidance != 1.0, len(TERMS[config.sampler])
        kind, percentile, prediction = config.threshold, config.percentile, self.config.diffusion.prediction

        def advance(
            weight: Tensor, numbers: Tensor, logsnr_B: Tensor, z: Tensor, *rest: Tensor
        ) -> tuple[Tensor, Tensor]:
            terms, fixed = rest[:num], rest[num:]
            output = self.predict_guided(weight, z, logsnr_B, *fixed) if guided else self.predict(z, logsnr_B, *fixed)
            x = threshold(x_from(prediction, output, z, logsnr_B), kind, percentile)
            return combine(numbers, z, x, *terms), x

        return self.graphs.setdefault((guided, num, kind, percentile), runtime.compile(advance))

    # What a kind decides.

    def predict(self, z: Tensor, logsnr_B: Tensor, text: Tensor, mask: Tensor, *condition: Tensor) -> Tensor:
        """The network's answer to a noisy picture."""
        raise NotImplementedError

    def condition(
        self, low: np.ndarray | None, seed: int, numbers: Sequence[int], augment: float
    ) -> tuple[tuple[int, ...], Arrays]:
        """The shape (3, S, S) of the pictures to make, and what `predict` takes beside the text, for sampling."""
        raise NotImplementedError

    def picture(self, pictures: np.ndarray, text_BLD: np.ndarray, mask_BL: np.ndarray) -> np.ndarray:
        """Samples beside the truth, as one uint8 picture to look at while training."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What the manifest says of the kind: sizes and augmentation."""
        raise NotImplementedError


def unit_noise(streams: Sequence[np.random.Generator], shape: tuple[int, ...]) -> np.ndarray:
    """float32 (B, *shape). Drawn in threads: at 1024 px a batch's draws take as long as a small network's call."""
    noise = np.empty((len(streams), *shape), np.float32)

    def draw(stream: np.random.Generator, out: np.ndarray) -> None:
        stream.standard_normal(dtype=np.float32, out=out)

    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as threads:
        list(threads.map(draw, streams, noise))
    return noise


def sampling_noise(seed: int, numbers: Sequence[int], shape: tuple[int, ...], step: int) -> np.ndarray:
    """Unit noise float32 (B, *shape); the size of the picture tells the stages of a cascade apart."""
    return unit_noise([generator(seed, "sample", number, shape[-1], step) for number in numbers], shape)


def sheet(*columns: np.ndarray) -> np.ndarray:
    """uint8 (B, S, S, 3) arrays side by side, one row an image."""
    return np.concatenate([np.concatenate(list(column)) for column in columns], axis=1)
