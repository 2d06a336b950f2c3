"""Image to image: what a batch holds, what the loss counts, and folders of restored pictures.

The stage was trained for four steps: what matters is what stays, what is made and what is refused.
"""

import json
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor
from PIL import Image

from launch.cli import main as cli
from pipeline import Cascade
from pipeline.config import ConfigError, build
from pipeline.diffusion.process import add_noise
from pipeline.errors import UserError
from pipeline.generate.cascade_folder import export
from pipeline.generate.restore import Damage, RestoreOptions, chunks, damages, extended, restore
from pipeline.imaging.compositing import least_certain, spread
from pipeline.imaging.degradations import TASKS, grey
from pipeline.nn.parameters import initialize
from pipeline.stage.registry import stage_class
from pipeline.train.loop import train
from tests.conftest import LENGTH, stage_yaml

KNOWN = ["inpainting", "colorization"]
RNG = np.random.default_rng(0)


def make(run: Path, shards: Path, **changes: Any) -> Any:
    raw = stage_yaml("base", run, shards, Path("unused")) | {"kind": "image_to_image"}
    del raw["text"]
    raw["unet"] |= {"patch": 2, "attention": ["none", "none"], "dropout": 0.1}
    raw["sample"] = {"sampler": "ddim", "steps": 2, "batch_size": 4, "threshold": "static"}
    raw["tasks"] = {"inpainting": {"logsnr_shift": -1.0}, "colorization": {"weight": 3.0}}
    cls = stage_class("image_to_image")
    return cls(build(cls.Config, raw | changes))


@pytest.fixture(scope="module")
def stage() -> Any:
    stage = make(Path("run"), Path("shards"))
    initialize(stage.network, 0)
    return stage


@pytest.fixture(scope="module")
def run(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("palette") / "run"
    assert train(make(folder, shards_folder))
    return folder


@pytest.fixture(scope="module")
def cascade(run: Path) -> Cascade:
    return Cascade.load(run / "stage")


def picture(height: int = 16, width: int = 16) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def hole(height: int = 16, width: int = 16) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[4:12, 3:10] = True
    return mask


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


class TestBatch:
    def test_holds_damage_of_every_task_in_its_share(self, stage):
        num = 400
        pictures = np.stack([picture()] * num)
        x, *_, source, mask, task = stage.batch(0, range(num), pictures)
        assert task.sum(axis=1).tolist() == [1.0] * num
        assert task[:, 0].mean() == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / num))
        for number in range(40):
            if task[number, 0]:
                assert 0.1 <= mask[number].mean() <= 0.4
                known = np.broadcast_to(mask[number] == 0, x[number].shape)
                np.testing.assert_array_equal(source[number][known], x[number][known])
            else:
                assert (mask[number] == 1).all()
                np.testing.assert_array_equal(source[number][0], source[number][2])

    def test_a_task_has_its_noise(self, stage):
        """The same times with and without the logsnr_shift."""
        num, plain = (
            40,
            make(
                Path("run"),
                Path("shards"),
                tasks={"inpainting": {}, "colorization": {"weight": 3.0}},
            ),
        )
        pictures = np.stack([picture()] * num)
        shifted, level = (each.batch(0, range(num), pictures) for each in (stage, plain))
        np.testing.assert_array_equal(shifted[-1], level[-1])
        np.testing.assert_allclose(shifted[2] - level[2], -shifted[-1][:, 0], atol=1e-5)

    def test_does_not_depend_on_company(self, stage):
        pictures = np.stack([picture() for _ in range(4)])
        whole = stage.batch(3, range(4), pictures)
        for array, part in zip(whole, stage.batch(3, range(2, 4), pictures[2:]), strict=True):
            assert array.dtype in (np.float32, np.int32)  # the latter seeds dropout
            assert (array[2:] == part).all()


def test_the_loss_is_the_holes(stage):
    """What lies outside of the hole changes nothing: neither what the network sees there nor what
    is asked.
    """
    x, *rest = stage.batch(0, range(8), np.stack([picture() for _ in range(8)]))
    mask = rest[-2]
    assert (mask == 0).any()
    other = np.where(mask == 1, x, RNG.standard_normal(x.shape).astype(np.float32))
    inside = np.where(mask == 1, x + 0.1, x)
    losses = [
        stage.loss(Tensor(image), *map(Tensor, rest)).asnumpy() for image in (x, other, inside)
    ]
    np.testing.assert_array_equal(losses[0], losses[1])
    assert (losses[0] != losses[2]).all()


