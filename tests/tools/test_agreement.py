import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pipeline.errors import UserError
from tools.agreement import agreement, main, read_scene
from tools.shapes import BACKGROUNDS, Scene, caption, draw, random_scene

SCENES = [random_scene(11, number) for number in range(400)]


def shares(pictures):
    found = agreement(
        (caption(scene), image) for scene, image in zip(SCENES, pictures, strict=True)
    )
    assert found["images"] == len(SCENES)
    return {name: found[name]["share"] for name in ("colour", "shape", "background")}


def noisy(image, seed, sigma, blur):
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(blur))).astype(float)
    pixels += np.random.default_rng(seed).normal(0, 255 * sigma, pixels.shape)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("pixels", [32, 64, 96, 256])
def test_clean_pictures_agree(pixels):
    assert min(shares(np.asarray(draw(scene, pixels)) for scene in SCENES).values()) >= 0.99


@pytest.mark.parametrize("blur", [0.7, 1.2])
def test_noisy_pictures_agree(blur):
    found = shares(
        noisy(draw(scene, 64), number, 0.08, blur) for number, scene in enumerate(SCENES)
    )
    assert found["colour"] >= 0.99
    assert found["shape"] >= 0.95
    assert found["background"] >= 0.99


def test_other_pictures_agree_by_chance():
    """The pictures of other captions: what a model that ignores its text would reach."""
    others = [np.asarray(draw(random_scene(12, number), 64)) for number in range(len(SCENES))]
    found = agreement((caption(scene), image) for scene, image in zip(SCENES, others, strict=True))
    for name in ("colour", "shape", "background"):
        assert found[name]["share"] == pytest.approx(found[name]["chance"], abs=0.07)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_empty_pictures(background):
    flat = Image.new("RGB", (64, 64), BACKGROUNDS[background])
    assert read_scene(np.asarray(flat)) == (None, None, background)
    assert read_scene(noisy(flat, 0, 0.08, 0)) == (None, None, background)


def test_a_streak_has_a_colour_but_no_shape():
    image = np.full((64, 64, 3), 255, np.uint8)
    image[30:34, 5:60] = (220, 20, 30)
    assert read_scene(image) == ("red", None, "white")


def test_shades_are_named_by_eye():
    image = np.array(
        draw(Scene(size="large", colour="green", shape="circle", background="black"), 64)
    )
    assert read_scene((image * 0.7).astype(np.uint8)) == ("green", "circle", "black")
    assert read_scene(np.full((64, 64, 3), 235, np.uint8))[2] == "white"


@pytest.fixture
def images(tmp_path):
    lines = []
    for number, scene in enumerate(SCENES[:6]):
        draw(scene, 64).save(tmp_path / f"{number}.png")
        lines.append({"prompt": caption(scene), "file": f"{number}.png", "seed": number})
    lines[5]["prompt"] = caption(
        Scene(size="small", colour="red", shape="cross", background="grey")
    )
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "two.tsv").write_text(
        "".join(f"{line['prompt']}\t{line['file']}\n" for line in lines[:2])
    )
    return tmp_path


def test_the_command(images, capsys):
    main([str(images), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 6
    assert found["colour"]["chance"] == pytest.approx(1 / 6)
    assert all(found[name]["share"] >= 5 / 6 for name in ("colour", "shape", "background"))
    main([str(images), "--manifest", str(images / "two.tsv")])
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["agree", "chance", "of", "2", "images"]
    assert [line.split() for line in table[1:]] == [
        ["colour", "100.0%", "16.7%"],
        ["shape", "100.0%", "25.0%"],
        ["background", "100.0%", "33.3%"],
    ]


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "manifest.jsonl: cannot be read"),
        ("", "no images to judge"),
        ('{"prompt": "a small red circle on white"}', "manifest.jsonl:1: no prompt and file"),
        ("[1]", "manifest.jsonl:1: no prompt and file"),
        ('{"prompt": "a small red circle on white", "file": "7.png"}', "7.png cannot be read"),
        (
            '{"prompt": "a small red circle on white", "file": "manifest.jsonl"}',
            "cannot be read as an image",
        ),
        ('{"prompt": "a cat", "file": "0.png"}', "caption 'a cat': not like"),
    ],
)
def test_mistakes(images, manifest, message):
    (images / "manifest.jsonl").unlink()
    if manifest is not None:
        (images / "manifest.jsonl").write_text(manifest)
    with pytest.raises(UserError, match=message):
        main([str(images)])
