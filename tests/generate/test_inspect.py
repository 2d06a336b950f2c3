"""A look at a stage: what lies between two noises and two prompts, what noising shows, and the
sheets themselves.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.cli import main as cli
from pipeline import Cascade
from pipeline.config import build
from pipeline.data.image import to_float
from pipeline.generate.inspect import COLUMNS, PAIRS, PATHS, Explorer, between, slerp
from pipeline.rng import sampling_noise
from pipeline.stage.registry import stage_class
from pipeline.train.loop import train
from tests.conftest import stage_yaml
from tools.shapes import SHAPES

SHEETS = ["grid.png", "interpolation.png", "noising.png", "path.png", "steps.png"]
OWN = {"schedule": "linear", "timesteps": 20, "prediction": "x0"}


@pytest.fixture(scope="module")
def folder(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage that is told a shape, on normalized pixels, in discrete time."""
    run = tmp_path_factory.mktemp("explore") / "run"
    raw = stage_yaml("base", run, shards_folder, Path("unused")) | {
        "conditioning": "class",
        "classes": {"names": list(SHAPES), "field": "shape"},
        "pixels": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]},
        "diffusion": OWN,
    }
    del raw["text"]
    cls = stage_class("base")
    assert train(cls(build(cls.Config, raw)))
    return run / "stage"


@pytest.fixture(scope="module")
def explorer(folder: Path) -> Explorer:
    cascade = Cascade.load(folder)
    (name,) = cascade.stages
    return Explorer(cascade.stages[name], SHAPES, cascade.prompt(name, SHAPES), 7, bool)


# What lies between.


def test_slerp_is_its_definition():
    one, other = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    shares = [0, 0.25, 0.5, 1]
    found = slerp(one, other, shares)
    assert found.dtype == np.float32
    assert (found[0] == one).all()
    assert (found[-1] == other).all()
    a, b = one.astype(np.float64).ravel(), other.astype(np.float64).ravel()
    omega = np.arccos(a @ b / np.sqrt((a @ a) * (b @ b)))
    for share, each in zip(shares, found, strict=True):
        expected = (np.sin((1 - share) * omega) * a + np.sin(share * omega) * b) / np.sin(omega)
        np.testing.assert_allclose(each.ravel(), expected, rtol=1e-6, atol=1e-6)


def test_slerp_stays_on_the_sphere_and_goes_evenly():
    one, other = np.random.default_rng(1).standard_normal((2, 200))
    one, other = one / np.linalg.norm(one), other / np.linalg.norm(other)
    found = slerp(one, other, np.linspace(0, 1, 9).tolist()).astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    steps = np.linalg.norm(np.diff(found, axis=0), axis=1)
    np.testing.assert_allclose(steps, steps[0], atol=1e-6)


def test_prompts_are_mixed_evenly():
    one, other = (np.eye(4, dtype=np.float32)[i : i + 1] for i in (1, 3))
    (found,) = between((one,), (other,), [0, 0.25, 1])
    np.testing.assert_array_equal(found, [[0, 1, 0, 0], [0, 0.75, 0, 0.25], [0, 0, 0, 1]])


def test_of_mixed_texts_the_tokens_of_both_are_seen():
    rng = np.random.default_rng(0)
    masks = np.array([[1, 1, 0, 0]], np.float32), np.array([[1, 1, 1, 0]], np.float32)
    one, other = (
        (rng.standard_normal((1, 4, 8)).astype(np.float32) * mask[..., None], mask)
        for mask in masks
    )
    text, mask = between(one, other, [0, 0.5, 1])
    np.testing.assert_array_equal(mask, [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]])
    np.testing.assert_array_equal(text[[0, 2]], np.concatenate([one[0], other[0]]))
    np.testing.assert_allclose(text[1], (one[0][0] + other[0][0]) / 2, rtol=1e-6)


def test_interpolation_ends_at_the_pictures_of_its_noises(explorer):
    rows = explorer.interpolation()
    assert [row.label for row in rows] == [
        *(f"noise {2 * i} to {2 * i + 1}" for i in range(PAIRS)),
        "circle to square",
    ]
    assert all(row.pictures.shape == (COLUMNS, 16, 16, 3) for row in rows)
    stage, told = explorer.stage, tuple(array[[0, 0, 1]] for array in explorer.prompt)
    config = replace(explorer.config, sampler="ddim")
    made = stage.sample(
        config, tuple(np.resize(a, (COLUMNS, a.shape[1])) for a in told), 7, [0, 1, 0] * 2 + [0, 1]
    )
    ends = np.stack([rows[0].pictures[0], rows[0].pictures[-1], rows[-1].pictures[-1]])
    assert np.abs(ends.astype(int) - made[:3]).max() <= 1


