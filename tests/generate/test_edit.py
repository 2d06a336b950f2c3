"""Editing through three stages that were trained for four steps: what is known stays, and what was
asked for changes. How good it looks is measured on a trained cascade, see docs/editing.md.
"""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launch.cli import main as cli
from pipeline import Cascade
from pipeline.errors import UserError
from pipeline.generate.cascade import Result
from pipeline.generate.edit import (
    EditFiles,
    add_detail,
    edits_of,
    open_edit_files,
    pool_mask,
    shrink,
    strengths,
)
from pipeline.generate.engine import SampleStep
from pipeline.generate.output_folder import OutputFolder, generate
from pipeline.imaging.compositing import seam
from tools.shapes import draw, random_scene

pytestmark = pytest.mark.slow

PROMPTS = ["a small red circle on white", "a large blue square on black"]
SEED = 7
SIZES = {"base": 16, "sr32": 32, "sr64": 64}
SIZE = 64
IMAGES = [draw(random_scene(0, index), SIZE) for index in (1, 2)]
HOLE = np.zeros((SIZE, SIZE), bool)
HOLE[21:45, 18:50] = True  # aligned to no pixel grid of the smaller stages
MASK = Image.fromarray(HOLE)


@pytest.fixture(scope="module")
def inpainted(cascade: Cascade) -> Result:
    return cascade(PROMPTS, seed=SEED, image=IMAGES, mask=MASK)


