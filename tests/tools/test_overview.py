"""The picture of all stages side by side."""

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
    """Two prompts through two stages; each stage's pictures have one colour."""
    lines = []
    for stage, colour in COLOURS.items():
        (tmp_path / stage).mkdir()
        for number in (0, 1):
            file = f"{stage}/{number:05d}.png"
            Image.new("RGB", (16, 16) if stage == "base" else (32, 32), colour).save(
                tmp_path / file
            )
            lines.append(
                {"number": number, "stage": stage, "file": file, "prompt": f"prompt {number}"}
            )
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_a_row_a_prompt_and_a_column_a_stage(folder):
    main([str(folder), str(folder / "overview.png")])
    with Image.open(folder / "overview.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape == (LINE + 2 * (LINE + TILE), GAP + 3 * (TILE + GAP), 3)
    for row in (0, 1):
        for column, colour in enumerate(
            [*COLOURS.values(), COLOURS["sr32"]]
        ):  # the last is a detail
            top, left = LINE + row * (LINE + TILE) + LINE, GAP + column * (TILE + GAP)
            assert (sheet[top : top + TILE, left : left + TILE] == colour).all()


def test_a_missing_picture_is_named(folder):
    lines = (folder / "manifest.jsonl").read_text().splitlines(keepends=True)
    (folder / "manifest.jsonl").write_text("".join(lines[:3]))
    with pytest.raises(UserError) as error:
        overview(folder)
    assert str(error.value) == (
        f"{folder}/manifest.jsonl: picture 1 has no sr32; run the same `cascade sample` again"
    )


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(UserError, match="give the --out of `cascade sample`"):
        overview(tmp_path)
