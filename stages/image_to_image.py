"""Image to image: an image of which something is missing to what it may have been (Palette, arXiv
2111.05826).

The network's inputs are the noisy image, the degraded one, its `source`, and the task. Where a
pixel is known, outside of the task's mask, the noisy image is the known one and the loss does not
count; tasks without a hole sample every pixel. One model may be trained on one task or on all, each
with a share of the batch and a noise level of its own: the more a task leaves open, the more noise
it wants (Chen, arXiv 2301.10972).

A task may have a `residual_std`: then the network predicts less, how the image differs from a
`prior_mean`, the source with its hole smoothly filled, and errors count in units of that standard
deviation. Its inputs are the prior mean, the mask and, instead of the noisy image, what that
reveals of the residual, which is nothing in much noise (EDM's preconditioning around a mean that is
not 0: `gaussian_posterior`). A small network would need most of its training to learn to copy its
input and to ignore noise. Without a residual_std this is Palette.

Shapes: see pipeline/stage/stage.py; K tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from mindspore import Tensor, ops
from mindspore import dtype as mstype

from pipeline.config import ConfigError
from pipeline.data.image import to_uint8
from pipeline.diffusion.objective import diffusion_loss
from pipeline.diffusion.process import add_noise, expand_dims, gaussian_posterior
from pipeline.diffusion.schedule import ScheduleConfig
from pipeline.diffusion.solvers import SamplerConfig
from pipeline.generate.engine import sample
from pipeline.imaging.degradations import TASKS, Degraded, degrade, prior_mean
from pipeline.rng import Draws
from pipeline.stage.config import StageConfig
from pipeline.stage.inputs import Arrays
from pipeline.stage.request import SampleRequest
from pipeline.stage.stage import Network, Stage, image_grid
from pipeline.text.prompts import Conditioning, one_hot


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A task among those that a stage learns."""

    weight: float = 1.0  # share of the batch, relative to the other tasks'
    # Added to logsnr in training and sampling: below 0 is more noise, for a harder task.
    logsnr_shift: float = 0.0
    # Of the images around the prior mean, in [-1, 1] units; None: the network predicts from no
    # prior mean.
    residual_std: float | None = None

    def __post_init__(self) -> None:
        if self.residual_std is not None and self.residual_std <= 0:
            raise ConfigError(
                f"residual_std: {self.residual_std} is not positive; leave it out for a network "
                "without a prior mean"
            )

        if self.weight <= 0:
            raise ConfigError(
                f"weight: {self.weight} is not positive; leave out a task that is not trained"
            )


@dataclass(frozen=True, kw_only=True)
class ImageToImageConfig(StageConfig):
    """Degraded images of `size` to whole ones."""

    kind: Literal["image_to_image"] = "image_to_image"
    conditioning: Conditioning = "none"
    tasks: dict[str, TaskConfig] = field(hash=False)  # see pipeline/imaging/degradations.py

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.conditioning == "class":
            raise ConfigError(
                "conditioning: class, but image to image is conditioned on its task; take none or "
                "text"
            )

        if not self.tasks:
            raise ConfigError(f"tasks: empty; name some of {', '.join(TASKS)}")
        if unknown := [name for name in self.tasks if name not in TASKS]:
            raise ConfigError(f"tasks.{unknown[0]}: no such task; there are {', '.join(TASKS)}")

        without = [name for name, task in self.tasks.items() if task.residual_std is None]
        if without and len(without) < len(self.tasks):
            raise ConfigError(
                f"tasks.{without[0]}.residual_std: missing, and other tasks have one; give each "
                "task one or none"
            )

        # `predict` then returns x itself: the posterior mean plus the network's output.
        if not without and self.diffusion.prediction != "x0":
            raise ConfigError(
                f"diffusion.prediction: {self.diffusion.prediction}, and tasks have a "
                "residual_std; give x0"
            )


