"""Image to image: a picture of which something is missing to what it may have been (Palette, arXiv 2111.05826).

The network sees the noisy picture beside the damaged one, its `source`, and which task it is to do. Where a pixel is
known, outside of the task's mask, the noisy picture is the known one and the loss does not count; tasks without a hole
make every pixel anew. One model may know one task or all, each with a share of the batch and a noise level of its own:
the more a task leaves open, the more noise it wants (Chen, arXiv 2301.10972).

With `prediction: eps` that is Palette. With x0 the network is asked for less: how the picture differs from a `guess`,
the source with its hole smoothly filled, which a small network would need most of its training to learn to copy.

Shapes: see stage.py; K tasks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from mindspore import Tensor, ops

from pipeline.config import ConfigError
from pipeline.data.image import to_uint8
from pipeline.data.prompts import Arrays, Condition, one_hot
from pipeline.data.tasks import TASKS, Given, damaged
from pipeline.diffusion.loss import loss as score
from pipeline.diffusion.process import add_noise, x_around
from pipeline.diffusion.sampler import SamplerConfig
from pipeline.editing import Edit
from stages.stage import Stage, StageConfig, sheet

SPREAD = 0.1  # by about how much pictures differ from the guess, in deviations of the network's pixels


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A task among those that a stage learns."""

    weight: float = 1.0  # its share of the batch, beside the others'
    shift: float = 0.0  # added to logsnr in training and sampling: below 0 is more noise, for a harder task

    def __post_init__(self) -> None:
        if self.weight <= 0:
            raise ConfigError(f"weight: {self.weight} is not positive; leave out the task that is not to be learnt")


@dataclass(frozen=True, kw_only=True)
class ImageToImageConfig(StageConfig):
    """Damaged pictures of `size` to whole ones."""

    kind: Literal["image_to_image"] = "image_to_image"
    condition: Condition = "none"
    tasks: dict[str, TaskConfig] = field(hash=False)  # by name, see pipeline/data/tasks.py

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.condition == "class":
            raise ConfigError("condition: class, but image to image is told its task; take none or text")
        if unknown := [name for name in self.tasks if name not in TASKS]:
            raise ConfigError(f"tasks.{unknown[0]}: no such task; there are {', '.join(TASKS)}")
        if not self.tasks:
            raise ConfigError(f"tasks: there is none; name some of {', '.join(TASKS)}")


class ImageToImage(Stage):
    """Sees the noisy picture, the source, which task it is and, perhaps, text."""

    Config = ImageToImageConfig
    config: ImageToImageConfig
    channels_in = 6
    num_levels = 1

    @property
    def tasks(self) -> list[str]:
        return list(self.config.tasks)

    def told(self) -> dict[str, int]:
        return {**super().told(), "num_classes": len(self.tasks)}

    def batch(self, step: int, positions: Sequence[int], pictures: np.ndarray, *prompt: np.ndarray) -> Arrays:
        """Adds the damage: what is given of each picture, and by which task."""
        x, eps, logsnr, *rest = super().batch(step, positions, pictures, *prompt)
        weights = np.array([task.weight for task in self.config.tasks.values()])
        streams = self.streams("damage", step, positions)
        chosen = [int(stream.choice(len(weights), p=weights / weights.sum())) for stream in streams]
        given = [
            damaged(self.tasks[number], picture, stream)
            for number, picture, stream in zip(chosen, pictures, streams, strict=True)
        ]
        shifts = np.array([task.shift for task in self.config.tasks.values()], np.float32)
        return x, eps, logsnr + shifts[chosen], *rest, *self.seen(given, chosen)

    @property
    def guesses(self) -> bool:
        """Whether `predict` takes a guess too."""
        return self.config.diffusion.prediction == "x0"

    def seen(self, given: Sequence[Given], chosen: Sequence[int]) -> Arrays:
        """What `predict` takes: sources as the network sees them (B, 3, S, S), with x0 as many guesses, masks
        (B, 1, S, S), tasks (B, K).
        """
        sources, masks = (np.stack(arrays) for arrays in zip(*given, strict=True))
        guesses = [np.stack([each.guess() for each in given])] if self.guesses else []
        pictures = [((each - self.mean) / self.std).astype(np.float32) for each in (sources, *guesses)]
        return *pictures, masks, *one_hot(chosen, len(self.tasks))

    def predict(self, z: Tensor, logsnr_B: Tensor, *told: Tensor) -> Tensor:
        num = 4 if self.guesses else 3  # of `seen`, the last ones told
        source, mask, task_BK = told[-num], told[-2], told[-1]
        seen = ops.cat((source + mask * (z - source), source), 1)
        prompt, seeds = told[: self.num_prompt], told[self.num_prompt : -num]
        answer = self.network(seen, logsnr_B.expand_dims(1), *prompt, task_BK, *seeds)
        return x_around(told[-3], SPREAD, answer, z, logsnr_B) if self.guesses else answer

    def loss(self, x: Tensor, eps: Tensor, logsnr_B: Tensor, *told: Tensor) -> Tensor:
        """The loss of each image (B,), over what is to be made."""
        output = self.predict(add_noise(x, eps, logsnr_B), logsnr_B, *told)
        return score(self.config.diffusion, output, x, eps, logsnr_B, told[-2])

    def condition(
        self, given: Any, seed: int, numbers: Sequence[int], augment: float
    ) -> tuple[tuple[int, ...], Arrays]:
        """`given` is a task's name and what is given of each picture."""
        task, pictures = given
        seen = self.seen(pictures, [self.tasks.index(task)] * len(pictures))
        return seen[0].shape[1:], seen

    def restore(
        self,
        config: SamplerConfig,
        task: str,
        given: Sequence[Given],
        prompt: Arrays,
        seed: int,
        numbers: Sequence[int],
        kept: Arrays | None = None,
        progress: Callable[[], object] = bool,
    ) -> np.ndarray:
        """`sample` of what is given of some pictures of one size, uint8 (B, H, W, 3).

        What is known comes out as it went in; or it is the pictures `kept`, uint8 (B, H, W, 3), outside of their masks,
        float32 (B, 1, H, W).
        """
        schedule, shift = config.schedule or self.config.diffusion, self.config.tasks[task].shift
        shifted = replace(config, schedule=replace(schedule, shift=schedule.shift + shift))
        sources, masks = (np.stack(arrays) for arrays in zip(*given, strict=True))
        edit = Edit(*(kept or (to_uint8(sources), masks)))
        return self.sample(shifted, prompt, seed, numbers, (task, given), edit, progress)

    def picture(self, pictures: np.ndarray, *prompt: np.ndarray) -> np.ndarray:
        """Source | sample | truth, the tasks in turn."""
        sources, made = np.empty_like(pictures), np.empty_like(pictures)
        for first, task in enumerate(self.tasks[: len(pictures)]):
            rows = range(first, len(pictures), len(self.tasks))
            streams = self.streams("damage", 0, rows)
            given = [damaged(task, pictures[row], stream) for row, stream in zip(rows, streams, strict=True)]
            told = tuple(array[rows] for array in prompt)
            sources[rows] = to_uint8(np.stack([each.source for each in given]))
            made[rows] = self.restore(self.config.sample, task, given, told, self.config.seed, rows)
        return sheet(sources, made, pictures)

    def facts(self) -> dict[str, Any]:
        return {"size_in": None, "augment": None, "tasks": self.tasks}
