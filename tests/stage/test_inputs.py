"""Named inputs: their one order, what guidance drops, and a stage that adds an input."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor, ops

from pipeline import runtime
from pipeline.config import build
from pipeline.diffusion.solvers import SamplerConfig
from pipeline.generate.engine import sample
from pipeline.nn.parameters import assign
from pipeline.rng import Draws
from pipeline.stage.inputs import Arrays, Inputs
from pipeline.stage.request import SampleRequest
from pipeline.stage.stage import Network
from stages.base import Base
from tests.conftest import LENGTH, stage_yaml
from tools.references import random_weights

INPUTS = Inputs(leading=("x",), prompt=("text", "text_mask"), others=("low_res",))


def test_flattened_arrays_come_back_by_name() -> None:
    arrays = {name: np.full(2, i) for i, name in enumerate(INPUTS.names)}
    shuffled = dict(reversed(arrays.items())) | {"more": np.zeros(2)}
    flat = INPUTS.flatten(shuffled)
    assert INPUTS.unpack(flat) == {name: arrays[name] for name in INPUTS.names}


def test_missing_inputs_are_named() -> None:
    with pytest.raises(ValueError) as error:
        INPUTS.flatten({"x": np.zeros(2), "text": np.zeros(2), "label": np.zeros(2)})
    assert str(error.value) == (
        "inputs: text_mask, low_res missing; this stage takes x, text, text_mask, low_res and was "
        "given x, text, label"
    )


def test_dropping_zeroes_the_prompt_of_whole_samples_alone() -> None:
    rng = np.random.default_rng(0)
    shapes = {"text": (3, 4, 2), "text_mask": (3, 4), "low_res": (3, 3, 2, 2)}
    arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    dropped = INPUTS.drop_prompt(arrays, np.array([1, 0, 1], np.float32))
    for name, array in dropped.items():
        np.testing.assert_array_equal(array[[0, 2]], arrays[name][[0, 2]])
        assert (array[1] == 0).all() == (name in INPUTS.prompt)


class TwoLevels(Base):
    """A base that is conditioned on a second noise level."""

    num_noise_levels = 2
    extra_inputs = ("second_logsnr",)

    def training_inputs(self, images: np.ndarray, prompt: Arrays, draws: Draws) -> Arrays:
        arrays = super().training_inputs(images, prompt, draws)
        return {**arrays, "second_logsnr": arrays["logsnr"] + 1}

    def sampling_inputs(self, request: SampleRequest, config: SamplerConfig) -> Arrays:
        level = np.array(request.image_ids, np.float32)
        return {**request.prompt, "second_logsnr": level}

    def predict(
        self, network: Network, z: Tensor, logsnr_B: Tensor, inputs: dict[str, Tensor]
    ) -> Tensor:
        levels_BT = ops.stack((logsnr_B, inputs["second_logsnr"]), 1)
        return self.call_network(network, z, levels_BT, inputs)


@pytest.fixture(scope="module")
def stage() -> TwoLevels:
    raw: dict[str, Any] = stage_yaml("base", Path("run"), Path("shards"), Path("t5"))
    raw |= {"diffusion": {"prediction": "x0"}}
    stage = TwoLevels(build(TwoLevels.Config, raw))
    weights = {p.name: p.shape for p in stage.network.trainable_params()}
    assign(stage.network, random_weights(weights, 0), "stage")
    return stage


def prompt(num: int) -> Arrays:
    return {
        "text": np.ones((num, LENGTH, 16), np.float32),
        "text_mask": np.ones((num, LENGTH), np.float32),
    }


def test_an_input_that_a_stage_adds_reaches_the_compiled_loss(stage: TwoLevels) -> None:
    """By its name alone: nothing else of the library knows it."""

    def compute(*tensors: Tensor) -> Tensor:
        return stage.loss(*tensors)

    compiled = runtime.jit(compute)
    images = np.zeros((2, 16, 16, 3), np.uint8)
    arrays = stage.training_inputs(images, prompt(2), Draws(seed=0, step=0, positions=range(2)))
    assert stage.loss_inputs.names[-1] == "second_logsnr"

    def loss(changed: Arrays) -> np.ndarray:
        tensors = map(Tensor, stage.loss_inputs.flatten({**arrays, **changed}))
        return np.asarray(compiled(*tensors).asnumpy())

    same = arrays["second_logsnr"].copy()
    same[1] += 3
    first, second = loss({}), loss({"second_logsnr": same})
    assert first[0] == second[0]
    assert first[1] != second[1]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_input_that_a_stage_adds_reaches_its_samples(stage: TwoLevels, guidance: float) -> None:
    """Images that differ in nothing else than the second level, which is their id."""
    config = replace(stage.config.sample, steps=1, guidance=guidance)
    noise = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    request = SampleRequest(
        prompt=prompt(4), seed=0, image_ids=[0, 0, 5, 9], initial_noise=noise.repeat(4, 0)
    )
    images = sample(stage, config, request)
    np.testing.assert_array_equal(images[0], images[1])
    assert (images[0] != images[2]).any()
    assert (images[2] != images[3]).any()
