"""Editing through three stages that were trained for four steps: what is known stays, what changes
is what was asked for. Whether it looks well is for a trained cascade to show, see docs/editing.md.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.cli import main as cli
from pipeline import Cascade
from pipeline.errors import UserError
from pipeline.generate.edit import detailed, edits_of, open_editing, pooled, shrunk, strengths
from pipeline.generate.output_folder import generate
from pipeline.imaging.compositing import seam
from tools.shapes import draw, random_scene

PROMPTS = ["a small red circle on white", "a large blue square on black"]
SIZES = {"base": 16, "sr32": 32, "sr64": 64}
IMAGES = [draw(random_scene(0, number), 64) for number in (1, 2)]
HOLE = np.zeros((64, 64), bool)
HOLE[21:45, 18:50] = True  # on no grid of the smaller stages
MASK = Image.fromarray(HOLE)


@pytest.fixture(scope="module")
def cascade(trained: Path) -> Cascade:
    return Cascade.load(trained / "cascade")


@pytest.fixture(scope="module")
def painted(cascade):
    return cascade(PROMPTS, seed=7, image=IMAGES, mask=MASK)


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def at(size: int) -> np.ndarray:
    """Where the hole is at this size: each pixel that covers some of it, found one by one."""
    factor = 64 // size
    return np.array([
        [HOLE[i * factor : (i + 1) * factor, j * factor : (j + 1) * factor].max() for j in range(size)]
        for i in range(size)
    ])  # fmt: skip


# What each stage sees.


@pytest.mark.parametrize("size", [1, 2, 8, 16, 64])
def test_a_pixel_is_painted_if_any_that_it_covers_is(size):
    assert (pooled(HOLE[None, None], size)[0, 0] == at(size)).all()


def test_the_start_has_the_colours_of_the_low_resolution_and_the_detail_of_the_picture():
    pictures = pixels(IMAGES) // 2 + 60  # away from black and white, where it would be cut
    low = shrunk(pictures, 16)
    assert np.abs(detailed(low, pictures).astype(int) - pictures).max() <= 1
    assert np.abs(detailed(low + 20, pictures).astype(int) - pictures - 20).max() <= 1


def test_strengths_unless_said_otherwise():
    assert strengths(None, True, ["a", "b"]) == {"a": 1.0, "b": 1.0}
    assert strengths(None, False, ["a", "b"]) == {"a": 0.8, "b": 0.8}
    assert strengths(0.5, True, ["a", "b"]) == {"a": 0.5, "b": 0.5}
    assert strengths({"b": 0.5}, False, ["a", "b"]) == {"a": 0.8, "b": 0.5}


# Inpainting.


def test_what_is_known_stays(painted):
    """Bit for bit in the end; before, within the level by which a stage's own picture is rounded."""
    assert (pixels(painted.images)[:, ~HOLE] == pixels(IMAGES)[:, ~HOLE]).all()
    for name, size in SIZES.items():
        known, picture = (
            array.astype(int)
            for array in (pixels(painted.stages[name]), shrunk(pixels(IMAGES), size))
        )
        assert np.abs(known - picture)[:, ~at(size)].max() <= 1, name


def test_the_hole_is_painted_by_prompt_and_seed(cascade, painted):
    def hole(prompt: str, seed: int) -> np.ndarray:
        return pixels(cascade([prompt], seed=seed, image=IMAGES[0], mask=MASK).images)[0, HOLE]

    first = pixels(painted.images)[0, HOLE]
    assert (hole(PROMPTS[0], 7) == first).all()
    for other in (np.asarray(IMAGES[0])[HOLE], hole(PROMPTS[1], 7), hole(PROMPTS[0], 8)):
        assert (other != first).mean() > 0.1


def test_the_seam_does_not_show(painted):
    for picture in pixels(painted.images):
        found = seam(picture, HOLE)
        assert found.across <= max(found.known, found.painted)


def test_a_picture_alone_is_the_picture_in_company(cascade, painted):
    alone = cascade(PROMPTS[1:], seed=7, numbers=[1], image=IMAGES[1], mask=[MASK])
    for name, images in painted.stages.items():
        assert (pixels(alone.stages[name])[0] == pixels(images)[1]).all(), name


def test_a_weak_edit_of_a_hole_stays_near_what_was_in_it(cascade, painted):
    weak = cascade(PROMPTS, seed=7, image=IMAGES, mask=MASK, strength=0.1)
    assert (pixels(weak.images)[:, ~HOLE] == pixels(IMAGES)[:, ~HOLE]).all()
    near, far = (
        np.abs(pixels(each.images) - pixels(IMAGES).astype(float)).mean()
        for each in (weak, painted)
    )
    assert 0 < near < far / 2


# Image to image.


def test_the_stronger_the_farther(cascade):
    def distance(strength: float) -> float:
        made = cascade(PROMPTS, seed=7, image=IMAGES, strength=strength)
        return np.abs(pixels(made.images) - pixels(IMAGES).astype(float)).mean()

    weak, half, strong = (distance(strength) for strength in (0.001, 0.4, 1.0))
    assert weak < half < strong
    assert weak < strong / 4


