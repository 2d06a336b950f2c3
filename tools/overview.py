"""One sheet of generated images: a row per prompt, a column per stage, and a detail of the last
stage enlarged.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pipeline.errors import UserError
from pipeline.terminal import Parser, run

# In pixels.
TILE = 256  # side of an image on the sheet
GAP = 8  # between images
LINE = 24  # height of a line of text

DETAIL = 8  # the last column is the centre of the last stage's image, 1/8 of its side

Row = dict[str, dict[str, str]]  # the manifest's entries for one prompt, by stage


def overview(folder: Path) -> Image.Image:
    """The images that `folder`/manifest.jsonl lists, all shown at one size.

    Raises:
        UserError: there is no manifest, or an image of some stage is missing.
    """
    path = folder / "manifest.jsonl"
    if not path.exists():
        raise UserError(f"{path}: no such file; give the --out of `cascade sample`")

    rows = read_rows(path)
    # In order of appearance: an image runs through the stages one after the other.
    stages = list(dict.fromkeys(stage for row in rows.values() for stage in row))
    titles = [*stages, f"{stages[-1]}, 1/{DETAIL} of it"]

    size = (GAP + len(titles) * (TILE + GAP), LINE + len(rows) * (LINE + TILE))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=14)

    for row, image_id in enumerate(sorted(rows)):
        top = LINE + row * (LINE + TILE)
        images = read_images(folder, rows[image_id], stages, image_id)
        draw.text((GAP, top + 4), rows[image_id][stages[0]]["prompt"], "black", font)

        for column, image in enumerate(images):
            left = GAP + column * (TILE + GAP)
            tile = image.resize((TILE, TILE), Image.Resampling.BOX)
            sheet.paste(tile, (left, top + LINE))

            # The headings, with the sizes that the first row shows.
            if row == 0:
                size_text = f": {image.width} px" if column < len(stages) else ""
                draw.text((left, 4), titles[column] + size_text, "black", font)

    return sheet


def read_rows(manifest: Path) -> dict[int, Row]:
    """The manifest's entries by image id and stage."""
    rows: dict[int, Row] = {}
    for line in manifest.read_text().splitlines():
        entry = json.loads(line)
        # An image that was written again is listed again: the last entry counts.
        rows.setdefault(entry["number"], {})[entry["stage"]] = entry
    return rows


def read_images(
    folder: Path, row: Mapping[str, Mapping[str, str]], stages: Sequence[str], image_id: int
) -> list[Image.Image]:
    """The image of each stage, and the detail of the last one."""
    images = []
    for stage in stages:
        if stage not in row:
            raise UserError(
                f"{folder / 'manifest.jsonl'}: image {image_id} has no stage {stage}; "
                "run the same `cascade sample` again"
            )
        images.append(Image.open(folder / row[stage]["file"]).convert("RGB"))

    side = images[-1].width
    # The middle 1 / DETAIL of the side.
    begin = side * (DETAIL - 1) // (2 * DETAIL)
    end = side * (DETAIL + 1) // (2 * DETAIL)
    return [*images, images[-1].crop((begin, begin, end, end))]


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m tools.overview", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="IMAGES", help="the --out of `cascade sample`")
    parser.add_argument("out", type=Path, metavar="PNG", help="the image to write")
    arguments = parser.parse_args(argv)

    sheet = overview(arguments.folder)
    sheet.save(arguments.out, "PNG")
    print(f"{arguments.out}: {sheet.width} x {sheet.height} pixels")


if __name__ == "__main__":
    run(main)
