"""The layers of the U-Nets: equal to PyTorch's (stored answers; live in test_parity_unet.py), and
known values.
"""

from dataclasses import replace

import numpy as np
import pytest
from mindspore import Tensor, grad

from pipeline import runtime
from pipeline.nn import attention, blocks
from pipeline.nn.dropout import Dropout
from pipeline.nn.embeddings import PADDING, NoiseLevelEmbedding
from pipeline.nn.parameters import assign, initialize
from tests.helpers.compare import assert_close, differentiate, reference
from tools.references import LAYERS, random_weights

CONFIG = blocks.BlockConfig(head_channels=4, text_channels=6)


def built(kind, width, **sizes):
    """The layer that a reference's arguments name."""
    if kind == "ResBlock":
        return blocks.ResBlock(sizes.pop("width_in"), width, sizes.pop("emb"), CONFIG, **sizes)
    config = blocks.BlockConfig(head_channels=sizes["head"], text_channels=sizes["text_width"])
    return attention.Attention(width, config, "cross" if sizes["cross"] else "self")


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_reference(name):
    inputs, answers, config = reference(name)
    seed = config.pop("seed")
    layer = built(**config)
    assign(layer, random_weights({p.name: p.shape for p in layer.trainable_params()}, seed), name)
    cotangent = answers.pop("cotangent")

    found = differentiate(layer)(cotangent, *(inputs[key] for key in ("x", "emb", "text", "bias")))
    assert found.keys() == answers.keys()
    assert_close(found, answers)


