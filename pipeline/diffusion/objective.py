"""What a network is asked to predict, how its answer is scored, and how noise levels are weighed.

The score is a mean over an image of L1, L2 or Huber distances between answer and target. Weights by
noise level are given for an error in eps; for the other predictions they are multiplied by the
factor between eps' squared error and theirs: snr for x0, snr / (snr + 1) for v. Min-SNR (Hang et
al., arXiv 2303.09556, section 3.4) holds the easy, nearly clean levels down: min(snr, gamma) / snr.
P2 (Choi et al., arXiv 2204.00227, eq. 8) does so too, and spares what is neither noise nor detail:
(k + snr)^-gamma, k = 1.
"""

from dataclasses import dataclass
from typing import Literal

from mindspore import Tensor, ops

from pipeline.config import ConfigError
from pipeline.diffusion.process import Prediction, target
from pipeline.diffusion.schedule import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(ScheduleConfig):
    """The diffusion that a stage is trained with; part of its manifest."""

    prediction: Prediction = "eps"
    loss: Literal["l1", "l2", "huber"] = "l2"
    min_snr: float | None = None  # gamma, usually 5; None weighs all levels alike
    p2: float | None = None  # gamma, usually 1; None likewise

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, usual in (("min_snr", 5.0), ("p2", 1.0)):
            gamma = getattr(self, name)
            if gamma is not None and gamma <= 0:
                raise ConfigError(
                    f"{name}: {gamma} is not positive; leave it out, or use {usual} as the paper does"
                )
        if self.min_snr is not None and self.p2 is not None:
            raise ConfigError(
                f"p2: {self.p2} and min_snr {self.min_snr} both weigh the levels; leave one of them out"
            )


def pointwise_loss(kind: str, output: Tensor, wanted: Tensor) -> Tensor:
    """|d|, d^2, or Huber's d^2 / 2 up to |d| = 1 and |d| - 1/2 beyond, element by element."""
    difference = output - wanted
    if kind == "l1":
        return ops.abs(difference)
    if kind == "l2":
        return difference * difference
    size = ops.abs(difference)
    inside = ops.minimum(size, 1.0)
    return inside * (size - 0.5 * inside)


def weight(config: DiffusionConfig, logsnr: Tensor) -> Tensor | None:
    """Of logsnr's shape; None: all levels weigh alike."""
    snr = ops.exp(logsnr)
    if config.min_snr is not None:
        of_x = ops.minimum(snr, config.min_snr)
    elif config.p2 is not None:
        of_x = snr * ops.pow(1.0 + snr, -config.p2)
    else:
        return None
    if config.prediction == "eps":
        return of_x / snr
    if config.prediction == "x0":
        return of_x
    return of_x / (snr + 1.0)


def loss(
    config: DiffusionConfig,
    output: Tensor,
    x: Tensor,
    eps: Tensor,
    logsnr_B: Tensor,
    mask_B1HW: Tensor | None = None,
) -> Tensor:
    """The loss of each image (B,), given the network's answer at z = alpha x + sigma eps.

    With a mask, the mean over the pixels where it is 1, of which each image has some.
    """
    loss_BCHW = pointwise_loss(config.loss, output, target(config.prediction, x, eps, logsnr_B))
    if mask_B1HW is None:
        loss_B = loss_BCHW.mean(axis=(1, 2, 3))
    else:
        loss_B = (loss_BCHW * mask_B1HW).mean(axis=(1, 2, 3)) / mask_B1HW.mean(axis=(1, 2, 3))
    factor_B = weight(config, logsnr_B)
    return loss_B if factor_B is None else loss_B * factor_B