class ImageToImage(Stage):
    """Inputs: the noisy image, the source, the task and, optionally, text."""

    Config = ImageToImageConfig
    config: ImageToImageConfig
    num_noise_levels = 1
    extra_inputs = ("source", "mask", "task")

    def __init__(self, config: ImageToImageConfig) -> None:
        tasks = config.tasks.values()
        self.tasks = list(config.tasks)
        self.residual_stds = [task.residual_std for task in tasks if task.residual_std is not None]

        # Last, as it builds the network from `channels_in` and `num_classes`.
        super().__init__(config)

    @property
    def channels_in(self) -> int:
        """With a prior mean the mask too, as no noise shows where the hole is."""
        return 7 if self.residual_stds else 6

    @property
    def num_classes(self) -> int:
        return len(self.tasks)

    def training_inputs(self, images: np.ndarray, prompt: Arrays, draws: Draws) -> Arrays:
        """Adds degraded images, each by a task drawn for it."""
        arrays = super().training_inputs(images, prompt, draws)
        weights = np.array([task.weight for task in self.config.tasks.values()])
        shifts = np.array([task.logsnr_shift for task in self.config.tasks.values()], np.float32)

        task_ids = []
        degraded = []
        for image, stream in zip(images, draws.streams("damage"), strict=True):
            # From the stream of this image alone, so that the others have no influence on it.
            task_id = int(stream.choice(len(weights), p=weights / weights.sum()))
            task_ids.append(task_id)
            degraded.append(degrade(self.tasks[task_id], image, stream))

        # z is made from this logsnr in the graph, so the shift moves the noise too.
        arrays["logsnr"] = arrays["logsnr"] + shifts[task_ids]
        return {**arrays, **self.degraded_inputs(degraded, task_ids)}

    def degraded_inputs(self, degraded: Sequence[Degraded], task_ids: Sequence[int]) -> Arrays:
        """source (B, 3, H, W), or the prior mean in its place, mask (B, 1, H, W), task (B, K)."""
        sources = np.stack([each.source for each in degraded])
        masks = np.stack([each.mask for each in degraded])
        if self.residual_stds:
            means: dict[int, np.ndarray] = {}  # several samples of an image share its prior mean
            for each, task_id in zip(degraded, task_ids, strict=True):
                if id(each) not in means:
                    means[id(each)] = prior_mean(self.tasks[task_id], each)
            sources = np.stack([means[id(each)] for each in degraded])

        return {
            "source": (sources - self.mean) / self.std,
            "mask": masks,
            "task": one_hot(task_ids, len(self.tasks)),
        }

    def predict(
        self, network: Network, z: Tensor, logsnr_B: Tensor, inputs: dict[str, Tensor]
    ) -> Tensor:
        source = inputs["source"]
        mask = inputs["mask"]
        task_BK = inputs["task"]
        logsnr_B1 = logsnr_B.expand_dims(1)
        if not self.residual_stds:
            # z in the hole, and what is known around it.
            x = ops.cat((source + mask * (z - source), source), 1)
            return self.call_network(network, x, logsnr_B1, inputs, task_BK)

        residual_std_B = self.residual_std(task_BK)
        mean, deviation = gaussian_posterior(source, residual_std_B, z, logsnr_B)
        # Divided by the task's residual_std, so that residuals have one size for all tasks.
        revealed = mask * (mean - source) / expand_dims(residual_std_B)

        x = ops.cat((revealed, source, mask), 1)
        # x in deviations of its posterior: outputs of one size at all noise levels.
        return mean + deviation * self.call_network(network, x, logsnr_B1, inputs, task_BK)

    def residual_std(self, task_BK: Tensor) -> Tensor:
        """Of each image (B,)."""
        stds_BK = ops.broadcast_to(Tensor(self.residual_stds, mstype.float32), task_BK.shape)
        return (task_BK * stds_BK).sum(axis=1)

    def named_loss(self, inputs: dict[str, Tensor]) -> Tensor:
        """The loss of each image (B,), over the pixels of its mask."""
        x = inputs["x"]
        eps = inputs["eps"]
        logsnr_B = inputs["logsnr"]
        output = self.predict(self.network, add_noise(x, eps, logsnr_B), logsnr_B, inputs)

        if self.residual_stds:
            unit = expand_dims(1.0 / self.residual_std(inputs["task"]))
            output, x = output * unit, x * unit

        return diffusion_loss(self.config.diffusion, output, x, eps, logsnr_B, inputs["mask"])

    def sampling_inputs(self, request: SampleRequest, config: SamplerConfig) -> Arrays:
        if request.degraded is None or request.task is None:
            raise ValueError(
                "degraded: missing; image to image needs images to restore, and a task"
            )

        task_ids = [self.tasks.index(request.task)] * request.num_images
        return {**request.prompt, **self.degraded_inputs(request.degraded, task_ids)}

    def sample_shape(self, request: SampleRequest) -> tuple[int, int, int]:
        if request.degraded is None:
            return super().sample_shape(request)

        _, height, width = request.degraded[0].source.shape
        return (3, height, width)

    def sampling_schedule(self, request: SampleRequest, config: SamplerConfig) -> ScheduleConfig:
        """Shifted as the task is in training."""
        schedule = super().sampling_schedule(request, config)
        shift = self.config.tasks[request.task].logsnr_shift if request.task else 0.0
        return replace(schedule, logsnr_shift=schedule.logsnr_shift + shift)

    def sample_grid(self, images: np.ndarray, prompt: Arrays) -> np.ndarray:
        """Source | sample | truth, the tasks in turn."""
        sources = np.empty_like(images)
        samples = np.empty_like(images)
        for first, task in enumerate(self.tasks[: len(images)]):
            # A request for each task, as each has noise levels of its own.
            rows = range(first, len(images), len(self.tasks))
            # Of step 0, so that all grids of a run show the same damage.
            draws = Draws(seed=self.config.seed, step=0, positions=rows)
            streams = draws.streams("damage")
            degraded = [
                degrade(task, images[row], stream)
                for row, stream in zip(rows, streams, strict=True)
            ]

            request = SampleRequest(
                prompt={name: array[rows] for name, array in prompt.items()},
                seed=self.config.seed,
                image_ids=rows,
                degraded=degraded,
                task=task,
            )

            sources[rows] = to_uint8(np.stack([each.source for each in degraded]))
            samples[rows] = sample(self, self.config.sample, request)
        return image_grid(sources, samples, images)

    def manifest_fields(self) -> dict[str, Any]:
        return {"size_in": None, "aug_range": None, "tasks": self.tasks}