@pytest.mark.parametrize(
    "layer",
    [
        blocks.ResBlock(8, 8, 4, CONFIG),
        blocks.ResBlock(8, 8, 4, replace(CONFIG, block="convnext")),
        attention.Attention(8, CONFIG, "self"),
        attention.Attention(8, CONFIG, "cross"),
        attention.Attention(8, CONFIG, "linear"),
    ],
)
def test_layers_start_as_the_identity(layer):
    initialize(layer, seed=0)
    stream = np.random.default_rng(0)
    x, emb, text = (
        Tensor(stream.standard_normal(s).astype(np.float32))
        for s in ((2, 8, 4, 2), (2, 4), (2, 3, 6))
    )
    bias = Tensor(np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(layer(x, emb, text, bias).asnumpy(), x.asnumpy())


@pytest.mark.parametrize("text", [False, True])
def test_linear_attention(text):
    """Against its definition in float64; what the bias keeps out does not count."""
    stream = np.random.default_rng(0)
    q, k, v = stream.standard_normal((3, 2, 2, 5, 4))
    bias = np.zeros((2, 5))
    bias[1, 3:] = PADDING * text
    first = (array.swapaxes(-1, -2) for array in (q, k, v))  # channels before positions
    found = attention.LinearAttention()(
        *(Tensor(array.astype(np.float32)) for array in (*first, bias))
    ).asnumpy()
    found = found.swapaxes(-1, -2)

    def softmax(x, axis):
        e = np.exp(x - x.max(axis, keepdims=True))
        return e / e.sum(axis, keepdims=True)

    k = softmax(k + bias[:, None, :, None], -2)
    if text:
        k, v = k[1:, :, :3], v[1:, :, :3]
    wanted = softmax(q, -1)[-len(k) :] / 2 @ (k.swapaxes(-1, -2) @ v)
    np.testing.assert_allclose(found[-len(k) :], wanted, atol=1e-5)


def test_a_convnext_block():
    """Against PyTorch's order of things in float64, written out: 7 x 7 of each channel, norm, 1 x
    1, SiLU, 1 x 1.
    """
    block = blocks.ResBlock(8, 8, 4, replace(CONFIG, block="convnext"))
    weights = random_weights({p.name: p.shape for p in block.trainable_params()}, 0)
    assign(block, weights, "block")
    stream = np.random.default_rng(1)
    x, emb = stream.standard_normal((1, 8, 6, 5)), stream.standard_normal((1, 4))
    found = block(Tensor(x.astype(np.float32)), Tensor(emb.astype(np.float32))).asnumpy()
    padded = np.pad(x, ((0, 0), (0, 0), (3, 3), (3, 3)))
    h = sum(
        weights["conv1.weight"][:, 0, i, j].reshape(1, 8, 1, 1) * padded[:, :, i : i + 6, j : j + 5]
        for i in range(7)
        for j in range(7)
    ) + weights["conv1.bias"].reshape(1, 8, 1, 1)
    grouped = h.reshape(1, 2, -1)
    h = (grouped - grouped.mean(2, keepdims=True)) / np.sqrt(grouped.var(2, keepdims=True) + 1e-5)
    h = h.reshape(x.shape) * weights["norm2.gain"].reshape(-1, 1, 1) + weights[
        "norm2.bias"
    ].reshape(-1, 1, 1)
    scale, shift = np.split(emb @ weights["emb.weight"].T + weights["emb.bias"], 2, axis=1)
    h = h * (1 + scale.reshape(1, 8, 1, 1)) + shift.reshape(1, 8, 1, 1)
    h = np.einsum("oc,bchw->bohw", weights["widen.weight"][..., 0, 0], h) + weights[
        "widen.bias"
    ].reshape(1, 32, 1, 1)
    h = h / (1 + np.exp(-h))
    h = np.einsum("oc,bchw->bohw", weights["conv2.weight"][..., 0, 0], h) + weights[
        "conv2.bias"
    ].reshape(1, 8, 1, 1)
    np.testing.assert_allclose(found, x + h, atol=2e-4)


def dropped(seeds, number, rate, shape):
    """The mask of dropout by unsigned arithmetic: MurmurHash3's finalizer of image and layer,
    channel, place.
    """

    def mix_bits(bits):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = (bits ^ bits >> np.uint32(shift)) * np.uint32(factor)
        return bits ^ bits >> np.uint32(16)

    bits = mix_bits(seeds.astype(np.uint32) + np.uint32(number))
    for count in (shape[1], shape[2] * shape[3]):
        bits = mix_bits(bits[..., None] + np.arange(count, dtype=np.uint32) * np.uint32(0x9E3779B9))
    return (bits & np.uint32(2**31 - 1)).reshape(shape) < int(rate * 2**31)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout(rate):
    """The mask is the seed's and the layer's; what is left is scaled up; the gradient goes the same
    way.
    """
    shape, seeds = (3, 8, 12, 10), np.array([5, 2**31 - 1, 5], np.int32)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32) + 3
    layer = Dropout(rate)
    layer.number = 7
    wanted = np.where(dropped(seeds, 7, rate, shape), 0, x / (1 - rate))

    def square(x, seeds):
        return (layer(x, seeds) ** 2).sum() / 2

    found = layer(Tensor(x), Tensor(seeds)).asnumpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    gradient = runtime.jit(grad(square))(Tensor(x), Tensor(seeds)).asnumpy()
    np.testing.assert_allclose(gradient, wanted / (1 - rate), rtol=1e-6)
    np.testing.assert_array_equal(found[0] == 0, found[2] == 0)  # wherever in a batch


def test_dropout_drops_its_share_of_everything():
    """Of each image, channel, row and column, and one layer or image says nothing of another: five
    deviations.
    """
    shape, rate = (16, 32, 32, 32), 0.1
    seeds = np.arange(100, 116, dtype=np.int32)
    masks = []
    for number in (0, 1):
        layer = Dropout(rate)
        layer.number = number
        masks.append(layer(Tensor(np.ones(shape, np.float32)), Tensor(seeds)).asnumpy() == 0)
    masks.append(np.roll(masks[0], 1, 0))
    for mask in masks[:2]:
        for axis in range(4):
            shares = mask.mean(tuple(other for other in range(4) if other != axis))
            assert (
                np.abs(shares - rate).max()
                < 5 * (rate * (1 - rate) * shape[axis] / mask.size) ** 0.5
            )
    for mask in masks[1:]:
        both = (masks[0] & mask).mean()
        assert abs(both - rate**2) < 5 * (rate**2 * (1 - rate**2) / mask.size) ** 0.5


