"""Baselines of restoration: better than nothing, and only where an image is to be restored."""

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
from tools.photographs import crop_square, read

SIDE = 64
NAMES = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg")


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    photographs = [read(name) for name in NAMES]
    return [
        crop_square(photographs[i % len(NAMES)], SIDE, generator(0, "photographs", 0, i))
        for i in range(16)
    ]


@pytest.mark.parametrize("task", TASKS)
def test_known_pixels_are_unchanged(task: str, images: list[np.ndarray]) -> None:
    for i, image in enumerate(images):
        degraded = degrade(task, image, generator(0, "damage", i))
        known = degraded.mask[0] == 0
        restored = baseline(task, degraded, np.array([5.0, 0, -5]))
        assert restored.dtype == np.uint8
        assert (restored[known] == image[known]).all()


@pytest.mark.parametrize("task", ["inpainting", "uncropping"])
def test_a_filled_hole_is_closer_than_the_mean_colour(task: str, images: list[np.ndarray]) -> None:
    gains = []
    for i, image in enumerate(images):
        degraded = degrade(task, image, generator(0, "damage", i))
        known = degraded.mask[0] == 0
        mean_colour = np.where(known[..., None], image, image[known].mean(0).astype(np.uint8))
        gains.append(psnr(baseline(task, degraded), image) - psnr(mean_colour, image))
    assert np.mean(gains) > 1


@pytest.mark.parametrize("edge", ["left", "around"])
def test_a_uniform_image_is_filled_with_its_colour(edge: str) -> None:
    image = np.full((SIDE, SIDE, 3), (10, 200, 90), np.uint8)
    degraded = with_hole(image, half_mask(SIDE, edge), generator(0, "damage"))
    assert (baseline("uncropping", degraded) == image).all()


@pytest.mark.parametrize("quality", [5, 10, 20])
def test_a_blurred_jpeg_is_closer(quality: int, images: list[np.ndarray]) -> None:
    jpegs = [compress_jpeg(image, quality) for image in images]
    restored = [baseline("jpeg_restoration", without_hole(jpeg)) for jpeg in jpegs]

    for score in (psnr, lambda a, b: structural_similarity(a, b, channel_axis=-1)):
        before = np.mean([score(image, jpeg) for image, jpeg in zip(images, jpegs, strict=True)])
        after = np.mean([score(image, each) for image, each in zip(images, restored, strict=True)])
        assert after > before


def test_the_mean_chroma_has_no_luma_and_improves_grey(images: list[np.ndarray]) -> None:
    for image in images:
        chroma = mean_chroma([image])
        assert abs(chroma @ [0.299, 0.587, 0.114]) < 0.5
        degraded = without_hole(to_grayscale(image))
        assert (baseline("colorization", degraded) == to_uint8(degraded.source)).all()
        assert psnr(baseline("colorization", degraded, chroma), image) > psnr(
            to_grayscale(image), image
        )

    np.testing.assert_allclose(
        mean_chroma(images), np.mean([mean_chroma([image]) for image in images], 0)
    )
