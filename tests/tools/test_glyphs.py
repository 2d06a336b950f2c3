"""Digits: what the tars hold, that the seed alone decides, and that a stage gets their classes."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.config import DataConfig
from pipeline.data.shards import Shards
from pipeline.errors import UserError
from pipeline.rng import generator
from pipeline.text.prompts import ClassConfig, ClassPrompts
from tests.helpers.tools import read_tar
from tools.glyphs import SHIFT, SIDE, Digit, draw, main

ARGUMENTS = ["--num", "50", "--seed", "3", "--shard-size", "20"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 digits in three tars; read only."""
    out = tmp_path_factory.mktemp("glyphs") / "out"
    main([str(out), *ARGUMENTS, "--workers", "1"])
    return out


@pytest.fixture(scope="module")
def digits() -> list[Digit]:
    return [draw(generator(0, "glyphs", index)) for index in range(400)]


def test_tars_hold_images_and_classes(folder: Path) -> None:
    names = ["00000.tar", "00001.tar", "00002.tar", "glyphs.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [path.name for path in folder.parent.iterdir()] == ["out"]

    files = read_tar(folder / "00001.tar")
    assert sorted(files) == sorted(
        f"{index:08d}.{extension}" for index in range(20, 40) for extension in ("cls", "png")
    )
    for index in range(20, 40):
        digit = draw(generator(3, "glyphs", index))
        assert files[f"{index:08d}.cls"] == str(digit.label).encode()
        with Image.open(io.BytesIO(files[f"{index:08d}.png"])) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (SIDE, SIDE))
            assert (np.asarray(image) == np.asarray(digit.image)).all()


def test_workers_do_not_change_the_bytes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(tmp_path / "again"), *ARGUMENTS, "--workers", "2"])
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()

    main([str(folder), *ARGUMENTS])
    assert "already there" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"'seed': 3.*'seed': 4"):
        main([str(folder), "--num", "50", "--seed", "4", "--shard-size", "20"])


def test_a_stage_reads_the_classes(folder: Path) -> None:
    shards = Shards.open(DataConfig(shards=f"{folder}/*.tar", captions={}), progress=False)
    assert len(shards) == 50
    labels = ClassPrompts(ClassConfig(names=10), shards).embed(range(50), 0, 0, range(50))["label"]
    assert labels.argmax(axis=1).tolist() == [
        draw(generator(3, "glyphs", index)).label for index in range(50)
    ]


def test_digits_are_white_on_black_whole_and_near_the_middle(digits: list[Digit]) -> None:
    middles = []
    for digit in digits:
        pixels = np.asarray(digit.image).astype(float)
        assert pixels.max() > 200
        assert not np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).any()

        rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
        middles.append([(rows[0] + rows[-1] + 1) / 2, (columns[0] + columns[-1] + 1) / 2])

    assert np.abs(np.array(middles) - SIDE / 2).max() < SHIFT + 2
    assert np.abs(np.mean(middles, axis=0) - SIDE / 2).max() < 0.3
    assert min(np.bincount([digit.label for digit in digits], minlength=10)) > 20


def test_no_two_digits_are_equal(digits: list[Digit]) -> None:
    assert len({digit.image.tobytes() for digit in digits}) == len(digits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num", "0", "--seed", "1"], "--num: 0 is less than 1"),
        (["--num", "1", "--seed", "-1"], "--seed: -1 is outside"),
        (["--num", "1"], "required: --seed"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()
