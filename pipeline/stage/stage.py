"""What every stage is: a configuration, a network, a batch, a loss and a way to sample.

A stage differs from another in what its network sees beside the noisy picture: its `condition`. All
else stands here. `train.loop` and the orchestrator use a stage through its methods alone and never
name a kind.

Shapes: B images, C channels, S side, T noise levels an image.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, cast

import numpy as np
from mindspore import Tensor, ops

from pipeline import runtime
from pipeline.config import ConfigError, build
from pipeline.data.image import to_float, to_uint8
from pipeline.data.shards import DataConfig
from pipeline.diffusion.guidance import guide, threshold
from pipeline.diffusion.objective import DiffusionConfig
from pipeline.diffusion.objective import (
    loss as score,
)  # in a compiled method `loss` would be the method itself
from pipeline.diffusion.process import add_noise, x_from
from pipeline.diffusion.solvers import TERMS, SamplerConfig, linear_step, logsnr_steps, sample
from pipeline.generate.edit import Edit
from pipeline.nn.tiling import tiled
from pipeline.nn.unet import UNet, UNetConfig
from pipeline.rng import generator, sampling_noise, unit_noise
from pipeline.text.encoder import TextConfig
from pipeline.text.prompts import Arrays, ClassConfig, Conditioning
from pipeline.train.config import TrainConfig
from pipeline.train.optimizer import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class PixelConfig:
    """The data set's pixels, red, green and blue, in [-1, 1]: a network sees (pixel - mean) / std."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if min(self.std) <= 0:
            raise ConfigError(
                f"std: {list(self.std)} is not positive; `python -m tools.pixels` measures it"
            )


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A run of one stage. Kinds of stage add what they need."""

    kind: str
    run: str  # the run's folder
    seed: int = 0
    size: int  # side of the pictures that the stage makes, in pixels
    conditioning: Conditioning = (
        "text"  # what the network is told of a sample, and `sample.guidance` weighs
    )
    text: TextConfig | None = None
    classes: ClassConfig | None = None
    pixels: PixelConfig | None = None  # None: as they are
    diffusion: DiffusionConfig = DiffusionConfig()
    unet: UNetConfig
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    sample: SamplerConfig = SamplerConfig()

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed: {self.seed} is not in [0, 2**63)")
        for name, kind in (("text", "text"), ("classes", "class")):
            if (getattr(self, name) is not None) != (self.conditioning == kind):
                given = f"and there is {'a' if getattr(self, name) else 'no'} section {name}"
                raise ConfigError(
                    f"conditioning: {self.conditioning} {given}; conditioning is {kind} if and only if there is one"
                )
        if self.conditioning != "text" and "cross" in self.unet.attention:
            raise ConfigError(
                f"unet.attention: cross looks at the text, and conditioning is {self.conditioning}; take self"
            )
        if self.conditioning == "none" and self.sample.guidance != 1:
            raise ConfigError(
                f"sample.guidance: {self.sample.guidance}, but conditioning none leaves nothing to weigh; leave it out"
            )
        if self.conditioning != "text":  # then a sample needs no caption, but a class
            wanted = self.classes.filter if self.classes else {}
            chosen = replace(self.data.filter, fields=self.data.filter.fields | wanted)
            object.__setattr__(self, "data", replace(self.data, captions={}, filter=chosen))


class Stage:
    """Shared by all stages; a kind says `channels_in`, `num_levels`, `condition` and `predict`.

    A `prompt` is the one, two or no arrays of `pipeline.text.prompts`.
    """

    Config: ClassVar[type[StageConfig]] = StageConfig
    channels_in: int
    num_levels: ClassVar[int]

    def __init__(self, config: StageConfig) -> None:
        self.config = config
        self.num_prompt = {"text": 2, "class": 1, "none": 0}[config.conditioning]
        self.network = UNet(config.unet, self.channels_in, self.num_levels, **self.told())
        self.graphs: dict[
            tuple[Any, ...], Callable[..., tuple[Tensor, Tensor]]
        ] = {}  # of sampling, see `advance`
        pixels = config.pixels or PixelConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        self.mean, self.std = (
            np.array(each, np.float32).reshape(3, 1, 1) for each in (pixels.mean, pixels.std)
        )

    def told(self) -> dict[str, int]:
        """Widths of what conditions the network beside the noise level."""
        text, classes = self.config.text, self.config.classes
        return {
            "text_width": text.width if text else 0,
            "num_classes": classes.num if classes else 0,
        }

    @classmethod
    def from_config(cls, raw: dict[str, Any]) -> "Stage":
        """The stage of a resolved configuration, as a manifest holds it."""
        return cls(build(cls.Config, raw))

    def from_pictures(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 (B, S, S, 3) as the network sees it, float32 (B, 3, S, S)."""
        return (to_float(pictures) - self.mean) / self.std

    def to_pictures(self, x: np.ndarray) -> np.ndarray:
        """The inverse of `from_pictures`, cut to what pixels can be."""
        return to_uint8(x * self.std + self.mean)

    # Training.

    @property
    def window(self) -> int | None:
        """Side of the window of each picture that training sees, in pixels; None: all of it."""
        return None

    def batch(
        self, step: int, positions: Sequence[int], pictures: np.ndarray, *prompt: np.ndarray
    ) -> Arrays:
        """Pictures uint8 (B, S, S, 3) and prompt -> what `loss` takes, with every random draw in
        it.
        """
        x = self.from_pictures(pictures)
        t = np.array([stream.random() for stream in self.streams("time", step, positions)])
        logsnr = self.config.diffusion.logsnr(t).astype(np.float32)
        eps = unit_noise(self.streams("noise", step, positions), x.shape[1:])
        kept = np.array(
            [
                stream.random() >= self.cond_drop_prob
                for stream in self.streams("drop", step, positions)
            ],
            np.float32,
        )
        told = [array * kept.reshape(-1, *(1,) * (array.ndim - 1)) for array in prompt]
        if self.config.unet.dropout:
            streams = self.streams("dropout", step, positions)
            told.append(np.array([stream.integers(2**31) for stream in streams], np.int32))
        return x, eps, logsnr, *told

    @property
    def cond_drop_prob(self) -> float:
        """The share of samples whose prompt is dropped in training."""
        section = self.config.text or self.config.classes
        return section.cond_drop_prob if section else 0.0

    def streams(
        self, purpose: str, step: int, positions: Sequence[int]
    ) -> list[np.random.Generator]:
        """The randomness of each place of a step's global batch."""
        return [generator(self.config.seed, purpose, step, position) for position in positions]

    def loss(self, x: Tensor, eps: Tensor, logsnr_B: Tensor, *told: Tensor) -> Tensor:
        """The loss of each image (B,); `told` is the prompt, with dropout its seeds, and the
        condition.
        """
        output = self.predict(add_noise(x, eps, logsnr_B), logsnr_B, *told)
        return score(self.config.diffusion, output, x, eps, logsnr_B)

    # Sampling.

    def predict_guided(self, weight: Tensor, z: Tensor, logsnr_B: Tensor, *told: Tensor) -> Tensor:
        """The network's answer with guidance; with and without the prompt in one call."""
        twice: tuple[Tensor, ...] = ()
        for part in told[: self.num_prompt]:
            twice = (*twice, ops.cat((part, ops.zeros_like(part))))
        for part in told[self.num_prompt :]:
            twice = (*twice, ops.cat((part, part)))
        output = self.predict(ops.cat((z, z)), ops.cat((logsnr_B, logsnr_B)), *twice)
        with_prompt, without = ops.chunk(output, 2)
        return guide(with_prompt, without, weight)

    def sample(
        self,
        config: SamplerConfig,
        prompt: Arrays,
        seed: int,
        numbers: Sequence[int],
        given: Any = None,
        edit: Edit | None = None,
        progress: Callable[[], object] = bool,
        start: np.ndarray | None = None,
        watch: Callable[[float, Tensor, Tensor], None] | None = None,
    ) -> np.ndarray:
        """Pictures uint8 (B, S, S, 3); each depends on the seed, its number and its own inputs
        alone.

        Args:
            config: usually the stage's own, `self.config.sample`.
            seed, numbers: name the noise of each image.
            given: what the kind's `condition` takes; uint8 (B, s, s, 3) to be enlarged, in
                super-resolution.
            edit: what to start from, if not from noise.
            progress: called after each step.
            start: unit noise float32 (B, 3, S, S) to start from instead of the one that seed and
                numbers name.
            watch: shown each step's logsnr, z and the x that the network sees in it.
        """
        shape, condition = self.condition(given, seed, numbers, config.aug_level)
        edit = edit or Edit(np.empty(0))
        logsnrs = logsnr_steps(
            config.schedule or self.config.diffusion,
            config.steps,
            config.extra_steps,
            edit.strength,
        )
        before = self.from_pictures(edit.pictures) if edit.pictures.size else None
        kept = () if edit.mask is None else (before, edit.mask)
        fixed = [Tensor(np.asarray(array, np.float32)) for array in (*kept, *prompt, *condition)]
        weight, compiled = (
            Tensor(np.float32(config.guidance)),
            self.bounded.advance(config, edit.mask is not None),
        )

        def advance(
            level: float, factors: tuple[float, ...], *tensors: Tensor
        ) -> tuple[Tensor, Tensor]:
            logsnr_B = Tensor(np.full(len(numbers), level, np.float32))
            z, x = compiled(
                weight, Tensor(np.array(factors, np.float32)), logsnr_B, *tensors, *fixed
            )
            progress()
            if watch:
                watch(level, tensors[0], x)
            return z, x

        def noise(draw: int) -> Tensor:
            unit = Tensor(
                sampling_noise(seed, numbers, shape, draw) if draw or start is None else start
            )
            if draw or before is None or edit.strength == 1:
                return unit
            return add_noise(
                Tensor(before), unit, Tensor(np.full(len(numbers), logsnrs[0], np.float32))
            )

        repaint_steps = config.repaint_steps if edit.mask is not None else 1
        return self.to_pictures(
            sample(advance, noise, config.sampler, logsnrs, repaint_steps).asnumpy()
        )

    @cached_property
    def bounded(self) -> "Stage":
        """This stage, for sampling: what its network is asked about large pictures is answered in
        bounded memory.
        """

        def network(
            *tensors: Tensor,
        ) -> Tensor:  # no `partial`, as an attribute of that kind would not be compiled
            return tiled(self.network, *tensors)

        stage: Any = copy(self)
        stage.network = network
        return cast(Stage, stage)

    def advance(
        self, config: SamplerConfig, masked: bool = False
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        """(weight, numbers, logsnr_B, z, terms and what `predict` takes) -> z', x: a step of
        sampling as one graph.

        `masked`: what is known and the mask stand before what `predict` takes, and x is what is
        known where the mask is 0. Each step is linear in z and x, so that there z stays the known
        picture with the noise that it began with. Compiled once for whatever agrees in all that
        shapes it. See `diffusion.sampler.sample`.
        """
        guided, num = config.guidance != 1.0, len(TERMS[config.sampler])
        kind, quantile, prediction = (
            config.threshold,
            config.quantile,
            self.config.diffusion.prediction,
        )
        pixels = (Tensor(self.mean), Tensor(self.std)) if self.config.pixels else ()

        def bounded(x: Tensor) -> Tensor:
            if not pixels:
                return threshold(x, kind, quantile)
            return (threshold(x * pixels[1] + pixels[0], kind, quantile) - pixels[0]) / pixels[1]

        def advance(
            weight: Tensor, numbers: Tensor, logsnr_B: Tensor, z: Tensor, *rest: Tensor
        ) -> tuple[Tensor, Tensor]:
            terms, told = rest[:num], rest[num + 2 * masked :]
            output = (
                self.predict_guided(weight, z, logsnr_B, *told)
                if guided
                else self.predict(z, logsnr_B, *told)
            )
            x = bounded(x_from(prediction, output, z, logsnr_B))
            if masked:
                known, mask = rest[num], rest[num + 1]
                x = known + mask * (x - known)
            return linear_step(numbers, z, x, *terms), x

        return self.graphs.setdefault(
            (guided, num, kind, quantile, masked), runtime.compile(advance)
        )

    # What a kind decides.

    def predict(self, z: Tensor, logsnr_B: Tensor, *told: Tensor) -> Tensor:
        """The network's answer to a noisy picture; `told` is the prompt, in training with dropout
        its seeds, and the condition.
        """
        raise NotImplementedError

    def condition(
        self, given: Any, seed: int, numbers: Sequence[int], aug_level: float
    ) -> tuple[tuple[int, ...], Arrays]:
        """The shape (3, S, S) of the pictures to make, and what `predict` takes beside the prompt,
        for sampling.
        """
        raise NotImplementedError

    def picture(self, pictures: np.ndarray, *prompt: np.ndarray) -> np.ndarray:
        """Samples beside the truth, as one uint8 picture to look at while training."""
        raise NotImplementedError

    def manifest_fields(self) -> dict[str, Any]:
        """What the manifest says of the kind: sizes and augmentation."""
        raise NotImplementedError


def sheet(*columns: np.ndarray) -> np.ndarray:
    """uint8 (B, S, S, 3) arrays side by side, one row an image."""
    return np.concatenate([np.concatenate(list(column)) for column in columns], axis=1)
