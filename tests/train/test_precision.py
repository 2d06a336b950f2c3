"""The loss scale as an automaton, and networks that compute in 16 bits."""

import numpy as np
import pytest
from mindspore import Tensor, nn

from pipeline import device
from pipeline.config import ConfigError
from pipeline.nn.parameters import initialize
from pipeline.train.precision import MAX_SCALE, LossScale, cast_matmuls


def test_float32_has_no_scale() -> None:
    scale = LossScale()
    assert [scale.update(finite) for finite in (True, False, False)] == [False] * 3
    assert scale.value == 1.0


def test_the_scale_halves_at_once_and_doubles_after_an_interval() -> None:
    scale = LossScale("float16", growth_interval=3)
    assert scale.value == MAX_SCALE
    assert [scale.update(False) for _ in range(2)] == [True, True]

    values = []
    for finite in (True, True, True, True, False, True, True, True):
        scale.update(finite)
        values.append(scale.value / MAX_SCALE)
    assert values == [1 / 4, 1 / 4, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 4, 1 / 2]

    for _ in range(9):
        scale.update(True)
    assert scale.value == MAX_SCALE


def test_a_scale_of_one_is_not_the_cause() -> None:
    scale = LossScale("float16")
    while scale.value > 1:
        assert scale.update(False)
    assert not scale.update(False)
    assert scale.value == 1


class Small(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, has_bias=True)
        self.dense = nn.Dense(8, 4)

    def construct(self, x: Tensor) -> Tensor:
        return self.dense(self.conv(x).mean((2, 3)))


def test_convolutions_and_products_are_computed_in_16_bits() -> None:
    exact, low = Small(), Small()
    for network in (exact, low):
        initialize(network, 0)
    cast_matmuls(low, "float16")

    x = Tensor(np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32))
    a, b = exact(x).asnumpy(), low(x).asnumpy()
    assert b.dtype == np.float16
    assert 0 < np.abs(a - b).max() < 2e-3
    assert {str(parameter.dtype) for parameter in low.trainable_params()} == {"Float32"}


@pytest.mark.skipif("bfloat16" in device.supported_precisions(), reason="this device has bfloat16")
def test_a_precision_that_the_device_lacks_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        cast_matmuls(Small(), "bfloat16")
    assert str(error.value) == (
        "train.precision: bfloat16 is not supported on this device; give one of float32, float16"
    )
