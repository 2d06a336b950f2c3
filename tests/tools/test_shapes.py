import io
import itertools
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.terminal import run
from tools.shapes import (
    BACKGROUNDS,
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    caption,
    draw,
    main,
    parse,
    random_scene,
)

SCENES = [
    Scene(size=size, colour=colour, shape=shape, background=background, position=position)
    for size, colour, shape, background, position in itertools.product(
        SIZES, COLOURS, SHAPES, BACKGROUNDS, POSITIONS
    )
]


def tool(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tools.shapes", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_scene_reads_back():
    captions = [caption(scene) for scene in SCENES]
    assert len(set(captions)) == len(SCENES)
    assert [parse(text) for text in captions] == SCENES


def test_captions():
    scene = Scene(size="small", colour="red", shape="circle", background="white")
    assert caption(scene) == "a small red circle on white"
    assert parse("a large blue cross on grey, at the left").position == "left"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red circle on white",
        "a small red circle on white ",
        "A small red circle on white",
        "a small red circle on red",
        "a small red circle on white, at the center",
        "a small red circle on white\n",
        "two small red circles on white",
    ],
)
def test_what_is_not_a_caption(text):
    with pytest.raises(UserError, match="not like"):
        parse(text)


def test_random_scenes():
    scenes = [random_scene(4, number) for number in range(2000)]
    assert scenes[7] == random_scene(4, 7)
    assert scenes[7].jitter == random_scene(4, 7).jitter
    assert scenes != [random_scene(5, number) for number in range(2000)]
    for name, values in {
        "size": SIZES,
        "colour": COLOURS,
        "shape": SHAPES,
        "background": BACKGROUNDS,
        "position": POSITIONS,
    }.items():
        found = [getattr(scene, name) for scene in scenes]
        assert all(found.count(value) > 0.75 * len(scenes) / len(values) for value in values)
    jitter = np.array([scene.jitter for scene in scenes])
    assert np.abs(jitter.mean(0)).max() < 0.05
    assert 0.9 < np.abs(jitter).max() <= 1


@pytest.mark.parametrize("scene", SCENES[::7], ids=caption)
def test_pictures_show_the_scene(scene):
    pixels = np.asarray(draw(scene, 64)).astype(int)
    assert pixels.shape == (64, 64, 3)
    assert pixels[0, 0].tolist() == list(BACKGROUNDS[scene.background])
    shape = np.abs(pixels - pixels[0, 0]).sum(-1) > 60
    rows, columns = np.flatnonzero(shape.any(1)), np.flatnonzero(shape.any(0))
    assert np.ptp(columns) + 1 == pytest.approx(64 * SIZES[scene.size], abs=2)
    assert np.ptp(rows) + 1 == pytest.approx(64 * SIZES[scene.size], abs=3)
    middle = (columns.mean() + 0.5) / 64, (rows.mean() + 0.5) / 64
    assert middle == pytest.approx(POSITIONS[scene.position], abs=0.03)
    assert pixels[round(rows.mean()), round(columns.mean())].tolist() == list(COLOURS[scene.colour])


def test_nothing_leaves_the_picture():
    for shape, position in itertools.product(SHAPES, POSITIONS):
        for jitter in ((-1, -1), (1, 1)):
            scene = Scene(
                size="large",
                colour="red",
                shape=shape,
                background="black",
                position=position,
                jitter=jitter,
            )
            pixels = np.asarray(draw(scene, 256))
            assert not pixels[0].any()
            assert not pixels[-1].any()
            assert not pixels[:, 0].any()
            assert not pixels[:, -1].any()


def test_files_say_what_they_show(shards_folder):
    with tarfile.open(shards_folder / "00001.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    assert sorted(files) == sorted(
        f"{number:08d}.{kind}" for number in range(12, 24) for kind in ("jpg", "json", "txt")
    )
    for number in range(12, 24):
        scene = random_scene(1, number)
        fields = json.loads(files[f"{number:08d}.json"])
        assert (fields["width"], fields["height"], fields["colour"]) == (96, 96, scene.colour)
        assert parse(files[f"{number:08d}.txt"].decode()) == scene
        with Image.open(io.BytesIO(files[f"{number:08d}.jpg"])) as image:
            assert image.format == "JPEG"
            assert np.abs(np.asarray(image).astype(int) - np.asarray(draw(scene, 96))).mean() < 3


def test_the_command(tmp_path):
    out = tmp_path / "new" / "shards"
    done = tool(out, "--num", 10, "--size", 32, "--seed", 1, "--shard-size", 4)
    assert done.returncode == 0, done.stderr
    total = sum(path.stat().st_size for path in out.glob("*.tar"))
    assert done.stdout == f"{out}: 10 images of 32 px in 3 shards, {total:,} bytes\n"
    assert sorted(path.name for path in out.iterdir()) == [
        "00000.tar",
        "00001.tar",
        "00002.tar",
        "shapes.json",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["shards"]

    main(
        [
            str(tmp_path / "again"),
            "--num",
            "10",
            "--size",
            "32",
            "--seed",
            "1",
            "--shard-size",
            "4",
            "--workers",
            "1",
        ]
    )
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_the_same_command_again(shards_folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in shards_folder.iterdir()}
    main([str(shards_folder), "--num", "24", "--size", "96", "--seed", "1", "--shard-size", "12"])
    assert "already there" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in shards_folder.iterdir()}
    with pytest.raises(UserError, match=r"'num': 24.*'num': 25"):
        main(
            [str(shards_folder), "--num", "25", "--size", "96", "--seed", "1", "--shard-size", "12"]
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num", "0"], "--num: 0 is less than 1"),
        (["--num", "x"], "invalid positive value: 'x'"),
        (["--num", "1", "--seed", "-1"], "--seed -1: outside"),
        (["--num", "1", "--colour", "red"], "unrecognized arguments: --colour"),
        ([], "required: --num"),
    ],
)
def test_mistakes(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        main([str(tmp_path / "out"), "--size", "32", "--seed", "1", *arguments])


def test_folders_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "00000.tar").write_text("mine")
    for out in ("file", "file/out", "mine"):
        with pytest.raises(UserError, match=str(tmp_path / out)):
            main([str(tmp_path / out), "--num", "1", "--size", "8", "--seed", "1"])
    assert (tmp_path / "mine" / "00000.tar").read_text() == "mine"


def test_exit_codes(capsys, monkeypatch):
    def ends(error):
        def main(argv):
            if error:
                raise error

        with pytest.raises(SystemExit) as exit:
            run(main)
        return exit.value.code, capsys.readouterr().err

    monkeypatch.setattr(sys, "argv", ["tool"])
    assert ends(None) == (0, "")
    assert ends(UserError("here: this; do that")) == (2, "here: this; do that\n")
    assert ends(KeyboardInterrupt()) == (130, "interrupted\n")


def test_a_mistake_is_one_line():
    done = tool("out", "--num", 3)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
