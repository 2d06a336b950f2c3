"""Digits in tars: what they hold, that the seed alone decides, and that a stage can be told them."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from pipeline.data.shards import DataConfig, Shards
from pipeline.errors import UserError
from pipeline.rng import generator
from pipeline.text.prompts import ClassConfig, ClassPrompts
from tools.glyphs import SHIFT, SIDE, draw, main

ARGUMENTS = ["--num", "50", "--seed", "3", "--shard-size", "20"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("glyphs") / "out"
    main([str(out), *ARGUMENTS, "--workers", "1"])
    return out


def test_what_is_written(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "00000.tar",
        "00001.tar",
        "00002.tar",
        "glyphs.json",
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    with tarfile.open(folder / "00001.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    assert sorted(files) == sorted(
        f"{number:08d}.{kind}" for number in range(20, 40) for kind in ("cls", "png")
    )
    for number in range(20, 40):
        digit, picture = draw(generator(3, "glyphs", number))
        assert files[f"{number:08d}.cls"] == str(digit).encode()
        with Image.open(io.BytesIO(files[f"{number:08d}.png"])) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "L", (SIDE, SIDE))
            assert (np.asarray(image) == np.asarray(picture)).all()


def test_the_same_command_writes_the_same_bytes(folder, tmp_path, capsys):
    main([str(tmp_path / "again"), *ARGUMENTS, "--workers", "2"])
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    main([str(folder), *ARGUMENTS])
    assert "already there" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"'seed': 3.*'seed': 4"):
        main([str(folder), "--num", "50", "--seed", "4", "--shard-size", "20"])


def test_a_stage_can_be_told_the_digit(folder):
    shards = Shards.open(DataConfig(shards=f"{folder}/*.tar", captions={}), progress=False)
    assert len(shards) == 50
    told = ClassPrompts(ClassConfig(names=10), shards).embed(range(50), 0, 0, range(50))[0]
    assert told.argmax(axis=1).tolist() == [
        draw(generator(3, "glyphs", number))[0] for number in range(50)
    ]


def test_digits_are_white_on_black_whole_and_near_the_middle():
    digits, middles = [], []
    for number in range(400):
        digit, picture = draw(generator(0, "glyphs", number))
        pixels = np.asarray(picture).astype(float)
        assert pixels.max() > 200
        assert not np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).any()
        rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
        middles.append([(rows[0] + rows[-1] + 1) / 2, (columns[0] + columns[-1] + 1) / 2])
        digits.append(digit)
    assert np.abs(np.array(middles) - SIDE / 2).max() < SHIFT + 2
    assert np.abs(np.mean(middles, axis=0) - SIDE / 2).max() < 0.3
    assert min(np.bincount(digits, minlength=10)) > 20


def test_no_two_are_alike():
    pictures = {digit: [] for digit in range(10)}
    for number in range(200):
        digit, picture = draw(generator(0, "glyphs", number))
        pictures[digit].append(picture.tobytes())
    assert all(len(set(each)) == len(each) > 5 for each in pictures.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num", "0", "--seed", "1"], "--num: 0 is less than 1"),
        (["--num", "1", "--seed", "-1"], "--seed -1: outside"),
        (["--num", "1"], "required: --seed"),
    ],
)
def test_mistakes(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        main([str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()