@pytest.fixture(scope="module")
def guessing(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A stage whose network answers how the picture differs from a prior_mean."""
    tasks = {"inpainting": {"residual_std": 0.1}, "colorization": {"residual_std": 0.2}}
    folder = tmp_path_factory.mktemp("guessing") / "run"
    return make(folder, shards_folder, diffusion={"prediction": "x0"}, tasks=tasks)


class TestGuess:
    def test_a_network_that_answers_nothing_leaves_the_guess_or_what_z_shows(self, guessing):
        initialize(guessing.network, 0)
        pictures = np.stack([picture() for _ in range(4)])
        x, eps, _, *told = guessing.batch(0, range(4), pictures)
        for level, wanted in ((-20.0, told[-3]), (20.0, x)):
            logsnr = np.full(4, level, np.float32)
            z = add_noise(Tensor(x), Tensor(eps), Tensor(logsnr))
            found = guessing.predict(z, Tensor(logsnr), *map(Tensor, told)).asnumpy()
            np.testing.assert_allclose(found, wanted, atol=1e-3)

    def test_errors_count_in_spreads(self, guessing):
        """A network that answers nothing, in much noise: the prior_mean's own error in the hole, or
        everywhere.
        """
        initialize(guessing.network, 0)
        x, eps, _, *told = guessing.batch(0, range(6), np.stack([picture() for _ in range(6)]))
        *_, prior_mean, mask, task = told
        found = guessing.loss(*map(Tensor, (x, eps, np.full(6, -20, np.float32), *told))).asnumpy()
        error = ((x - prior_mean) ** 2 * mask).mean((1, 2, 3)) / mask.mean((1, 2, 3))
        np.testing.assert_allclose(found, error / (task @ (0.1, 0.2)) ** 2, rtol=1e-3)

    @pytest.mark.parametrize("level", [-20.0, 0.0, 20.0])
    def test_the_network_sees_what_z_shows_of_the_difference(self, guessing, level):
        """Beside the prior_mean and the mask: nothing in much noise, all of it in little, and none where
        it is known.
        """
        x, eps, *_, prior_mean, mask, task = guessing.batch(
            0, range(4), np.stack([picture() for _ in range(4)])
        )
        logsnr, seen = np.full(4, level, np.float32), []
        watched = copy(guessing)
        watched.network = lambda seen_B7HW, *_: seen.append(seen_B7HW.asnumpy()) or seen_B7HW[:, :3]
        z = add_noise(Tensor(x), Tensor(eps), Tensor(logsnr))
        watched.predict(z, *map(Tensor, (logsnr, prior_mean, mask, task)))
        np.testing.assert_array_equal(seen[0][:, 3:], np.concatenate((prior_mean, mask), 1))
        assert not seen[0][:, :3][np.broadcast_to(mask, x.shape) == 0].any()
        if level:
            wanted = mask * (x - prior_mean) / (task @ (0.1, 0.2)).reshape(4, 1, 1, 1) * (level > 0)
            np.testing.assert_allclose(seen[0][:, :3], wanted, atol=0.02)

    def test_it_trains_and_restores(self, guessing, tmp_path):
        """Several samples, a part of them once more, and a mask that leaves nothing to go by."""
        assert train(guessing)
        cascade = Cascade.load(Path(guessing.config.run) / "stage")
        damages = [
            Damage("a", picture(17, 13), hole(17, 13)),
            Damage("b", picture(), np.ones((16, 16), bool)),
        ]
        how = RestoreOptions(task="inpainting", samples=2, repaint_share=0.25)
        assert restore(cascade, damages, how, tmp_path / "out") == 2
        found = read(tmp_path / "out" / "a.png")
        assert (found[~damages[0].mask] == damages[0].picture[~damages[0].mask]).all()
        assert read(tmp_path / "out" / "b.png").std() > 1


class TestRestore:
    def test_what_is_known_is_untouched_and_the_hole_is_made(self, cascade, tmp_path):
        """Sides that the stride does not divide, and two sizes at once."""
        pictures = [
            Damage(f"p{n}", picture(*size), hole(*size))
            for n, size in enumerate([(16, 16), (17, 13), (16, 16)])
        ]
        assert restore(cascade, pictures, RestoreOptions(task="inpainting"), tmp_path / "out") == 3
        for each in pictures:
            found = read(tmp_path / "out" / f"{each.name}.png")
            assert (found[~each.mask] == each.picture[~each.mask]).all()
            assert (found[each.mask] != each.picture[each.mask]).mean() > 0.9

    def test_a_picture_alone_is_the_picture_in_company(self, cascade, tmp_path):
        pictures = [Damage(f"p{n}", picture(), hole()) for n in range(3)]
        how = RestoreOptions(task="inpainting", samples=2)
        restore(cascade, pictures, how, tmp_path / "all")
        restore(cascade, pictures[:1], how, tmp_path / "one")
        for name in ("p0.png", "p0.sample_1.png", "p0.residual_std.png"):
            assert (read(tmp_path / "all" / name) == read(tmp_path / "one" / name)).all()

    def test_samples_their_spread_and_their_blend(self, cascade, tmp_path):
        damage = Damage("p", picture(), hole())
        restore(
            cascade,
            [damage],
            RestoreOptions(task="inpainting", samples=3, weights=(0.0, 1.0, 1.0)),
            tmp_path,
        )
        samples = np.stack([read(tmp_path / f"p.sample_{n}.png") for n in range(3)])
        assert spread(samples)[~damage.mask].max() == 0
        assert spread(samples)[damage.mask].min() > 0
        np.testing.assert_allclose(read(tmp_path / "p.png"), samples[1:].mean(0), atol=0.51)
        entry = json.loads((tmp_path / "manifest.jsonl").read_text().splitlines()[-1])
        assert entry["file"] == "p.png"
        assert entry["mean_spread"] == pytest.approx(spread(samples)[damage.mask].mean())
        assert set(entry["seam"]) == {"across", "known", "painted"}

    @pytest.mark.parametrize("task", KNOWN)
    def test_the_least_certain_part_alone_is_made_again(self, cascade, tmp_path, task):
        mask = hole() if task == "inpainting" else np.ones((16, 16), bool)
        damage, how = Damage("p", picture(), mask), {"task": task, "samples": 3}
        for name, more in (("without", {}), ("with", {"repaint_share": 0.25})):
            restore(cascade, [damage], RestoreOptions(**how, **more), tmp_path / name)
        samples = np.stack([read(tmp_path / "with" / f"p.sample_{n}.png") for n in range(3)])
        part = least_certain(spread(samples), mask, 0.25)
        before, after = (read(tmp_path / name / "p.png") for name in ("without", "with"))
        assert (before[~part] == after[~part]).all()
        assert (before[part] != after[part]).any(axis=-1).mean() > 0.5

    def test_a_folder_goes_on_where_it_was(self, cascade, tmp_path):
        pictures = [Damage(f"p{n}", picture(), hole()) for n in range(2)]
        how = RestoreOptions(task="inpainting")
        assert restore(cascade, pictures[:1], how, tmp_path) == 1
        assert restore(cascade, pictures, how, tmp_path) == 1
        assert restore(cascade, pictures, how, tmp_path) == 0
        with pytest.raises(
            UserError, match=r"p0\.png: was made with seed 0 and this command has 1; choose an"
        ):
            restore(cascade, pictures, RestoreOptions(task="inpainting", seed=1), tmp_path)

    def test_colour_starts_from_grey(self, cascade, tmp_path):
        """Of a coloured picture only its grey is used."""
        image = picture()
        for name, seen in (("colour", image), ("grey", grey(image))):
            restore(
                cascade,
                [Damage("p", seen, np.ones((16, 16), bool))],
                RestoreOptions(task="colorization"),
                tmp_path / name,
            )
        assert (read(tmp_path / "colour" / "p.png") == read(tmp_path / "grey" / "p.png")).all()

    def test_what_is_too_small_is_refused(self, cascade, tmp_path):
        tiny = Damage("tiny", picture(3, 9), np.ones((3, 9), bool))
        with pytest.raises(UserError, match="tiny: 9 x 3 pixels; this stage takes sides from 4 on"):
            restore(cascade, [tiny], RestoreOptions(task="colorization"), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_pictures_are_extended_on_each_side():
    image = picture(4, 6)
    larger, mask = extended(image, (1, 2, 3, 0))
    assert larger.shape == (6, 10, 3)
    assert (larger[2:, 1:7] == image).all()
    assert not mask[2:, 1:7].any()
    assert mask.sum() == 60 - 24


def test_those_of_one_size_go_together():
    shapes = {0: (2, 2), 1: (4, 4), 2: (2, 2)}
    assert chunks([0, 1, 2], shapes.__getitem__) == [[0, 2], [1]]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, array in (
        ("a", picture()),
        ("mask", hole() * np.uint8(255)),
        ("small", hole(8, 16) * np.uint8(255)),
    ):
        Image.fromarray(array).save(tmp_path / f"{name}.png")
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "none.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "twice").mkdir()
    for name in ("a.png", "a.jpg"):
        Image.fromarray(picture()).save(tmp_path / "twice" / name)
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
        ("inpainting", "a.png", {"mask": "none.png"}, "none.png: nothing in this mask is white"),
        (
            "inpainting",
            "a.png",
            {},
            "inpainting: say what is to be made, by --mask PATH or by --extend",
        ),
        (
            "colorization",
            "a.png",
            {"mask": "mask.png"},
            "--mask: colorization makes every pixel anew; leave it out",
        ),
        (
            "colorization",
            "broken.png",
            {},
            "broken.png: is none of JPEG, PNG, WEBP, GIF, BMP; give a picture",
        ),
        ("colorization", "gone.png", {}, "gone.png: No such file or directory; give a picture"),
        ("colorization", "empty", {}, "empty: there is no picture in this folder"),
        ("colorization", "twice", {}, "twice: two pictures have one name but for its ending"),
        (
            "uncropping",
            "a.png",
            {"extend": (0, 0, 0, 0)},
            "--extend: 0 0 0 0; give pixels of at least 0, some above",
        ),
        (
            "uncropping",
            "a.png",
            {"extend": (8, 0, 0, -1)},
            "--extend: 8 0 0 -1; give pixels of at least 0, some above",
        ),
    ],
)
def test_input_that_cannot_be(files, task, image, options, message):
    masks = files / options["mask"] if "mask" in options else None
    with pytest.raises(UserError) as error:
        damages(task, files / image, masks, options.get("extend"))
    assert message.format(files) in str(error.value)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"samples": 2, "weights": (1.0,)}, "--weights: 1 for 2 samples; give each sample one"),
        ({"samples": 4, "repaint_share": 1.5}, r"--repaint-share: 1\.5 is not in \[0, 1\]"),
        (
            {"repaint_share": 0.25},
            "--repaint-share: 1 sample says nothing of what is certain; give --samples 4",
        ),
    ],
)
def test_what_is_asked_of_samples(how, message):
    with pytest.raises(UserError, match=message):
        RestoreOptions(task="inpainting", **how)


def test_the_command(run, files, capsys, monkeypatch):
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
        match="--task: uncropping is nothing that this stage was trained for; it knows inp",
    ):
        cli.answer([*argv, "--task", "uncropping", "--extend", "4", "4", "4", "4"])
    assert not (files / "out").exists()
    assert (
        cli.answer(
            [*argv, "--task", "inpainting", "--mask", str(files / "mask.png"), "--steps", "3"]
        )
        == 0
    )
    assert (
        capsys.readouterr().out
        == f"{files / 'out'}: 1 of 1 pictures restored now, listed in manifest.jsonl\n"
    )
    entry = json.loads((files / "out" / "manifest.jsonl").read_text())
    assert (entry["task"], entry["steps"], entry["file"]) == ("inpainting", 3, "a.png")


@pytest.mark.parametrize("residual_std", [None, 0.1])
def test_text_is_told_beside_the_task(shards_folder, t5_folder, tmp_path, residual_std):
    """Trained on captions, joined with the encoder and asked with and without words, with guidance."""
    changes = {
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
    told = Cascade.load(tmp_path / "cascade")
    damage, how = Damage("p", picture(), hole()), RestoreOptions(task="inpainting")
    found = []
    for number, words in enumerate(
        ("a small red circle on white", "a large blue square on black", "")
    ):
        restore(told, [damage], how, tmp_path / str(number), words)
        found.append(read(tmp_path / str(number) / "p.png"))
    one, other, none = found
    assert (one != other).any()
    assert (one != none).any()


def test_other_stages_restore_nothing_and_this_one_makes_nothing(run, trained, files):
    argv = ["--task", "colorization", "--image", str(files / "a.png"), "--out", str(files / "out")]
    with pytest.raises(UserError, match="base, sr32, sr64: not an image-to-image stage"):
        cli.answer(["restore", str(trained / "cascade"), *argv])
    with pytest.raises(
        UserError, match="image_to_image restores pictures and makes none; use `cascade restore`"
    ):
        Cascade.load(run / "stage")(["x"])
    with pytest.raises(
        UserError,
        match="image_to_image starts from a picture; give the folder of a stage that needs",
    ):
        cli.answer(["explore", str(run / "stage"), "--out", str(files / "look")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tasks": {"painting": {}}},
            f"tasks.painting: no such task; there are {', '.join(TASKS)}",
        ),
        ({"tasks": {}}, f"tasks: there is none; name some of {', '.join(TASKS)}"),
        (
            {"tasks": {"inpainting": {"weight": 0}}},
            "tasks.inpainting.weight: 0.0 is not positive; leave out the task",
        ),
        (
            {"tasks": {"inpainting": {"residual_std": 0.0}}},
            "tasks.inpainting.residual_std: 0.0 is not positive; leave it out for a",
        ),
        (
            {"tasks": {"inpainting": {"residual_std": 0.1}, "colorization": {}}},
            "tasks.colorization.residual_std: none, and other tasks have one; give each task one or none",
        ),
        (
            {"tasks": {"inpainting": {"residual_std": 0.1}}},
            "diffusion.prediction: v, and tasks have a residual_std; give x0",
        ),
        (
            {"conditioning": "class", "classes": {"names": 3}},
            "conditioning: class, but image to image is told its task",
        ),
    ],
)
def test_configurations_that_cannot_be(changes, message):
    with pytest.raises(ConfigError) as error:
        make(Path("run"), Path("shards"), **changes)
    assert str(error.value).startswith(message)
