"""What a network is asked to predict, how its answer is scored, and how noise levels are weighed.

The score is a mean over an image of L1, L2 or Huber distances between answer and target. Min-SNR (Hang et al., arXiv
2303.09556, section 3.4) holds the weight of the easy, nearly clean levels down: an error in x counts min(snr, gamma),
which for the other predictions is divided by the snr-dependent factor between their squared error and x's.
"""

from dataclasses import dataclass
from typing import Literal

from mindspore import Tensor, ops

from pipeline.config import ConfigError
from pipeline.diffusion.process import Prediction, target
from pipeline.diffusion.schedule import ScheduleName


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The diffusion that a stage is trained with; part of its manifest."""

    schedule: ScheduleName = "cosine"
    prediction: Prediction = "eps"
    loss: Literal["l1", "l2", "huber"] = "l2"
    min_snr: float | None = None  # gamma, usually 5; None weighs all levels alike

    def __post_init__(self) -> None:
        if self.min_snr is not None and self.min_snr <= 0:
            raise ConfigError(f"min_snr: {self.min_snr} is not positive; leave it out, or use 5.0 as the paper does")


def distance(kind: str, output: Tensor, wanted: Tensor) -> Tensor:
    """|d|, d^2, or Huber's d^2 / 2 up to |d| = 1 and |d| - 1/2 beyond, element by element."""
    difference = output - wanted
    if kind == "l1":
        return ops.abs(difference)
    if kind == "l2":
        return difference * difference
    size = ops.abs(difference)
    inside = ops.minimum(size, 1.0)
    return inside * (size - 0.5 * inside)


def min_snr_weight(prediction: Prediction, logsnr: Tensor, gamma: float) -> Tensor:
    """min(snr, gamma) for x0, over snr for eps, over snr + 1 for v; of logsnr's shape."""
    snr = ops.exp(logsnr)
    capped = ops.minimum(snr, gamma)
    if prediction == "eps":
        return capped / snr
    if prediction == "x0":
        return capped
    return capped / (snr + 1.0)


def loss(config: DiffusionConfig, output: Tensor, x: Tensor, eps: Tensor, logsnr_B: Tensor) -> Tensor:
    """The loss of each image (B,), given the network's answer at z = alpha x + sigma eps."""
    loss_B = distance(config.loss, output, target(config.prediction, x, eps, logsnr_B)).mean(axis=(1, 2, 3))
    if config.min_snr is None:
        return loss_B
    return loss_B * min_snr_weight(config.prediction, logsnr_B, config.min_snr)
