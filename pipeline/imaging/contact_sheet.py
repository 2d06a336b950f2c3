"""Pictures in rows on one page, with words before and over them."""

from collections.abc import Sequence
from textwrap import shorten
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

TILE, GAP, LINE, LETTER = (
    96,
    4,
    18,
    6,
)  # pixels: a small picture's least side, the space between, a line, a letter


class Row(NamedTuple):
    """A row of a sheet: what stands before it and over its pictures, and they, uint8 (B, S, S, 3)."""

    label: str
    captions: Sequence[str]  # one a picture, or none
    pictures: np.ndarray


def sheet(rows: Sequence[Row]) -> Image.Image:
    """The rows beneath one another; small pictures in visible pixels."""
    side = rows[0].pictures.shape[1] * -(-TILE // rows[0].pictures.shape[1])
    font = ImageFont.load_default(size=12)
    margin = GAP + max(int(font.getlength(row.label)) + GAP if row.label else 0 for row in rows)
    heights = [side + GAP + (LINE if row.captions else 0) for row in rows]
    width = margin + max(len(row.pictures) for row in rows) * (side + GAP)
    page = Image.new("RGB", (width, GAP + sum(heights)), "white")
    draw, top = ImageDraw.Draw(page), GAP
    for row, height in zip(rows, heights, strict=True):
        begin = top + height - side - GAP
        draw.text((GAP, begin + side // 2), row.label, "black", font, anchor="lm")
        for i, picture in enumerate(row.pictures):
            left = margin + i * (side + GAP)
            if row.captions:
                caption = shorten(row.captions[i], side // LETTER, placeholder="...")
                draw.text((left + side // 2, top + LINE // 2), caption, "black", font, anchor="mm")
            page.paste(
                Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST),
                (left, begin),
            )
        top += height
    return page
