"""A folder of generated pictures: recipes, continuing, and starting from what is there."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.cli import main as cli
from pipeline import Cascade
from pipeline.errors import UserError
from pipeline.files import lock
from pipeline.generate.output_folder import generate

PROMPTS = ["a small red circle on white", "a large blue square on black"]


@pytest.fixture(scope="module")
def cascade(trained: Path) -> Cascade:
    return Cascade.load(trained / "cascade")


@pytest.fixture(scope="module")
def folder(cascade, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "out"
    assert generate(cascade, PROMPTS, folder, 7, {}) == 6
    return folder


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_files_and_manifest_agree(folder):
    assert [entry["file"] for entry in entries(folder)] == [
        f"{place}{number:05d}.png" for place in ("base/", "sr32/", "") for number in (0, 1)
    ]
    on_disk = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    assert on_disk == sorted(entry["file"] for entry in entries(folder))


def test_a_png_carries_its_recipe(folder):
    for entry in entries(folder):
        with Image.open(folder / entry["file"]) as image:
            chunks = image.text
        told = {key: value if key in ("stage", "file", "prompt", "sampler", "threshold") else json.loads(value)
                for key, value in chunks.items()}  # fmt: skip
        assert told == entry
    assert entries(folder)[5] == {
        "number": 1,
        "stage": "sr64",
        "file": "00001.png",
        "prompt": PROMPTS[1],
        "seed": 7,
        "sampler": "dpm_solver++",
        "steps": 3,
        "guidance": 2.0,
        "threshold": "dynamic",
        "quantile": 0.995,
        "aug_level": 0.0,
        "schedule": None,
        "extra_steps": 0,
        "repaint_steps": 1,
    }


def test_the_pictures_are_the_cascades(cascade, folder):
    result = cascade(PROMPTS, seed=7)
    for name, images in result.stages.items():
        for number, image in enumerate(images):
            place = folder if name == "sr64" else folder / name
            assert (pixels(place / f"{number:05d}.png") == np.asarray(image)).all()


def test_the_same_call_again_makes_nothing(cascade, folder):
    before = (folder / "manifest.jsonl").read_bytes()
    assert generate(cascade, PROMPTS, folder, 7, {}) == 0
    assert (folder / "manifest.jsonl").read_bytes() == before


def test_what_is_missing_is_made_and_is_the_same(cascade, folder, tmp_path):
    out = tmp_path / "out"
    assert generate(cascade, PROMPTS[:1], out, 7, {}, stop="sr32") == 2
    (out / "manifest.jsonl").write_bytes(
        (out / "manifest.jsonl").read_bytes()[:-9]
    )  # killed in the middle of a line
    assert generate(cascade, PROMPTS, out, 7, {}) == 5
    for path in sorted(folder.rglob("*.png")):
        assert (pixels(path) == pixels(out / path.relative_to(folder))).all()


def test_a_stage_starts_from_pictures_that_lie_there(cascade, folder, tmp_path):
    out = tmp_path / "out"
    (out / "base").mkdir(parents=True)
    for number in (0, 1):
        Image.open(folder / "base" / f"{number:05d}.png").save(out / "base" / f"{number:05d}.png")
    assert generate(cascade, PROMPTS, out, 7, {}, start="sr32", stop="sr32") == 2
    assert (pixels(out / "sr32/00001.png") == pixels(folder / "sr32/00001.png")).all()


def test_another_recipe_under_one_number_is_refused(cascade, folder):
    with pytest.raises(UserError) as error:
        generate(cascade, PROMPTS[::-1], folder, 7, {})
    assert str(error.value) == (
        f"{folder}/base/00000.png: was made with prompt '{PROMPTS[0]}' and this command has '{PROMPTS[1]}'; choose "
        "another --out"
    )
    with pytest.raises(
        UserError, match="was made with steps 3 and this command has 2; choose another --out"
    ):
        generate(cascade, PROMPTS, folder, 7, {"base": {"steps": 2}})


def test_a_folder_in_use_is_refused(cascade, tmp_path):
    with lock(tmp_path / "out"), pytest.raises(UserError, match="in use by another run"):
        generate(cascade, PROMPTS, tmp_path / "out", 7, {})


def test_a_missing_intermediate_is_named(cascade, tmp_path):
    with pytest.raises(
        UserError, match=r"base/00000\.png: cannot be read .*; make it with --to base first"
    ):
        generate(cascade, PROMPTS, tmp_path / "out", 7, {}, start="sr32")


# The command.


def sample(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["sample", *arguments])
    return end.value.code


def test_the_command_makes_the_same(trained, folder, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join([PROMPTS[0], "", PROMPTS[1]]) + "\n")
    out = tmp_path / "out"
    command = [
        str(trained / "cascade"),
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--out",
        str(out),
        "--seed",
        "7",
    ]
    assert sample(*command) == 0
    assert (
        capsys.readouterr().out
        == f"{out}: 6 pictures written for 2 prompts, listed in manifest.jsonl\n"
    )
    assert entries(out) == entries(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "2", "3"], "--steps: 2 values for 3 stages (base, sr32, sr64); give one for each or one for all"),
        (["--steps", "0"], "--steps: [0] holds a number below 1; give positive numbers"),
        (["--aug-level", "1.5"], "--aug-level: 1.5 is not in [0.0, 1.0], which sr32 was trained with"),
        (["--from", "sr"], "sr: no such stage; this cascade has base, sr32, sr64"),
        (["--to", "base", "--aug-level", "0.1", "0.2"], "--aug-level: 2 values for 0 stages (); give one for each or one "
         "for all"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_are_refused(trained, tmp_path, capsys, options, message):
    command = [str(trained / "cascade"), "--prompt", "x", "--out", str(tmp_path / "out"), *options]
    assert sample(*command) == 2
    assert capsys.readouterr().err == f"{message}\n"
    assert not (tmp_path / "out").exists()


def test_stages_that_are_told_a_text_want_one(trained, tmp_path, capsys):
    assert sample(str(trained / "cascade"), "--num", "2", "--out", str(tmp_path / "out")) == 2
    said = "no prompt: these stages are told a text; give --prompt TEXT, one a picture\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "out").exists()
