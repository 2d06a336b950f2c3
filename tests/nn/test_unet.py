"""Both U-Nets: equal to PyTorch's (stored references; live in test_parity_unet.py), and properties.

Each is compiled once, at one shape; the tests change its weights and inputs.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
from mindspore import Tensor

from pipeline.config import ConfigError
from pipeline.errors import UserError
from pipeline.nn.dropout import Dropout
from pipeline.nn.parameters import assign, initialize, num_parameters
from pipeline.nn.unet import UNet, UNetConfig
from tests.helpers.compare import Arrays, assert_close, assign_random, differentiate, reference

INPUTS = ("x", "logsnr", "text", "mask")
ADM = UNetConfig(
    channels=16,
    channel_mults=(1, 2),
    num_blocks=(1, 1),
    attention=("none", "self"),
    head_channels=16,
)


SMALLEST = UNetConfig(channels=16, channel_mults=(1,), num_blocks=(1,), attention=("none",))


class Case:
    """A U-Net of a stored reference, compiled, with the reference's weights, inputs and outputs."""

    def __init__(self, name: str, **changes: object) -> None:
        self.inputs, self.expected, stored = reference(name)
        tuples = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in stored["config"].items()
        }
        self.config = UNetConfig(**tuples | changes)
        self.net = UNet(self.config, **stored["sizes"])
        self.weights = assign_random(self.net, stored["seed"])
        self.cotangent = self.expected.pop("cotangent")
        self.differentiate: Callable[..., Arrays] = differentiate(self.net)
        self.outputs = self(**self.inputs)

    def __call__(self, **inputs: np.ndarray) -> Arrays:
        return self.differentiate(self.cotangent, *(inputs[key] for key in INPUTS))

    def output(self, **changes: np.ndarray) -> np.ndarray:
        return self(**self.inputs | changes)["output"]


@pytest.fixture(scope="module")
def cases() -> dict[str, Case]:
    return {name: Case(name) for name in ("unet_adm", "unet_efficient")}


@pytest.fixture(params=["unet_adm", "unet_efficient"])
def case(request: pytest.FixtureRequest, cases: dict[str, Case]) -> Case:
    return cases[request.param]


def test_equals_the_reference(case: Case) -> None:
    assert set(case.expected) <= set(case.outputs)
    assert {"gradients.x", "gradients.stem.weight", "gradients.head.bias"} <= set(case.expected)
    assert_close(case.outputs, case.expected)


def test_every_parameter_has_a_gradient(case: Case) -> None:
    """At random weights; that of an unused parameter would be zero."""
    for name, value in case.outputs.items():
        assert np.isfinite(value).all(), name
        assert np.abs(value).max() > 1e-3, name


def test_the_output_of_an_initialized_network_is_zero(case: Case) -> None:
    """Also for a compiled graph that has run before with other weights."""
    initialize(case.net, seed=0)
    outputs = case(**case.inputs)
    np.testing.assert_array_equal(outputs["output"], 0)
    assert np.abs(outputs["gradients.head.weight"]).max() > 0.1  # from where training starts
    assign(case.net, case.weights, "reference")


def test_padding_has_no_influence(case: Case) -> None:
    mask = case.inputs["mask"]
    assert (mask == 0).any()
    noise = 100 * np.random.default_rng(0).standard_normal(case.inputs["text"].shape).astype(
        np.float32
    )
    padded = np.where(mask[:, :, None] > 0, case.inputs["text"], noise)
    np.testing.assert_array_equal(case.output(text=padded), case.outputs["output"])
    assert (
        np.abs(case.output(text=case.inputs["text"] + noise) - case.outputs["output"]).max() > 0.01
    )


def test_without_text(case: Case) -> None:
    """Without any token the outputs are finite; stages drop a caption by zeros."""
    none = {"mask": np.zeros_like(case.inputs["mask"]), "text": np.zeros_like(case.inputs["text"])}
    outputs = case(**case.inputs | none)
    assert all(np.isfinite(value).all() for value in outputs.values())
    assert np.abs(outputs["output"] - case.outputs["output"]).max() > 0.01
    assert np.isfinite(case.output(mask=none["mask"])).all()


