"""Rows of images on a page."""

import numpy as np

from pipeline.imaging.contact_sheet import Row, contact_sheet


def test_a_contact_sheet_has_every_image_enlarged() -> None:
    rng = np.random.default_rng(0)
    rows = [
        Row(label, captions, rng.integers(0, 256, (num, 50, 50, 3)).astype(np.uint8))
        for label, captions, num in (("one", ["a", "b", "c"], 3), ("another", (), 2))
    ]

    page = np.asarray(contact_sheet(rows)).tobytes()

    for row in rows:
        for image in row.images:
            # 50 px are enlarged to 100, so the first row of pixels is there twice.
            first_row = np.repeat(image[0], 2, axis=0)
            assert page.count(first_row.tobytes()) == 2
