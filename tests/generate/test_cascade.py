"""The orchestrator on three stages that were trained for four steps: how they are chained."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import tools.tiny_t5
from launch.cli import main as cli
from pipeline import Cascade
from pipeline.config import ConfigError, build
from pipeline.errors import UserError
from pipeline.generate.cascade import Result, stages_between
from pipeline.generate.cascade_folder import CascadeConfig, export
from tests.conftest import stage_yaml

pytestmark = pytest.mark.slow

PROMPTS = [
    "a small red circle on white",
    "a large blue square on black",
    "a small green cross on grey",
]
STAGES = ["base", "sr32", "sr64"]


@pytest.fixture(scope="module")
def result(cascade: Cascade) -> Result:
    return cascade(PROMPTS, seed=7)


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


# What a cascade generates.


def test_each_stage_generates_images_of_its_size(result: Result) -> None:
    assert {name: images[0].size for name, images in result.stages.items()} == {
        "base": (16, 16),
        "sr32": (32, 32),
        "sr64": (64, 64),
    }
    assert (pixels(result.images) == pixels(result.stages["sr64"])).all()


def test_images_differ_by_prompt_id_and_seed(cascade: Cascade, result: Result) -> None:
    same_prompt = pixels(cascade(PROMPTS[:1] * 2, seed=7, stop="base").images)
    assert (same_prompt[0] == pixels(result.stages["base"])[0]).all()
    assert (same_prompt[0] != same_prompt[1]).any()

    other_prompt = pixels(cascade(PROMPTS[1:2], seed=7, stop="base").images)
    assert (other_prompt[0] != same_prompt[0]).any()
    other_seed = pixels(cascade(PROMPTS[:1], seed=8, stop="base").images)
    assert (other_seed[0] != same_prompt[0]).any()


def test_an_image_does_not_depend_on_its_batch(cascade: Cascade, result: Result) -> None:
    alone = cascade(PROMPTS[2:], seed=7, image_ids=[2])
    for name, images in result.stages.items():
        assert (pixels(alone.stages[name])[0] == pixels(images)[2]).all(), name


def test_prompts_are_cleaned_if_captions_were(cascade: Cascade, result: Result) -> None:
    manifests = {}
    for name, manifest in cascade.manifests.items():
        assert manifest.text
        manifests[name] = replace(manifest, text=replace(manifest.text, clean=True))
    cleaning = Cascade(manifests, cascade.stages, cascade.text_encoder)
    prompt = "A small  <b>RED</b> circle on white"
    cleaned = cleaning([prompt], seed=7, stop="base").images
    assert (pixels(cleaned)[0] == pixels(result.stages["base"])[0]).all()

    uncleaned = cascade([prompt], seed=7, stop="base").images
    assert (pixels(uncleaned) != pixels(cleaned)).any()


def test_any_stage_can_be_the_first_and_the_last(cascade: Cascade, result: Result) -> None:
    middle = cascade(PROMPTS, seed=7, start="sr32", stop="sr32", low_res=result.stages["base"])
    assert list(middle.stages) == ["sr32"]
    assert (pixels(middle.images) == pixels(result.stages["sr32"])).all()


def test_sampling_options_apply_to_their_stage(cascade: Cascade, result: Result) -> None:
    fewer_steps = cascade(PROMPTS, seed=7, stop="sr32", options={"sr32": {"steps": 2}})
    assert (pixels(fewer_steps.stages["base"]) == pixels(result.stages["base"])).all()
    assert (pixels(fewer_steps.stages["sr32"]) != pixels(result.stages["sr32"])).any()

    augmented = cascade(
        PROMPTS,
        seed=7,
        start="sr64",
        low_res=result.stages["sr32"],
        options={"sr64": {"aug_level": 0.5}},
    )
    assert (pixels(augmented.images) != pixels(result.images)).any()


def test_a_long_prompt_is_cut_with_a_warning(
    cascade: Cascade, caplog: pytest.LogCaptureFixture
) -> None:
    cascade(["a small red circle on white " * 5], stop="base")
    assert "1 of 1 captions have more than 12 tokens" in caplog.text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompts": []}, "prompts: expected a list of at least one prompt"),
        ({"prompts": "red"}, "prompts: expected a list of at least one prompt"),
        (
            {"prompts": ["x"], "start": "sr32"},
            "low_res: missing; sr32 starts from images of 16 x 16",
        ),
        (
            {"prompts": ["x"], "low_res": [Image.new("RGB", (16, 16))]},
            "low_res: base starts from noise and takes no image; leave it out",
        ),
        (
            {"prompts": ["x"], "start": "sr32", "low_res": [Image.new("RGB", (20, 16))]},
            "low_res: sr32 takes images of 16 x 16 and one is 20 x 16",
        ),
        (
            {"prompts": ["x", "y"], "start": "sr32", "low_res": [Image.new("RGB", (16, 16))]},
            "low_res: 1 images for 2 prompts; give one each",
        ),
    ],
)
def test_calls_that_do_not_fit_are_refused(
    cascade: Cascade, call: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        cascade(**call)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("start", "stop", "message"),
    [
        ("sr", None, "sr: no such stage; this cascade has base, sr32, sr64"),
        ("sr64", "base", "sr64 comes after base; the stages are base, sr32, sr64"),
    ],
)
def test_ranges_of_stages_that_do_not_exist_are_refused(
    start: str, stop: str | None, message: str
) -> None:
    with pytest.raises(UserError) as error:
        stages_between(STAGES, start, stop)
    assert str(error.value) == message


# The folder.


def test_a_chain_that_does_not_fit_is_refused_before_a_weight_is_read(
    trained: Path, t5_folder: Path, tmp_path: Path
) -> None:
    stages = {name: tmp_path / "stages" / name for name in ("base", "sr64")}
    for name, folder in stages.items():  # without their weights
        folder.mkdir(parents=True)
        shutil.copy(trained / name / "stage" / "stage.json", folder)
    with pytest.raises(UserError) as error:
        export(stages, t5_folder, tmp_path / "cascade")
    assert str(error.value) == (
        "base generates 16 px and sr64 takes 32 px; chain stages whose sizes agree"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["stages"]


def test_the_export_command_writes_the_folder_that_was_loaded(
    trained: Path,
    shards_folder: Path,
    t5_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in STAGES:
        raw = stage_yaml(name, trained / name, shards_folder, t5_folder)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    entries = [{"name": name, "config": f"{name}.yaml"} for name in STAGES]
    (tmp_path / "cascade.yaml").write_text(yaml.safe_dump({"folder": "cascade", "stages": entries}))

    with pytest.raises(SystemExit) as end:
        cli.main(["export", "cascade.yaml"])
    assert end.value.code == 0

    expected, exported = (  # without what loading leaves, a file of fingerprints
        {path.relative_to(folder): path for path in folder.rglob("[!.]*") if path.is_file()}
        for folder in (trained / "cascade", tmp_path / "cascade")
    )
    assert exported.keys() == expected.keys()
    for file, path in exported.items():
        assert path.read_bytes() == expected[file].read_bytes(), file


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["base64/config.yaml"], "exists and is no cascade folder"),
        ([".git/config"], "exists and is no cascade folder"),  # `folder: runs`, say
        (["cascade.json"], "exists and is no cascade folder"),  # empty: not one of ours
        (None, "is a file"),
    ],
)
def test_export_replaces_nothing_but_a_cascade(
    trained: Path, t5_folder: Path, tmp_path: Path, files: list[str] | None, message: str
) -> None:
    folder = tmp_path / "runs"
    for file in files or ():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    if files is None:
        folder.touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        export({"base": trained / "base" / "stage"}, t5_folder, folder)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("added", ["images/00000.png", ".git/config", "base/notes.txt"])
def test_export_replaces_its_own_cascade_unless_something_was_added(
    added: str, trained: Path, t5_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cascade"
    for _ in range(2):
        export({"base": trained / "base" / "stage"}, t5_folder, folder)
    (folder / added).parent.mkdir(exist_ok=True)
    (folder / added).touch()
    with pytest.raises(UserError, match="which no export wrote"):
        export({"base": trained / "base" / "stage"}, t5_folder, folder)
    assert (folder / added).exists()


@pytest.mark.parametrize("name", ["../base", "", ".hidden", "tokenizer", "a/b"])
def test_names_of_stages_that_cannot_be_folders_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"stages\[0\]\.name: "):
        build(
            CascadeConfig, {"folder": "cascade", "stages": [{"name": name, "config": "base.yaml"}]}
        )


def test_another_text_encoder_is_refused(
    trained: Path, shards_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cascade"
    shutil.copytree(trained / "cascade", folder)
    tools.tiny_t5.make(
        tmp_path / "t5",
        sorted(shards_folder.glob("*.tar")),
        width=16,
        layers=1,
        heads=2,
        vocab=64,
        seed=1,
    )
    shutil.copy(
        tmp_path / "t5" / "model.safetensors", folder / "text_encoder" / "model.safetensors"
    )
    with pytest.raises(
        UserError,
        match=r"text_encoder/ and tokenizer/ have fingerprint .* export the cascade again",
    ):
        Cascade.load(folder)


def test_a_damaged_weight_is_refused(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cascade"
    shutil.copytree(trained / "cascade", folder)
    path = folder / "sr32" / "unet.safetensors"
    weights = bytearray(path.read_bytes())
    weights[-1] ^= 1
    path.write_bytes(weights)
    with pytest.raises(
        UserError, match=r"sr32/unet.safetensors: its SHA-256 is not the one in stage.json"
    ):
        Cascade.load(folder)


@pytest.mark.parametrize("content", [None, "{", json.dumps({"format": 99, "stages": ["base"]})])
def test_a_folder_that_is_no_cascade_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "cascade.json").write_text(content)
    with pytest.raises(UserError, match=r"cascade\.json: "):
        Cascade.load(tmp_path)
