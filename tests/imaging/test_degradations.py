"""The four tasks: what is seen, what is to be made, how often which, and that the generator alone
decides.
"""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from pipeline.data.decode import decode
from pipeline.data.image import to_float, to_uint8
from pipeline.errors import UserError
from pipeline.imaging.degradations import (
    HOLE,
    QUALITIES,
    TASKS,
    centre,
    compressed,
    degrade,
    grey,
    half,
    prior_mean,
    rectangles,
    strokes,
    whole,
    with_hole,
)
from pipeline.rng import generator
from tests.data.test_image import photograph
from tests.helpers.image_files import encoded, psnr

SIDE = 64
COFFEE = photograph("coffee", SIDE)[:, :SIDE]


def draws(task, num, picture=COFFEE):
    return [degrade(task, picture, generator(0, "damage", number)) for number in range(num)]


@pytest.mark.parametrize("task", TASKS)
def test_what_the_network_is_given(task):
    for source, mask in draws(task, 20):
        assert source.shape == (3, SIDE, SIDE)
        assert mask.shape == (1, SIDE, SIDE)
        assert source.dtype == mask.dtype == np.float32
        assert set(np.unique(mask)) <= {0, 1}
        assert mask.any()


@pytest.mark.parametrize("task", TASKS)
def test_a_draw_is_its_generators(task):
    before = COFFEE.copy()
    again, other = (
        draws(task, 30),
        [degrade(task, COFFEE, generator(1, "damage", number)) for number in range(30)],
    )
    for a, b in zip(draws(task, 30), again, strict=True):
        assert (a.source == b.source).all()
        assert (a.mask == b.mask).all()
    assert (before == COFFEE).all()
    same = [(a.source == b.source).all() for a, b in zip(again, other, strict=True)]
    assert all(same) if task == "colorization" else np.mean(same) < 0.3


@pytest.mark.parametrize("task", ["inpainting", "uncropping"])
def test_the_known_is_the_picture_and_a_hole_is_noise(task):
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
def test_nothing_of_what_is_missing_shows(task):
    for a, b in zip(draws(task, 5), draws(task, 5, 255 - COFFEE), strict=True):
        hole = a.mask[0] == 1
        assert (a.source[:, hole] == b.source[:, hole]).all()


def test_an_unknown_task_names_the_known():
    with pytest.raises(
        UserError,
        match=r"'inpaint': not known; .* colorization, inpainting, uncropping, jpeg_resto",
    ):
        degrade("inpaint", COFFEE, generator(0, "damage"))


class TestWholePictures:
    @pytest.mark.parametrize("task", ["colorization", "jpeg_restoration"])
    def test_all_is_made_anew(self, task):
        for source, mask in draws(task, 5):
            assert mask.all()
            assert np.abs(source).max() <= 1

    def test_grey_is_pillows_luma(self):
        luma = np.asarray(Image.fromarray(COFFEE).convert("L"))
        for source, _ in draws("colorization", 1):
            assert (to_uint8(source) == luma[..., None]).all()
        assert np.abs(luma - COFFEE @ [0.299, 0.587, 0.114]).max() <= 0.51
        assert (grey(grey(COFFEE)) == grey(COFFEE)).all()

    @pytest.mark.parametrize("quality", [5, 10, 30])
    def test_a_jpeg_is_what_others_make(self, quality):
        """Pillow has the same tables and subsampling; a few coefficients are rounded to the other
        side.
        """
        theirs = decode(encoded(COFFEE, "JPEG", quality=quality, subsampling="4:2:0"), SIDE).pixels
        ours = compressed(COFFEE, quality)
        assert psnr(ours, theirs) > 32
        assert abs(psnr(ours, COFFEE) - psnr(theirs, COFFEE)) < 0.05

    def test_qualities(self):
        """Which one a source had shows in its pixels. Chi-square of 25 degrees of freedom: above
        52.6 once in 1,000.
        """
        small = COFFEE[:32, :32]
        of = {compressed(small, quality).tobytes(): quality for quality in QUALITIES}
        assert len(of) == len(QUALITIES)
        num = 4000
        drawn = [
            of[to_uint8(source).tobytes()] for source, _ in draws("jpeg_restoration", num, small)
        ]
        expected = np.exp(-np.arange(5, 31) / 10)
        expected *= num / expected.sum()
        found = np.bincount(drawn, minlength=31)[5:]
        assert ((found - expected) ** 2 / expected).sum() < 52.6

    def test_a_users_picture_of_any_shape(self):
        picture = photograph("rocket", 40)
        source, mask = whole(picture)
        assert (to_uint8(source) == picture).all()
        assert mask.shape == (1, *picture.shape[:2])
        assert mask.all()


