"""Folders of restored images: what stays, what is sampled and what is refused.

The stages were trained for four steps.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from launch.cli import main as cli
from pipeline import Cascade
from pipeline.errors import UserError
from pipeline.generate.cascade_folder import export
from pipeline.generate.restore import (
    ImageToRestore,
    RestoreOptions,
    chunks,
    extend_image,
    read_images,
    restore,
)
from pipeline.imaging.compositing import most_uncertain, sample_std
from pipeline.imaging.degradations import to_grayscale
from pipeline.train.loop import train
from tests.conftest import LENGTH
from tests.helpers.palette import hole, make, random_image

pytestmark = pytest.mark.slow

TASKS = ["inpainting", "colorization"]


@pytest.fixture(scope="module")
def run(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("palette") / "run"
    assert train(make(folder, shards_folder))
    return folder


@pytest.fixture(scope="module")
def cascade(run: Path) -> Cascade:
    return Cascade.load(run / "stage")


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_stage_with_residual_stds_trains_and_restores(
    shards_folder: Path, tmp_path: Path
) -> None:
    """Several samples, a part of them once more, and a mask that leaves nothing known."""
    tasks = {"inpainting": {"residual_std": 0.1}, "colorization": {"residual_std": 0.2}}
    run = tmp_path / "run"
    assert train(make(run, shards_folder, diffusion={"prediction": "x0"}, tasks=tasks))
    images = [
        ImageToRestore(name="a", image=random_image(17, 13), mask=hole(17, 13)),
        ImageToRestore(name="b", image=random_image(), mask=np.ones((16, 16), bool)),
    ]
    options = RestoreOptions(task="inpainting", samples=2, repaint_share=0.25)
    assert restore(Cascade.load(run / "stage"), images, options, tmp_path / "out") == 2
    result = read(tmp_path / "out" / "a.png")
    assert (result[~images[0].mask] == images[0].image[~images[0].mask]).all()
    assert read(tmp_path / "out" / "b.png").std() > 1


def test_known_pixels_are_untouched_and_the_hole_is_sampled(
    cascade: Cascade, tmp_path: Path
) -> None:
    """Sides that the stride does not divide, and two sizes at once."""
    images = [
        ImageToRestore(name=f"p{n}", image=random_image(*size), mask=hole(*size))
        for n, size in enumerate([(16, 16), (17, 13), (16, 16)])
    ]
    assert restore(cascade, images, RestoreOptions(task="inpainting"), tmp_path / "out") == 3
    for each in images:
        found = read(tmp_path / "out" / f"{each.name}.png")
        assert (found[~each.mask] == each.image[~each.mask]).all()
        assert (found[each.mask] != each.image[each.mask]).mean() > 0.9


def test_an_image_does_not_depend_on_its_batch(cascade: Cascade, tmp_path: Path) -> None:
    images = [ImageToRestore(name=f"p{n}", image=random_image(), mask=hole()) for n in range(3)]
    options = RestoreOptions(task="inpainting", samples=2)
    restore(cascade, images, options, tmp_path / "all")
    restore(cascade, images[:1], options, tmp_path / "one")
    for name in ("p0.png", "p0.sample_1.png", "p0.std.png"):
        assert (read(tmp_path / "all" / name) == read(tmp_path / "one" / name)).all()


def test_samples_their_standard_deviation_and_their_blend(cascade: Cascade, tmp_path: Path) -> None:
    damaged = ImageToRestore(name="p", image=random_image(), mask=hole())
    restore(
        cascade,
        [damaged],
        RestoreOptions(task="inpainting", samples=3, weights=(0.0, 1.0, 1.0)),
        tmp_path,
    )
    samples = np.stack([read(tmp_path / f"p.sample_{n}.png") for n in range(3)])
    assert sample_std(samples)[~damaged.mask].max() == 0
    assert sample_std(samples)[damaged.mask].min() > 0
    np.testing.assert_allclose(read(tmp_path / "p.png"), samples[1:].mean(0), atol=0.51)
    entry = json.loads((tmp_path / "manifest.jsonl").read_text().splitlines()[-1])
    assert entry["file"] == "p.png"
    assert entry["mean_std"] == pytest.approx(sample_std(samples)[damaged.mask].mean())
    assert set(entry["seam"]) == {"across", "known", "painted"}


@pytest.mark.parametrize("task", TASKS)
def test_the_most_uncertain_part_alone_is_repainted(
    cascade: Cascade, tmp_path: Path, task: str
) -> None:
    mask = hole() if task == "inpainting" else np.ones((16, 16), bool)
    damaged = ImageToRestore(name="p", image=random_image(), mask=mask)
    for name, share in (("without", 0.0), ("with", 0.25)):
        options = RestoreOptions(task=task, samples=3, repaint_share=share)
        restore(cascade, [damaged], options, tmp_path / name)
    samples = np.stack([read(tmp_path / "with" / f"p.sample_{n}.png") for n in range(3)])
    part = most_uncertain(sample_std(samples), mask, 0.25)
    before = read(tmp_path / "without" / "p.png")
    after = read(tmp_path / "with" / "p.png")
    assert (before[~part] == after[~part]).all()
    assert (before[part] != after[part]).any(axis=-1).mean() > 0.5


def test_a_folder_goes_on_where_it_was(cascade: Cascade, tmp_path: Path) -> None:
    images = [ImageToRestore(name=f"p{n}", image=random_image(), mask=hole()) for n in range(2)]
    options = RestoreOptions(task="inpainting")
    assert restore(cascade, images[:1], options, tmp_path) == 1
    assert restore(cascade, images, options, tmp_path) == 1
    assert restore(cascade, images, options, tmp_path) == 0
    with pytest.raises(
        UserError, match=r"p0\.png: was generated with seed 0 and this command has 1; choose an"
    ):
        restore(cascade, images, RestoreOptions(task="inpainting", seed=1), tmp_path)


def test_colour_starts_from_grey(cascade: Cascade, tmp_path: Path) -> None:
    """Of a coloured image only its grey is used."""
    image = random_image()
    for name, seen in (("colour", image), ("grey", to_grayscale(image))):
        restore(
            cascade,
            [ImageToRestore(name="p", image=seen, mask=np.ones((16, 16), bool))],
            RestoreOptions(task="colorization"),
            tmp_path / name,
        )
    assert (read(tmp_path / "colour" / "p.png") == read(tmp_path / "grey" / "p.png")).all()


def test_what_is_too_small_is_refused(cascade: Cascade, tmp_path: Path) -> None:
    tiny = ImageToRestore(name="tiny", image=random_image(3, 9), mask=np.ones((3, 9), bool))
    with pytest.raises(UserError, match="tiny: 9 x 3 pixels; this stage takes sides from 4 on"):
        restore(cascade, [tiny], RestoreOptions(task="colorization"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_are_extended_on_each_side() -> None:
    image = random_image(4, 6)
    larger, mask = extend_image(image, (1, 2, 3, 0))
    assert larger.shape == (6, 10, 3)
    assert (larger[2:, 1:7] == image).all()
    assert not mask[2:, 1:7].any()
    assert mask.sum() == 60 - 24


def test_those_of_one_size_go_together() -> None:
    shapes = {0: (2, 2), 1: (4, 4), 2: (2, 2)}
    assert chunks([0, 1, 2], shapes.__getitem__, 64) == [[0, 2], [1]]
    assert chunks([0, 1, 2], shapes.__getitem__, 1) == [[0], [2], [1]]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, array in (
        ("a", random_image()),
        ("mask", hole() * np.uint8(255)),
        ("small", hole(8, 16) * np.uint8(255)),
    ):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "none.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "twice").mkdir()
    for name in ("a.png", "a.jpg"):
        Image.fromarray(random_image()).save(tmp_path / "twice" / name)
    return tmp_path


@pytest.mark.parametrize(
    ("task", "image", "options", "message"),
    [
        (
            "inpainting",
            "a.png",
            {"mask": "small.png"},
            "small.png: the mask has 16 x 8 pixels and {}/a.png 16 x 16; give",
        ),
        ("inpainting", "a.png", {"mask": "none.png"}, "none.png: no pixel is white"),
        (
            "inpainting",
            "a.png",
            {},
            "inpainting: give the hole, either by a mask or by pixels to extend",
        ),
        (
            "colorization",
            "a.png",
            {"mask": "mask.png"},
            "mask: colorization samples every pixel; leave it out",
        ),
        (
            "colorization",
            "broken.png",
            {},
            "broken.png: is none of JPEG, PNG, WEBP, GIF, BMP; give an image",
        ),
        ("colorization", "gone.png", {}, "gone.png: No such file or directory; give an image"),
        ("colorization", "empty", {}, "empty: no image in this folder"),
        ("colorization", "twice", {}, "twice: two images have the same name"),
        (
            "uncropping",
            "a.png",
            {"extend": (0, 0, 0, 0)},
            "extend: 0 0 0 0; give pixels of at least 0, some above",
        ),
        (
            "uncropping",
            "a.png",
            {"extend": (8, 0, 0, -1)},
            "extend: 8 0 0 -1; give pixels of at least 0, some above",
        ),
    ],
)
def test_input_that_cannot_be(
    files: Path, task: str, image: str, options: dict[str, Any], message: str
) -> None:
    masks = files / options["mask"] if "mask" in options else None
    with pytest.raises(UserError) as error:
        read_images(task, files / image, masks, options.get("extend"))
    assert message.format(files) in str(error.value)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"samples": 2, "weights": (1.0,)}, "weights: 1 for 2 samples; give each sample one"),
        ({"samples": 4, "repaint_share": 1.5}, r"repaint_share: 1\.5 is not in \[0, 1\]"),
        (
            {"repaint_share": 0.25},
            "repaint_share: 1 sample does not show where samples differ; take 4 samples",
        ),
    ],
)
def test_what_is_asked_of_samples(how: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RestoreOptions(task="inpainting", **how)


def test_the_command(run: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "restore",
        str(run / "stage"),
        "--image",
        str(files / "a.png"),
        "--out",
        str(files / "out"),
    ]
    with pytest.raises(
        UserError,
        match="--task: uncropping is none that this stage was trained for; it has inp",
    ):
        cli.dispatch([*argv, "--task", "uncropping", "--extend", "4", "4", "4", "4"])
    assert not (files / "out").exists()
    assert (
        cli.dispatch(
            [*argv, "--task", "inpainting", "--mask", str(files / "mask.png"), "--steps", "3"]
        )
        == 0
    )
    assert (
        capsys.readouterr().out
        == f"{files / 'out'}: 1 of 1 images restored now, listed in manifest.jsonl\n"
    )
    entry = json.loads((files / "out" / "manifest.jsonl").read_text())
    assert (entry["task"], entry["steps"], entry["file"]) == ("inpainting", 3, "a.png")


@pytest.mark.parametrize("residual_std", [None, 0.1])
def test_text_conditions_beside_the_task(
    shards_folder: Path, t5_folder: Path, tmp_path: Path, residual_std: float | None
) -> None:
    """Trained on captions, exported with the encoder, sampled with and without a prompt, guided."""
    changes: dict[str, Any] = {
        "conditioning": "text",
        "text": {"encoder": str(t5_folder), "width": 16, "length": LENGTH},
    }
    changes |= {
        "diffusion": {"prediction": "x0"},
        "tasks": {"inpainting": {"residual_std": residual_std}},
    }
    changes["sample"] = {
        "sampler": "ddim",
        "steps": 2,
        "batch_size": 4,
        "threshold": "static",
        "guidance": 3.0,
    }
    assert train(make(tmp_path / "run", shards_folder, **changes))
    export({"mend": tmp_path / "run" / "stage"}, t5_folder, tmp_path / "cascade")
    cascade = Cascade.load(tmp_path / "cascade")
    damaged, options = (
        ImageToRestore(name="p", image=random_image(), mask=hole()),
        RestoreOptions(task="inpainting"),
    )
    found = []
    for number, words in enumerate(
        ("a small red circle on white", "a large blue square on black", "")
    ):
        restore(cascade, [damaged], options, tmp_path / str(number), prompt=words)
        found.append(read(tmp_path / str(number) / "p.png"))
    one, other, none = found
    assert (one != other).any()
    assert (one != none).any()


def test_other_stages_restore_nothing_and_this_one_generates_nothing(
    run: Path, trained: Path, files: Path
) -> None:
    argv = ["--task", "colorization", "--image", str(files / "a.png"), "--out", str(files / "out")]
    with pytest.raises(UserError, match="base, sr32, sr64: not an image-to-image stage"):
        cli.dispatch(["restore", str(trained / "cascade"), *argv])
    with pytest.raises(
        UserError, match="image_to_image restores images and generates none; use `cascade restore`"
    ):
        Cascade.load(run / "stage")(["x"])
    with pytest.raises(
        UserError,
        match="image_to_image starts from an image; give the folder of a stage that needs",
    ):
        cli.dispatch(["explore", str(run / "stage"), "--out", str(files / "look")])
