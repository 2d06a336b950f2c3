"""Image to image: a picture of which something is missing to what it may have been (Palette, arXiv
2111.05826).

The network sees the noisy picture beside the degrade one, its `source`, and which task it is to do.
Where a pixel is known, outside of the task's mask, the noisy picture is the known one and the loss
does not count; tasks without a hole make every pixel anew. One model may know one task or all, each
with a share of the batch and a noise level of its own: the more a task leaves open, the more noise
it wants (Chen, arXiv 2301.10972).

A task may have a `residual_std`: then the network is asked for less, how the picture differs from a
`prior_mean`, the source with its hole smoothly filled, and errors count in units of the residual_std. It sees
the prior_mean, the mask and, instead of the noisy picture, what that shows of the difference, which is
nothing in much noise: a small network would need most of its training to learn to copy what it is
shown and to close its eyes to noise. Without spreads this is Palette.

Shapes: see stage.py; K tasks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from mindspore import Tensor, ops
from mindspore import dtype as mstype

from pipeline.config import ConfigError
from pipeline.data.image import to_uint8
from pipeline.diffusion.objective import loss as score
from pipeline.diffusion.process import add_noise, expand_dims, gaussian_posterior
from pipeline.diffusion.solvers import SamplerConfig
from pipeline.generate.edit import Edit
from pipeline.imaging.degradations import TASKS, Degraded, degrade, prior_mean
from pipeline.stage.stage import Stage, StageConfig, sheet
from pipeline.text.prompts import Arrays, Conditioning, one_hot


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A task among those that a stage learns."""

    weight: float = 1.0  # its share of the batch, beside the others'
    logsnr_shift: float = (
        0.0  # added to logsnr in training and sampling: below 0 is more noise, for a harder task
    )
    residual_std: float | None = (
        None  # by about how much pictures differ from a prior_mean, if the network is to start from one
    )

    def __post_init__(self) -> None:
        if self.residual_std is not None and self.residual_std <= 0:
            raise ConfigError(
                f"residual_std: {self.residual_std} is not positive; leave it out for a network without a prior_mean"
            )
        if self.weight <= 0:
            raise ConfigError(
                f"weight: {self.weight} is not positive; leave out the task that is not to be learnt"
            )


@dataclass(frozen=True, kw_only=True)
class ImageToImageConfig(StageConfig):
    """Damaged pictures of `size` to whole ones."""

    kind: Literal["image_to_image"] = "image_to_image"
    conditioning: Conditioning = "none"
    tasks: dict[str, TaskConfig] = field(
        hash=False
    )  # by name, see pipeline/imaging/degradations.py

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conditioning == "class":
            raise ConfigError(
                "conditioning: class, but image to image is told its task; take none or text"
            )
        if unknown := [name for name in self.tasks if name not in TASKS]:
            raise ConfigError(f"tasks.{unknown[0]}: no such task; there are {', '.join(TASKS)}")
        if not self.tasks:
            raise ConfigError(f"tasks: there is none; name some of {', '.join(TASKS)}")
        without = [name for name, task in self.tasks.items() if task.residual_std is None]
        if without and len(without) < len(self.tasks):
            raise ConfigError(
                f"tasks.{without[0]}.residual_std: none, and other tasks have one; give each task one or none"
            )
        if not without and self.diffusion.prediction != "x0":
            raise ConfigError(
                f"diffusion.prediction: {self.diffusion.prediction}, and tasks have a residual_std; give x0"
            )


