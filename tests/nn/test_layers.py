"""The layers below the blocks: normalization, convolution and resampling."""

import numpy as np
import pytest
from mindspore import Tensor

from pipeline.nn import layers
from pipeline.nn.layers import NormKind
from pipeline.nn.parameters import put


def normalize(x: np.ndarray, groups: int) -> np.ndarray:
    """The definition of group normalization, without gain and bias."""
    grouped = x.reshape(len(x), groups, -1)
    deviation = np.sqrt(grouped.var(2, keepdims=True) + 1e-5)
    return ((grouped - grouped.mean(2, keepdims=True)) / deviation).reshape(x.shape)


@pytest.mark.parametrize(("kind", "groups"), [("layer", 1), ("instance", 16)])
@pytest.mark.usefixtures("both")
def test_layer_and_instance_norm(kind: NormKind, groups: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 16, 3, 5)) * 2 + 5
    output = layers.Norm(16, kind, silu=False)(Tensor(x.astype(np.float32))).asnumpy()
    np.testing.assert_allclose(output, normalize(x, groups), atol=1e-4)


@pytest.mark.parametrize(
    ("width", "groups"), [(4, 1), (16, 4), (48, 12), (128, 32), (144, 24), (192, 32), (1024, 32)]
)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.usefixtures("both")
def test_group_norm(width: int, groups: int, silu: bool) -> None:
    """With gain, bias, scale and shift, also for widths that are no multiples of 32."""
    stream = np.random.default_rng(width)
    x = stream.standard_normal((2, width, 3, 5)) * 2 + 5
    gain = stream.standard_normal(width)
    bias = stream.standard_normal(width)
    scale_shift = stream.standard_normal((2, 2 * width))

    norm = layers.Norm(width, silu=silu)
    put(norm.gain, gain.astype(np.float32))
    put(norm.bias, bias.astype(np.float32))
    output = norm(Tensor(x.astype(np.float32)), Tensor(scale_shift.astype(np.float32))).asnumpy()

    scale, shift = np.split(scale_shift[:, :, None, None], 2, axis=1)
    y = normalize(x, groups) * gain[:, None, None] + bias[:, None, None]
    y = y * (1 + scale) + shift
    if silu:
        y = y / (1 + np.exp(-y))
    np.testing.assert_allclose(output, y, atol=2e-4)


@pytest.mark.usefixtures("both")
def test_norm_of_a_constant_is_its_bias() -> None:
    """Rounding can make the variance of equal values negative; the output is not NaN."""
    x = np.full((1, 8, 5, 7), 1234.567, np.float32)
    output = layers.Norm(8, silu=False)(Tensor(x)).asnumpy()
    np.testing.assert_allclose(output, 0, atol=0.1)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_round_trip(patch: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 4)).astype(np.float32)
    patches = layers.space_to_channels(Tensor(x), patch)
    assert patches.shape == (2, 3 * patch**2, 8 // patch, 4 // patch)
    first = x[0, :, :patch, :patch].reshape(-1)
    np.testing.assert_array_equal(patches[0, :, 0, 0].asnumpy(), first)
    np.testing.assert_array_equal(layers.channels_to_space(patches, patch).asnumpy(), x)


def test_resampling() -> None:
    x = Tensor(np.array([[[[1, 2, 3], [4, 5, 6]]]], np.float32))
    enlarged = layers.upsample(x)
    np.testing.assert_array_equal(
        enlarged.asnumpy()[0, 0],
        [[1, 1, 2, 2, 3, 3], [1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6], [4, 4, 5, 5, 6, 6]],
    )
    np.testing.assert_array_equal(layers.downsample(enlarged).asnumpy(), x.asnumpy())

    mean = layers.downsample(Tensor(np.arange(8, dtype=np.float32).reshape(1, 1, 2, 4)))
    np.testing.assert_array_equal(mean.asnumpy()[0, 0], [[2.5, 4.5]])


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize(
    ("size", "stride", "height", "width"),
    [(3, 1, 6, 8), (1, 1, 6, 8), (3, 2, 6, 8), (3, 2, 5, 7)],
)
def test_convolutions_keep_or_divide_the_size(
    size: int, stride: int, height: int, width: int
) -> None:
    x = Tensor(np.zeros((1, 4, height, width), np.float32))
    output = layers.Conv(4, 5, size, stride=stride)(x)
    assert output.shape == (1, 5, -(-height // stride), -(-width // stride))
