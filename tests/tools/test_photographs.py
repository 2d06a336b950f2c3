"""Squares of photographs in tars: what they hold, what is held out, and that the seed alone
decides.
"""

import io
import json
import re
import shutil
import tarfile
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from pipeline.data.shards import DataConfig, Shards
from pipeline.errors import UserError
from pipeline.rng import generator
from tools import photographs
from tools.photographs import FOLDERS, PHOTOGRAPHS, main, parts, read, samples, square

ARGUMENTS = ["--size", "32", "--num", "60", "--held-out", "20", "--shard-size", "25"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("photographs") / "out"
    main([str(out), *ARGUMENTS])
    return out


def files(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_what_is_written(folder):
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == [
        *("held_out/00000.tar", "photographs.json"),
        *(f"train/{number:05d}.tar" for number in range(3)),
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    for name, first, last in (("train/00001", 25, 50), ("held_out/00000", 0, 20)):
        found = files(folder / f"{name}.tar")
        assert sorted(found) == [
            f"{i:08d}.{kind}" for i in range(first, last) for kind in ("jpg", "json", "txt")
        ]
        for i in range(first, last):
            fields = json.loads(found[f"{i:08d}.json"])
            assert (fields["width"], fields["height"]) == (32, 32)
            assert (
                found[f"{i:08d}.txt"].decode()
                == f"a photograph of {PHOTOGRAPHS[fields['photograph']]}"
            )
            with Image.open(io.BytesIO(found[f"{i:08d}.jpg"])) as image:
                assert (image.format, image.size, image.mode) == ("JPEG", (32, 32), "RGB")


def test_every_photograph_has_its_turn(folder):
    tars = [files(path) for path in (folder / "train").glob("*.tar")]
    seen = {
        json.loads(data)["photograph"]
        for tar in tars
        for key, data in tar.items()
        if key.endswith("json")
    }
    assert seen == PHOTOGRAPHS.keys()


def test_no_scene_is_there_twice():
    assert len({re.split(r"[_.]", name)[0] for name in PHOTOGRAPHS}) == len(PHOTOGRAPHS)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_no_pixel_is_in_both_folders(name):
    pixels = read(name)
    (left, right), (middle,) = (parts(pixels, folder) for folder in FOLDERS)
    assert (np.concatenate((left, middle, right), 1) == pixels).all()
    assert middle.shape[1] / pixels.shape[1] == pytest.approx(1 / 3, abs=0.01)


def test_the_loader_takes_them(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "out")  # it writes an index beside the tars
    shards = Shards.open(DataConfig(shards=f"{tmp_path}/out/train/*.tar"), progress=False)
    assert len(shards) == 60
    assert not list(shards.faults)


def test_squares_are_parts_of_the_photograph_at_several_scales():
    """Red tells how far to the right a pixel was, green how far down."""
    y, x = np.mgrid[:300, :400]
    plane = np.stack([x * 255 // 399, y * 255 // 299, np.zeros_like(x)], -1).astype(np.uint8)
    squares = [
        square(plane, 20, generator(0, "photographs", 0, number)).astype(float)
        for number in range(300)
    ]
    assert {image.shape for image in squares} == {(20, 20, 3)}
    across = (
        np.array([(image[:, -1, 0] - image[:, 0, 0]).mean() for image in squares])
        * 399
        / 255
        * 20
        / 19
    )
    down = (
        np.array([(image[-1, :, 1] - image[0, :, 1]).mean() for image in squares])
        * 299
        / 255
        * 20
        / 19
    )
    assert np.abs(across - down).max() < 6  # pixels stay square
    assert 70 < across.min() < 80
    assert 290 < across.max() < 306
    assert abs(np.median(across) - 150) < 15  # evenly in log scale
    middle = np.array([image[..., 0].mean() for image in squares]) / 255
    assert middle.min() < 0.2
    assert middle.max() > 0.8


def test_squares_to_train_on_lie_in_all_eight_ways():
    """A picture whose red tells right from left and whose green tells up from down, in all of its
    squares.
    """
    y, x = np.mgrid[:64, :64]
    plane = np.stack([x * 4, y * 2, np.zeros_like(x)], -1).astype(np.uint8)
    ways = []
    for folder in ("train", "held_out"):
        squares = [
            image.astype(int)
            for image, *_ in islice(samples([("rocket.jpg", plane)], 64, 0, folder), 64)
        ]
        ways.append(
            {
                tuple(np.sign(np.diff(image[0, :2], axis=0)[0, :2])) + tuple(image[0, 0])
                for image in squares
            }
        )
    assert [len(each) for each in ways] == [8, 1]


def test_a_square_is_never_enlarged():
    pixels = read("chelsea.png")[:, :300]
    for number in range(20):
        assert (square(pixels, 300, generator(0, "photographs", 0, number)) == pixels).all()


def test_the_seed_and_the_number_decide(folder, tmp_path):
    main([str(tmp_path / "one"), *ARGUMENTS[:-1], "60"])
    several = {
        name: data
        for number in range(3)
        for name, data in files(folder / f"train/{number:05d}.tar").items()
    }
    assert files(tmp_path / "one/train/00000.tar") == several
    main([str(tmp_path / "again"), *ARGUMENTS])
    for path in folder.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(folder)).read_bytes()
    main([str(tmp_path / "other"), *ARGUMENTS, "--seed", "1"])
    assert (tmp_path / "other/train/00000.tar").read_bytes() != (
        folder / "train/00000.tar"
    ).read_bytes()


def test_the_same_command_again(folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    main([str(folder), *ARGUMENTS])
    assert "already there, 60 + 20 squares of 32 px" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"'num': 60.*'num': 61"):
        main([str(folder), *ARGUMENTS, "--num", "61"])
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num", "0"], "--num: 0 is less than 1"),
        (["--size", "151"], "--size 151: of a photograph only 150 pixels are held out"),
        (["--seed", "-1"], "--seed -1: outside"),
        (["--colour", "red"], "unrecognized arguments: --colour"),
    ],
)
def test_mistakes_leave_nothing(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        main([str(tmp_path / "out"), *ARGUMENTS, *arguments])
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(path, first, samples):
        path.write_bytes(b"half")
        if first:
            raise KeyboardInterrupt
        return 4

    monkeypatch.setattr(photographs, "write_tar", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main([str(tmp_path / "out"), *ARGUMENTS])
    assert not list(tmp_path.iterdir())


def test_without_scikit_image(tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'imagen-cascade\[restoration\]'"):
        main([str(tmp_path / "out"), *ARGUMENTS])
    assert not list(tmp_path.iterdir())
