"""A folder of generated images: recipes, continuing, and starting from what is there."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from launch.cli import main as cli
from pipeline import Cascade
from pipeline.errors import UserError
from pipeline.files import lock
from pipeline.generate.output_folder import generate

pytestmark = pytest.mark.slow

PROMPTS = ["a small red circle on white", "a large blue square on black"]
SEED = 7
STRING_FIELDS = {"stage", "file", "prompt", "sampler", "threshold"}  # the others are JSON in a PNG


@pytest.fixture(scope="module")
def folder(cascade: Cascade, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of all prompts and stages. Read only: all tests share it."""
    folder = tmp_path_factory.mktemp("images") / "out"
    assert generate(cascade, PROMPTS, folder, SEED) == 6
    return folder


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


# What is written.


def test_files_and_manifest_agree(folder: Path) -> None:
    assert [entry["file"] for entry in entries(folder)] == [
        f"{place}{image_id:05d}.png" for place in ("base/", "sr32/", "") for image_id in (0, 1)
    ]
    on_disk = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    assert on_disk == sorted(entry["file"] for entry in entries(folder))


def test_the_recipe_is_in_the_manifest_and_in_the_png(folder: Path) -> None:
    for entry in entries(folder):
        with Image.open(folder / entry["file"]) as image:
            assert isinstance(image, PngImageFile)
            chunks = image.text
        recipe = {
            key: value if key in STRING_FIELDS else json.loads(value)
            for key, value in chunks.items()
        }
        assert recipe == entry

    assert entries(folder)[5] == {
        "number": 1,
        "stage": "sr64",
        "file": "00001.png",
        "prompt": PROMPTS[1],
        "seed": SEED,
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


def test_the_images_are_those_of_the_cascade(cascade: Cascade, folder: Path) -> None:
    result = cascade(PROMPTS, seed=SEED)
    for name, images in result.stages.items():
        place = folder if name == "sr64" else folder / name
        for image_id, image in enumerate(images):
            assert (pixels(place / f"{image_id:05d}.png") == np.asarray(image)).all()


# What is there already.


def test_the_same_call_again_generates_nothing(cascade: Cascade, folder: Path) -> None:
    before = (folder / "manifest.jsonl").read_bytes()
    assert generate(cascade, PROMPTS, folder, SEED) == 0
    assert (folder / "manifest.jsonl").read_bytes() == before


def test_missing_images_are_generated_and_are_the_same(
    cascade: Cascade, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert generate(cascade, PROMPTS[:1], out, SEED, stop="sr32") == 2
    manifest = out / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-9])  # killed in the middle of a line
    assert generate(cascade, PROMPTS, out, SEED) == 5
    for path in sorted(folder.rglob("*.png")):
        assert (pixels(path) == pixels(out / path.relative_to(folder))).all()


def test_a_stage_starts_from_images_that_are_there(
    cascade: Cascade, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder / "base", out / "base")
    assert generate(cascade, PROMPTS, out, SEED, start="sr32", stop="sr32") == 2
    assert (pixels(out / "sr32/00001.png") == pixels(folder / "sr32/00001.png")).all()


def test_images_of_two_recipes_are_not_mixed(cascade: Cascade, folder: Path) -> None:
    with pytest.raises(UserError) as error:
        generate(cascade, PROMPTS[::-1], folder, SEED)
    assert str(error.value) == (
        f"{folder}/base/00000.png: was generated with prompt '{PROMPTS[0]}' and this command has "
        f"'{PROMPTS[1]}'; choose another output folder"
    )
    with pytest.raises(
        UserError,
        match="was generated with steps 3 and this command has 2; choose another output folder",
    ):
        generate(cascade, PROMPTS, folder, SEED, options={"base": {"steps": 2}})


def test_a_folder_in_use_is_refused(cascade: Cascade, tmp_path: Path) -> None:
    with lock(tmp_path / "out"), pytest.raises(UserError, match="in use by another"):
        generate(cascade, PROMPTS, tmp_path / "out", SEED)


def test_a_missing_image_of_the_stage_before_is_named(cascade: Cascade, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"base/00000\.png: cannot be read .*; generate it first, with base as the last stage",
    ):
        generate(cascade, PROMPTS, tmp_path / "out", SEED, start="sr32")


# The command.


def sample(*arguments: object) -> int | str | None:
    """The exit code of `cascade sample`."""
    with pytest.raises(SystemExit) as end:
        cli.main(["sample", *map(str, arguments)])
    return end.value.code


def test_the_command_writes_the_same_folder(
    trained: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join([PROMPTS[0], "", PROMPTS[1]]) + "\n")
    out = tmp_path / "out"
    sources = ["--prompts", tmp_path / "prompts.txt", "--seed", SEED]
    assert sample(trained / "cascade", *sources, "--out", out) == 0
    assert capsys.readouterr().out == (
        f"{out}: 6 images written for 2 prompts, listed in manifest.jsonl\n"
    )
    assert entries(out) == entries(folder)
    for path in sorted(folder.rglob("*.png")):
        assert path.read_bytes() == (out / path.relative_to(folder)).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--steps", "2", "3"],
            "--steps: 2 values for 3 stages (base, sr32, sr64); give one for each or one for all",
        ),
        (["--steps", "0"], "--steps: [0] holds a number below 1; give positive numbers"),
        (
            ["--aug-level", "1.5"],
            "--aug-level: 1.5 is not in [0.0, 1.0], which sr32 was trained with",
        ),
        (["--from", "sr"], "sr: no such stage; this cascade has base, sr32, sr64"),
        (
            ["--to", "base", "--aug-level", "0.1", "0.2"],
            "--aug-level: 2 values for 0 stages (); give one for each or one for all",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    out = tmp_path / "out"
    assert sample(trained / "cascade", "--prompt", "x", "--out", out, *options) == 2
    assert capsys.readouterr().err == f"{message}\n"
    assert not out.exists()


def test_stages_that_are_conditioned_on_text_need_prompts(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert sample(trained / "cascade", "--num", 2, "--out", out) == 2
    assert capsys.readouterr().err == (
        "--prompt: missing; these stages are conditioned on text; give one prompt per image\n"
    )
    assert not out.exists()