@pytest.mark.parametrize("block", ["residual", "convnext"])
def test_a_block_drops_where_it_has_seeds(block):
    layer = blocks.ResBlock(8, 8, 0, replace(CONFIG, block=block, dropout=0.5))
    assign(layer, random_weights({p.name: p.shape for p in layer.trainable_params()}, 0), "block")
    plain = blocks.ResBlock(8, 8, 0, replace(CONFIG, block=block))
    assign(plain, random_weights({p.name: p.shape for p in plain.trainable_params()}, 0), "block")
    x = Tensor(np.random.default_rng(0).standard_normal((2, 8, 6, 4)).astype(np.float32))
    without, one, other = (
        layer(x, dropout_seeds_B=seeds).asnumpy()
        for seeds in (None, Tensor(np.array([1, 2], np.int32)), Tensor(np.array([2, 2], np.int32)))
    )
    np.testing.assert_array_equal(without, plain(x).asnumpy())
    assert np.abs(one - without).max() > 0.1
    np.testing.assert_array_equal(one[1], other[1])
    assert np.abs(one[0] - other[0]).max() > 0.1


@pytest.mark.parametrize(("kind", "groups"), [("layer", 1), ("instance", 16)])
@pytest.mark.usefixtures("both")
def test_norms_over_all_channels_and_over_each(kind, groups):
    x = np.random.default_rng(0).standard_normal((2, 16, 3, 5)) * 2 + 5
    grouped = x.reshape(2, groups, -1)
    wanted = (grouped - grouped.mean(2, keepdims=True)) / np.sqrt(
        grouped.var(2, keepdims=True) + 1e-5
    )
    found = blocks.Norm(16, kind, silu=False)(Tensor(x.astype(np.float32))).asnumpy()
    np.testing.assert_allclose(found, wanted.reshape(x.shape), atol=1e-4)


@pytest.mark.parametrize(
    ("width", "groups"), [(4, 1), (16, 4), (48, 12), (128, 32), (144, 24), (192, 32), (1024, 32)]
)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.usefixtures("both")
def test_norm(width, groups, silu):
    """Against the definition in float64, also for widths that 32 does not divide."""
    stream = np.random.default_rng(width)
    x = stream.standard_normal((2, width, 3, 5)) * 2 + 5
    gain, bias, scale_shift = (
        stream.standard_normal(size) for size in (width, width, (2, 2 * width))
    )
    norm = blocks.Norm(width, silu=silu)
    norm.gain.set_data(Tensor(gain.astype(np.float32)))
    norm.bias.set_data(Tensor(bias.astype(np.float32)))
    found = norm(Tensor(x.astype(np.float32)), Tensor(scale_shift.astype(np.float32))).asnumpy()

    grouped = x.reshape(2, groups, -1)
    y = (grouped - grouped.mean(2, keepdims=True)) / np.sqrt(grouped.var(2, keepdims=True) + 1e-5)
    y = y.reshape(x.shape) * gain[:, None, None] + bias[:, None, None]
    scale, shift = np.split(scale_shift[:, :, None, None], 2, axis=1)
    y = y * (1 + scale) + shift
    np.testing.assert_allclose(found, y / (1 + np.exp(-y)) if silu else y, atol=2e-4)


