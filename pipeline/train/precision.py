"""Mixed precision: convolutions and matrix products in 16 bits, all else and weights in float32.

This is what PyTorch calls autocast. float16 has a narrow range in which small gradients underflow,
so the loss is multiplied by a scale, as large as possible, while gradients are computed
(Micikevicius et al., arXiv 1710.03740, section 3.2).
"""

from typing import Literal

from mindspore import dtype as mstype
from mindspore import nn

from pipeline import device
from pipeline.config import ConfigError

Precision = Literal["float32", "bfloat16", "float16"]

GROWTH_INTERVAL = 2000  # steps without overflow after which the scale is doubled
MAX_SCALE = 2.0**16  # also the initial scale


def cast_matmuls(network: nn.Cell, precision: Precision) -> None:
    """Makes the convolutions and dense layers of `network` compute in `precision`.

    ConfigError if the device does not support it.
    """
    if precision not in device.supported_precisions():
        raise ConfigError(
            f"train.precision: {precision} is not supported on this device; give one of "
            f"{', '.join(device.supported_precisions())}"
        )

    if precision == "float32":
        return
    # `to_float` casts the inputs and weights of a cell's own operator; the weights stay float32.
    for _, cell in network.cells_and_names():
        if isinstance(cell, nn.Conv2d | nn.Dense):
            cell.to_float(getattr(mstype, precision))


class LossScale:
    """Dynamic loss scale for float16; the constant 1 for any other precision.

    A step whose gradient overflows halves it, and that step is skipped. `growth_interval` steps
    without an overflow double it, up to `MAX_SCALE`.
    """

    def __init__(
        self, precision: Precision = "float32", growth_interval: int = GROWTH_INTERVAL
    ) -> None:
        self.dynamic = precision == "float16"
        self.growth_interval = growth_interval
        self.value = MAX_SCALE if self.dynamic else 1.0
        self.good_steps = 0  # finite steps since the scale last changed

    def update(self, finite: bool) -> bool:
        """Adjusts the scale after a step, given whether its loss and gradient were finite.

        Returns whether the scale is the likely cause: not if it was 1 already.
        """
        if not self.dynamic:
            return False

        if not finite:
            overflow = self.value > 1
            self.value = max(self.value / 2, 1.0)
            self.good_steps = 0
            return overflow

        # A larger scale is tried now and then: gradients get smaller as training goes on.
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.value = min(2 * self.value, MAX_SCALE)
            self.good_steps = 0
        return False
