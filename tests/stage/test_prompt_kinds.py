"""The classic small models: conditioned on a class or on nothing, in discrete time, of other
blocks, at sizes
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
from pipeline.generate.engine import sample
from pipeline.nn.unet import UNet, UNetConfig
from pipeline.rng import Draws
from pipeline.stage.inputs import Arrays
from pipeline.stage.registry import stage_class
from pipeline.stage.request import Edit, SampleRequest
from pipeline.stage.stage import Stage
from pipeline.train.loop import train
from tests.conftest import stage_yaml
from tools.shapes import SHAPES

pytestmark = pytest.mark.slow

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


def test_a_stage_without_text_is_a_cascade_of_its_own(run: Path, cascade: Cascade) -> None:
    result = cascade(["circle", "cross", "1"], seed=3)
    assert pixels(result.images).shape == (3, 14, 14, 3)
    (manifest,) = cascade.manifests.values()
    assert manifest.text is None
    assert manifest.classes == (SHAPES if run.name == "class" else None)
    again = cascade(["circle", "cross", "1"], seed=3, image_ids=[0, 1, 2])
    assert (pixels(result.images) == pixels(again.images)).all()


def test_a_class_conditions_the_image(run: Path, cascade: Cascade) -> None:
    one, other = (pixels(cascade([name], seed=3).images) for name in ("circle", "square"))
    assert (one == other).all() == (run.name == "none")


def test_unknown_classes_are_refused(run: Path, cascade: Cascade) -> None:
    if run.name == "class":
        with pytest.raises(
            UserError, match="'sphere' is no class; the classes are circle, square, triangle, cross"
        ):
            cascade(["sphere"])
        with pytest.raises(UserError, match="'4' is no class"):
            cascade(["4"])


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["sample", *arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


def test_the_command_generates_a_number_of_images(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of nothing, or of the classes in turn; their recipes say which, and the same command makes no
    more.
    """
    argv = [str(run / "stage"), "--out", str(tmp_path / "out"), "--num", "6"]
    told = [*SHAPES, *SHAPES[:2]] if run.name == "class" else [""] * 6
    for written in (6, 0):
        assert command(*argv) == 0
        for_them = " for 6 prompts" if run.name == "class" else ""
        assert (
            capsys.readouterr().out
            == f"{tmp_path}/out: {written} images written{for_them}, listed in manifest.jsonl\n"
        )
    entries = [
        json.loads(line) for line in (tmp_path / "out/manifest.jsonl").read_text().splitlines()
    ]
    assert [entry["prompt"] for entry in entries] == told
    with Image.open(tmp_path / "out/00004.png") as image:
        assert image.text["prompt"] == told[4]


def test_the_command_refuses_prompts_of_another_kind(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded."""
    monkeypatch.setattr(Cascade, "load", None)
    said = "circle" if run.name == "none" else "4"
    assert command(str(run / "stage"), "--out", str(tmp_path / "out"), "--prompt", said) == 2
    assert capsys.readouterr().err == (
        "--prompt: 'circle', but these stages are unconditional; give a number of images\n"
        if run.name == "none"
        else "'4' is no class; the classes are circle, square, triangle, cross\n"
    )
    assert not (tmp_path / "out").exists()


def request(cascade: Cascade, edit: Edit) -> SampleRequest:
    (name,) = cascade.stages
    prompt = cascade.prompt(name, ["circle"] * len(edit.images))
    return SampleRequest(prompt=prompt, seed=0, image_ids=range(len(edit.images)), edit=edit)


def test_known_pixels_stay_and_the_hole_is_sampled(cascade: Cascade) -> None:
    """In the stage's own image, which rounds what it keeps to a level at most."""
    (stage,) = cascade.stages.values()
    images = np.random.default_rng(0).integers(0, 256, (4, 14, 14, 3)).astype(np.uint8)
    mask = np.zeros((4, 1, 14, 14), np.float32)
    mask[:, :, 4:9, 3:12] = 1
    edited = sample(stage, stage.config.sample, request(cascade, Edit(images=images, mask=mask)))
    hole = mask[:, 0] == 1
    np.testing.assert_allclose(edited[~hole].astype(int), images[~hole], atol=1)
    assert (edited[hole] != images[hole]).mean() > 0.9


def test_a_weak_edit_stays_near_the_image(cascade: Cascade) -> None:
    (stage,) = cascade.stages.values()
    images = np.full((4, 14, 14, 3), 200, np.uint8)
    weak, strong = (
        sample(stage, stage.config.sample, request(cascade, Edit(images=images, strength=strength)))
        for strength in (0.1, 0.9)
    )
    assert np.abs(weak - 200.0).mean() < np.abs(strong - 200.0).mean()


def batch(stage: Stage, images: np.ndarray, prompt: Arrays) -> Arrays:
    return stage.training_inputs(
        images, prompt, Draws(seed=0, step=0, positions=range(len(images)))
    )


def test_pixels_are_normalized_and_brought_back() -> None:
    stage = make("class", Path("unused"), Path("unused"))
    images = np.random.default_rng(0).integers(0, 256, (2, 14, 14, 3)).astype(np.uint8)
    mean, std = (np.array(PIXELS[name])[:, None, None] for name in ("mean", "std"))
    x = stage.from_images(images)
    np.testing.assert_allclose(x, (to_float(images) - mean) / std, rtol=1e-5, atol=1e-6)
    assert (stage.to_images(x) == images).all()
    assert (batch(stage, images, {"label": np.eye(4, dtype=np.float32)[:2]})["x"] == x).all()


def test_classes_are_dropped_as_often_as_configured() -> None:
    stage = make("class", Path("unused"), Path("unused"))
    num = 2000
    prompt = {"label": np.tile(np.eye(4)[2], (num, 1))}
    label = batch(stage, np.zeros((num, 14, 14, 3), np.uint8), prompt)["label"]
    assert set(map(tuple, label)) == {(0, 0, 1, 0), (0, 0, 0, 0)}
    share = (label.sum(axis=1) == 0).mean()
    assert share == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / num))


def test_discrete_time_trains_its_levels_alone() -> None:
    stage = make("none", Path("unused"), Path("unused"))
    logsnr = batch(stage, np.zeros((400, 14, 14, 3), np.uint8), {})["logsnr"]
    assert len(np.unique(logsnr)) == 20


def test_an_image_is_padded_to_the_stride_and_cropped_back() -> None:
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
            "conditioning: class and there is no section classes; conditioning is class if",
        ),
        (
            {"classes": CLASSES},
            "conditioning: none and there is a section classes; conditioning is class if",
        ),
        (
            {"sample": {"guidance": 2.0}},
            "sample.guidance: 2.0, but conditioning none leaves nothing to weigh",
        ),
        (
            {"unet": {"channel_mults": [1], "num_blocks": [1], "attention": ["cross"]}},
            "unet.attention: cross attends to the text, and conditioning is none; take self",
        ),
        ({"pixels": {**PIXELS, "std": [0, 1, 1]}}, "pixels.std: [0.0, 1.0, 1.0] is not positive"),
    ],
)
def test_configurations_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make("none", Path("run"), Path("shards"), **changes)
    assert str(error.value).startswith(message)