class TestHoles:
    @pytest.mark.parametrize("draw", [strokes, rectangles])
    @pytest.mark.parametrize("side", [8, 16, 64, 256])
    def test_areas(self, draw, side):
        areas = [draw(side, generator(0, "damage", number)).mean() for number in range(200)]
        lowest, highest = HOLE
        assert lowest <= min(areas)
        assert max(areas) <= highest
        assert min(areas) < 0.15  # all of the range
        assert max(areas) > 0.35
        assert 0.18 < np.median(areas) < 0.28

    def test_another_range(self):
        for draw in (strokes, rectangles):
            areas = [
                draw(SIDE, generator(0, "damage", number), (0.2, 0.3)).mean()
                for number in range(50)
            ]
            assert 0.2 <= min(areas) < max(areas) <= 0.3
        with pytest.raises(
            ValueError, match="no hole covers 10% to 40% of a picture 1 pixels wide"
        ):
            rectangles(1, generator(0, "damage"))

    def test_strokes_and_rectangles(self):
        """A square, moved about in rectangles that are wider, reaches all of them, and no brush has
        its corners.
        """

        def is_rectangles(mask):
            inner = ndimage.minimum_filter(mask, 13, mode="constant")
            return (ndimage.maximum_filter(inner, 13, mode="constant") == mask).all()

        for number in range(100):
            assert is_rectangles(rectangles(256, generator(1, "damage", number)))
            assert not is_rectangles(strokes(256, generator(1, "damage", number)))
        num, picture = 600, np.zeros((256, 256, 3), np.uint8)
        found = [
            is_rectangles(degrade("inpainting", picture, generator(0, "damage", i)).mask[0])
            for i in range(num)
        ]
        assert abs(sum(found) - 0.4 * num) < 3.3 * (num * 0.6 * 0.4) ** 0.5

    def test_rectangles_are_one_to_five(self):
        parts = [
            ndimage.label(rectangles(256, generator(2, "damage", number)))[1]
            for number in range(300)
        ]
        assert set(parts) == {1, 2, 3, 4, 5}

    def test_strokes_are_round_and_as_wide_as_a_brush(self):
        """A disc of 11 pixels, moved about in them, reaches nearly all: no stroke is thinner, and
        no end is square.
        """
        disc = np.hypot(*np.mgrid[-5:6, -5:6]) <= 5.5
        lost = total = 0
        for number in range(30):
            mask = strokes(256, generator(3, "damage", number))
            reached = ndimage.binary_opening(np.pad(mask, 16, "edge"), disc)[16:-16, 16:-16]
            lost, total = lost + (mask & ~reached).sum(), total + mask.sum()
        assert lost < 0.005 * total

    def test_strokes_go_up_and_down_as_often_as_across(self):
        masks = [strokes(SIDE, generator(5, "damage", number)).astype(int) for number in range(300)]
        upright = [
            np.abs(np.diff(mask, axis=1)).sum() > np.abs(np.diff(mask, axis=0)).sum()
            for mask in masks
        ]
        assert abs(np.mean(upright) - 0.5) < 0.1

    def test_strokes_of_another_size_are_the_same(self):
        """Lengths go with the side: the same draws at 64 and 256 px cover much the same part."""
        overlaps = []
        for number in range(50):
            small, large = (strokes(side, generator(4, "damage", number)) for side in (64, 256))
            enlarged = small.repeat(4, 0).repeat(4, 1)
            overlaps.append((enlarged & large).sum() / (enlarged | large).sum())
        assert np.median(overlaps) > 0.8

    @pytest.mark.parametrize(
        ("task", "least", "most"), [("inpainting", 0.04, 0.45), ("uncropping", 0.15, 0.85)]
    )
    def test_every_place_is_sometimes_missing_and_sometimes_known(self, task, least, most):
        often = np.mean([mask[0] for _, mask in draws(task, 600)], axis=0)
        assert least < often.min()
        assert often.max() < most

    @pytest.mark.parametrize("side", [8, 15, 64, 256])
    def test_half(self, side):
        for edge, turns in (("top", 0), ("left", 1), ("bottom", 2), ("right", 3)):
            mask = np.rot90(half(side, edge), -turns)
            assert mask[: side // 2].all()
            assert not mask[side // 2 :].any()
        frame = half(side, "around")
        assert abs(frame.mean() - 0.5) < 1.5 / side
        rows, columns = (np.flatnonzero(~frame.all(axis)) for axis in (1, 0))
        assert (rows == columns).all()
        assert abs(rows[0] - (side - 1 - rows[-1])) <= 1
        assert not frame[rows[0] : rows[-1] + 1, rows[0] : rows[-1] + 1].any()

    def test_edges_are_equally_likely(self):
        num = 800
        masks = [mask[0] == 1 for _, mask in draws("uncropping", num)]
        for edge, share in [
            ("around", 1 / 2),
            *[(edge, 1 / 8) for edge in ("left", "right", "top", "bottom")],
        ]:
            count = sum((mask == half(SIDE, edge)).all() for mask in masks)
            assert abs(count - num * share) < 3.3 * (num * share * (1 - share)) ** 0.5

    def test_the_fixed_hole(self):
        mask = centre(SIDE)
        assert mask.mean() == 0.25
        assert (mask == mask[::-1]).all()
        assert (mask == mask.T).all()
        assert mask[16:48, 16:48].all()

    def test_a_users_picture_and_mask_of_any_shape(self):
        picture = photograph("rocket", 40)
        hole = np.zeros(picture.shape[:2], bool)
        hole[3:20, 5:50] = True
        source, mask = with_hole(picture, hole, generator(0, "damage"))
        assert (to_uint8(source)[~hole] == picture[~hole]).all()
        assert (mask[0] == hole).all()
        assert (source == with_hole(picture, hole, generator(0, "damage")).source).all()


@pytest.mark.parametrize("task", TASKS)
def test_the_guess_is_the_source_and_in_a_hole_what_is_around(task):
    for given in draws(task, 5):
        found, known = prior_mean(task, given), np.broadcast_to(given.mask == 0, given.source.shape)
        assert found.dtype == np.float32
        if given.mask.all():
            np.testing.assert_array_equal(found, given.source)
        else:
            np.testing.assert_array_equal(found[known], given.source[known])
            assert np.abs(found).max() <= 1
            off, noise = (
                np.abs(each - to_float(COFFEE))[~known].mean() for each in (found, given.source)
            )
            assert off < noise
