"""Validation: losses of fixed samples, equal to the stage's own formula, and sums over bins."""

from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor

from pipeline.config import build
from pipeline.data.quarantine import Quarantine
from pipeline.data.shards import Shards
from pipeline.errors import UserError
from pipeline.nn.parameters import assign
from pipeline.rng import PURPOSES, Draws
from pipeline.stage.registry import stage_class
from pipeline.stage.stage import Stage
from pipeline.text.prompts import open_prompts
from pipeline.train.validation import Validation, ValidationDraws, ValidationSet
from tests.conftest import stage_yaml
from tests.helpers import palette
from tests.helpers.tars import jpeg, sample, tar
from tools.references import random_weights


def make(kind: str, run: Path, shards: Path, t5: Path) -> Stage:
    run.mkdir()
    data = {"shards": f"{shards}/*.tar", "global_batch": 4, "validation": 0.5}
    if kind == "palette":
        return palette.make(run, shards, data=data)
    raw = stage_yaml(kind, run, shards, t5) | {"data": data}
    cls = stage_class(raw["kind"])
    return cls(build(cls.Config, raw))


def validation_of(stage: Stage) -> Validation:
    config = stage.config
    shards = Shards.open(config.data, progress=False).open_validation()
    assert shards is not None
    (prompts,) = open_prompts(config.text, config.classes, [shards])
    quarantine = Quarantine(Path(config.run) / "quarantine.jsonl", len(shards), 1.0)
    return Validation(stage, ValidationSet(shards=shards, prompts=prompts), quarantine)


@pytest.fixture(scope="module", params=["base", "sr32", "palette"])
def stage(
    request: pytest.FixtureRequest,
    shards_folder: Path,
    t5_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Stage:
    run = tmp_path_factory.mktemp("validation") / "run"
    stage = make(request.param, run, shards_folder, t5_folder)
    shapes = {p.name: p.shape for p in stage.network.trainable_params()}
    assign(stage.network, random_weights(shapes, 0), request.param)
    return stage


@pytest.fixture(scope="module")
def validation(stage: Stage) -> Validation:
    return validation_of(stage)


def test_losses_are_those_of_the_stage_one_by_one(stage: Stage, validation: Validation) -> None:
    losses = validation.losses()
    assert losses.shape == (len(validation.sample_ids),)
    for position in (0, len(losses) - 1):
        prompt = validation.prompts.embed(
            [validation.sample_ids[position]], stage.config.seed, 0, [position]
        )
        images = validation.images[position : position + 1]
        arrays = stage.training_inputs(images, prompt, validation.draws([position]))
        # Without seeds nothing is dropped out.
        arrays.pop("dropout_seeds", None)
        inputs = {name: Tensor(array.astype(np.float32)) for name, array in arrays.items()}
        (expected,) = stage.named_loss(inputs).asnumpy()
        assert losses[position] == pytest.approx(expected, rel=1e-4)


def test_they_change_with_the_weights_alone(stage: Stage, validation: Validation) -> None:
    before = validation.losses()
    assert (validation.losses() == before).all()

    weights = {p.name: p.asnumpy().copy() for p in stage.network.trainable_params()}
    assign(stage.network, {name: 1.1 * weight for name, weight in weights.items()}, "other")
    other = validation.losses()
    assign(stage.network, weights, "as before")
    assert (other != before).any()
    assert (validation.losses() == before).all()


def test_means_by_bin(stage: Stage, validation: Validation) -> None:
    num_samples = len(validation.sample_ids)
    ema = np.arange(num_samples, dtype=float)
    metrics = validation.metrics(ema, ema + 1)
    assert metrics["validation_loss"] == ema.mean()
    assert metrics["validation_loss_raw"] == ema.mean() + 1
    for noise_bin in range(8):
        assert metrics[f"validation_loss_noise_{noise_bin}"] == ema[noise_bin::8].mean()

    by_augmentation = [name for name in metrics if "_aug_" in name]
    if stage.config.kind != "super_resolution":
        assert not by_augmentation
        return
    for name in by_augmentation:
        noise_bin, aug_bin = int(name.split("_")[3]), int(name.split("_")[5])
        cell = [i for i in range(num_samples) if (i % 8, i // 8 % 4) == (noise_bin, aug_bin)]
        assert metrics[name] == ema[cell].mean()


def unconditional(run: Path, shards: Path) -> Stage:
    """A stage whose samples for validation are those of `shards`/0.tar."""
    raw = stage_yaml("base", run, shards, Path("no encoder"))
    del raw["text"]
    raw |= {"size": 8, "conditioning": "none"}
    raw["unet"] |= {"attention": ["none", "none"], "patch": 1}
    raw["sample"]["guidance"] = 1.0
    run.mkdir()
    (run / "trained.tar").write_bytes(tar(sample("trained on")))
    raw["data"] |= {
        "shards": f"{run}/trained.tar",
        "validation": f"{shards}/0.tar",
        "max_damage": 1.0,
        "captions": {},
    }
    cls = stage_class("base")
    return cls(build(cls.Config, raw))


def test_samples_that_cannot_be_used_are_left_out(tmp_path: Path) -> None:
    truncated = [("bad.jpg", jpeg(64, 64)[:-400])]
    (tmp_path / "0.tar").write_bytes(tar([*truncated, *sample("good", 1)]))
    validation = validation_of(unconditional(tmp_path / "run", tmp_path))
    assert validation.sample_ids == [1]
    assert '"key": "bad"' in (tmp_path / "run/quarantine.jsonl").read_text()


def test_no_usable_sample_is_refused(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(tar([("bad.jpg", jpeg(64, 64)[:-400])]))
    with pytest.raises(UserError) as caught:
        validation_of(unconditional(tmp_path / "run", tmp_path))
    assert str(caught.value) == (
        "data.validation: none of 1 samples can be used; the reasons are in "
        f"{tmp_path}/run/quarantine.jsonl; give others"
    )


def test_levels_of_validation_are_stratified() -> None:
    draws = ValidationDraws(seed=3, positions=range(64))
    levels = draws.uniform("time")
    aug_levels, noise = draws.uniform_and_noise("augment", (2, 3))

    # Two samples in each cell of 8 bins of noise and 4 of augmentation.
    cells = np.stack([np.floor(levels * 8), np.floor(aug_levels * 4)], 1).astype(int)
    _, counts = np.unique(cells, axis=0, return_counts=True)
    assert counts.tolist() == [2] * 32
    assert (cells == np.stack([draws.noise_bins, draws.aug_bins], 1)).all()
    assert len({row.tobytes() for row in noise}) == 64


def test_draws_of_validation_depend_on_the_position_alone() -> None:
    draws = ValidationDraws(seed=3, positions=range(64))
    some = ValidationDraws(seed=3, positions=[40, 2])
    np.testing.assert_array_equal(some.noise("noise", (4,)), draws.noise("noise", (4,))[[40, 2]])
    np.testing.assert_array_equal(some.uniform("time"), draws.uniform("time")[[40, 2]])
    # Whatever the rate at which training drops a condition.
    assert (draws.uniform("drop") >= 1).all()

    # Never those of a training step.
    training = Draws(seed=3, step=PURPOSES["noise"], positions=range(64)).noise("noise", (4,))
    assert not np.isin(draws.noise("noise", (4,)), training).any()
