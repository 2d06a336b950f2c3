"""The four tasks: source and mask, their distributions, and that the generator determines them."""

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from pipeline.data.decode import decode
from pipeline.data.image import to_float, to_uint8
from pipeline.errors import UserError
from pipeline.imaging.degradations import (
    HOLE_AREA,
    JPEG_QUALITIES,
    TASKS,
    Degraded,
    center_mask,
    compress_jpeg,
    degrade,
    half_mask,
    prior_mean,
    rectangle_mask,
    stroke_mask,
    to_grayscale,
    with_hole,
    without_hole,
)
from pipeline.rng import generator
from tests.data.test_image import photograph
from tests.helpers.image_files import encoded, psnr

DrawMask = Callable[..., np.ndarray]

SIDE = 64
COFFEE = photograph("coffee", SIDE)[:, :SIDE]


def rng(i: int = 0, seed: int = 0) -> np.random.Generator:
    return generator(seed, "damage", i)


def draws(task: str, num: int, image: np.ndarray = COFFEE, seed: int = 0) -> list[Degraded]:
    return [degrade(task, image, rng(i, seed)) for i in range(num)]


@pytest.mark.parametrize("task", TASKS)
def test_shapes_and_types(task: str) -> None:
    for source, mask in draws(task, 20):
        assert source.shape == (3, SIDE, SIDE)
        assert mask.shape == (1, SIDE, SIDE)
        assert source.dtype == mask.dtype == np.float32
        assert set(np.unique(mask)) <= {0, 1}
        assert mask.any()


@pytest.mark.parametrize("task", TASKS)
def test_a_degradation_depends_on_the_generator_only(task: str) -> None:
    before = COFFEE.copy()
    first = draws(task, 30)
    again = draws(task, 30)
    other_seed = draws(task, 30, seed=1)

    for a, b in zip(first, again, strict=True):
        assert (a.source == b.source).all()
        assert (a.mask == b.mask).all()
    assert (before == COFFEE).all()

    same = [(a.source == b.source).all() for a, b in zip(first, other_seed, strict=True)]
    if task == "colorization":
        assert all(same)
    else:
        assert np.mean(same) < 0.3


@pytest.mark.parametrize("task", ["inpainting", "uncropping"])
def test_known_pixels_are_the_image_and_a_hole_is_noise(task: str) -> None:
    noise = []
    for source, (mask,) in draws(task, 30):
        known = mask == 0
        assert known.any()
        assert (source[:, known] == to_float(COFFEE)[:, known]).all()
        noise.append(source[:, ~known].ravel())

    values = np.concatenate(noise)
    assert abs(values.mean()) < 4 / len(values) ** 0.5
    assert abs(values.std() - 1) < 4 / (2 * len(values)) ** 0.5
    assert np.abs(values).max() > 3  # not clipped
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 4 / len(values) ** 0.5


@pytest.mark.parametrize("task", ["inpainting", "uncropping"])
def test_missing_pixels_have_no_influence(task: str) -> None:
    for a, b in zip(draws(task, 5), draws(task, 5, 255 - COFFEE), strict=True):
        hole = a.mask[0] == 1
        assert (a.source[:, hole] == b.source[:, hole]).all()


def test_an_unknown_task_names_the_tasks() -> None:
    message = r"'inpaint': not known; .* colorization, inpainting, uncropping, jpeg_resto"
    with pytest.raises(UserError, match=message):
        degrade("inpaint", COFFEE, rng())


