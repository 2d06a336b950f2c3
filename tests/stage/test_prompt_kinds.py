"""The classic small models: told a class or nothing, in discrete time, by other blocks, at sizes
that are no multiple of the network's stride, on normalized pixels. Each is trained for four steps
and sampled from the folder it leaves.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor
from PIL import Image

from launch.cli import main as cli
from pipeline import Cascade
from pipeline.config import ConfigError, build
from pipeline.data.image import to_float
from pipeline.errors import UserError
from pipeline.generate.edit import Edit
from pipeline.nn.unet import UNet, UNetConfig
from pipeline.stage.registry import stage_class
from pipeline.stage.stage import Stage
from pipeline.train.loop import train
from tests.conftest import stage_yaml
from tools.shapes import SHAPES

PIXELS = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
CLASSES = {"names": list(SHAPES), "field": "shape", "cond_drop_prob": 0.25}


def make(kind: str, run: Path, shards: Path, **changes: Any) -> Stage:
    raw = stage_yaml("base", run, shards, Path("unused")) | {"conditioning": kind, "size": 14}
    del raw["text"]
    raw["unet"] |= {"patch": 1, "attention": ["linear", "self"]}
    if kind == "class":
        raw |= {"classes": CLASSES, "pixels": PIXELS}
        raw["unet"] |= {"block": "convnext", "norm": "layer", "dropout": 0.1}
    else:
        raw["diffusion"] |= {"schedule": "linear", "timesteps": 20, "loss": "huber"}
        raw["sample"] |= {"guidance": 1.0, "sampler": "ddpm"}
    cls = stage_class("base")
    return cls(build(cls.Config, raw | changes))


@pytest.fixture(scope="module", params=["class", "none"])
def run(
    request: pytest.FixtureRequest, shards_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("classic") / request.param
    assert train(make(request.param, folder, shards_folder))
    return folder


@pytest.fixture(scope="module")
def cascade(run: Path) -> Cascade:
    return Cascade.load(run / "stage")


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_a_stage_without_text_is_a_cascade_by_itself(run, cascade):
    result = cascade(["circle", "cross", "1"], seed=3)
    assert pixels(result.images).shape == (3, 14, 14, 3)
    (manifest,) = cascade.manifests.values()
    assert manifest.text is None
    assert manifest.classes == (SHAPES if run.name == "class" else None)
    again = cascade(["circle", "cross", "1"], seed=3, numbers=[0, 1, 2])
    assert (pixels(result.images) == pixels(again.images)).all()


def test_a_class_is_seen_and_nothing_is_not(run, cascade):
    one, other = (pixels(cascade([name], seed=3).images) for name in ("circle", "square"))
    assert (one == other).all() == (run.name == "none")


def test_what_is_no_class_is_refused(run, cascade):
    if run.name == "class":
        with pytest.raises(
            UserError, match="'sphere' is no class; the classes are circle, square, triangle, cross"
        ):
            cascade(["sphere"])
        with pytest.raises(UserError, match="'4' is no class"):
            cascade(["4"])


def sample(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["sample", *arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


def test_the_command_makes_a_number_of_pictures(run, tmp_path, capsys):
    """Of nothing, or of the classes in turn; their recipes say which, and the same command makes no
    more.
    """
    command = [str(run / "stage"), "--out", str(tmp_path / "out"), "--num", "6"]
    told = [*SHAPES, *SHAPES[:2]] if run.name == "class" else [""] * 6
    for written in (6, 0):
        assert sample(*command) == 0
        for_them = " for 6 prompts" if run.name == "class" else ""
        assert (
            capsys.readouterr().out
            == f"{tmp_path}/out: {written} pictures written{for_them}, listed in manifest.jsonl\n"
        )
    entries = [
        json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()
    ]
    assert [entry["prompt"] for entry in entries] == told
    with Image.open(tmp_path / "out/00004.png") as image:
        assert image.text["prompt"] == told[4]


def test_the_command_refuses_what_the_stage_is_not_told(run, tmp_path, capsys, monkeypatch):
    """Before anything is loaded."""
    monkeypatch.setattr(Cascade, "load", None)
    said = "circle" if run.name == "none" else "4"
    assert sample(str(run / "stage"), "--out", str(tmp_path / "out"), "--prompt", said) == 2
    assert capsys.readouterr().err == (
        "--prompt: 'circle', but these stages are told nothing; give --num N pictures instead\n"
        if run.name == "none"
        else "'4' is no class; the classes are circle, square, triangle, cross\n"
    )
    assert not (tmp_path / "out").exists()


def test_known_pixels_stay_and_the_hole_is_painted(cascade):
    """In the stage's own picture, which rounds what it keeps to a level at most."""
    (stage,) = cascade.stages.values()
    (name,) = cascade.stages
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (4, 14, 14, 3)).astype(np.uint8)
    mask = np.zeros((4, 1, 14, 14), np.float32)
    mask[:, :, 4:9, 3:12] = 1
    prompt = cascade.prompt(name, ["circle"] * 4)
    made = stage.sample(stage.config.sample, prompt, 0, range(4), edit=Edit(picture, mask))
    hole = mask[:, 0] == 1
    np.testing.assert_allclose(made[~hole].astype(int), picture[~hole], atol=1)
    assert (made[hole] != picture[hole]).mean() > 0.9