@pytest.mark.usefixtures("both")
def test_norm_of_a_constant_is_its_bias():
    """Rounding makes the variance of equal numbers negative at times; no NaN comes of it."""
    found = blocks.Norm(8, silu=False)(
        Tensor(np.full((1, 8, 5, 7), 1234.567, np.float32))
    ).asnumpy()
    np.testing.assert_allclose(found, 0, atol=0.1)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_patches_round_trip(patch):
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 4)).astype(np.float32)
    there = blocks.space_to_channels(Tensor(x), patch)
    assert there.shape == (2, 3 * patch**2, 8 // patch, 4 // patch)
    np.testing.assert_array_equal(there[0, :, 0, 0].asnumpy(), x[0, :, :patch, :patch].reshape(-1))
    np.testing.assert_array_equal(blocks.channels_to_space(there, patch).asnumpy(), x)


def test_resampling():
    x = Tensor(np.array([[[[1, 2, 3], [4, 5, 6]]]], np.float32))
    twice = blocks.upsample(x)
    np.testing.assert_array_equal(
        twice.asnumpy()[0, 0],
        [[1, 1, 2, 2, 3, 3], [1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6], [4, 4, 5, 5, 6, 6]],
    )
    np.testing.assert_array_equal(blocks.downsample(twice).asnumpy(), x.asnumpy())
    mean = blocks.downsample(Tensor(np.arange(8, dtype=np.float32).reshape(1, 1, 2, 4)))
    np.testing.assert_array_equal(mean.asnumpy()[0, 0], [[2.5, 4.5]])


@pytest.mark.usefixtures("both")
def test_convolutions_keep_or_divide_the_size():
    x = Tensor(np.zeros((1, 4, 6, 8), np.float32))
    assert blocks.Conv(4, 5, 3)(x).shape == blocks.Conv(4, 5, 1)(x).shape == (1, 5, 6, 8)
    assert blocks.Conv(4, 5, 3, stride=2)(x).shape == (1, 5, 3, 4)
    assert blocks.Conv(4, 5, 3, stride=2)(x[:, :, 1:, :7]).shape == (1, 5, 3, 4)


def test_attention_is_a_mean_of_what_it_may_look_at():
    """Equal scores: the mean of the values without padding; of all values if there is nothing but
    padding.
    """
    v = np.random.default_rng(0).standard_normal((2, 1, 4, 3)).astype(np.float32)
    bias = np.array([[0, 0, PADDING], [PADDING] * 3], np.float32)
    zero = Tensor(np.zeros((2, 1, 4, 5), np.float32))
    found = attention.ScaledDotProductAttention()(
        zero, Tensor(v * 0), Tensor(v), Tensor(bias)
    ).asnumpy()
    for image, seen in enumerate((v[0, 0, :, :2], v[1, 0])):
        np.testing.assert_allclose(
            found[image, 0], np.tile(seen.mean(1, keepdims=True), 5), atol=1e-5
        )


@pytest.mark.usefixtures("both")
def test_attention_answers_some_queries_after_the_others(monkeypatch):
    """Where their scores are many: never more at once than are allowed, also when the last are
    fewer.
    """
    stream = np.random.default_rng(0)
    q, k, v = (Tensor(stream.standard_normal((2, 3, 4, n)).astype(np.float32)) for n in (11, 7, 7))
    bias = Tensor(np.where(np.arange(7) < [[5], [7]], 0, PADDING).astype(np.float32))
    lookup = attention.ScaledDotProductAttention()
    product, seen = lookup.scores, []

    def spy(one, other):
        seen.append(one.shape[3])
        return product(one, other)

    wanted = lookup(q, k, v, bias).asnumpy()
    lookup.scores = spy
    monkeypatch.setattr(attention, "SCORES", 3 * 7 * 4 + 5)
    np.testing.assert_allclose(lookup(q, k, v, bias).asnumpy(), wanted, atol=1e-6)
    assert seen == [4, 4, 3]
    lookup.scores = product
    np.testing.assert_allclose(runtime.jit(lookup)(q, k, v, bias).asnumpy(), wanted, atol=1e-6)


def test_level_embedding():
    """Against the definition in float64: times up to 1,000 keep the precision that float32 leaves
    them.
    """
    level = NoiseLevelEmbedding(8, 16)
    weights = random_weights({p.name: p.shape for p in level.trainable_params()}, seed=0)
    assign(level, weights, "test")
    logsnr = np.linspace(-20, 20, 41).astype(np.float32)
    found = level(Tensor(logsnr)).asnumpy()

    time = 1000 * 2 / np.pi * np.arctan(np.exp(-logsnr.astype(np.float64) / 2))
    angles = time[:, None] * 10000.0 ** -np.array([0, 1 / 3, 2 / 3, 1])
    waves = np.concatenate((np.sin(angles), np.cos(angles)), axis=1)
    hidden = waves @ weights["dense1.weight"].T + weights["dense1.bias"]
    wanted = hidden / (1 + np.exp(-hidden)) @ weights["dense2.weight"].T + weights["dense2.bias"]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