class TestWithoutHole:
    @pytest.mark.parametrize("task", ["colorization", "jpeg_restoration"])
    def test_every_pixel_is_generated(self, task: str) -> None:
        for source, mask in draws(task, 5):
            assert mask.all()
            assert np.abs(source).max() <= 1

    def test_grayscale_is_pillows_luma(self) -> None:
        luma = np.asarray(Image.fromarray(COFFEE).convert("L"))
        for source, _ in draws("colorization", 1):
            assert (to_uint8(source) == luma[..., None]).all()
        assert np.abs(luma - COFFEE @ [0.299, 0.587, 0.114]).max() <= 0.51
        assert (to_grayscale(to_grayscale(COFFEE)) == to_grayscale(COFFEE)).all()

    @pytest.mark.parametrize("quality", [5, 10, 30])
    def test_jpeg_compression_agrees_with_pillow(self, quality: int) -> None:
        """Tables and subsampling are the same; a few coefficients are rounded differently."""
        theirs = decode(encoded(COFFEE, "JPEG", quality=quality, subsampling="4:2:0"), SIDE).pixels
        ours = compress_jpeg(COFFEE, quality)
        assert psnr(ours, theirs) > 32
        assert abs(psnr(ours, COFFEE) - psnr(theirs, COFFEE)) < 0.05

    def test_qualities_have_their_distribution(self) -> None:
        """A source's pixels identify its quality. Chi-square, 25 degrees of freedom: above 52.6
        with probability 0.001.
        """
        small = COFFEE[:32, :32]
        quality_of = {compress_jpeg(small, q).tobytes(): q for q in JPEG_QUALITIES}
        assert len(quality_of) == len(JPEG_QUALITIES)

        num = 4000
        sources = [source for source, _ in draws("jpeg_restoration", num, small)]
        drawn = [quality_of[to_uint8(source).tobytes()] for source in sources]

        expected = np.exp(-np.arange(5, 31) / 10)
        expected *= num / expected.sum()
        counts = np.bincount(drawn, minlength=31)[5:]
        assert ((counts - expected) ** 2 / expected).sum() < 52.6

    def test_an_image_of_any_shape(self) -> None:
        image = photograph("rocket", 40)
        source, mask = without_hole(image)
        assert (to_uint8(source) == image).all()
        assert mask.shape == (1, *image.shape[:2])
        assert mask.all()


