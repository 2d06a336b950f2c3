"""A look at a stage: what lies between two noises and two prompts, noised images, the steps of
sampling, and the contact sheets themselves.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch.cli import main as cli
from pipeline import Cascade
from pipeline.config import build
from pipeline.data.image import to_float
from pipeline.diffusion.solvers import SamplerConfig
from pipeline.generate.engine import ignore, sample
from pipeline.generate.inspect import (
    COLUMNS,
    NUM_PAIRS,
    NUM_PATHS,
    Inspector,
    mix_prompts,
    slerp,
)
from pipeline.rng import sampling_noise
from pipeline.stage.inputs import Arrays
from pipeline.stage.registry import stage_class
from pipeline.stage.request import SampleRequest
from pipeline.train.loop import train
from tests.conftest import stage_yaml
from tools.shapes import SHAPES

pytestmark = pytest.mark.slow

SEED = 7
SHEETS = ["grid.png", "interpolation.png", "noising.png", "path.png", "steps.png"]
DIFFUSION = {"schedule": "linear", "timesteps": 20, "prediction": "x0"}


@pytest.fixture(scope="module")
def folder(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage that is conditioned on a shape, on normalized pixels, in discrete time."""
    run = tmp_path_factory.mktemp("inspect") / "run"
    raw = stage_yaml("base", run, shards_folder, Path("unused")) | {
        "conditioning": "class",
        "classes": {"names": list(SHAPES), "field": "shape"},
        "pixels": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]},
        "diffusion": DIFFUSION,
    }
    del raw["text"]
    cls = stage_class("base")
    assert train(cls(build(cls.Config, raw)))
    return run / "stage"


@pytest.fixture(scope="module")
def inspector(folder: Path) -> Inspector:
    cascade = Cascade.load(folder)
    (name,) = cascade.stages
    return Inspector(
        stage=cascade.stages[name],
        prompts=SHAPES,
        arrays=cascade.prompt(name, SHAPES),
        seed=SEED,
        on_step=ignore,
    )


def sample_images(
    inspector: Inspector, config: SamplerConfig, prompt: Arrays, image_ids: Sequence[int]
) -> np.ndarray:
    """What the engine generates, without the inspector."""
    request = SampleRequest(prompt=prompt, seed=SEED, image_ids=image_ids)
    return sample(inspector.stage, config, request)


# What lies between.


def test_slerp_is_its_definition() -> None:
    one, other = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    shares = [0, 0.25, 0.5, 1]
    points = slerp(one, other, shares)
    assert points.dtype == np.float32
    assert (points[0] == one).all()
    assert (points[-1] == other).all()

    a = one.astype(np.float64).ravel()
    b = other.astype(np.float64).ravel()
    angle = np.arccos(a @ b / np.sqrt((a @ a) * (b @ b)))
    for share, point in zip(shares, points, strict=True):
        expected = (np.sin((1 - share) * angle) * a + np.sin(share * angle) * b) / np.sin(angle)
        np.testing.assert_allclose(point.ravel(), expected, rtol=1e-6, atol=1e-6)


def test_slerp_stays_on_the_sphere_in_even_steps() -> None:
    one, other = np.random.default_rng(1).standard_normal((2, 200))
    one /= np.linalg.norm(one)
    other /= np.linalg.norm(other)
    points = slerp(one, other, np.linspace(0, 1, 9).tolist()).astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, atol=1e-6)
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    np.testing.assert_allclose(steps, steps[0], atol=1e-6)


def test_labels_are_mixed_linearly() -> None:
    one, other = ({"label": np.eye(4, dtype=np.float32)[i : i + 1]} for i in (1, 3))
    mixed = mix_prompts(one, other, [0, 0.25, 1])
    assert list(mixed) == ["label"]
    expected = np.array([[0, 1, 0, 0], [0, 0.75, 0, 0.25], [0, 0, 0, 1]])
    np.testing.assert_array_equal(mixed["label"], expected)


def test_mixed_texts_attend_to_the_tokens_of_both() -> None:
    rng = np.random.default_rng(0)
    one, other = (
        {
            "text": rng.standard_normal((1, 4, 8)).astype(np.float32) * mask[..., None],
            "text_mask": mask,
        }
        for mask in (np.array([[1, 1, 0, 0]], np.float32), np.array([[1, 1, 1, 0]], np.float32))
    )
    mixed = mix_prompts(one, other, [0, 0.5, 1])
    np.testing.assert_array_equal(mixed["text_mask"], [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]])
    text = mixed["text"]
    np.testing.assert_array_equal(text[[0, 2]], np.concatenate([one["text"], other["text"]]))
    np.testing.assert_allclose(text[1], (one["text"][0] + other["text"][0]) / 2, rtol=1e-6)


def test_interpolation_ends_at_the_images_of_its_noises(inspector: Inspector) -> None:
    rows = inspector.interpolation()
    assert [row.label for row in rows] == [
        *(f"noise {2 * i} to {2 * i + 1}" for i in range(NUM_PAIRS)),
        "circle to square",
    ]
    assert all(row.images.shape == (COLUMNS, 16, 16, 3) for row in rows)

    # Noise 0 and noise 1 under the first prompt, and noise 0 under the second.
    config = replace(inspector.config, sampler="ddim")
    prompt = inspector.prompt([0, 0, 1])
    expected = sample_images(inspector, config, prompt, [0, 1, 0])
    ends = np.stack([rows[0].images[0], rows[0].images[-1], rows[-1].images[-1]])
    assert np.abs(ends.astype(int) - expected).max() <= 1


