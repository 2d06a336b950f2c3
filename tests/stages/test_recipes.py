"""Stages: what a batch holds, that its randomness belongs to the sample's place, what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor

from pipeline.config import ConfigError, build
from pipeline.data.image import downsample, to_float, upsample
from pipeline.diffusion.schedule import cosine
from pipeline.nn.parameters import assign, initialize
from pipeline.rng import sampling_noise
from pipeline.stage.registry import stage_class
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


def inputs(stage: Stage, num: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    side = stage.config.size
    pictures = RNG.integers(0, 256, (num, side, side, 3), dtype=np.uint8)
    return pictures, np.ones((num, 12, 16), np.float32), np.ones((num, 12), bool)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_drawn_for_a_place_does_not_depend_on_the_others(stages, name):
    stage = stages[name]
    pictures, text, mask = inputs(stage, 6)
    whole = stage.batch(5, range(6), pictures, text, mask)
    parts = [
        stage.batch(5, range(i, i + 2), pictures[i : i + 2], text[i : i + 2], mask[i : i + 2])
        for i in (0, 2, 4)
    ]
    for array, *pieces in zip(whole, *parts, strict=True):
        assert array.dtype == np.float32
        assert (array == np.concatenate(pieces)).all()


@pytest.mark.parametrize("name", KINDS)
def test_every_step_draws_anew(stages, name):
    stage = stages[name]
    given = inputs(stage, 2)
    _, eps, logsnr, *_ = stage.batch(1, range(2), *given)
    _, other_eps, other_logsnr, *_ = stage.batch(2, range(2), *given)
    assert (eps != other_eps).mean() > 0.99
    assert (logsnr != other_logsnr).all()


def test_captions_are_dropped_whole_and_as_often_as_asked():
    stage = make("base", text={"cond_drop_prob": 0.25})
    pictures, text, mask = inputs(stage, 1)
    num = 2000
    _, _, _, text, mask = stage.batch(
        0, range(num), pictures.repeat(num, 0), text.repeat(num, 0), mask.repeat(num, 0)
    )
    dropped = (mask == 0).all(axis=1)
    assert ((text == 0).all(axis=(1, 2)) == dropped).all()
    assert ((mask == 1).all(axis=1) != dropped).all()
    assert dropped.mean() == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / num))


@pytest.mark.parametrize("name", KINDS)
def test_dropout_is_seeded_for_each_place_in_training_alone(name):
    stage = make(name, unet={"dropout": 0.5})
    weights = {p.name: p.shape for p in stage.network.trainable_params()}
    assign(stage.network, random_weights(weights, 0), name)
    given = inputs(stage, 2)
    batch, other = (
        stage.batch(3, range(2), *given),
        stage.batch(3, (1, 0), *(array[::-1] for array in given)),
    )
    seeds, num = batch[5], stage.num_prompt
    assert seeds.dtype == np.int32
    assert seeds.min() >= 0
    np.testing.assert_array_equal(seeds, other[5][::-1])
    assert len({*seeds, *stage.batch(4, range(2), *given)[5]}) == 4

    def loss(seeds: list[np.ndarray]) -> np.ndarray:
        told = (*batch[: 3 + num], *seeds, *batch[4 + num :])
        return np.asarray(stage.loss(*map(Tensor, told)).asnumpy())

    first, swapped, without = loss([seeds]), loss([seeds[::-1].copy()]), loss([])
    assert np.abs(first - swapped).min() > 1e-5
    assert np.abs(first - without).min() > 1e-5
    plain = make(name)
    assign(plain.network, random_weights(weights, 0), name)
    told = (*batch[: 3 + num], *batch[4 + num :])
    np.testing.assert_array_equal(plain.loss(*map(Tensor, told)).asnumpy(), without)


def test_times_are_uniform(stages):
    stage = stages["base"]
    pictures, text, mask = inputs(stage, 1)
    num = 2000
    logsnr = stage.batch(
        0, range(num), pictures.repeat(num, 0), text.repeat(num, 0), mask.repeat(num, 0)
    )[2]
    for share in (0.1, 0.5, 0.9):
        assert (logsnr > cosine(np.array(share))).mean() == pytest.approx(share, abs=0.05)


def test_the_low_resolution_is_the_pictures_own(stages):
    stage = stages["sr32"]
    pictures, text, mask = inputs(stage, 2)
    x, *_, low, low_eps, low_logsnr = stage.batch(0, range(2), pictures, text, mask)
    assert (x == to_float(pictures)).all()
    assert (low == upsample(downsample(x, 16), 32)).all()
    assert low_eps.shape == x.shape
    assert (np.abs(low_logsnr) <= 20.001).all()
    assert low_logsnr[0] != low_logsnr[1]  # a level for each sample


def test_the_network_sees_the_noisy_low_resolution_and_its_level(stages, monkeypatch):
    """alpha low + sigma eps at the level that is embedded beside the picture's own, against NumPy
    in float64.
    """
    from mindspore import Tensor

    stage, seen = stages["sr32"], []
    monkeypatch.setattr(
        stage, "network", lambda *given: seen.append([array.asnumpy() for array in given])
    )
    x, _, logsnr, text, mask, low, low_eps, low_logsnr = stage.batch(0, range(2), *inputs(stage, 2))
    stage.predict(Tensor(x), *map(Tensor, (logsnr, text, mask, low, low_eps, low_logsnr)))
    ((picture, levels, *_),) = seen
    variance = 1 / (1 + np.exp(low_logsnr.astype(np.float64)))[:, None, None, None]
    noisy = np.sqrt(1 - variance) * low + np.sqrt(variance) * low_eps
    assert (picture[:, :3] == x).all()
    np.testing.assert_allclose(picture[:, 3:], noisy, atol=2e-5)
    assert (levels == np.stack([logsnr, low_logsnr], axis=1)).all()


def test_levels_stay_within_what_is_trained():
    stage = make("sr32", low_res={"max_aug_level": 0.5})
    pictures, text, mask = inputs(stage, 8)
    levels = stage.batch(0, range(8), pictures, text, mask)[-1]
    assert (levels >= cosine(np.array(0.5)) - 1e-6).all()


def test_noise_of_sampling_is_named_by_seed_number_size_and_step():
    noise = sampling_noise(3, [4, 9], (3, 8, 8), 0)
    assert (sampling_noise(3, [9], (3, 8, 8), 0)[0] == noise[1]).all()
    for other in (
        sampling_noise(2, [9], (3, 8, 8), 0),
        sampling_noise(3, [8], (3, 8, 8), 0),
        sampling_noise(3, [9], (3, 8, 8), 1),
    ):
        assert (other[0] != noise[1]).mean() > 0.99
    assert (sampling_noise(3, [9], (3, 16, 16), 0)[0, :, :8, :8] != noise[1]).mean() > 0.99


def test_any_multiple_of_the_low_resolution_can_be_enlarged(stages):
    """A stage that was trained on windows is run at full size: the shape follows from the low
    resolution it gets.
    """
    shape, (low, noise, logsnr) = stages["sr64"].condition(
        np.zeros((2, 24, 24, 3), np.uint8), 0, [0, 1], 0.3
    )
    assert shape == (3, 48, 48)
    assert low.shape == noise.shape == (2, 3, 48, 48)
    assert logsnr == pytest.approx(cosine(np.array([0.3, 0.3])), rel=1e-6)


def test_the_first_loss_is_that_of_answering_nothing(stages):
    """The network starts at zero, so the loss of an image is its target's mean square."""
    from pipeline.diffusion.process import v_target

    stage = stages["sr32"]
    initialize(stage.network, 0)
    batch = [Tensor(array) for array in stage.batch(0, range(2), *inputs(stage, 2))]
    wanted = (v_target(*batch[:3]).asnumpy() ** 2).mean(axis=(1, 2, 3))
    assert stage.loss(*batch).asnumpy() == pytest.approx(wanted, rel=1e-5)


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
            "low_res.window: 30 is no multiple of 2 (the enlargement) and of 8 (by which this U-Net shrinks a picture) "
            "up to the size 64",
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
            "unet.dropout: 1.0 is no share in [0, 1); ADM has 0.1",
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
def test_what_cannot_be_is_refused(name, sections, message):
    with pytest.raises(ConfigError) as error:
        make(name, **sections)
    assert message is None or str(error.value) == message