class TestHoles:
    @pytest.mark.parametrize("draw", [stroke_mask, rectangle_mask])
    @pytest.mark.parametrize("side", [8, 16, 64, 256])
    def test_areas_cover_their_range(self, draw: DrawMask, side: int) -> None:
        areas = [draw(side, rng(i)).mean() for i in range(200)]
        lowest, highest = HOLE_AREA
        assert lowest <= min(areas) < 0.15
        assert 0.35 < max(areas) <= highest
        assert 0.18 < np.median(areas) < 0.28

    def test_areas_of_another_range(self) -> None:
        for draw in (stroke_mask, rectangle_mask):
            areas = [draw(SIDE, rng(i), (0.2, 0.3)).mean() for i in range(50)]
            assert 0.2 <= min(areas) < max(areas) <= 0.3

    def test_a_side_that_has_no_hole_of_the_range(self) -> None:
        with pytest.raises(ValueError, match="no hole covers 10% to 40% of an image 1 pixels wide"):
            rectangle_mask(1, rng())

    def test_inpainting_has_strokes_and_rectangles(self) -> None:
        """A morphological opening by a square reproduces rectangles that are wider, and no strokes,
        which are round.
        """

        def is_rectangles(mask: np.ndarray) -> bool:
            inner = ndimage.minimum_filter(mask, 13, mode="constant")
            return bool((ndimage.maximum_filter(inner, 13, mode="constant") == mask).all())

        for i in range(100):
            assert is_rectangles(rectangle_mask(256, rng(i, seed=1)))
            assert not is_rectangles(stroke_mask(256, rng(i, seed=1)))

        num = 600
        image = np.zeros((256, 256, 3), np.uint8)
        count = sum(is_rectangles(mask[0]) for _, mask in draws("inpainting", num, image))
        assert abs(count - 0.4 * num) < 3.3 * (num * 0.6 * 0.4) ** 0.5

    def test_rectangles_are_one_to_five(self) -> None:
        masks = [rectangle_mask(256, rng(i, seed=2)) for i in range(300)]
        assert {ndimage.label(mask)[1] for mask in masks} == {1, 2, 3, 4, 5}

    def test_strokes_are_round_and_as_wide_as_a_brush(self) -> None:
        """A morphological opening by a disc of 11 pixels loses almost nothing: no stroke is
        thinner, and no end is square.
        """
        disc = np.hypot(*np.mgrid[-5:6, -5:6]) <= 5.5
        lost = 0
        total = 0
        for i in range(30):
            mask = stroke_mask(256, rng(i, seed=3))
            opened = ndimage.binary_opening(np.pad(mask, 16, "edge"), disc)[16:-16, 16:-16]
            lost += (mask & ~opened).sum()
            total += mask.sum()
        assert lost < 0.005 * total

    def test_strokes_are_vertical_as_often_as_horizontal(self) -> None:
        masks = [stroke_mask(SIDE, rng(i, seed=5)).astype(int) for i in range(300)]
        vertical = [
            np.abs(np.diff(mask, axis=1)).sum() > np.abs(np.diff(mask, axis=0)).sum()
            for mask in masks
        ]
        assert abs(np.mean(vertical) - 0.5) < 0.1

    def test_strokes_scale_with_the_side(self) -> None:
        """The same draws at 64 and 256 px cover nearly the same part of the image."""
        overlaps = []
        for i in range(50):
            small, large = (stroke_mask(side, rng(i, seed=4)) for side in (64, 256))
            enlarged = small.repeat(4, 0).repeat(4, 1)
            overlaps.append((enlarged & large).sum() / (enlarged | large).sum())
        assert np.median(overlaps) > 0.8

    @pytest.mark.parametrize(
        ("task", "least", "most"), [("inpainting", 0.04, 0.45), ("uncropping", 0.15, 0.85)]
    )
    def test_every_pixel_is_sometimes_missing_and_sometimes_known(
        self, task: str, least: float, most: float
    ) -> None:
        frequency = np.mean([mask[0] for _, mask in draws(task, 600)], axis=0)
        assert least < frequency.min()
        assert frequency.max() < most

    @pytest.mark.parametrize("side", [8, 15, 64, 256])
    def test_half_masks(self, side: int) -> None:
        for edge, turns in (("top", 0), ("left", 1), ("bottom", 2), ("right", 3)):
            mask = np.rot90(half_mask(side, edge), -turns)
            assert mask[: side // 2].all()
            assert not mask[side // 2 :].any()
        frame = half_mask(side, "around")
        assert abs(frame.mean() - 0.5) < 1.5 / side
        rows, columns = (np.flatnonzero(~frame.all(axis)) for axis in (1, 0))
        assert (rows == columns).all()
        assert abs(rows[0] - (side - 1 - rows[-1])) <= 1
        assert not frame[rows[0] : rows[-1] + 1, rows[0] : rows[-1] + 1].any()

    def test_uncropping_edges_have_their_probabilities(self) -> None:
        num = 800
        masks = [mask[0] == 1 for _, mask in draws("uncropping", num)]
        probabilities = {"around": 1 / 2, "left": 1 / 8, "right": 1 / 8, "top": 1 / 8}
        for edge, prob in (probabilities | {"bottom": 1 / 8}).items():
            count = sum((mask == half_mask(SIDE, edge)).all() for mask in masks)
            assert abs(count - num * prob) < 3.3 * (num * prob * (1 - prob)) ** 0.5

    def test_the_center_mask(self) -> None:
        mask = center_mask(SIDE)
        assert mask.mean() == 0.25
        assert (mask == mask[::-1]).all()
        assert (mask == mask.T).all()
        assert mask[16:48, 16:48].all()

    def test_an_image_and_mask_of_any_shape(self) -> None:
        image = photograph("rocket", 40)
        hole = np.zeros(image.shape[:2], bool)
        hole[3:20, 5:50] = True
        source, mask = with_hole(image, hole, rng())
        assert (to_uint8(source)[~hole] == image[~hole]).all()
        assert (mask[0] == hole).all()
        assert (source == with_hole(image, hole, rng()).source).all()


@pytest.mark.parametrize("task", TASKS)
def test_the_prior_mean_fills_the_hole_from_its_border(task: str) -> None:
    for degraded in draws(task, 5):
        mean = prior_mean(task, degraded)
        assert mean.dtype == np.float32

        if degraded.mask.all():
            np.testing.assert_array_equal(mean, degraded.source)
            continue

        known = np.broadcast_to(degraded.mask == 0, degraded.source.shape)
        np.testing.assert_array_equal(mean[known], degraded.source[known])
        assert np.abs(mean).max() <= 1

        error, noise_error = (
            np.abs(each - to_float(COFFEE))[~known].mean() for each in (mean, degraded.source)
        )
        assert error < noise_error
