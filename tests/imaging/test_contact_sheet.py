"""Rows of pictures on a page."""

import numpy as np

from pipeline.imaging.contact_sheet import Row, sheet


def test_a_sheet_shows_its_rows():
    rng = np.random.default_rng(0)
    rows = [
        Row(label, captions, rng.integers(0, 256, (num, 50, 50, 3)).astype(np.uint8))
        for label, captions, num in (("one", ["a", "b", "c"], 3), ("another", (), 2))
    ]
    page = np.asarray(sheet(rows))
    for row in rows:
        for picture in row.pictures:
            assert (
                page.tobytes().count(np.repeat(picture[0], 2, axis=0).tobytes()) == 2
            )  # enlarged to 100 px
