"""A contact sheet: rows of images on one page, with row labels and captions."""

from collections.abc import Sequence
from textwrap import shorten
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# All in pixels.
MIN_SIDE = 96  # smaller images are enlarged by a whole factor to at least this side
GAP = 4  # between images, and around the page
CAPTION_HEIGHT = 18
CHARACTER_WIDTH = 6  # average, for shortening captions
FONT_SIZE = 12


class Row(NamedTuple):
    """A row of a contact sheet."""

    label: str  # to the left of the images
    captions: Sequence[str]  # above the images: one per image, or none
    images: np.ndarray  # uint8 (B, S, S, 3)


def contact_sheet(rows: Sequence[Row]) -> Image.Image:
    """The rows below one another. Images are enlarged without interpolation."""
    image_side = rows[0].images.shape[1]
    # A whole factor, so that all pixels of an image are squares of one size.
    side = image_side * -(-MIN_SIDE // image_side)
    font = ImageFont.load_default(size=FONT_SIZE)

    label_widths = [int(font.getlength(row.label)) + GAP if row.label else 0 for row in rows]
    left_margin = GAP + max(label_widths)
    width = left_margin + max(len(row.images) for row in rows) * (side + GAP)
    heights = [side + GAP + (CAPTION_HEIGHT if row.captions else 0) for row in rows]

    page = Image.new("RGB", (width, GAP + sum(heights)), "white")
    draw = ImageDraw.Draw(page)

    top = GAP
    for row, height in zip(rows, heights, strict=True):
        # Captions, if the row has any, stand above its images.
        images_top = top + height - side - GAP
        draw.text((GAP, images_top + side // 2), row.label, "black", font, anchor="lm")

        for i, image in enumerate(row.images):
            left = left_margin + i * (side + GAP)

            if row.captions:
                caption = shorten(row.captions[i], side // CHARACTER_WIDTH, placeholder="...")
                middle = (left + side // 2, top + CAPTION_HEIGHT // 2)
                draw.text(middle, caption, "black", font, anchor="mm")

            enlarged = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            page.paste(enlarged, (left, images_top))

        top += height

    return page
