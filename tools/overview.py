"""One picture of generated images: a row a prompt, a column a stage, and what super-resolution
added, enlarged.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pipeline.errors import UserError
from pipeline.terminal import Parser, run

TILE, GAP, LINE = 256, 8, 24  # pixels: a picture's side, the space between, a line of text
DETAIL = 8  # the last column is the centre of the last picture, 1/8 of its side


def overview(folder: Path) -> Image.Image:
    """The pictures that `folder`/manifest.jsonl lists, all shown at one size: small ones in visible
    pixels.
    """
    path = folder / "manifest.jsonl"
    if not path.exists():
        raise UserError(f"{path}: no such file; give the --out of `cascade sample`")
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    stages = list(dict.fromkeys(entry["stage"] for entry in entries))
    rows: dict[int, dict[str, dict[str, str]]] = {}
    for entry in entries:
        rows.setdefault(entry["number"], {})[entry["stage"]] = entry
    columns = [*stages, f"{stages[-1]}, 1/{DETAIL} of it"]
    sheet = Image.new(
        "RGB", (GAP + len(columns) * (TILE + GAP), LINE + len(rows) * (LINE + TILE)), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    for row, number in enumerate(sorted(rows)):
        top = LINE + row * (LINE + TILE)
        pictures = []
        for stage in stages:
            if stage not in rows[number]:
                raise UserError(
                    f"{path}: picture {number} has no {stage}; run the same `cascade sample` again"
                )
            pictures.append(Image.open(folder / rows[number][stage]["file"]).convert("RGB"))
        side = pictures[-1].width
        begin, end = side * (DETAIL - 1) // (2 * DETAIL), side * (DETAIL + 1) // (2 * DETAIL)
        pictures.append(pictures[-1].crop((begin, begin, end, end)))
        draw.text((GAP, top + 4), rows[number][stages[0]]["prompt"], "black", font)
        for column, picture in enumerate(pictures):
            left = GAP + column * (TILE + GAP)
            sheet.paste(picture.resize((TILE, TILE), Image.Resampling.BOX), (left, top + LINE))
            if row == 0:
                title = (
                    columns[column]
                    if column == len(stages)
                    else f"{columns[column]}: {picture.width} px"
                )
                draw.text((left, 4), title, "black", font)
    return sheet


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m tools.overview", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="IMAGES", help="the --out of `cascade sample`")
    parser.add_argument("out", type=Path, metavar="PNG", help="the picture to write")
    arguments = parser.parse_args(argv)
    sheet = overview(arguments.folder)
    sheet.save(arguments.out, "PNG")
    print(f"{arguments.out}: {sheet.width} x {sheet.height} pixels")


if __name__ == "__main__":
    run(main)
