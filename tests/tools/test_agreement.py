"""Agreement of images with their captions: near one for the truth, chance for other images."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pipeline.errors import UserError
from tools.agreement import CHANCES, agreement, main, read_scene
from tools.shapes import BACKGROUNDS, Scene, caption, draw, random_scene

SCENES = [random_scene(11, index) for index in range(400)]


def shares(images: Iterable[np.ndarray]) -> dict[str, float]:
    """Of images that belong to SCENES, by attribute."""
    captions = map(caption, SCENES)
    result = agreement(zip(captions, images, strict=True))
    assert result["images"] == len(SCENES)

    scores: dict[str, dict[str, float]] = {name: result[name] for name in CHANCES}  # type: ignore[misc]
    assert {name: score["chance"] for name, score in scores.items()} == CHANCES
    return {name: score["share"] for name, score in scores.items()}


def noisy(image: Image.Image, seed: int, *, sigma: float, blur: float) -> np.ndarray:
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(blur))).astype(float)
    pixels += np.random.default_rng(seed).normal(0, 255 * sigma, pixels.shape)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("pixels", [32, 64, 96, 256])
def test_clean_images_agree(pixels: int) -> None:
    assert min(shares(np.asarray(draw(scene, pixels)) for scene in SCENES).values()) >= 0.99


@pytest.mark.parametrize("blur", [0.7, 1.2])
def test_noisy_images_agree(blur: float) -> None:
    result = shares(
        noisy(draw(scene, 64), seed, sigma=0.08, blur=blur) for seed, scene in enumerate(SCENES)
    )
    assert result["colour"] >= 0.99
    assert result["shape"] >= 0.95
    assert result["background"] >= 0.99


def test_images_of_other_captions_agree_by_chance() -> None:
    """What a model that ignores its text would reach."""
    others = [np.asarray(draw(random_scene(12, index), 64)) for index in range(len(SCENES))]
    assert shares(others) == pytest.approx(CHANCES, abs=0.07)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_an_empty_image_has_a_background_only(background: str) -> None:
    flat = Image.new("RGB", (64, 64), BACKGROUNDS[background])
    assert read_scene(np.asarray(flat)) == (None, None, background)
    assert read_scene(noisy(flat, 0, sigma=0.08, blur=0)) == (None, None, background)


def test_a_streak_has_a_colour_but_no_shape() -> None:
    image = np.full((64, 64, 3), 255, np.uint8)
    image[30:34, 5:60] = (220, 20, 30)
    assert read_scene(image) == ("red", None, "white")


def test_darker_and_lighter_shades_keep_their_names() -> None:
    scene = Scene(size="large", colour="green", shape="circle", background="black")
    image = np.array(draw(scene, 64))
    assert read_scene((image * 0.7).astype(np.uint8)) == ("green", "circle", "black")
    assert read_scene(np.full((64, 64, 3), 235, np.uint8)).background == "white"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Six images with a manifest.jsonl, the last with another caption, and two.tsv of the first
    two.
    """
    prompts = [caption(scene) for scene in SCENES[:5]]
    prompts.append(caption(Scene(size="small", colour="red", shape="cross", background="grey")))
    for index, scene in enumerate(SCENES[:6]):
        draw(scene, 64).save(tmp_path / f"{index}.png")

    lines = [
        json.dumps({"prompt": prompt, "file": f"{index}.png", "seed": index})
        for index, prompt in enumerate(prompts)
    ]
    (tmp_path / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "two.tsv").write_text(f"{prompts[0]}\t0.png\n{prompts[1]}\t1.png\n")
    return tmp_path


def test_the_command_prints_json_or_a_table(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(images), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 6
    assert result["colour"]["chance"] == pytest.approx(1 / 6)
    assert all(result[name]["share"] >= 5 / 6 for name in CHANCES)

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
        ('{"prompt": "a cat", "file": "0.png"}', "caption 'a cat': not in the grammar"),
    ],
)
def test_a_wrong_manifest_is_refused(images: Path, manifest: str | None, message: str) -> None:
    (images / "manifest.jsonl").unlink()
    if manifest is not None:
        (images / "manifest.jsonl").write_text(manifest)
    with pytest.raises(UserError, match=message):
        main([str(images)])