def test_images_are_independent(case: Case) -> None:
    for key in INPUTS:
        other = case.inputs[key].copy()
        other[1] = other[1, ::-1] if key == "mask" else -other[1]
        outputs = case.output(**{key: other})
        np.testing.assert_array_equal(outputs[0], case.outputs["output"][0], err_msg=key)
        assert np.abs(outputs[1] - case.outputs["output"][1]).max() > 1e-3, key
    swapped = {key: value[::-1].copy() for key, value in case.inputs.items()}
    np.testing.assert_allclose(case.output(**swapped), case.outputs["output"][::-1], atol=1e-5)


def test_every_noise_level_has_influence(case: Case) -> None:
    for i in range(case.inputs["logsnr"].shape[1]):
        logsnr = case.inputs["logsnr"].copy()
        logsnr[:, i] += 1
        assert np.abs(case.output(logsnr=logsnr) - case.outputs["output"]).max() > 1e-3


def test_outputs_are_finite_at_extreme_noise_levels(case: Case) -> None:
    for logsnr in (-40.0, 40.0):
        assert np.isfinite(case.output(logsnr=np.full_like(case.inputs["logsnr"], logsnr))).all()


def test_recompute_changes_no_output(cases: dict[str, Case]) -> None:
    """Nor names or gradients."""
    plain, again = cases["unet_efficient"], Case("unet_efficient", recompute=True)
    assert again.config == replace(plain.config, recompute=True)
    assert_close(again.outputs, plain.outputs, tolerance=1e-6)
    assert again.outputs.keys() == plain.outputs.keys()


def test_dropout_differs_by_layer_and_is_recomputed_alike() -> None:
    """Compiled; without seeds nothing is dropped."""
    seeds = np.array([3, 4], np.int32)
    logsnr = np.zeros((2, 1), np.float32)
    x, cotangent = np.random.default_rng(0).standard_normal((2, 2, 3, 8, 8)).astype(np.float32)

    def network(recompute: bool) -> UNet:
        config = replace(SMALLEST, dropout=0.3, recompute=recompute)
        net = UNet(config, channels_in=3, num_levels=1, text_width=0)
        assign_random(net)
        return net

    def gradients(net: UNet) -> Arrays:
        def call(x: Tensor, logsnr: Tensor, seeds: Tensor) -> Tensor:
            return net(x, logsnr, dropout_seeds_B=seeds)

        return differentiate(net, call)(cotangent, x, logsnr, seeds)

    net = network(recompute=False)
    indices = [cell.layer_index for _, cell in net.cells_and_names() if isinstance(cell, Dropout)]
    assert indices == list(range(5))

    expected = gradients(net)
    assert_close(gradients(network(recompute=True)), expected, tolerance=1e-6)

    without = net(Tensor(x), Tensor(logsnr)).asnumpy()
    assert np.abs(without - expected["output"]).max() > 0.01


def test_missing_and_unexpected_inputs_are_named() -> None:
    x = Tensor(np.zeros((1, 3, 8, 8), np.float32))
    logsnr = Tensor(np.zeros((1, 1), np.float32))
    label = Tensor(np.zeros((1, 4), np.float32))

    plain = UNet(ADM, channels_in=3, num_levels=1, text_width=0)
    with pytest.raises(ValueError, match="label_BK: given, but the network has no classes"):
        plain(x, logsnr, label_BK=label)
    with pytest.raises(ValueError, match="text_BLD: given, but the network has no text"):
        plain(x, logsnr, label)

    conditional = UNet(ADM, channels_in=3, num_levels=1, text_width=0, num_classes=4)
    with pytest.raises(ValueError, match="label_BK: None, but the network has classes"):
        conditional(x, logsnr)


def names(net: UNet) -> list[str]:
    return [parameter.name for parameter in net.trainable_params()]


def values(net: UNet) -> Arrays:
    return {parameter.name: parameter.asnumpy().copy() for parameter in net.trainable_params()}


@pytest.fixture
def net() -> UNet:
    return UNet(ADM, channels_in=3, num_levels=1, text_width=12)