def pixels(images: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def hole_at(size: int) -> np.ndarray:
    """The hole at a stage's size: each pixel that covers some of it, looked up one by one."""
    factor = SIZE // size
    hole = np.zeros((size, size), bool)
    for i, j in np.ndindex(size, size):
        hole[i, j] = HOLE[i * factor : (i + 1) * factor, j * factor : (j + 1) * factor].max()
    return hole


# What each stage starts from.


@pytest.mark.parametrize("size", [1, 2, 8, 16, 64])
def test_a_pixel_is_sampled_if_any_that_it_covers_is(size: int) -> None:
    assert (pool_mask(HOLE[None, None], size)[0, 0] == hole_at(size)).all()


def test_the_start_has_the_colours_of_the_low_resolution_and_the_detail_of_the_image() -> None:
    images = pixels(IMAGES) // 2 + 60  # away from black and white, where it would be clipped
    low_res = shrink(images, 16)
    assert np.abs(add_detail(low_res, images).astype(int) - images).max() <= 1
    assert np.abs(add_detail(low_res + 20, images).astype(int) - images - 20).max() <= 1


def test_strengths_have_defaults() -> None:
    assert strengths(None, True, ["a", "b"]) == {"a": 1.0, "b": 1.0}
    assert strengths(None, False, ["a", "b"]) == {"a": 0.8, "b": 0.8}
    assert strengths(0.5, True, ["a", "b"]) == {"a": 0.5, "b": 0.5}
    assert strengths({"b": 0.5}, False, ["a", "b"]) == {"a": 0.8, "b": 0.5}


# Inpainting.


def test_known_pixels_stay(inpainted: Result) -> None:
    """Bit for bit in the end; before, within the level to which a stage's image is rounded."""
    assert (pixels(inpainted.images)[:, ~HOLE] == pixels(IMAGES)[:, ~HOLE]).all()
    for name, size in SIZES.items():
        difference = pixels(inpainted.stages[name]).astype(int) - shrink(pixels(IMAGES), size)
        assert np.abs(difference[:, ~hole_at(size)]).max() <= 1, name


def test_the_hole_depends_on_prompt_and_seed(cascade: Cascade, inpainted: Result) -> None:
    def sampled(prompt: str, seed: int) -> np.ndarray:
        result = cascade([prompt], seed=seed, image=IMAGES[0], mask=MASK)
        return pixels(result.images)[0, HOLE]

    first = pixels(inpainted.images)[0, HOLE]
    assert (sampled(PROMPTS[0], SEED) == first).all()
    original = np.asarray(IMAGES[0])[HOLE]
    for other in (original, sampled(PROMPTS[1], SEED), sampled(PROMPTS[0], SEED + 1)):
        assert (other != first).mean() > 0.1


def test_the_seam_does_not_show(inpainted: Result) -> None:
    for image in pixels(inpainted.images):
        differences = seam(image, HOLE)
        assert differences.across <= max(differences.known, differences.painted)


def test_an_edited_image_does_not_depend_on_its_batch(cascade: Cascade, inpainted: Result) -> None:
    alone = cascade(PROMPTS[1:], seed=SEED, image_ids=[1], image=IMAGES[1], mask=[MASK])
    for name, images in inpainted.stages.items():
        assert (pixels(alone.stages[name])[0] == pixels(images)[1]).all(), name


def test_a_weak_edit_of_a_hole_stays_near_what_was_in_it(
    cascade: Cascade, inpainted: Result
) -> None:
    weak = cascade(PROMPTS, seed=SEED, image=IMAGES, mask=MASK, strength=0.1)
    assert (pixels(weak.images)[:, ~HOLE] == pixels(IMAGES)[:, ~HOLE]).all()
    near, far = (
        np.abs(pixels(result.images) - pixels(IMAGES).astype(float)).mean()
        for result in (weak, inpainted)
    )
    assert 0 < near < far / 2


# Image to image.


def test_a_higher_strength_changes_more(cascade: Cascade) -> None:
    def difference(strength: float) -> float:
        result = cascade(PROMPTS, seed=SEED, image=IMAGES, strength=strength)
        return float(np.abs(pixels(result.images) - pixels(IMAGES).astype(float)).mean())

    weak, half, strong = (difference(strength) for strength in (0.001, 0.4, 1.0))
    assert weak < half < strong
    assert weak < strong / 4


def test_each_stage_has_its_strength(cascade: Cascade) -> None:
    one, other = (
        cascade(PROMPTS, image=IMAGES, strength={"base": 0.4, "sr32": 1.0, "sr64": last})
        for last in (0.5, 0.9)
    )
    for name in ("base", "sr32"):
        assert (pixels(one.stages[name]) == pixels(other.stages[name])).all()
    assert (pixels(one.images) != pixels(other.images)).any()


def test_the_first_stage_enlarges_the_image_itself(cascade: Cascade) -> None:
    result = cascade(PROMPTS, image=IMAGES, start="sr64", strength=0.5)
    assert list(result.stages) == ["sr64"]

    low_res = [Image.fromarray(image) for image in shrink(pixels(IMAGES), 32)]
    expected = cascade(PROMPTS, image=IMAGES, start="sr64", strength=0.5, low_res=low_res)
    assert (pixels(result.images) == pixels(expected.images)).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            {"image": Image.new("RGB", (64, 48))},
            "image 0: 64 x 48 pixels, but this cascade edits images of 64 x 64, which its last "
            "stage generates; crop or resize it",
        ),
        (
            {"image": IMAGES[:1]},
            "image: 1 images for 2 prompts; give one each or one for all",
        ),
        (
            {"image": IMAGES, "mask": [MASK]},
            "mask: 1 images for 2 prompts; give one each or one for all",
        ),
        (
            {"image": IMAGES, "mask": Image.new("L", (32, 32), 255)},
            "mask 0: the mask has 32 x 32 pixels and image 0 64 x 64; give ",
        ),
        ({"image": IMAGES, "mask": Image.new("L", (64, 64))}, "mask 0: no pixel is white; "),
        (
            {"image": IMAGES, "strength": 0},
            "strength: 0 is not in (0, 1]; 1 keeps nothing of the image",
        ),
        (
            {"image": IMAGES, "strength": {"sr32": 2}},
            "strength: 2 is not in (0, 1]; 1 keeps nothing of the image",
        ),
        ({"mask": MASK}, "mask: there is no image to edit; give image"),
        ({"strength": 0.5}, "strength: there is no image to edit; give image"),
    ],
)
def test_calls_that_do_not_fit_are_refused(
    cascade: Cascade, call: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        cascade(PROMPTS, **call)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("strength", "masked"), [(1.0, False), (0.5, False), (1.0, True), (0.4, True)]
)
def test_the_number_of_calls_is_known_beforehand(
    cascade: Cascade, strength: float, masked: bool
) -> None:
    """Which is where the progress bar ends."""
    mask = MASK if masked else None
    edits = edits_of(IMAGES[0], mask, strength, num_images=6, size=SIZE, stage_names=["base"])
    options = {"base": {"steps": 5, "repaint_steps": 3, "extra_steps": 2}}
    steps: list[SampleStep] = []
    cascade.sample_stage(
        "base",
        PROMPTS * 3,
        seed=0,
        image_ids=range(6),
        options=options,
        edit=edits["base"],
        on_step=steps.append,
    )
    assert len(steps) == cascade.num_calls("base", 6, options, edits["base"])


