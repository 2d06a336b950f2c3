"""The loss scale as an automaton, and networks that compute in 16 bits."""

import numpy as np
import pytest
from mindspore import Tensor, nn

from pipeline import device
from pipeline.config import ConfigError
from pipeline.nn.parameters import initialize
from pipeline.train import precision
from pipeline.train.precision import LARGEST, LossScale, cast_matmuls


def test_float32_has_no_scale() -> None:
    scale = LossScale()
    assert [scale.after(finite) for finite in (True, False, False)] == [False] * 3
    assert scale.value == 1.0


def test_the_scale_halves_at_once_and_doubles_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "GROWTH", 3)
    scale = LossScale("float16")
    assert scale.value == LARGEST
    assert [scale.after(False) for _ in range(2)] == [True, True]
    seen = []
    for finite in (True, True, True, True, False, True, True, True):
        scale.after(finite)
        seen.append(scale.value / LARGEST)
    assert seen == [1 / 4, 1 / 4, 1 / 2, 1 / 2, 1 / 4, 1 / 4, 1 / 4, 1 / 2]
    for _ in range(9):
        scale.after(True)
    assert scale.value == LARGEST  # and no more


def test_a_scale_of_one_is_not_to_blame() -> None:
    scale = LossScale("float16")
    while scale.value > 1:
        assert scale.after(False)
    assert not scale.after(False)
    assert scale.value == 1


class Small(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, has_bias=True)
        self.dense = nn.Dense(8, 4)

    def construct(self, x: Tensor) -> Tensor:
        return self.dense(self.conv(x).mean((2, 3)))


def test_convolutions_and_products_are_lowered() -> None:
    exact, low = Small(), Small()
    for network in (exact, low):
        initialize(network, 0)
    cast_matmuls(low, "float16")
    x = Tensor(np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32))
    a, b = exact(x).asnumpy(), low(x).asnumpy()
    assert b.dtype == np.float16
    assert 0 < np.abs(a - b).max() < 2e-3
    assert {str(parameter.dtype) for parameter in low.trainable_params()} == {"Float32"}


def test_what_the_device_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "supported_precisions", lambda: ("float32", "float16"))
    with pytest.raises(ConfigError) as error:
        cast_matmuls(Small(), "bfloat16")
    assert str(error.value) == (
        "train.precision: bfloat16 is nothing that this device computes in; give one of float32, float16"
    )