def test_initialize(net: UNet) -> None:
    initialize(net, seed=1)
    first = values(net)
    initialize(net, seed=1)
    assert all((value == first[name]).all() for name, value in values(net).items())
    other = UNet(ADM, channels_in=3, num_levels=1, text_width=12)
    initialize(other, seed=1)
    assert all((value == first[name]).all() for name, value in values(other).items())
    initialize(other, seed=2)
    for name, value in values(other).items():
        if name.endswith(("gain", "gamma")):
            assert (value == 1).all(), name
        elif value.ndim == 1 or (
            name.endswith(("conv2.weight", "out.weight", "head.weight")) and "text_pool" not in name
        ):
            assert (value == 0).all(), name
        else:
            assert (value != first[name]).mean() > 0.99, name
            assert value.var() * np.prod(value.shape[1:]) == pytest.approx(1, abs=0.3), name
    weights = [
        value.reshape(-1)[:16].tobytes()
        for name, value in first.items()
        if value.any() and value.ndim > 1
    ]
    assert len(set(weights)) == len(weights)  # no two parameters have the same draws


def test_recompute_changes_no_parameter_name(net: UNet) -> None:
    again = UNet(replace(ADM, recompute=True), channels_in=3, num_levels=1, text_width=12)
    assert names(again) == names(net)
    assert len(set(names(net))) == len(names(net))
    assert (
        num_parameters(net)
        == num_parameters(again)
        == sum(value.size for value in values(net).values())
    )


def test_assign_is_strict(net: UNet) -> None:
    before = values(net)
    weights = {name: value + 1 for name, value in before.items()}
    missing = {name: value for name, value in weights.items() if name != "head.bias"}
    with pytest.raises(
        UserError,
        match=r"^here: has no 'head\.bias', which the network needs; it was made by another",
    ):
        assign(net, missing, "here")
    with pytest.raises(
        UserError,
        match=r"^here: has 'tail\.bias', which the network does not have; it was made by another",
    ):
        assign(net, weights | {"tail.bias": np.zeros(3, np.float32)}, "here")
    with pytest.raises(
        UserError,
        match=r"^here: 'head\.bias' has shape \[4\], but the network's is \[3\]; it was made by an",
    ):
        assign(net, weights | {"head.bias": np.zeros(4, np.float32)}, "here")
    assert all((value == before[name]).all() for name, value in values(net).items())
    assign(net, {name: value.astype(np.float64) for name, value in weights.items()}, "here")
    assert {value.dtype for value in values(net).values()} == {np.dtype(np.float32)}
    assert all((value == weights[name]).all() for name, value in values(net).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_blocks": (1,)},
            "num_blocks: [1] has 1 entries, but channel_mults has 2; give one per level",
        ),
        (
            {"attention": ("self",) * 3},
            "attention: ['self', 'self', 'self'] has 3 entries, but channel_mults has 2;",
        ),
        (
            {"channels": 18, "attention": ("none", "none")},
            "channels: 18 is not a multiple of 4, as group norm",
        ),
        (
            {"head_channels": 24},
            "head_channels: 24 does not divide the 32 channels of a level with attention",
        ),
        ({"num_blocks": (0, 1)}, "num_blocks: [0, 1] is not valid; use whole numbers from 1 on"),
        ({"channel_mults": ()}, "channel_mults: [] is not valid; use whole numbers from 1 on"),
        ({"head_channels": 0}, "head_channels: 0 is not valid; use whole numbers from 1 on"),
        ({"patch": -1}, "patch: -1 is not valid; use whole numbers from 1 on"),
    ],
)
def test_invalid_configurations_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        replace(ADM, **changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("kind", "patch", "stride"),
    [("adm", 1, 8), ("adm", 2, 16), ("efficient", 1, 16), ("efficient", 4, 64)],
)
def test_stride(kind: Literal["adm", "efficient"], patch: int, stride: int) -> None:
    assert UNetConfig(kind=kind, patch=patch).stride == stride
    assert replace(ADM, kind=kind, patch=patch).stride == stride // 4