def test_a_weak_edit_stays_near_the_picture(cascade):
    (stage,) = cascade.stages.values()
    (name,) = cascade.stages
    picture = np.full((4, 14, 14, 3), 200, np.uint8)
    prompt = cascade.prompt(name, ["circle"] * 4)
    edits = (Edit(picture, None, strength) for strength in (0.1, 0.9))
    weak, strong = (
        stage.sample(stage.config.sample, prompt, 0, range(4), edit=edit) for edit in edits
    )
    assert np.abs(weak - 200.0).mean() < np.abs(strong - 200.0).mean()


def test_pixels_are_normalized_and_brought_back(shards_folder):
    stage = make("class", Path("unused"), shards_folder)
    picture = np.random.default_rng(0).integers(0, 256, (2, 14, 14, 3)).astype(np.uint8)
    mean, std = (np.array(PIXELS[name])[:, None, None] for name in ("mean", "std"))
    x = stage.from_pictures(picture)
    np.testing.assert_allclose(x, (to_float(picture) - mean) / std, rtol=1e-5, atol=1e-6)
    assert (stage.to_pictures(x) == picture).all()
    assert (stage.batch(0, range(2), picture, np.eye(4, dtype=np.float32)[:2])[0] == x).all()


def test_classes_are_dropped_as_often_as_asked(shards_folder):
    stage, num = make("class", Path("unused"), shards_folder), 2000
    label = stage.batch(
        0, range(num), np.zeros((num, 14, 14, 3), np.uint8), np.tile(np.eye(4)[2], (num, 1))
    )[3]
    assert set(map(tuple, label)) == {(0, 0, 1, 0), (0, 0, 0, 0)}
    assert (label.sum(axis=1) == 0).mean() == pytest.approx(
        0.25, abs=4 * np.sqrt(0.25 * 0.75 / num)
    )


def test_discrete_time_trains_its_levels_alone(shards_folder):
    stage, num = make("none", Path("unused"), shards_folder), 400
    logsnr = stage.batch(0, range(num), np.zeros((num, 14, 14, 3), np.uint8))[2]
    assert len(np.unique(logsnr)) == 20


def test_a_picture_is_filled_up_to_the_stride_and_cut_back():
    """As if the rows and columns had been there; the answer depends on the whole picture alone."""
    config = UNetConfig(
        channels=8, channel_mults=(1, 2, 2), num_blocks=(1,) * 3, attention=("none",) * 3
    )
    net = UNet(config, channels_in=3, num_levels=1, text_width=0)
    for parameter in net.trainable_params():
        parameter.set_data(
            Tensor(
                np.random.default_rng(parameter.size).normal(0, 0.2, parameter.shape),
                parameter.dtype,
            )
        )
    x = np.random.default_rng(0).standard_normal((1, 3, 9, 14)).astype(np.float32)
    level = Tensor(np.zeros((1, 1), np.float32))
    filled = np.pad(x, ((0, 0), (0, 0), (0, 3), (0, 2)))
    found = net(Tensor(x), level).asnumpy()
    assert found.shape == x.shape
    np.testing.assert_array_equal(found, net(Tensor(filled), level).asnumpy()[:, :, :9, :14])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"conditioning": "text"},
            "conditioning: text and there is no section text; conditioning is text if",
        ),
        (
            {"conditioning": "class"},
            "conditioning: class and there is no section classes; conditioning is class if and only if",
        ),
        (
            {"classes": CLASSES},
            "conditioning: none and there is a section classes; conditioning is class if and only if",
        ),
        (
            {"sample": {"guidance": 2.0}},
            "sample.guidance: 2.0, but conditioning none leaves nothing to weigh",
        ),
        (
            {"unet": {"channel_mults": [1], "num_blocks": [1], "attention": ["cross"]}},
            "unet.attention: cross looks at the text, and conditioning is none; take self",
        ),
        ({"pixels": {**PIXELS, "std": [0, 1, 1]}}, "pixels.std: [0.0, 1.0, 1.0] is not positive"),
    ],
)
def test_what_does_not_go_together(changes, message):
    with pytest.raises(ConfigError) as error:
        make("none", Path("run"), Path("shards"), **changes)
    assert str(error.value).startswith(message)
