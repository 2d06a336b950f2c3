"""Squares of photographs: what the tars hold, what is held out, and that the seed alone decides."""

import io
import json
import re
import shutil
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.config import DataConfig
from pipeline.data.shards import Shards
from pipeline.errors import UserError
from pipeline.rng import generator
from tests.helpers.tools import read_tar
from tools.dataset import new_dataset
from tools.photographs import (
    FOLDERS,
    PHOTOGRAPHS,
    Region,
    crop_square,
    main,
    read,
    samples,
    split,
)

ARGUMENTS = ["--size", "32", "--num", "60", "--held-out", "20", "--shard-size", "25"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 squares to train on in three tars, 20 held out in one; read only."""
    out = tmp_path_factory.mktemp("photographs") / "out"
    main([str(out), *ARGUMENTS])
    return out


def test_tars_hold_images_captions_and_fields(folder: Path) -> None:
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == [
        *("held_out/00000.tar", "photographs.json"),
        *(f"train/{shard:05d}.tar" for shard in range(3)),
    ]
    assert [path.name for path in folder.parent.iterdir()] == ["out"]

    for name, first, last in (("train/00001", 25, 50), ("held_out/00000", 0, 20)):
        files = read_tar(folder / f"{name}.tar")
        assert sorted(files) == [
            f"{i:08d}.{extension}"
            for i in range(first, last)
            for extension in ("jpg", "json", "txt")
        ]
        for i in range(first, last):
            fields = json.loads(files[f"{i:08d}.json"])
            assert (fields["width"], fields["height"]) == (32, 32)
            caption = f"a photograph of {PHOTOGRAPHS[fields['photograph']]}"
            assert files[f"{i:08d}.txt"].decode() == caption
            with Image.open(io.BytesIO(files[f"{i:08d}.jpg"])) as image:
                assert (image.format, image.size, image.mode) == ("JPEG", (32, 32), "RGB")


def test_every_photograph_is_used(folder: Path) -> None:
    fields = [
        json.loads(data)
        for path in (folder / "train").glob("*.tar")
        for name, data in read_tar(path).items()
        if name.endswith("json")
    ]
    assert {each["photograph"] for each in fields} == PHOTOGRAPHS.keys()


def test_no_scene_occurs_twice() -> None:
    assert len({re.split(r"[_.]", name)[0] for name in PHOTOGRAPHS}) == len(PHOTOGRAPHS)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_no_pixel_is_in_both_folders(name: str) -> None:
    pixels = read(name)
    (left, right), (middle,) = (split(pixels, folder) for folder in FOLDERS)
    assert (np.concatenate((left, middle, right), 1) == pixels).all()
    assert middle.shape[1] / pixels.shape[1] == pytest.approx(1 / 3, abs=0.01)


def test_the_loader_reads_them(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "out")  # an index is written beside the tars
    shards = Shards.open(DataConfig(shards=f"{tmp_path}/out/train/*.tar"), progress=False)
    assert len(shards) == 60
    assert not list(shards.faults)


def test_squares_are_crops_at_several_scales() -> None:
    """Red encodes a pixel's column and green its row."""
    y, x = np.mgrid[:300, :400]
    plane = np.stack([x * 255 // 399, y * 255 // 299, np.zeros_like(x)], -1).astype(np.uint8)
    squares = [
        crop_square(plane, 20, generator(0, "photographs", 0, index)).astype(float)
        for index in range(300)
    ]
    assert {image.shape for image in squares} == {(20, 20, 3)}

    # Sides in pixels of the plane, from the range of the colours between the outer pixels' centres.
    red = np.array([(image[:, -1, 0] - image[:, 0, 0]).mean() for image in squares])
    green = np.array([(image[-1, :, 1] - image[0, :, 1]).mean() for image in squares])
    width = red * 399 / 255 * 20 / 19
    height = green * 299 / 255 * 20 / 19
    assert np.abs(width - height).max() < 6  # pixels stay square
    assert 70 < width.min() < 80
    assert 290 < width.max() < 306
    assert abs(np.median(width) - 150) < 15  # log-uniform

    middle = np.array([image[..., 0].mean() for image in squares]) / 255
    assert middle.min() < 0.2
    assert middle.max() > 0.8


def test_only_training_squares_are_flipped_and_rotated() -> None:
    """Red tells right from left and green up from down, in all crops of this plane."""
    y, x = np.mgrid[:64, :64]
    plane = np.stack([x * 4, y * 2, np.zeros_like(x)], -1).astype(np.uint8)
    num_orientations = []
    for folder in FOLDERS:
        squares = islice(samples([Region("rocket.jpg", plane)], 64, 0, folder), 64)
        num_orientations.append(len({square.image[:2, :2].tobytes() for square in squares}))
    assert num_orientations == [8, 1]


def test_a_square_is_never_enlarged() -> None:
    pixels = read("chelsea.png")[:, :300]
    for index in range(20):
        assert (crop_square(pixels, 300, generator(0, "photographs", 0, index)) == pixels).all()


def test_seed_and_index_decide(folder: Path, tmp_path: Path) -> None:
    main([str(tmp_path / "one"), *ARGUMENTS[:-1], "60"])
    files = {
        name: data
        for shard in range(3)
        for name, data in read_tar(folder / f"train/{shard:05d}.tar").items()
    }
    assert read_tar(tmp_path / "one/train/00000.tar") == files

    main([str(tmp_path / "again"), *ARGUMENTS])
    for path in folder.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(folder)).read_bytes()

    main([str(tmp_path / "other"), *ARGUMENTS, "--seed", "1"])
    other = (tmp_path / "other/train/00000.tar").read_bytes()
    assert other != (folder / "train/00000.tar").read_bytes()


def test_the_same_command_again_does_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
        (["--size", "151"], "size: 151 px does not fit into .*; take at most 150"),
        (["--seed", "-1"], "--seed: -1 is outside"),
        (["--colour", "red"], "unrecognized arguments: --colour"),
    ],
)
def test_wrong_arguments_leave_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([str(tmp_path / "out"), *ARGUMENTS, *arguments])
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def write_half() -> None:
        with new_dataset(tmp_path / "out", "photographs.json", {}) as folder:
            (folder / "00000.tar").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert not list(tmp_path.iterdir())


def test_without_scikit_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "skimage"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(UserError, match=r"pip install 'imagen-cascade\[restoration\]'"):
        main([str(tmp_path / "out"), *ARGUMENTS])
    assert not list(tmp_path.iterdir())
