"""The orchestrator on three stages that were trained for four steps: what matters is how they are
chained.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tools.export
import yaml
from PIL import Image

import tools.tiny_t5
from pipeline import Cascade
from pipeline.config import ConfigError, build
from pipeline.errors import UserError
from pipeline.generate.cascade import span
from pipeline.generate.cascade_folder import CascadeConfig, export
from tests.conftest import stage_yaml

PROMPTS = [
    "a small red circle on white",
    "a large blue square on black",
    "a small green cross on grey",
]


@pytest.fixture(scope="module")
def cascade(trained: Path) -> Cascade:
    return Cascade.load(trained / "cascade")


@pytest.fixture(scope="module")
def result(cascade: Cascade):
    return cascade(PROMPTS, seed=7)


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_every_stage_gives_its_size(result):
    assert {name: images[0].size for name, images in result.stages.items()} == {
        "base": (16, 16),
        "sr32": (32, 32),
        "sr64": (64, 64),
    }
    assert (pixels(result.images) == pixels(result.stages["sr64"])).all()


def test_pictures_differ_by_prompt_number_and_seed(cascade, result):
    again = cascade(PROMPTS[:1] * 2, seed=7, stop="base").stages["base"]
    assert (pixels(again)[0] == pixels(result.stages["base"])[0]).all()
    assert (pixels(again)[0] != pixels(again)[1]).any()
    other = cascade(PROMPTS[:1], seed=8, stop="base").stages["base"]
    assert (pixels(other)[0] != pixels(again)[0]).any()


def test_a_picture_alone_is_the_picture_in_company(cascade, result):
    alone = cascade(PROMPTS[2:], seed=7, numbers=[2])
    for name, images in result.stages.items():
        assert (pixels(alone.stages[name])[0] == pixels(images)[2]).all(), name


def test_prompts_are_cleaned_if_captions_were(cascade, result, monkeypatch):
    facts = {
        name: replace(m, text=replace(m.text, clean=True)) for name, m in cascade.manifests.items()
    }
    monkeypatch.setattr(cascade, "manifests", facts)
    messy = cascade(["A small  <b>RED</b> circle on white"], seed=7, stop="base").images
    assert (pixels(messy)[0] == pixels(result.stages["base"])[0]).all()
    monkeypatch.undo()
    assert (
        pixels(cascade(["A small  RED circle on white"], seed=7, stop="base").images)
        != pixels(messy)
    ).any()


def test_any_stage_can_be_the_first_and_the_last(cascade, result):
    later = cascade(PROMPTS, seed=7, start="sr32", stop="sr32", low=result.stages["base"])
    assert list(later.stages) == ["sr32"]
    assert (pixels(later.images) == pixels(result.stages["sr32"])).all()


def test_options_reach_their_stage(cascade, result):
    other = cascade(PROMPTS, seed=7, options={"sr32": {"steps": 2}, "sr64": {"aug_level": 0.5}})
    assert (pixels(other.stages["base"]) == pixels(result.stages["base"])).all()
    assert (pixels(other.stages["sr32"]) != pixels(result.stages["sr32"])).any()


def test_a_long_prompt_is_cut_with_a_warning(cascade, caplog):
    cascade(["a small red circle on white " * 5], stop="base")
    assert "1 of 1 captions have more than 12 tokens" in caplog.text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompts": []}, "prompts: expected a list of at least one prompt"),
        ({"prompts": "red"}, "prompts: expected a list of at least one prompt"),
        ({"prompts": ["x"], "start": "sr32"}, "sr32 starts from pictures; give low"),
        ({"prompts": ["x"], "low": [Image.new("RGB", (16, 16))]}, "base starts from no picture"),
        (
            {"prompts": ["x"], "start": "sr32", "low": [Image.new("RGB", (20, 16))]},
            "sr32 takes pictures of 16 x 16 and got one of 20 x 16",
        ),
        (
            {"prompts": ["x", "y"], "start": "sr32", "low": [Image.new("RGB", (16, 16))]},
            "low: 1 pictures for 2 prompts; give one each",
        ),
    ],
)
def test_what_cannot_be_made_is_refused(cascade, call, message):
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
def test_span_names_what_is_wrong(start, stop, message):
    with pytest.raises(UserError) as error:
        span(["base", "sr32", "sr64"], start, stop)
    assert str(error.value) == message


def test_a_chain_that_does_not_fit_is_refused_before_a_weight_is_read(
    trained, t5_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "pipeline.generate.cascade.read_weights", lambda *_: pytest.fail("read a weight")
    )
    stages = {name: trained / name / "stage" for name in ("base", "sr64")}
    with pytest.raises(UserError) as error:
        export(stages, t5_folder, tmp_path / "cascade")
    assert (
        str(error.value) == "base gives 16 px and sr64 takes 32 px; chain stages whose sizes agree"
    )
    assert not list(tmp_path.iterdir())


def test_the_export_tool_makes_the_folder_that_was_loaded(
    trained, shards_folder, t5_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "sr32", "sr64"):
        raw = stage_yaml(name, trained / name, shards_folder, t5_folder)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(raw))
    entries = [{"name": name, "config": f"{name}.yaml"} for name in ("base", "sr32", "sr64")]
    (tmp_path / "cascade.yaml").write_text(yaml.safe_dump({"folder": "cascade", "stages": entries}))
    tools.export.main(["cascade.yaml"])
    expected, made = (  # but for what loading leaves, a remembered fingerprint
        {path.relative_to(folder): path for path in folder.rglob("[!.]*") if path.is_file()}
        for folder in (trained / "cascade", Path("cascade"))
    )
    assert made.keys() == expected.keys()
    assert all(made[name].read_bytes() == expected[name].read_bytes() for name in made)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["base64/config.yaml"], "is there and is no cascade folder"),  # `folder: runs`, say
        (["cascade.json"], "is there and is no cascade folder"),  # empty: not one of ours
        (None, "is a file"),
    ],
)
def test_export_replaces_nothing_but_a_cascade(trained, t5_folder, tmp_path, files, message):
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


def test_export_replaces_its_own_cascade_unless_something_was_added(trained, t5_folder, tmp_path):
    folder = tmp_path / "cascade"
    for _ in range(2):
        export({"base": trained / "base" / "stage"}, t5_folder, folder)
    (folder / "images").mkdir()
    with pytest.raises(UserError, match="holds 'images', which no export wrote"):
        export({"base": trained / "base" / "stage"}, t5_folder, folder)
    assert (folder / "images").exists()


@pytest.mark.parametrize("name", ["../base", "", ".hidden", "tokenizer", "a/b"])
def test_a_stage_is_named_like_a_folder(name):
    with pytest.raises(ConfigError, match=r"stages\[0\]\.name: "):
        build(
            CascadeConfig, {"folder": "cascade", "stages": [{"name": name, "config": "base.yaml"}]}
        )


def test_another_text_encoder_is_refused(trained, tmp_path, shards_folder):
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


def test_a_damaged_weight_is_refused(trained, tmp_path):
    folder = tmp_path / "cascade"
    shutil.copytree(trained / "cascade", folder)
    weights = bytearray((folder / "sr32" / "unet.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "sr32" / "unet.safetensors").write_bytes(weights)
    with pytest.raises(
        UserError, match=r"sr32/unet.safetensors: its SHA-256 is not the one in stage.json"
    ):
        Cascade.load(folder)


@pytest.mark.parametrize("content", [None, "{", json.dumps({"format": 99, "stages": ["base"]})])
def test_a_folder_that_is_no_cascade_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "cascade.json").write_text(content)
    with pytest.raises(UserError, match=r"cascade\.json: "):
        Cascade.load(tmp_path)