def test_each_stage_has_its_strength(cascade):
    said = {"base": 0.4, "sr32": 1.0, "sr64": 0.5}
    one, other = (
        cascade(PROMPTS, image=IMAGES, strength=said | {"sr64": last}) for last in (0.5, 0.9)
    )
    for name in ("base", "sr32"):
        assert (pixels(one.stages[name]) == pixels(other.stages[name])).all()
    assert (pixels(one.images) != pixels(other.images)).any()


def test_the_first_stage_enlarges_the_picture_itself(cascade):
    found = cascade(PROMPTS, image=IMAGES, start="sr64", strength=0.5)
    low = [Image.fromarray(picture) for picture in shrunk(pixels(IMAGES), 32)]
    assert list(found.stages) == ["sr64"]
    assert (
        pixels(found.images)
        == pixels(cascade(PROMPTS, image=IMAGES, start="sr64", strength=0.5, low=low).images)
    ).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            {"image": Image.new("RGB", (64, 48))},
            "image 0: 64 x 48 pixels, but this cascade edits pictures of 64 x 64, which its last stage makes; crop or "
            "resize it",
        ),
        (
            {"image": IMAGES[:1]},
            "image: 1 for 2 prompts; give one each or one for all",
        ),
        (
            {"image": IMAGES, "mask": [MASK]},
            "mask: 1 for 2 prompts; give one each or one for all",
        ),
        (
            {"image": IMAGES, "mask": Image.new("L", (32, 32), 255)},
            "mask 0: the mask has 32 x 32 pixels and image 0 64 x 64; give one of the picture's size, white where it "
            "is to be made",
        ),
        (
            {"image": IMAGES, "mask": Image.new("L", (64, 64))},
            "mask 0: nothing in this mask is white, which is what would be made",
        ),
        (
            {"image": IMAGES, "strength": 0},
            "strength 0: not in (0, 1]; 1 leaves nothing of what was there",
        ),
        (
            {"image": IMAGES, "strength": {"sr32": 2}},
            "strength 2: not in (0, 1]; 1 leaves nothing of what was there",
        ),
        ({"mask": MASK}, "mask: there is no picture to edit; give image"),
        ({"strength": 0.5}, "strength: there is no picture to edit; give image"),
    ],
)
def test_what_cannot_be_edited_is_refused(cascade, call, message):
    with pytest.raises(UserError) as error:
        cascade(PROMPTS, **call)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("strength", "masked"), [(1.0, False), (0.5, False), (1.0, True), (0.4, True)]
)
def test_the_bar_ends_where_it_says(cascade, strength, masked):
    options = {"base": {"steps": 5, "repaint_steps": 3, "extra_steps": 2}}
    (edit,) = edits_of(IMAGES[0], MASK if masked else None, strength, 6, 64, ["base"]).values()
    calls, told = [], cascade.prompt("base", PROMPTS * 3)
    cascade.run("base", told, 0, range(6), None, options, edit, lambda: calls.append(1))
    assert len(calls) == cascade.calls("base", 6, options, *edit.how)


# The folder.


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """images/a.png, images/b.png and mask.png."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "images").mkdir()
    for name, image in zip("ab", IMAGES, strict=True):
        image.save(folder / "images" / f"{name}.png")
    MASK.convert("L").save(folder / "mask.png")
    Image.new("L", (32, 32), 255).save(folder / "small.png")
    Image.new("RGB", (64, 48)).save(folder / "wide.png")
    (folder / "text.png").write_text("no picture")
    (folder / "empty").mkdir()
    return folder


def edit(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `cascade edit`."""
    with pytest.raises(SystemExit) as end:
        cli.main(["edit", *map(str, arguments)])
    out, err = capsys.readouterr()
    return end.value.code, out, err


@pytest.fixture(scope="module")
def command(trained, files) -> list[object]:
    return [trained / "cascade", "--image", files / "images", "--mask", files / "mask.png", "--seed", 7,
            "--prompt", *PROMPTS]  # fmt: skip


