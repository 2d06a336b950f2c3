"""Stages: the named inputs of a batch, that its draws belong to the sample's position, and what
configurations are refused.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor

from pipeline.config import ConfigError, build
from pipeline.data.image import downsample, to_float, upsample
from pipeline.diffusion.process import v_target
from pipeline.diffusion.schedule import cosine
from pipeline.nn.parameters import assign, initialize
from pipeline.rng import Draws, sampling_noise
from pipeline.stage.inputs import Arrays
from pipeline.stage.registry import stage_class
from pipeline.stage.request import SampleRequest
from pipeline.stage.stage import Stage
from tests.conftest import stage_yaml
from tools.references import random_weights

KINDS = ["base", "sr32", "sr64"]
RNG = np.random.default_rng(0)


def make(name: str, **sections: Any) -> Stage:
    raw = stage_yaml(name, Path("run"), Path("shards"), Path("t5"))
    for key, value in sections.items():
        raw[key] = raw[key] | value if isinstance(value, dict) else value
    cls = stage_class(raw["kind"])
    return cls(build(cls.Config, raw))


@pytest.fixture(scope="module")
def stages() -> dict[str, Stage]:
    return {name: make(name) for name in KINDS}


def samples(stage: Stage, num: int) -> tuple[np.ndarray, Arrays]:
    """Random images, and a prompt of ones."""
    side = stage.config.size
    images = RNG.integers(0, 256, (num, side, side, 3), dtype=np.uint8)
    prompt = {
        "text": np.ones((num, 12, 16), np.float32),
        "text_mask": np.ones((num, 12), bool),
    }
    return images, prompt


def batch(
    stage: Stage, step: int, positions: Sequence[int], images: np.ndarray, prompt: Arrays
) -> Arrays:
    draws = Draws(seed=stage.config.seed, step=step, positions=positions)
    return stage.training_inputs(images, prompt, draws)


def tensors(stage: Stage, arrays: Arrays) -> list[Tensor]:
    return [Tensor(array) for array in stage.loss_inputs.flatten(arrays)]


def repeated(stage: Stage, num: int) -> Arrays:
    """A batch of one sample at `num` positions."""
    images, prompt = samples(stage, 1)
    prompt = {name: array.repeat(num, 0) for name, array in prompt.items()}
    return batch(stage, 0, range(num), images.repeat(num, 0), prompt)


@pytest.mark.parametrize("name", KINDS)
def test_draws_of_a_position_do_not_depend_on_the_others(
    stages: dict[str, Stage], name: str
) -> None:
    stage = stages[name]
    images, prompt = samples(stage, 6)
    whole = batch(stage, 5, range(6), images, prompt)
    assert whole.keys() == set(stage.loss_inputs.names)
    for i in (0, 2, 4):
        rows = slice(i, i + 2)
        few = {key: array[rows] for key, array in prompt.items()}
        part = batch(stage, 5, range(i, i + 2), images[rows], few)
        for key, array in whole.items():
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array[rows], part[key])


@pytest.mark.parametrize("name", KINDS)
def test_every_step_draws_anew(stages: dict[str, Stage], name: str) -> None:
    stage = stages[name]
    images, prompt = samples(stage, 2)
    one = batch(stage, 1, range(2), images, prompt)
    other = batch(stage, 2, range(2), images, prompt)
    assert (one["eps"] != other["eps"]).mean() > 0.99
    assert (one["logsnr"] != other["logsnr"]).all()


def test_captions_are_dropped_whole_and_as_often_as_configured() -> None:
    num = 2000
    arrays = repeated(make("base", text={"cond_drop_prob": 0.25}), num)
    text, mask = arrays["text"], arrays["text_mask"]
    dropped = (mask == 0).all(axis=1)
    assert ((text == 0).all(axis=(1, 2)) == dropped).all()
    assert ((mask == 1).all(axis=1) != dropped).all()
    assert dropped.mean() == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / num))


@pytest.mark.parametrize("name", KINDS)
def test_dropout_is_seeded_by_position_and_in_training_alone(name: str) -> None:
    stage = make(name, unet={"dropout": 0.5})
    plain = make(name)
    weights = {p.name: p.shape for p in stage.network.trainable_params()}
    for each in (stage, plain):
        assign(each.network, random_weights(weights, 0), name)
    assert "dropout_seeds" not in stage.inputs.names

    images, prompt = samples(stage, 2)
    arrays = batch(stage, 3, range(2), images, prompt)
    swapped_prompt = {key: array[::-1] for key, array in prompt.items()}
    swapped = batch(stage, 3, (1, 0), images[::-1], swapped_prompt)
    seeds = arrays["dropout_seeds"]
    assert seeds.dtype == np.int32
    assert seeds.min() >= 0
    np.testing.assert_array_equal(seeds, swapped["dropout_seeds"][::-1])
    next_step = batch(stage, 4, range(2), images, prompt)
    assert len({*seeds, *next_step["dropout_seeds"]}) == 4

    loss = stage.loss(*tensors(stage, arrays)).asnumpy()
    other = {**arrays, "dropout_seeds": seeds[::-1].copy()}
    other_loss = stage.loss(*tensors(stage, other)).asnumpy()
    without = plain.loss(*tensors(plain, arrays)).asnumpy()
    assert np.abs(loss - other_loss).min() > 1e-5
    assert np.abs(loss - without).min() > 1e-5


def test_times_are_uniform(stages: dict[str, Stage]) -> None:
    logsnr = repeated(stages["base"], 2000)["logsnr"]
    for share in (0.1, 0.5, 0.9):
        assert (logsnr > cosine(np.array(share))).mean() == pytest.approx(share, abs=0.05)


def test_the_low_resolution_is_the_images_own(stages: dict[str, Stage]) -> None:
    stage = stages["sr32"]
    images, prompt = samples(stage, 2)
    arrays = batch(stage, 0, range(2), images, prompt)
    x = arrays["x"]
    assert (x == to_float(images)).all()
    assert (arrays["low_res"] == upsample(downsample(x, 16), 32)).all()
    assert arrays["low_res_noise"].shape == x.shape
    levels = arrays["low_res_logsnr"]
    assert (np.abs(levels) <= 20.001).all()
    assert levels[0] != levels[1]  # a level for each sample


def test_super_resolution_sees_the_noisy_low_resolution_and_its_level(
    stages: dict[str, Stage],
) -> None:
    """alpha low_res + sigma eps at the level that is embedded beside the image's own, against NumPy
    in float64.
    """
    stage = stages["sr32"]
    inputs: list[np.ndarray] = []

    def network(x_BCHW: Tensor, logsnr_BT: Tensor, *conditioning: Tensor | None) -> Tensor:
        inputs.extend((x_BCHW.asnumpy(), logsnr_BT.asnumpy()))
        return x_BCHW

    arrays = batch(stage, 0, range(2), *samples(stage, 2))
    named = {key: Tensor(array) for key, array in arrays.items()}
    stage.predict(network, named["x"], named["logsnr"], named)
    image, levels = inputs
    variance = 1 / (1 + np.exp(arrays["low_res_logsnr"].astype(np.float64)))[:, None, None, None]
    noisy = np.sqrt(1 - variance) * arrays["low_res"]
    noisy += np.sqrt(variance) * arrays["low_res_noise"]
    assert (image[:, :3] == arrays["x"]).all()
    np.testing.assert_allclose(image[:, 3:], noisy, atol=2e-5)
    assert (levels == np.stack([arrays["logsnr"], arrays["low_res_logsnr"]], axis=1)).all()


def test_augmentation_levels_stay_within_their_range() -> None:
    stage = make("sr32", low_res={"max_aug_level": 0.5})
    levels = batch(stage, 0, range(8), *samples(stage, 8))["low_res_logsnr"]
    assert (levels >= cosine(np.array(0.5)) - 1e-6).all()


def test_sampling_noise_is_named_by_seed_id_size_and_draw() -> None:
    noise = sampling_noise(3, [4, 9], (3, 8, 8), 0)
    assert (sampling_noise(3, [9], (3, 8, 8), 0)[0] == noise[1]).all()
    for other in (
        sampling_noise(2, [9], (3, 8, 8), 0),
        sampling_noise(3, [8], (3, 8, 8), 0),
        sampling_noise(3, [9], (3, 8, 8), 1),
    ):
        assert (other[0] != noise[1]).mean() > 0.99
    assert (sampling_noise(3, [9], (3, 16, 16), 0)[0, :, :8, :8] != noise[1]).mean() > 0.99


def test_any_multiple_of_the_low_resolution_can_be_enlarged(stages: dict[str, Stage]) -> None:
    """A stage that was trained on windows is run at full size: the shape follows from the low
    resolution.
    """
    stage = stages["sr64"]
    request = SampleRequest(
        prompt={}, seed=0, image_ids=[0, 1], low_res=np.zeros((2, 24, 24, 3), np.uint8)
    )
    arrays = stage.sampling_inputs(request, replace(stage.config.sample, aug_level=0.3))
    assert stage.sample_shape(request) == (3, 48, 48)
    assert arrays["low_res"].shape == arrays["low_res_noise"].shape == (2, 3, 48, 48)
    expected = cosine(np.array([0.3, 0.3]))
    assert arrays["low_res_logsnr"] == pytest.approx(expected, rel=1e-6)


def test_the_first_loss_is_that_of_predicting_zero(stages: dict[str, Stage]) -> None:
    """The network starts at zero, so the loss of an image is its target's mean square."""
    stage = stages["sr32"]
    initialize(stage.network, 0)
    x, eps, logsnr_B, *others = tensors(stage, batch(stage, 0, range(2), *samples(stage, 2)))
    target = v_target(x, eps, logsnr_B).asnumpy()
    loss = stage.loss(x, eps, logsnr_B, *others).asnumpy()
    assert loss == pytest.approx((target**2).mean(axis=(1, 2, 3)), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "sections", "message"),
    [
        ("base", {"seed": -1}, "seed: -1 is not in [0, 2**63)"),
        (
            "sr32",
            {"low_res": {"size": 12}},
            "low_res.size: 12 does not divide 32, the stage's size",
        ),
        (
            "sr64",
            {"low_res": {"window": 30}},
            "low_res.window: 30 is no multiple of 2 (the enlargement) and of 8 (by which this "
            "U-Net divides an image's sides) up to the size 64",
        ),
        (
            "sr32",
            {"low_res": {"max_aug_level": 0.5}, "sample": {"aug_level": 0.6}},
            "sample.aug_level: 0.6 is not in [0, low_res.max_aug_level = 0.5]",
        ),
        (
            "base",
            {"text": {"cond_drop_prob": 1.0}},
            "text.cond_drop_prob: 1.0 is not in [0, 1); Imagen has 0.1",
        ),
        (
            "base",
            {"unet": {"dropout": 1.0}},
            "unet.dropout: 1.0 is not in [0, 1); ADM uses 0.1",
        ),
        ("base", {"sample": {"steps": 0}}, None),
        (
            "base",
            {"data": {"global_batch": 0}},
            "data.global_batch: 0 is not positive; give 1 or more",
        ),
        (
            "base",
            {"train": {"ema_decay": 1.0}},
            "train.ema_decay: 1.0 is not in [0, 1); 0.9999 is usual",
        ),
    ],
)
def test_configurations_that_are_refused(
    name: str, sections: dict[str, Any], message: str | None
) -> None:
    with pytest.raises(ConfigError) as error:
        make(name, **sections)
    assert message is None or str(error.value) == message
