"""Large pictures in bands: what the whole network answers, everywhere, without a tensor of their
full resolution.
"""

from dataclasses import replace

import numpy as np
import pytest
from mindspore import Tensor, ops

from pipeline import kernels, runtime
from pipeline.nn import blocks, tiling
from pipeline.nn.parameters import assign, put
from pipeline.nn.unet import UNet, UNetConfig
from tests.stages.test_recipes import inputs, make
from tools.references import random_weights

CONFIG = UNetConfig(
    kind="efficient",
    channels=16,
    channel_mults=(1, 2, 2),
    num_blocks=(1, 1, 1),
    attention=("none", "none", "cross"),
    head_channels=16,
    text_channels=16,
)


def network(**changes: object) -> UNet:
    net = UNet(replace(CONFIG, **changes), channels_in=6, num_levels=2, text_width=12)
    assign(net, random_weights({p.name: p.shape for p in net.trainable_params()}, seed=0), "test")
    return net


def tensors(height: int, width: int, num: int = 2) -> list[Tensor]:
    """Pictures with noise levels, texts and lengths of their own; not about 0, for a border of
    zeros to be seen.
    """
    stream = np.random.default_rng(0)
    arrays = (
        stream.standard_normal((num, 6, height, width)) + 2,
        stream.uniform(-6, 6, (num, 2)),
        stream.standard_normal((num, 5, 12)),
        np.arange(5) < np.array([[5], [3]])[:num],
    )
    return [Tensor(array.astype(np.float32)) for array in arrays]


@pytest.fixture
def enlarged(monkeypatch):
    """The shape of each enlarged picture, appended as they come."""
    seen, upsample = [], blocks.upsample

    def spy(x_BCHW):
        y = upsample(x_BCHW)
        seen.append(y.shape)
        return y

    monkeypatch.setattr(blocks, "upsample", spy)
    return seen


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize(
    ("shape", "patch", "rows"),
    [
        ((40, 24), 1, 3),  # seven bands, the last with two rows
        ((24, 40), 1, 1),  # each a row, and little more than its halo
        ((48, 32), 2, 5),  # of patches
        ((16, 8), 1, 7),  # two, of which the last has one row
    ],
)
def test_equals_the_whole(shape, patch, rows, enlarged, monkeypatch):
    net, given = network(patch=patch), tensors(*shape)
    height, width = (side // patch for side in shape)
    wanted = net(*given).asnumpy()
    assert enlarged[-1] == (2, 16, height, width)
    monkeypatch.setattr(tiling, "LIMIT", rows * 2 * width * 16)
    enlarged.clear()
    found = tiling.tiled(net, *given).asnumpy()
    largest = max(shape for shape in enlarged if shape[3] == width)
    assert largest <= (1, 16, 2 * (rows + 2), width)
    assert wanted.std() > 0.3
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_equals_the_whole_compiled(monkeypatch):
    net, given = network(), tensors(40, 24)
    monkeypatch.setattr(tiling, "LIMIT", 3 * 2 * 16 * 24)

    def tiled(*tensors):
        return tiling.tiled(net, *tensors)

    np.testing.assert_allclose(
        runtime.jit(tiled)(*given).asnumpy(), net(*given).asnumpy(), atol=2e-5
    )


def test_small_pictures_and_other_networks_are_left_alone(monkeypatch):
    """Also where a single level, or ADM, has blocks at full resolution."""
    given = tensors(16, 8)
    net = network()
    np.testing.assert_array_equal(tiling.tiled(net, *given).asnumpy(), net(*given).asnumpy())
    monkeypatch.setattr(tiling, "LIMIT", 1)
    one_level = {"channel_mults": (1,), "num_blocks": (1,), "attention": ("cross",)}
    for changes in (one_level, {"kind": "adm"}):
        net = network(**changes)
        np.testing.assert_array_equal(tiling.tiled(net, *given).asnumpy(), net(*given).asnumpy())


def test_statistics_are_good_where_the_mean_is_large(monkeypatch):
    """Against our kernel, which sums in double precision; of squares in float32, nothing would be
    left.
    """
    if kernels.library() is None:
        pytest.skip("the kernels are not built here: no C++ compiler")
    net, given = network(), tensors(24, 16)
    put(net.up[-1].layers[-1].conv.bias, np.full(16, 1000, np.float32))
    wanted = net(*given).asnumpy()
    monkeypatch.setattr(tiling, "LIMIT", 5 * 2 * 16 * 16)
    np.testing.assert_allclose(tiling.tiled(net, *given).asnumpy(), wanted, atol=5e-3)


def test_sampling_is_in_bands_and_training_is_not(monkeypatch):
    """With what makes a picture of bands replaced, and a limit below the pictures of both."""
    stage = make("sr64")
    weights = random_weights({p.name: p.shape for p in stage.network.trainable_params()}, seed=0)
    assign(stage.network, weights, "test")
    pictures, text, mask = inputs(stage, 2)
    batch = [
        Tensor(np.asarray(array, np.float32))
        for array in stage.batch(0, range(2), pictures, text, mask)
    ]

    def loss(*tensors):
        return stage.loss(*tensors)

    trained = runtime.jit(loss)(*batch).asnumpy()

    def sample():
        config = replace(stage.config.sample, steps=2, guidance=2.0)
        stage.graphs.clear()
        return stage.sample(config, (text, mask), 0, range(2), pictures[:, ::2, ::2]).astype(int)

    wanted = sample()
    monkeypatch.setattr(tiling, "LIMIT", 16 * 32 * 12)
    assert np.abs(sample() - wanted).max() <= 1

    def zeros(unet, x_BCHW, *conditions):
        return ops.zeros_like(ops.narrow(x_BCHW, 1, 0, 3 * unet.patch**2))

    monkeypatch.setattr(tiling, "picture", zeros)
    assert np.abs(sample() - wanted).max() > 10
    np.testing.assert_array_equal(runtime.jit(loss)(*batch).asnumpy(), trained)
