"""Arithmetic in 16 bits where it pays: convolutions and matrix products; the rest, and all weights,
stay float32.

That is what PyTorch calls autocast. float16 has a narrow range, so that small gradients would
vanish in it: the loss is multiplied by a number as large as may be while they are taken
(Micikevicius et al., arXiv 1710.03740, section 3.2).
"""

from typing import Literal

from mindspore import dtype as mstype
from mindspore import nn

from pipeline import device
from pipeline.config import ConfigError

Precision = Literal["float32", "bfloat16", "float16"]
GROWTH = 2000  # steps without overflow after which a larger scale is tried
LARGEST = 2.0**16  # where it starts, too


def cast_matmuls(network: nn.Cell, precision: Precision) -> None:
    """Lets convolutions and dense layers of `network` compute in `precision`. ConfigError if the
    device does not.
    """
    if precision not in device.supported_precisions():
        raise ConfigError(
            f"train.precision: {precision} is nothing that this device computes in; give one of "
            f"{', '.join(device.supported_precisions())}"
        )
    if precision != "float32":
        for _, cell in network.cells_and_names():
            if isinstance(cell, nn.Conv2d | nn.Dense):
                cell.to_float(getattr(mstype, precision))


class LossScale:
    """Halved by a step whose gradient overflows, which is then not taken; doubled after `GROWTH`
    steps without one.

    1, for good, unless `precision` is float16.
    """

    def __init__(self, precision: Precision = "float32") -> None:
        self.dynamic = precision == "float16"
        self.value, self.good = LARGEST if self.dynamic else 1.0, 0

    def after(self, finite: bool) -> bool:
        """Learns how a step went; whether it was the scale that was too large, as far as can be
        told.
        """
        if not self.dynamic:
            return False
        if not finite:
            blamed = self.value > 1
            self.value, self.good = max(self.value / 2, 1.0), 0
            return blamed
        self.good += 1
        if self.good == GROWTH:
            self.value, self.good = min(2 * self.value, LARGEST), 0
        return False