@pytest.fixture(scope="module")
def out(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("edited") / "out"
    with pytest.raises(SystemExit) as end:
        cli.main(["edit", *map(str, command), "--out", str(out)])
    assert end.value.code == 0
    return out


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_the_folder_has_the_cascades_pictures_and_says_of_what(painted, out, files):
    for entry in entries(out):
        with Image.open(out / entry["file"]) as image:
            assert (
                np.asarray(image) == np.asarray(painted.stages[entry["stage"]][entry["number"]])
            ).all()
            assert image.text["image_sha256"] == entry["image_sha256"]
    last = entries(out)[-1]
    assert {
        key: last[key]
        for key in ("number", "file", "image", "mask", "strength", "edited_from", "seed")
    } == {
        "number": 1,
        "file": "00001.png",
        "image": "b.png",
        "mask": "mask.png",
        "strength": 1.0,
        "edited_from": "base",
        "seed": 7,
    }
    assert last["mask_sha256"] == hashlib.sha256((files / "mask.png").read_bytes()).hexdigest()


def test_the_same_again_makes_what_is_missing(capsys, command, out, files, tmp_path):
    copy = tmp_path / "out"
    shutil.copytree(out, copy)
    (copy / "00001.png").unlink()
    code, said, _ = edit(capsys, *command, "--out", copy)
    assert (code, said) == (
        0,
        f"{copy}: 1 pictures written for 2 edits, listed in manifest.jsonl\n",
    )
    assert (copy / "00001.png").read_bytes() == (out / "00001.png").read_bytes()
    renamed = tmp_path / "other name.png"
    shutil.copy(files / "mask.png", renamed)
    command = [renamed if word == files / "mask.png" else word for word in command]
    assert edit(capsys, *command, "--out", copy)[1].startswith(f"{copy}: 0 pictures written")


def test_another_picture_under_one_name_is_refused(capsys, command, out, tmp_path):
    (tmp_path / "images").mkdir()
    for name, image in zip("ab", IMAGES[::-1], strict=True):
        image.save(tmp_path / "images" / f"{name}.png")
    other = [tmp_path / "images" if str(word).endswith("images") else word for word in command]
    code, _, err = edit(capsys, *other, "--out", out)
    assert code == 2
    assert err.startswith(f"{out}/base/00000.png: was made with image_sha256 ")
    assert edit(capsys, *command, "--out", out, "--strength", 0.5)[2].startswith(
        f"{out}/base/00000.png: was made with strength 1.0 and this command has 0.5; choose another --out"
    )
    assert edit(capsys, *command, "--out", out, "--from", "sr32")[0] == 2


def test_made_and_edited_pictures_are_not_mixed(cascade, out):
    with pytest.raises(
        UserError, match=r"was made with image_sha256 .* and this command has None; choose another"
    ):
        generate(cascade, PROMPTS, out, 7, {})


def test_stop_then_the_rest_is_the_whole(capsys, command, out, tmp_path):
    copy = tmp_path / "out"
    assert edit(capsys, *command, "--out", copy, "--to", "base")[1].startswith(
        f"{copy}: 2 pictures written"
    )
    assert edit(capsys, *command, "--out", copy)[1].startswith(f"{copy}: 4 pictures written")
    for path in sorted(out.rglob("*.png")):
        assert path.read_bytes() == (copy / path.relative_to(out)).read_bytes()


def test_one_picture_by_many_prompts_and_many_by_one(cascade, files, tmp_path):
    images = [files / "images" / f"{name}.png" for name in "ab"]
    options, kept = {}, {"sr64": 0.5}
    for number, paths in enumerate((images[:1] * 2, images)):
        editing = open_editing(paths, None, 64, kept)
        assert (
            generate(cascade, PROMPTS, tmp_path / str(number), 7, options, "sr64", None, editing)
            == 2
        )
    one, many = (pixels([Image.open(tmp_path / name / "00001.png")])[0] for name in "01")
    assert (one != many).any()
    expected = cascade(PROMPTS, seed=7, image=IMAGES, start="sr64", strength=0.5)
    assert (many == np.asarray(expected.images[1])).all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mask", "{files}/small.png"], "{files}/small.png: the mask has 32 x 32 pixels and {files}/images/a.png 64"),
        (["--image", "{files}/wide.png"], "{files}/wide.png: 64 x 48 pixels, but this cascade edits pictures of 64 x "),
        (["--image", "{files}/text.png"], "{files}/text.png: "),
        (["--image", "{files}/none.png"], "{files}/none.png: No such file or directory; give a picture (.png, "),
        (["--image", "{files}/empty"], "{files}/empty: there is no picture in this folder (.png, "),
        (["--mask", "{files}/empty"], "{files}/empty/a.png: No such file or directory; give a picture (.png, "),
        (["--strength", "0"], "strength 0.0: not in (0, 1]; 1 leaves nothing of what was there"),
        (["--strength", "1.5"], "strength 1.5: not in (0, 1]; 1 leaves nothing of what was there"),
        (["--strength", "1", "0.5"], "--strength: 2 values for 3 stages (base, sr32, sr64); give one for each or one "),
        (["--repaint-steps", "5"], "--repaint-steps: it is in a hole that steps are made again; give --mask, or leave it out"),
        (["--repaint-steps", "0"], "argument --repaint-steps: 0 is less than 1"),
        (["--steps", "0"], "--steps: [0] holds a number below 1; give positive numbers"),
        (["--prompt", *"abc"], "--image: 2 pictures for 3 prompts; give one of either, or as many"),
        (["--from", "sr"], "sr: no such stage; this cascade has base, sr32, sr64"),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_in_one_line(trained, files, tmp_path, capsys, words, message):
    told = ["--image", "{files}/images", "--prompt", "x", *words]
    code, said, err = edit(
        capsys,
        trained / "cascade",
        "--out",
        tmp_path / "out",
        *(word.replace("{files}", str(files)) for word in told),
    )
    assert (code, said, err.count("\n")) == (2, "", 1)
    assert err.startswith(message.replace("{files}", str(files)))
    assert not (tmp_path / "out").exists()
