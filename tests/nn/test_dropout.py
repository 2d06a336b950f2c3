"""Dropout whose mask is a function of seed, layer and position."""

import numpy as np
import pytest
from mindspore import Tensor, grad

from pipeline import runtime
from pipeline.nn.dropout import Dropout


def dropout(rate: float, layer_index: int) -> Dropout:
    layer = Dropout(rate)
    layer.layer_index = layer_index
    return layer


def drop_mask(
    seeds: np.ndarray, layer_index: int, rate: float, shape: tuple[int, ...]
) -> np.ndarray:
    """The definition in unsigned arithmetic: MurmurHash3's finalizer of image and layer, channel,
    position.
    """

    def mix_bits(bits: np.ndarray) -> np.ndarray:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = (bits ^ bits >> np.uint32(shift)) * np.uint32(factor)
        return bits ^ bits >> np.uint32(16)

    bits = mix_bits(seeds.astype(np.uint32) + np.uint32(layer_index))
    for count in (shape[1], shape[2] * shape[3]):
        bits = mix_bits(bits[..., None] + np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B9))
    return (bits & np.uint32(2**31 - 1)).reshape(shape) < int(rate * 2**31)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_output_and_gradient_have_the_mask_of_the_definition(rate: float) -> None:
    shape = (3, 8, 12, 10)
    seeds = np.array([5, 2**31 - 1, 5], np.int32)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32) + 3
    layer = dropout(rate, layer_index=7)
    expected = np.where(drop_mask(seeds, 7, rate, shape), 0, x / (1 - rate))

    def half_square(x: Tensor, seeds: Tensor) -> Tensor:
        return (layer(x, seeds) ** 2).sum() / 2

    output = layer(Tensor(x), Tensor(seeds)).asnumpy()
    np.testing.assert_allclose(output, expected, rtol=1e-6)
    gradient = runtime.jit(grad(half_square))(Tensor(x), Tensor(seeds)).asnumpy()
    np.testing.assert_allclose(gradient, expected / (1 - rate), rtol=1e-6)

    # The seed alone counts, not the image's place in the batch.
    np.testing.assert_array_equal(output[0] == 0, output[2] == 0)


def test_the_rate_holds_along_each_axis_and_masks_are_independent() -> None:
    """For images, channels, rows and columns, and for two layers or two images: within five
    standard deviations.
    """
    shape = (16, 32, 32, 32)
    rate = 0.1
    seeds = np.arange(100, 116, dtype=np.int32)
    ones = Tensor(np.ones(shape, np.float32))
    masks = [dropout(rate, index)(ones, Tensor(seeds)).asnumpy() == 0 for index in (0, 1)]

    for mask in masks:
        for axis in range(4):
            shares = mask.mean(tuple(other for other in range(4) if other != axis))
            deviation = (rate * (1 - rate) * shape[axis] / mask.size) ** 0.5
            assert np.abs(shares - rate).max() < 5 * deviation

    other_image = np.roll(masks[0], 1, axis=0)
    for mask in (masks[1], other_image):
        both = (masks[0] & mask).mean()
        deviation = (rate**2 * (1 - rate**2) / mask.size) ** 0.5
        assert abs(both - rate**2) < 5 * deviation