# What noising shows.


def test_a_noised_picture_is_alpha_x_and_sigma_eps(explorer):
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    rows = explorer.noising(picture)
    assert [row.label for row in rows] == ["cosine", "linear", "offset_cosine", "the stage's own"]
    config = explorer.stage.config
    mean, std = (
        np.array(each).reshape(3, 1, 1) for each in (config.pixels.mean, config.pixels.std)
    )
    x = (to_float(picture).astype(np.float64) - mean) / std
    eps = sampling_noise(7, [0], (3, 16, 16), 0)[0].astype(np.float64)
    for column, time in enumerate(np.linspace(0, 1, COLUMNS)):
        logsnr = config.diffusion.logsnr(np.array(time))
        assert rows[-1].captions[column] == f"logsnr {logsnr:.1f}"
        z = np.sqrt(1 / (1 + np.exp(-logsnr))) * x + np.sqrt(1 / (1 + np.exp(logsnr))) * eps
        expected = np.clip((z * std + mean + 1) * 127.5, 0, 255).transpose(1, 2, 0)
        assert np.abs(rows[-1].pictures[column] - expected).max() <= 1
    assert (rows[0].pictures[0] == picture).all()  # cosine: logsnr 20


# How it is sampled.


def test_the_path_ends_at_the_picture_and_starts_at_the_noise(explorer):
    rows = explorer.path()
    assert [row.label for row in rows] == ["z", "x"] * PATHS
    made = explorer.grid(COLUMNS)[0].pictures
    noise = sampling_noise(7, range(PATHS), (3, 16, 16), 0)
    for i in range(PATHS):
        z, x = rows[2 * i].pictures, rows[2 * i + 1].pictures
        assert len(z) == len(x) == explorer.config.steps  # which are fewer than eight
        assert (z[0] == explorer.stage.to_pictures(noise[i : i + 1])[0]).all()
        assert (x[-1] == made[i]).all()


def test_steps_are_compared_under_one_noise(explorer):
    rows = explorer.by_steps()
    assert [row.label for row in rows] == [
        f"{number} steps" for number in (2, 4, 8, 16, 20)
    ]  # 20 is all of time
    own = explorer.stage.sample(explorer.config, explorer.told(range(COLUMNS)), 7, range(COLUMNS))
    assert all((row.pictures != own).any() for row in rows)  # which has three steps
    assert len({row.pictures.tobytes() for row in rows}) == len(rows)


def test_a_grid_has_as_many_as_were_asked_for(explorer):
    rows = explorer.grid(11)
    assert [len(row.pictures) for row in rows] == [8, 3]
    assert [*rows[0].captions, *rows[1].captions][:11] == [*SHAPES, *SHAPES, *SHAPES][:11]
    assert (rows[0].pictures == explorer.grid(8)[0].pictures).all()


# The sheets.


def explore(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["explore", *arguments])
    return end.value.code


def test_the_command_draws_five_sheets_of_a_cascades_first_stage(trained, tmp_path, capsys):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    out = tmp_path / "new" / "out"
    options = [
        "--num",
        "3",
        "--image",
        str(tmp_path / "red.png"),
        "--prompt",
        "a small red circle on white",
        "a cross",
    ]
    assert explore(str(trained / "cascade"), "--out", str(out), *options) == 0
    assert (
        capsys.readouterr().out
        == f"{out}: grid.png, path.png, steps.png, interpolation.png, noising.png\n"
    )
    assert sorted(path.name for path in out.iterdir()) == SHEETS
    for path in out.iterdir():
        Image.open(path).verify()


@pytest.mark.parametrize(
    ("place", "arguments", "message"),
    [
        (
            "folder",
            ["--prompt", "circle", "sphere"],
            "'sphere' is no class; the classes are circle, square, triangle, ",
        ),
        ("folder", ["--prompt", "4"], "'4' is no class"),
        (
            "folder",
            ["--image", "nowhere.png"],
            "nowhere.png: No such file or directory; give a picture",
        ),
        (
            "folder",
            ["--image", __file__],
            f"{__file__}: is none of JPEG, PNG, WEBP, GIF, BMP; give a picture",
        ),
        ("nowhere", [], "nowhere/cascade.json: no such file"),
        (
            "cascade",
            [],
            "no prompt: these stages are told a text; give --prompt TEXT, one a picture",
        ),
    ],
)
def test_what_cannot_be_looked_at(folder, trained, tmp_path, capsys, place, arguments, message):
    place = {"folder": str(folder), "cascade": str(trained / "cascade")}.get(place, place)
    assert explore(place, "--out", str(tmp_path / "out"), *arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
