"""Tiling: the output of the whole network on large images, without a tensor of full resolution."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from mindspore import Tensor, ops

from pipeline import kernels, runtime
from pipeline.nn import tiling
from pipeline.nn.parameters import put
from pipeline.nn.tiling import tiled
from pipeline.nn.unet import UNet, UNetConfig
from pipeline.stage import stage as stage_module
from tests.helpers.compare import assign_random
from tests.stages.test_recipes import inputs, make

CHANNELS = 16

CONFIG = UNetConfig(
    kind="efficient",
    channels=CHANNELS,
    channel_mults=(1, 2, 2),
    num_blocks=(1, 1, 1),
    attention=("none", "none", "cross"),
    head_channels=16,
    text_channels=16,
)


def network(**changes: object) -> UNet:
    net = UNet(replace(CONFIG, **changes), channels_in=6, num_levels=2, text_width=12)
    assign_random(net)
    return net


def network_inputs(height: int, width: int, num: int = 2) -> list[Tensor]:
    """Images with noise levels, texts and lengths of their own.

    Their mean is not 0, so that a border of zeros would show.
    """
    stream = np.random.default_rng(0)
    arrays = (
        stream.standard_normal((num, 6, height, width)) + 2,
        stream.uniform(-6, 6, (num, 2)),
        stream.standard_normal((num, 5, 12)),
        np.arange(5) < np.array([[5], [3]])[:num],
    )
    return [Tensor(array.astype(np.float32)) for array in arrays]


def limit_for(rows: int, width: int) -> int:
    """The limit at which bands have `rows` rows at half the side of `width` positions."""
    return rows * 2 * width * CHANNELS


def record_shapes(net: UNet) -> list[tuple[int, ...]]:
    """The output shapes of the layers at full resolution, appended as they run."""
    shapes: list[tuple[int, ...]] = []

    def record(cell: object, args: object, output: Tensor) -> None:
        shapes.append(output.shape)

    for layer in (net.stem, net.up[-1].layers[-1], net.head):
        layer.register_forward_hook(record)
    return shapes


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize(
    ("shape", "patch", "rows"),
    [
        pytest.param((40, 24), 1, 3, id="seven bands, the last with two rows"),
        pytest.param((24, 40), 1, 1, id="bands of one row"),
        pytest.param((48, 32), 2, 5, id="patches"),
        pytest.param((16, 8), 1, 7, id="two bands, the last with one row"),
    ],
)
def test_tiled_output_equals_the_whole_networks(
    shape: tuple[int, int], patch: int, rows: int
) -> None:
    net = network(patch=patch)
    arguments = network_inputs(*shape)
    height, width = (side // patch for side in shape)
    shapes = record_shapes(net)

    expected = net(*arguments).asnumpy()
    assert max(shapes)[2:] == (height, width)
    assert expected.std() > 0.3

    shapes.clear()
    output = tiled(net, *arguments, limit=limit_for(rows, width)).asnumpy()
    np.testing.assert_allclose(output, expected, atol=2e-5)

    # One image at a time, and no more rows than the band and its halo.
    assert {shape[0] for shape in shapes} == {1}
    assert max(shape[2] for shape in shapes) <= 2 * (rows + 2)


def test_tiled_output_is_the_same_when_compiled() -> None:
    net = network()
    arguments = network_inputs(40, 24)

    def call(x: Tensor, logsnr: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        return tiled(net, x, logsnr, text, mask, limit=limit_for(rows=3, width=24))

    output = runtime.jit(call)(*arguments).asnumpy()
    np.testing.assert_allclose(output, net(*arguments).asnumpy(), atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        pytest.param({}, 2**24, id="below the limit"),
        pytest.param(
            {"channel_mults": (1,), "num_blocks": (1,), "attention": ("cross",)}, 1, id="one level"
        ),
        pytest.param({"kind": "adm"}, 1, id="adm"),
    ],
)
def test_small_images_and_blocks_at_full_resolution_are_not_tiled(
    changes: dict[str, object], limit: int
) -> None:
    net = network(**changes)
    arguments = network_inputs(16, 8)
    expected = net(*arguments).asnumpy()
    np.testing.assert_array_equal(tiled(net, *arguments, limit=limit).asnumpy(), expected)


def test_statistics_are_accurate_where_the_mean_is_large() -> None:
    """Against the kernel, which sums in float64; a sum of squares in float32 would cancel."""
    if kernels.library() is None:
        pytest.skip("the kernels are not built here: no C++ compiler")
    net = network()
    arguments = network_inputs(24, 16)
    put(net.up[-1].layers[-1].conv.bias, np.full(CHANNELS, 1000, np.float32))

    expected = net(*arguments).asnumpy()
    output = tiled(net, *arguments, limit=limit_for(rows=5, width=16)).asnumpy()
    np.testing.assert_allclose(output, expected, atol=5e-3)


def test_sampling_is_tiled_and_training_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit below the images of both, and then with tiles of zeros."""
    stage = make("sr64")
    assign_random(stage.network)
    images, text, mask = inputs(stage, 2)
    batch = [
        Tensor(np.asarray(array, np.float32))
        for array in stage.batch(0, range(2), images, text, mask)
    ]

    def loss(*tensors: Tensor) -> Tensor:
        return stage.loss(*tensors)

    trained = runtime.jit(loss)(*batch).asnumpy()

    def sample(tile: Callable[..., Tensor]) -> np.ndarray:
        monkeypatch.setattr(stage_module, "tiled", tile)
        stage.graphs.clear()
        config = replace(stage.config.sample, steps=2, guidance=2.0)
        return stage.sample(config, (text, mask), 0, range(2), images[:, ::2, ::2]).astype(int)

    def small_tiles(unet: UNet, *arguments: Tensor) -> Tensor:
        return tiled(unet, *arguments, limit=CHANNELS * 32 * 12)

    def zeros(unet: UNet, x_BCHW: Tensor, *arguments: Tensor) -> Tensor:
        return ops.zeros_like(ops.narrow(x_BCHW, 1, 0, 3))

    expected = sample(tiling.tiled)
    assert np.abs(sample(small_tiles) - expected).max() <= 1
    assert np.abs(sample(zeros) - expected).max() > 10
    np.testing.assert_array_equal(runtime.jit(loss)(*batch).asnumpy(), trained)
