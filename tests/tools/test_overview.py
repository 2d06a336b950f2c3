"""The sheet of all stages side by side."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.errors import UserError
from tools.overview import GAP, LINE, TILE, main, overview

COLOURS = {"base": (255, 0, 0), "sr32": (0, 255, 0)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two prompts through two stages; each stage's images have one colour."""
    lines = []
    for stage, colour in COLOURS.items():
        (tmp_path / stage).mkdir()
        side = 16 if stage == "base" else 32
        for image_id in (0, 1):
            file = f"{stage}/{image_id:05d}.png"
            Image.new("RGB", (side, side), colour).save(tmp_path / file)
            lines.append(
                {"number": image_id, "stage": stage, "file": file, "prompt": f"prompt {image_id}"}
            )
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_a_row_per_prompt_and_a_column_per_stage(folder: Path) -> None:
    main([str(folder), str(folder / "overview.png")])
    with Image.open(folder / "overview.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape == (LINE + 2 * (LINE + TILE), GAP + 3 * (TILE + GAP), 3)

    detail = COLOURS["sr32"]
    for row in (0, 1):
        for column, colour in enumerate([*COLOURS.values(), detail]):
            top = LINE + row * (LINE + TILE) + LINE
            left = GAP + column * (TILE + GAP)
            assert (sheet[top : top + TILE, left : left + TILE] == colour).all()


def test_a_missing_image_is_named(folder: Path) -> None:
    lines = (folder / "manifest.jsonl").read_text().splitlines(keepends=True)
    (folder / "manifest.jsonl").write_text("".join(lines[:3]))
    with pytest.raises(UserError) as error:
        overview(folder)
    assert str(error.value) == (
        f"{folder}/manifest.jsonl: image 1 has no stage sr32; run the same `cascade sample` again"
    )


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give the --out of `cascade sample`"):
        overview(tmp_path)
