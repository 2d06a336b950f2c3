"""Restoring without a network: better than nothing, and only what is to be restored."""

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from pipeline.data.image import to_uint8
from pipeline.imaging.degradations import (
    TASKS,
    compress_jpeg,
    degrade,
    half_mask,
    to_grayscale,
    with_hole,
    without_hole,
)
from pipeline.rng import generator
from tests.helpers.image_files import psnr
from tools.baselines import baseline, mean_chroma
from tools.photographs import read, square

SIDE = 64
NAMES = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")
PICTURES = [square(read(NAMES[i % 4]), SIDE, generator(0, "photographs", 0, i)) for i in range(16)]


@pytest.mark.parametrize("task", TASKS)
def test_known_pixels_are_as_they_were(task):
    for number, picture in enumerate(PICTURES):
        given = degrade(task, picture, generator(0, "damage", number))
        known = given.mask[0] == 0
        found = baseline(task, given, np.array([5.0, 0, -5]))
        assert found.dtype == np.uint8
        assert (found[known] == picture[known]).all()


@pytest.mark.parametrize("task", ["inpainting", "uncropping"])
def test_a_filled_hole_is_closer_than_its_mean_colour(task):
    gains = []
    for number, picture in enumerate(PICTURES):
        given = degrade(task, picture, generator(0, "damage", number))
        known = given.mask[0] == 0
        even = np.where(known[..., None], picture, picture[known].mean(0).astype(np.uint8))
        gains.append(psnr(baseline(task, given), picture) - psnr(even, picture))
    assert np.mean(gains) > 1


def test_a_plane_of_one_colour_is_filled_with_it():
    picture = np.full((SIDE, SIDE, 3), (10, 200, 90), np.uint8)
    for edge in ("left", "around"):
        given = with_hole(picture, half_mask(SIDE, edge), generator(0, "damage"))
        assert (baseline("uncropping", given) == picture).all()


def test_a_blurred_jpeg_is_closer():
    for quality in (5, 10, 20):
        pairs = [(picture, compress_jpeg(picture, quality)) for picture in PICTURES]
        found = [
            (picture, baseline("jpeg_restoration", without_hole(jpeg))) for picture, jpeg in pairs
        ]
        for score in (psnr, lambda a, b: structural_similarity(a, b, channel_axis=-1)):
            assert np.mean([score(*pair) for pair in found]) > np.mean(
                [score(*pair) for pair in pairs]
            )


def test_the_mean_colour():
    for picture in PICTURES:
        chroma = mean_chroma([picture])
        assert abs(chroma @ [0.299, 0.587, 0.114]) < 0.5  # none of it is luma
        given = without_hole(to_grayscale(picture))
        assert (baseline("colorization", given) == to_uint8(given.source)).all()
        assert psnr(baseline("colorization", given, chroma), picture) > psnr(
            to_grayscale(picture), picture
        )
    np.testing.assert_allclose(
        mean_chroma(PICTURES), np.mean([mean_chroma([picture]) for picture in PICTURES], 0)
    )
