"""The training objective: what a network predicts, its loss, and the weight of each noise level.

The loss is the mean over an image of the L1, L2 or Huber loss between output and target, times a
weight of the noise level. Weights are defined for the squared error of eps; for the other
predictions they are multiplied by the ratio between that error and theirs: snr for x0, snr / (snr +
1) for v.

Min-SNR (Hang et al., arXiv 2303.09556, section 3.4) gives nearly clean levels less weight: min(snr,
gamma) / snr. So does P2 (Choi et al., arXiv 2204.00227, eq. 8): (k + snr)^-gamma, k = 1.
"""

from dataclasses import dataclass
from typing import Literal

from mindspore import Tensor, ops

from pipeline.config import ConfigError
from pipeline.diffusion.process import Prediction, prediction_target
from pipeline.diffusion.schedule import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(ScheduleConfig):
    """The diffusion that a stage is trained with; part of its manifest."""

    prediction: Prediction = "eps"  # what the network predicts
    loss: Literal["l1", "l2", "huber"] = "l2"  # of the prediction, each pixel
    # Gamma of min-SNR weighting, usually 5; None: off.
    min_snr: float | None = None
    # Gamma of P2 weighting, usually 1; None: off.
    p2: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, usual in (("min_snr", 5.0), ("p2", 1.0)):
            gamma = getattr(self, name)
            if gamma is not None and gamma <= 0:
                raise ConfigError(
                    f"{name}: {gamma} is not positive; leave it out, or use the paper's {usual}"
                )

        if self.min_snr is not None and self.p2 is not None:
            raise ConfigError(
                f"p2: {self.p2}, but min_snr: {self.min_snr} weights the noise levels too; leave "
                "one of them out"
            )


def pointwise_loss(kind: str, output: Tensor, target: Tensor) -> Tensor:
    """|d|, d^2, or Huber's d^2 / 2 up to |d| = 1 and |d| - 1/2 beyond, element by element."""
    difference = output - target
    if kind == "l1":
        return ops.abs(difference)
    if kind == "l2":
        return difference * difference

    # m (|d| - m / 2) with m = min(|d|, 1): both cases of Huber's loss without a branch.
    size = ops.abs(difference)
    inside = ops.minimum(size, 1.0)
    return inside * (size - 0.5 * inside)


def loss_weight(config: DiffusionConfig, logsnr: Tensor) -> Tensor | None:
    """The weight of each noise level, of logsnr's shape; None: all are 1."""
    snr = ops.exp(logsnr)

    # For the squared error of x, which is that of eps over snr.
    if config.min_snr is not None:
        weight_x = ops.minimum(snr, config.min_snr)
    elif config.p2 is not None:
        weight_x = snr * ops.pow(1.0 + snr, -config.p2)
    else:
        return None

    # |d_eps|^2 = snr |d_x|^2 and |d_v|^2 = (snr + 1) |d_x|^2, from the equations in process.py.
    if config.prediction == "eps":
        return weight_x / snr
    if config.prediction == "x0":
        return weight_x
    return weight_x / (snr + 1.0)


def diffusion_loss(
    config: DiffusionConfig,
    output: Tensor,
    x: Tensor,
    eps: Tensor,
    logsnr_B: Tensor,
    mask_B1HW: Tensor | None = None,
) -> Tensor:
    """The loss of each image (B,), from the network's output at z = alpha x + sigma eps.

    With a mask it is the mean over the pixels where the mask is 1; each image needs at least one.
    """
    target = prediction_target(config.prediction, x, eps, logsnr_B)
    loss_BCHW = pointwise_loss(config.loss, output, target)

    if mask_B1HW is None:
        loss_B = loss_BCHW.mean(axis=(1, 2, 3))
    else:
        # A quotient of means over all pixels, as the size of the mask differs between images.
        loss_B = (loss_BCHW * mask_B1HW).mean(axis=(1, 2, 3)) / mask_B1HW.mean(axis=(1, 2, 3))

    weight_B = loss_weight(config, logsnr_B)
    return loss_B if weight_B is None else loss_B * weight_B