# The folder.


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/a.png, images/b.png and mask.png; and files that cannot be used."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "images").mkdir()
    for name, image in zip("ab", IMAGES, strict=True):
        image.save(folder / "images" / f"{name}.png")
    MASK.convert("L").save(folder / "mask.png")
    Image.new("L", (32, 32), 255).save(folder / "small.png")
    Image.new("RGB", (64, 48)).save(folder / "wide.png")
    (folder / "text.png").write_text("no image")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def edit_files(files: Path) -> EditFiles:
    images = [files / "images" / f"{name}.png" for name in "ab"]
    return open_edit_files(
        images, files / "mask.png", size=SIZE, strengths=dict.fromkeys(SIZES, 1.0)
    )


@pytest.fixture(scope="module")
def out(cascade: Cascade, edit_files: EditFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The edited images of all stages. Read only: all tests share it."""
    out = tmp_path_factory.mktemp("edited") / "out"
    assert generate(cascade, PROMPTS, out, SEED, edit_files=edit_files) == 6
    return out


def read_pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_folder_has_the_images_of_the_cascade_and_what_they_are_edits_of(
    inpainted: Result, out: Path, files: Path
) -> None:
    entries = OutputFolder(out).entries
    for file, entry in entries.items():
        expected = np.asarray(inpainted.stages[entry["stage"]][entry["number"]])
        assert (read_pixels(out / file) == expected).all()
        with Image.open(out / file) as image:
            assert image.info["image_sha256"] == entry["image_sha256"]

    mask_sha256 = hashlib.sha256((files / "mask.png").read_bytes()).hexdigest()
    expected_fields = {
        "number": 1,
        "file": "00001.png",
        "image": "b.png",
        "mask": "mask.png",
        "mask_sha256": mask_sha256,
        "strength": 1.0,
        "edited_from": "base",
        "seed": SEED,
    }
    assert expected_fields.items() <= entries["00001.png"].items()


def test_missing_edits_are_generated_and_are_the_same(
    cascade: Cascade, edit_files: EditFiles, out: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    (copy / "00001.png").unlink()
    assert generate(cascade, PROMPTS, copy, SEED, edit_files=edit_files) == 1
    assert (copy / "00001.png").read_bytes() == (out / "00001.png").read_bytes()


def test_edits_do_not_depend_on_the_names_of_files(
    cascade: Cascade, edit_files: EditFiles, files: Path, out: Path, tmp_path: Path
) -> None:
    renamed = tmp_path / "other name.png"
    shutil.copy(files / "mask.png", renamed)
    same = open_edit_files(edit_files.images, renamed, size=SIZE, strengths=edit_files.strengths)
    assert generate(cascade, PROMPTS, out, SEED, edit_files=same) == 0


def test_edits_of_two_recipes_are_not_mixed(
    cascade: Cascade, edit_files: EditFiles, files: Path, out: Path
) -> None:
    def refusal(start: str | None = None, **changes: Any) -> str:
        with pytest.raises(UserError) as error:
            generate(
                cascade,
                PROMPTS,
                out,
                SEED,
                start=start,
                edit_files=replace(edit_files, **changes),
            )
        return str(error.value)

    assert refusal(images=edit_files.images[::-1]).startswith(
        f"{out}/base/00000.png: was generated with image_sha256 "
    )
    assert refusal(strengths=dict.fromkeys(SIZES, 0.5)) == (
        f"{out}/base/00000.png: was generated with strength 1.0 and this command has 0.5; choose "
        "another output folder"
    )
    assert refusal(start="sr32", strengths={"sr32": 1.0, "sr64": 1.0}).startswith(
        f"{out}/sr32/00000.png: was generated with edited_from 'base' and this command has 'sr32'"
    )


def test_generated_and_edited_images_are_not_mixed(cascade: Cascade, out: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"was generated with image_sha256 .* and this command has None; choose another",
    ):
        generate(cascade, PROMPTS, out, SEED)


def test_one_image_by_many_prompts_and_many_by_one(
    cascade: Cascade, edit_files: EditFiles, tmp_path: Path
) -> None:
    images = edit_files.images
    for name, paths in {"one": [images[0], images[0]], "many": images}.items():
        files = open_edit_files(paths, None, size=SIZE, strengths={"sr64": 0.5})
        out = tmp_path / name
        assert generate(cascade, PROMPTS, out, SEED, start="sr64", edit_files=files) == 2
    one, many = (read_pixels(tmp_path / name / "00001.png") for name in ("one", "many"))
    assert (one != many).any()

    expected = cascade(PROMPTS, seed=SEED, image=IMAGES, start="sr64", strength=0.5)
    assert (many == np.asarray(expected.images[1])).all()


# The command.


def edit(
    capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int | str | None, str, str]:
    """Exit code, stdout and stderr of `cascade edit`."""
    with pytest.raises(SystemExit) as end:
        cli.main(["edit", *map(str, arguments)])
    out, err = capsys.readouterr()
    return end.value.code, out, err


def test_the_command_and_then_the_other_stages_write_the_same_folder(
    cascade: Cascade,
    trained: Path,
    files: Path,
    edit_files: EditFiles,
    out: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "out"
    sources = ["--image", files / "images", "--mask", files / "mask.png", "--prompt", *PROMPTS]
    options = ["--out", copy, "--seed", SEED, "--to", "base"]
    code, stdout, _ = edit(capsys, trained / "cascade", *sources, *options)
    assert code == 0
    assert stdout == f"{copy}: 2 images written for 2 edits, listed in manifest.jsonl\n"

    assert generate(cascade, PROMPTS, copy, SEED, edit_files=edit_files) == 4
    assert OutputFolder(copy).entries == OutputFolder(out).entries
    for path in sorted(out.rglob("*.png")):
        assert path.read_bytes() == (copy / path.relative_to(out)).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--mask", "{files}/small.png"],
            "{files}/small.png: the mask has 32 x 32 pixels and {files}/images/a.png 64 x 64; ",
        ),
        (
            ["--image", "{files}/wide.png"],
            "{files}/wide.png: 64 x 48 pixels, but this cascade edits images of 64 x 64, which ",
        ),
        (["--image", "{files}/text.png"], "{files}/text.png: "),
        (["--image", "{files}/none.png"], "{files}/none.png: No such file or directory; give "),
        (["--image", "{files}/empty"], "{files}/empty: no image in this folder (.png, "),
        (["--mask", "{files}/empty"], "{files}/empty/a.png: No such file or directory; give "),
        (
            ["--strength", "0"],
            "--strength: 0.0 is not in (0, 1]; 1 keeps nothing of the image",
        ),
        (
            ["--strength", "1.5"],
            "--strength: 1.5 is not in (0, 1]; 1 keeps nothing of the image",
        ),
        (
            ["--strength", "1", "0.5"],
            "--strength: 2 values for 3 stages (base, sr32, sr64); give one for each or one ",
        ),
        (["--repaint-steps", "5"], "--repaint-steps: repeats the steps inside a mask; give --mask"),
        (["--repaint-steps", "0"], "argument --repaint-steps: 0 is less than 1"),
        (["--steps", "0"], "--steps: [0] holds a number below 1; give positive numbers"),
        (
            ["--prompt", *"abc"],
            "--image: 2 images for 3 prompts; give one of either, or as many",
        ),
        (["--from", "sr"], "sr: no such stage; this cascade has base, sr32, sr64"),
    ],
)
def test_a_mistake_is_reported_in_one_line(
    trained: Path,
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    out = tmp_path / "out"
    sources = ["--image", "{files}/images", "--prompt", "x", *arguments]
    code, stdout, stderr = edit(
        capsys,
        trained / "cascade",
        "--out",
        out,
        *(argument.replace("{files}", str(files)) for argument in sources),
    )
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert stderr.startswith(message.replace("{files}", str(files)))
    assert not out.exists()