# What noising shows.


def test_a_noised_image_is_alpha_x_and_sigma_eps(inspector: Inspector) -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    rows = inspector.noising(image)
    assert [row.label for row in rows] == ["cosine", "linear", "offset_cosine", "the stage's own"]

    config = inspector.stage.config
    assert config.pixels
    mean = np.array(config.pixels.mean).reshape(3, 1, 1)
    std = np.array(config.pixels.std).reshape(3, 1, 1)
    x = (to_float(image).astype(np.float64) - mean) / std
    eps = sampling_noise(SEED, [0], (3, 16, 16), 0)[0].astype(np.float64)
    for column, time in enumerate(np.linspace(0, 1, COLUMNS)):
        logsnr = config.diffusion.logsnr(np.array(time))
        assert rows[-1].captions[column] == f"logsnr {logsnr:.1f}"
        z = np.sqrt(1 / (1 + np.exp(-logsnr))) * x + np.sqrt(1 / (1 + np.exp(logsnr))) * eps
        expected = np.clip((z * std + mean + 1) * 127.5, 0, 255).transpose(1, 2, 0)
        assert np.abs(rows[-1].images[column] - expected).max() <= 1
    assert (rows[0].images[0] == image).all()  # cosine: logsnr 20


# How it is sampled.


def test_the_path_starts_at_the_noise_and_ends_at_the_image(inspector: Inspector) -> None:
    rows = inspector.path()
    assert [row.label for row in rows] == ["z", "x"] * NUM_PATHS
    images = inspector.grid(COLUMNS)[0].images
    noise = sampling_noise(SEED, range(NUM_PATHS), (3, 16, 16), 0)
    for i in range(NUM_PATHS):
        z = rows[2 * i].images
        x = rows[2 * i + 1].images
        assert len(z) == len(x) == inspector.config.steps  # which are fewer than eight
        assert (z[0] == inspector.stage.to_images(noise[i : i + 1])[0]).all()
        assert (x[-1] == images[i]).all()


def test_numbers_of_steps_are_compared_under_one_noise(inspector: Inspector) -> None:
    rows = inspector.by_steps()
    numbers = (2, 4, 8, 16, 20)  # 20 is all of discrete time
    assert [row.label for row in rows] == [f"{steps} steps" for steps in numbers]
    assert len({row.images.tobytes() for row in rows}) == len(rows)

    image_ids = range(COLUMNS)
    prompt = inspector.prompt(image_ids)
    own = sample_images(inspector, inspector.config, prompt, image_ids)  # in three steps
    assert all((row.images != own).any() for row in rows)
    in_eight = sample_images(inspector, replace(inspector.config, steps=8), prompt, image_ids)
    assert (rows[2].images == in_eight).all()


def test_a_grid_has_the_images_that_the_engine_samples(inspector: Inspector) -> None:
    rows = inspector.grid(11)
    assert [len(row.images) for row in rows] == [8, 3]
    assert [*rows[0].captions, *rows[1].captions][:11] == [*SHAPES, *SHAPES, *SHAPES][:11]

    image_ids = range(11)
    prompt = inspector.prompt(image_ids)
    expected = sample_images(inspector, inspector.config, prompt, image_ids)
    assert (np.concatenate([row.images for row in rows]) == expected).all()


# The contact sheets.


def explore(*arguments: object) -> int | str | None:
    """The exit code of `cascade explore`."""
    with pytest.raises(SystemExit) as end:
        cli.main(["explore", *map(str, arguments)])
    return end.value.code


def test_the_command_draws_five_sheets_of_a_cascades_first_stage(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "red.png"
    Image.new("RGB", (40, 30), "red").save(image)
    out = tmp_path / "new" / "out"
    prompts = ["--prompt", "a small red circle on white", "a cross"]
    options = ["--num", 3, "--image", image, *prompts]
    assert explore(trained / "cascade", "--out", out, *options) == 0
    assert capsys.readouterr().out == (
        f"{out}: grid.png, path.png, steps.png, interpolation.png, noising.png\n"
    )
    assert sorted(path.name for path in out.iterdir()) == SHEETS
    for path in out.iterdir():
        Image.open(path).verify()


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        (
            "folder",
            ["--prompt", "circle", "sphere"],
            "'sphere' is no class; the classes are circle, square, triangle, ",
        ),
        ("folder", ["--prompt", "4"], "'4' is no class"),
        ("folder", ["--image", "no.png"], "no.png: No such file or directory; give "),
        (
            "folder",
            ["--image", __file__],
            f"{__file__}: is none of JPEG, PNG, WEBP, GIF, BMP; give ",
        ),
        ("no folder", [], "no folder/cascade.json: no such file"),
        (
            "cascade",
            [],
            "--prompt: missing; these stages are conditioned on text; give one prompt per image",
        ),
    ],
)
def test_what_cannot_be_inspected_is_refused(
    folder: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    arguments: list[str],
    message: str,
) -> None:
    path = {"folder": folder, "cascade": trained / "cascade"}.get(stage, Path(stage))
    assert explore(path, "--out", tmp_path / "out", *arguments) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith(message)
    assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
