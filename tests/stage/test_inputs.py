"""Named inputs: their one order, what guidance drops, and a stage that adds an input."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor

from pipeline import runtime
from pipeline.config import build
from pipeline.diffusion.solvers import SamplerConfig
from pipeline.generate.engine import sample
from pipeline.nn.parameters import initialize
from pipeline.rng import Draws
from pipeline.stage.inputs import Arrays, Inputs
from pipeline.stage.request import SampleRequest
from pipeline.stage.stage import Network
from stages.base import Base
from tests.conftest import LENGTH, stage_yaml

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


def compiled(stage: Base) -> Any:
    def loss(*tensors: Tensor) -> Tensor:
        return stage.loss(*tensors)

    return runtime.jit(loss)


class OffsetBase(Base):
    """A base with one input more, which is added to its prediction."""

    extra_inputs = (*Base.extra_inputs, "offset")

    def training_inputs(self, images: np.ndarray, prompt: Arrays, draws: Draws) -> Arrays:
        arrays = super().training_inputs(images, prompt, draws)
        return {**arrays, "offset": np.full(len(images), 0.5, np.float32)}

    def sampling_inputs(self, request: SampleRequest, config: SamplerConfig) -> Arrays:
        return {**request.prompt, "offset": np.full(request.num_images, 0.5, np.float32)}

    def predict(
        self, network: Network, z: Tensor, logsnr_B: Tensor, inputs: dict[str, Tensor]
    ) -> Tensor:
        return super().predict(network, z, logsnr_B, inputs) + inputs["offset"].reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_stage_adds_an_input_by_name(guidance: float) -> None:
    """Its loss is compiled and its samples are drawn, with guidance too, without a word elsewhere.

    The network starts at zero, so that the offset is the whole prediction: of x, here.
    """
    raw: dict[str, Any] = stage_yaml("base", Path("run"), Path("shards"), Path("t5"))
    raw |= {"diffusion": {"prediction": "x0"}}
    raw["sample"] |= {"guidance": guidance}
    stage = OffsetBase(build(OffsetBase.Config, raw))
    initialize(stage.network, 0)
    assert stage.inputs.names == ("text", "text_mask", "offset")

    prompt = {
        "text": np.ones((4, LENGTH, 16), np.float32),
        "text_mask": np.ones((4, LENGTH), np.float32),
    }
    images = np.zeros((4, 16, 16, 3), np.uint8)
    arrays = stage.training_inputs(images, prompt, Draws(seed=0, step=0, positions=range(4)))
    if guidance == 1:
        loss = compiled(stage)(*map(Tensor, stage.loss_inputs.flatten(arrays)))
        np.testing.assert_allclose(loss.asnumpy(), (-1.0 - 0.5) ** 2, rtol=1e-5)

    request = SampleRequest(prompt=prompt, seed=0, image_ids=range(4))
    generated = sample(stage, stage.config.sample, request)
    np.testing.assert_allclose(generated, 255 * 0.75, atol=1)
