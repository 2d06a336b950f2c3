"""Scenes: captions that read back, images that show them, tars with the same bytes every time."""

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UserError
from pipeline.terminal import run
from tests.helpers.tools import read_tar, run_tool
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


def test_every_caption_parses_to_its_scene() -> None:
    captions = [caption(scene) for scene in SCENES]
    assert len(set(captions)) == len(SCENES)
    assert [parse(text) for text in captions] == SCENES


def test_captions_follow_the_grammar() -> None:
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
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="not in the grammar"):
        parse(text)


def test_random_scenes_are_uniform_and_depend_on_seed_and_index() -> None:
    scenes = [random_scene(4, index) for index in range(2000)]
    assert scenes[7] == random_scene(4, 7)
    assert scenes[7].jitter == random_scene(4, 7).jitter
    assert scenes != [random_scene(5, index) for index in range(2000)]

    for name, values in {
        "size": SIZES,
        "colour": COLOURS,
        "shape": SHAPES,
        "background": BACKGROUNDS,
        "position": POSITIONS,
    }.items():
        drawn = [getattr(scene, name) for scene in scenes]
        assert all(drawn.count(value) > 0.75 * len(scenes) / len(values) for value in values)

    jitter = np.array([scene.jitter for scene in scenes])
    assert np.abs(jitter.mean(0)).max() < 0.05
    assert 0.9 < np.abs(jitter).max() <= 1


@pytest.mark.parametrize("scene", SCENES[::7], ids=caption)
def test_images_show_the_scene(scene: Scene) -> None:
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


@pytest.mark.parametrize("jitter", [(-1, -1), (1, 1)])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_stay_within_the_image(
    shape: str, position: str, jitter: tuple[float, float]
) -> None:
    scene = Scene(
        size="large",
        colour="red",
        shape=shape,
        background="black",
        position=position,
        jitter=jitter,
    )
    pixels = np.asarray(draw(scene, 256))
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert not border.any()


def test_tars_hold_images_captions_and_fields(shards_folder: Path) -> None:
    files = read_tar(shards_folder / "00001.tar")
    assert sorted(files) == sorted(
        f"{index:08d}.{extension}"
        for index in range(12, 24)
        for extension in ("jpg", "json", "txt")
    )

    for index in range(12, 24):
        scene = random_scene(1, index)
        fields = json.loads(files[f"{index:08d}.json"])
        assert (fields["width"], fields["height"], fields["colour"]) == (96, 96, scene.colour)
        assert parse(files[f"{index:08d}.txt"].decode()) == scene
        with Image.open(io.BytesIO(files[f"{index:08d}.jpg"])) as image:
            assert image.format == "JPEG"
            assert np.abs(np.asarray(image).astype(int) - np.asarray(draw(scene, 96))).mean() < 3


def test_workers_do_not_change_the_bytes(tmp_path: Path) -> None:
    out = tmp_path / "new" / "shards"
    arguments = ["--num", "10", "--size", "32", "--seed", "1", "--shard-size", "4"]
    done = run_tool("shapes", out, *arguments)
    assert done.returncode == 0, done.stderr

    total = sum(path.stat().st_size for path in out.glob("*.tar"))
    assert done.stdout == f"{out}: 10 images of 32 px, seed 1; 3 shards, {total:,} bytes\n"
    names = ["00000.tar", "00001.tar", "00002.tar", "shapes.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert [path.name for path in out.parent.iterdir()] == ["shards"]

    main([str(tmp_path / "again"), *arguments, "--workers", "1"])
    for path in out.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_the_same_command_again_does_nothing(
    shards_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in shards_folder.iterdir()}
    arguments = [str(shards_folder), "--size", "96", "--seed", "1", "--shard-size", "12"]

    main([*arguments, "--num", "24"])
    assert "already there" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in shards_folder.iterdir()}

    with pytest.raises(UserError, match=r"'num': 24.*'num': 25"):
        main([*arguments, "--num", "25"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num", "0"], "--num: 0 is less than 1"),
        (["--num", "x"], "invalid positive value: 'x'"),
        (["--num", "1", "--seed", "-1"], "--seed: -1 is outside"),
        (["--num", "1", "--colour", "red"], "unrecognized arguments: --colour"),
        ([], "required: --num"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main([str(tmp_path / "out"), "--size", "32", "--seed", "1", *arguments])


def test_other_files_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "00000.tar").write_text("mine")

    for out in ("file", "file/out", "mine"):
        with pytest.raises(UserError, match=str(tmp_path / out)):
            main([str(tmp_path / out), "--num", "1", "--size", "8", "--seed", "1"])

    assert (tmp_path / "mine" / "00000.tar").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "code", "stderr"),
    [
        (None, 0, ""),
        (UserError("here: this; do that"), 2, "here: this; do that\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(
    error: BaseException | None, code: int, stderr: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def tool(argv: object) -> None:
        if error:
            raise error

    with pytest.raises(SystemExit) as exit:
        run(tool, [])
    assert exit.value.code == code
    assert capsys.readouterr().err == stderr


def test_a_mistake_is_one_line_on_stderr() -> None:
    done = run_tool("shapes", "out", "--num", 3)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
