"""Validation: the loss on samples that are not trained on, by noise level.

The samples, their captions, noise and levels follow from the configuration alone: whatever the
number of ranks and however often a run was resumed, two of its validations differ by the weights.
Levels are stratified over bins (`ValidationDraws`), as the loss at one level is worth nothing at
another. Rank 0 computes it; the others wait.
"""

import logging
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from mindspore import Tensor

from pipeline import device, runtime
from pipeline.data.decode import BadImage
from pipeline.data.image import ImageSize, read_square
from pipeline.data.quarantine import Quarantine
from pipeline.data.shards import DamagedSample, Shards
from pipeline.errors import UserError
from pipeline.rng import PURPOSES, Draws, generator
from pipeline.stage.request import batch_rows
from pipeline.stage.stage import Stage
from pipeline.text.prompts import Prompts

log = logging.getLogger("cascade")


@dataclass(frozen=True, kw_only=True)
class ValidationSet:
    """Samples that are not trained on, and what conditions them."""

    shards: Shards
    prompts: Prompts


@dataclass(frozen=True, kw_only=True)
class ValidationDraws(Draws):
    """The draws of validation samples: the same at every step, and never those of training.

    What is drawn uniformly is stratified, so that few samples cover all levels evenly: sample i has
    the noise level of bin i % NOISE_BINS, and the augmentation level of bin i // NOISE_BINS %
    AUG_BINS. Nothing is dropped.
    """

    NOISE_BINS: ClassVar[int] = 8
    AUG_BINS: ClassVar[int] = 4

    step: int = 0

    def streams(self, purpose: str) -> list[np.random.Generator]:
        number = PURPOSES[purpose]
        return [generator(self.seed, "validation", number, place) for place in self.positions]

    def uniform(self, purpose: str) -> np.ndarray:
        return self.stratified(purpose, super().uniform(purpose))

    def uniform_and_noise(
        self, purpose: str, shape: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        uniform, noise = super().uniform_and_noise(purpose, shape)
        return self.stratified(purpose, uniform), noise

    @property
    def noise_bins(self) -> np.ndarray:
        """int64 (B,)."""
        return np.asarray(self.positions) % self.NOISE_BINS

    @property
    def aug_bins(self) -> np.ndarray:
        """int64 (B,)."""
        return np.asarray(self.positions) // self.NOISE_BINS % self.AUG_BINS

    def stratified(self, purpose: str, uniform: np.ndarray) -> np.ndarray:
        """`uniform`, float64 (B,) in [0, 1), squeezed into each sample's bin."""
        if purpose == "time":
            return (self.noise_bins + uniform) / self.NOISE_BINS
        if purpose == "augment":
            return (self.aug_bins + uniform) / self.AUG_BINS
        # A condition is dropped where the draw is below the rate of dropping.
        return np.ones_like(uniform) if purpose == "drop" else uniform


class Validation:
    """The validation of a run, on N samples.

    Args:
        stage: whose network is measured, with the weights that it has at each call.
        samples: from which `train.num_validation` are taken.
        quarantine: of the run; gets those that cannot be used.

    Raises:
        UserError: no sample can be used.
    """

    def __init__(self, stage: Stage, samples: ValidationSet, quarantine: Quarantine) -> None:
        self.stage = stage
        self.prompts = samples.prompts
        self.sample_ids, self.images = read_images(
            samples.shards,
            stage.config.train.num_validation,
            size=stage.image_size,
            quarantine=quarantine,
        )
        log.info("validation: %d of %d samples", len(self.sample_ids), len(samples.shards))

        # Without the seeds of dropout, so that nothing is dropped out.
        self.inputs = replace(stage.inputs, leading=stage.loss_inputs.leading)

        def loss(*tensors: Tensor) -> Tensor:
            return stage.named_loss(self.inputs.unpack(tensors))

        self.compiled_loss = runtime.jit(loss)

    def losses(self) -> np.ndarray:
        """The loss of each sample, float64 (N,), of the weights that the network has now."""
        losses = np.empty(len(self.sample_ids))
        for rows in batch_rows(len(losses), self.stage.config.sample.batch_size):
            sample_ids = [self.sample_ids[row] for row in rows]
            positions = rows.tolist()
            prompt = self.prompts.embed(
                sample_ids, self.stage.config.seed, step=0, positions=positions
            )
            arrays = self.stage.training_inputs(self.images[rows], prompt, self.draws(positions))
            tensors = map(device.to_device, self.inputs.flatten(arrays))
            losses[rows] = self.compiled_loss(*tensors).asnumpy()
        return losses

    def draws(self, positions: list[int]) -> ValidationDraws:
        return ValidationDraws(seed=self.stage.config.seed, positions=positions)

    def metrics(self, ema_losses: np.ndarray, raw_losses: np.ndarray) -> dict[str, float]:
        """The means of both, and those of the EMA weights by bin; bin 0 has the least noise."""
        draws = self.draws(list(range(len(self.sample_ids))))
        metrics = {
            "validation_loss": float(ema_losses.mean()),
            "validation_loss_raw": float(raw_losses.mean()),
        }

        for noise_bin in range(draws.NOISE_BINS):
            in_bin = draws.noise_bins == noise_bin
            if in_bin.any():
                metrics[f"validation_loss_noise_{noise_bin}"] = float(ema_losses[in_bin].mean())

            if "low_res_logsnr" not in self.stage.inputs.names:
                continue
            for aug_bin in range(draws.AUG_BINS):
                in_both = in_bin & (draws.aug_bins == aug_bin)
                if in_both.any():
                    name = f"validation_loss_noise_{noise_bin}_aug_{aug_bin}"
                    metrics[name] = float(ema_losses[in_both].mean())
        return metrics


def read_images(
    shards: Shards, num_samples: int, *, size: ImageSize, quarantine: Quarantine
) -> tuple[list[int], np.ndarray]:
    """The ids of at most `num_samples` samples, evenly over the shards, and their images in the
    middle, uint8 (N, S, S, 3). Those that cannot be used are left out.
    """
    places = np.linspace(0, len(shards) - 1, min(num_samples, len(shards)))
    sample_ids: list[int] = []
    # Filled one by one: a window keeps its whole image's memory.
    images = np.empty((len(places), size.used, size.used, 3), np.uint8)

    for sample_id in places.round().astype(int).tolist():
        try:
            images[len(sample_ids)] = read_square(shards.image(sample_id), size)
        except (BadImage, DamagedSample) as error:
            quarantine.write((*shards.name(sample_id), str(error)))
        else:
            sample_ids.append(sample_id)

    if not sample_ids:
        raise UserError(
            f"data.validation: none of {len(places)} samples can be used; the reasons are in "
            f"{quarantine.path}; give others"
        )
    return sample_ids, images[: len(sample_ids)]
