"""The blocks of the U-Nets: equal to PyTorch's (stored references; live in test_parity_unet.py),
and to their definitions.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor, nn

from pipeline.nn.attention import Attention, AttentionKind
from pipeline.nn.blocks import BlockConfig, ResBlock
from pipeline.nn.parameters import initialize
from tests.helpers.compare import Arrays, assert_close, assign_random, differentiate, reference
from tools.references import LAYERS

CONFIG = BlockConfig(head_channels=4, text_channels=6)
CONVNEXT = replace(CONFIG, block="convnext")


def layer_of(kind: str, width: int, **sizes: Any) -> nn.Cell:
    """The layer that a reference's configuration describes."""
    if kind == "ResBlock":
        return ResBlock(sizes.pop("width_in"), width, sizes.pop("emb"), CONFIG, **sizes)
    config = BlockConfig(head_channels=sizes["head"], text_channels=sizes["text_width"])
    return Attention(width, config, "cross" if sizes["cross"] else "self")


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_reference(name: str) -> None:
    inputs, expected, config = reference(name)
    seed = config.pop("seed")
    layer = layer_of(**config)
    assign_random(layer, seed)

    cotangent = expected.pop("cotangent")
    arrays = [inputs[key] for key in ("x", "emb", "text", "bias")]
    outputs = differentiate(layer)(cotangent, *arrays)
    assert outputs.keys() == expected.keys()
    assert_close(outputs, expected)


def assert_identity(layer: nn.Cell) -> None:
    initialize(layer, seed=0)
    stream = np.random.default_rng(0)
    x, emb, text = (
        Tensor(stream.standard_normal(shape).astype(np.float32))
        for shape in ((2, 8, 4, 2), (2, 4), (2, 3, 6))
    )
    bias = Tensor(np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(layer(x, emb, text, bias).asnumpy(), x.asnumpy())


@pytest.mark.parametrize("config", [CONFIG, CONVNEXT], ids=["residual", "convnext"])
def test_a_residual_block_starts_as_the_identity(config: BlockConfig) -> None:
    assert_identity(ResBlock(8, 8, 4, config))


@pytest.mark.parametrize("kind", ["self", "cross", "linear"])
def test_attention_starts_as_the_identity(kind: AttentionKind) -> None:
    assert_identity(Attention(8, CONFIG, kind))


def convnext(weights: Arrays, x: np.ndarray, emb: np.ndarray) -> np.ndarray:
    """The definition of a ConvNeXt block of 8 channels in 2 groups."""

    def column(values: np.ndarray) -> np.ndarray:
        return values.reshape(-1, 1, 1)

    def conv1x1(name: str, h: np.ndarray) -> np.ndarray:
        product = np.einsum("oc,bchw->bohw", weights[f"{name}.weight"][..., 0, 0], h)
        return product + column(weights[f"{name}.bias"])

    height, width = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (3, 3), (3, 3)))
    h = np.zeros_like(x) + column(weights["conv1.bias"])
    for i in range(7):
        for j in range(7):
            shifted = padded[:, :, i : i + height, j : j + width]
            h = h + column(weights["conv1.weight"][:, 0, i, j]) * shifted

    grouped = h.reshape(len(x), 2, -1)
    deviation = np.sqrt(grouped.var(2, keepdims=True) + 1e-5)
    h = ((grouped - grouped.mean(2, keepdims=True)) / deviation).reshape(x.shape)
    h = h * column(weights["norm2.gain"]) + column(weights["norm2.bias"])

    scale_shift = emb @ weights["emb.weight"].T + weights["emb.bias"]
    scale, shift = np.split(scale_shift[:, :, None, None], 2, axis=1)
    h = h * (1 + scale) + shift

    h = conv1x1("widen", h)
    h = h / (1 + np.exp(-h))
    return x + conv1x1("conv2", h)


def test_a_convnext_block_equals_its_definition() -> None:
    block = ResBlock(8, 8, 4, CONVNEXT)
    weights = assign_random(block)
    stream = np.random.default_rng(1)
    x = stream.standard_normal((1, 8, 6, 5))
    emb = stream.standard_normal((1, 4))

    output = block(Tensor(x.astype(np.float32)), Tensor(emb.astype(np.float32))).asnumpy()
    np.testing.assert_allclose(output, convnext(weights, x, emb), atol=2e-4)


@pytest.mark.parametrize("config", [CONFIG, CONVNEXT], ids=["residual", "convnext"])
def test_a_block_drops_where_it_has_seeds(config: BlockConfig) -> None:
    block = ResBlock(8, 8, 0, replace(config, dropout=0.5))
    plain = ResBlock(8, 8, 0, config)
    assign_random(block)
    assign_random(plain)
    x = Tensor(np.random.default_rng(0).standard_normal((2, 8, 6, 4)).astype(np.float32))

    def output(seeds: list[int]) -> np.ndarray:
        return block(x, dropout_seeds_B=Tensor(np.array(seeds, np.int32))).asnumpy()

    without = block(x).asnumpy()
    first = output([1, 2])
    second = output([2, 2])
    np.testing.assert_array_equal(without, plain(x).asnumpy())
    assert np.abs(first - without).max() > 0.1
    np.testing.assert_array_equal(first[1], second[1])
    assert np.abs(first[0] - second[0]).max() > 0.1