class ImageToImage(Stage):
    """Sees the noisy picture, the source, which task it is and, perhaps, text."""

    Config = ImageToImageConfig
    config: ImageToImageConfig
    num_levels = 1

    def __init__(self, config: ImageToImageConfig) -> None:
        self.tasks = list(config.tasks)
        self.residual_stds = [
            task.residual_std for task in config.tasks.values() if task.residual_std is not None
        ]
        self.channels_in = (
            7 if self.residual_stds else 6
        )  # 7: the mask too, as no noise tells where the hole is
        super().__init__(config)

    def told(self) -> dict[str, int]:
        return {**super().told(), "num_classes": len(self.tasks)}

    def batch(
        self, step: int, positions: Sequence[int], pictures: np.ndarray, *prompt: np.ndarray
    ) -> Arrays:
        """Adds the damage: what is given of each picture, and by which task."""
        x, eps, logsnr, *rest = super().batch(step, positions, pictures, *prompt)
        weights = np.array([task.weight for task in self.config.tasks.values()])
        streams = self.streams("damage", step, positions)
        chosen = [int(stream.choice(len(weights), p=weights / weights.sum())) for stream in streams]
        given = [
            degrade(self.tasks[number], picture, stream)
            for number, picture, stream in zip(chosen, pictures, streams, strict=True)
        ]
        shifts = np.array([task.logsnr_shift for task in self.config.tasks.values()], np.float32)
        return x, eps, logsnr + shifts[chosen], *rest, *self.seen(given, chosen)

    def seen(self, given: Sequence[Degraded], chosen: Sequence[int]) -> Arrays:
        """What `predict` takes: sources or, with spreads, guesses (B, 3, S, S), masks (B, 1, S, S),
        tasks (B, K).
        """
        pictures, masks = (np.stack(arrays) for arrays in zip(*given, strict=True))
        if self.residual_stds:
            once = {
                id(each): (self.tasks[task], each) for each, task in zip(given, chosen, strict=True)
            }
            guesses = {
                key: prior_mean(*each) for key, each in once.items()
            }  # samples of a picture share it
            pictures = np.stack([guesses[id(each)] for each in given])
        return (pictures - self.mean) / self.std, masks, *one_hot(chosen, len(self.tasks))

    def predict(self, z: Tensor, logsnr_B: Tensor, *told: Tensor) -> Tensor:
        picture, mask, task_BK = told[-3:]
        prompt, seeds = told[: self.num_prompt], told[self.num_prompt : -3]
        if not self.residual_stds:
            seen = ops.cat((picture + mask * (z - picture), picture), 1)
            return self.network(seen, logsnr_B.expand_dims(1), *prompt, task_BK, *seeds)
        residual_std_B = self.residual_std(task_BK)
        mean, deviation = gaussian_posterior(picture, residual_std_B, z, logsnr_B)
        seen = ops.cat((mask * (mean - picture) / expand_dims(residual_std_B), picture, mask), 1)
        return mean + deviation * self.network(
            seen, logsnr_B.expand_dims(1), *prompt, task_BK, *seeds
        )

    def residual_std(self, task_BK: Tensor) -> Tensor:
        """Of each image (B,)."""
        return (
            task_BK * ops.broadcast_to(Tensor(self.residual_stds, mstype.float32), task_BK.shape)
        ).sum(axis=1)

    def loss(self, x: Tensor, eps: Tensor, logsnr_B: Tensor, *told: Tensor) -> Tensor:
        """The loss of each image (B,), over what is to be made."""
        output = self.predict(add_noise(x, eps, logsnr_B), logsnr_B, *told)
        if self.residual_stds:
            unit = expand_dims(1.0 / self.residual_std(told[-1]))
            output, x = output * unit, x * unit
        return score(self.config.diffusion, output, x, eps, logsnr_B, told[-2])

    def condition(
        self, given: Any, seed: int, numbers: Sequence[int], aug_level: float
    ) -> tuple[tuple[int, ...], Arrays]:
        """`given` is a task's name and what is given of each picture."""
        task, pictures = given
        seen = self.seen(pictures, [self.tasks.index(task)] * len(pictures))
        return seen[0].shape[1:], seen

    def restore(
        self,
        config: SamplerConfig,
        task: str,
        given: Sequence[Degraded],
        prompt: Arrays,
        seed: int,
        numbers: Sequence[int],
        kept: Arrays | None = None,
        progress: Callable[[], object] = bool,
    ) -> np.ndarray:
        """`sample` of what is given of some pictures of one size, uint8 (B, H, W, 3).

        What is known comes out as it went in; or it is the pictures `kept`, uint8 (B, H, W, 3),
        outside of their masks, float32 (B, 1, H, W).
        """
        schedule, logsnr_shift = (
            config.schedule or self.config.diffusion,
            self.config.tasks[task].logsnr_shift,
        )
        shifted = replace(
            config, schedule=replace(schedule, logsnr_shift=schedule.logsnr_shift + logsnr_shift)
        )
        sources, masks = (np.stack(arrays) for arrays in zip(*given, strict=True))
        edit = Edit(*(kept or (to_uint8(sources), masks)))
        return self.sample(shifted, prompt, seed, numbers, (task, given), edit, progress)

    def picture(self, pictures: np.ndarray, *prompt: np.ndarray) -> np.ndarray:
        """Source | sample | truth, the tasks in turn."""
        sources, made = np.empty_like(pictures), np.empty_like(pictures)
        for first, task in enumerate(self.tasks[: len(pictures)]):
            rows = range(first, len(pictures), len(self.tasks))
            streams = self.streams("damage", 0, rows)
            given = [
                degrade(task, pictures[row], stream)
                for row, stream in zip(rows, streams, strict=True)
            ]
            told = tuple(array[rows] for array in prompt)
            sources[rows] = to_uint8(np.stack([each.source for each in given]))
            made[rows] = self.restore(self.config.sample, task, given, told, self.config.seed, rows)
        return sheet(sources, made, pictures)

    def manifest_fields(self) -> dict[str, Any]:
        return {"size_in": None, "aug_range": None, "tasks": self.tasks}
