"""Around the samples of a restored picture: sizes, spread, blends, and a seam that does not show."""

import numpy as np
import pytest
from scipy import ndimage

from pipeline.errors import UserError
from pipeline.imaging.compositing import (
    BRIGHTEST,
    blend,
    composite,
    filled,
    heat,
    least_certain,
    membrane,
    padded,
    seam,
    spread,
)
from pipeline.imaging.degradations import centre, half, rectangles, strokes
from pipeline.rng import generator
from tests.data.test_image import photograph

RNG = np.random.default_rng(0)
SIDE = 96
HOLES = {
    "strokes": strokes(SIDE, generator(0, "damage", 1)),
    "rectangles": rectangles(SIDE, generator(0, "damage", 2)),
    "centre": centre(SIDE),
    "right": half(SIDE, "right"),
    "around": half(SIDE, "around"),
}
each_hole = pytest.mark.parametrize("mask", HOLES.values(), ids=HOLES)


def square(name):
    return photograph(name, 2 * SIDE)[SIDE // 2 :, SIDE // 2 :][:SIDE, :SIDE]


def noise(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


class TestSizes:
    def test_there_and_back(self):
        for height in range(1, 41):
            picture, mask = noise(height, 41 - height, 3), RNG.random((height, 41 - height)) < 0.5
            for stride in range(1, 17):
                for array in (picture, mask):
                    larger = padded(array, stride)
                    assert larger.dtype == array.dtype
                    assert (larger[: array.shape[0], : array.shape[1]] == array).all()
                    more = np.subtract(larger.shape, array.shape)
                    assert not (np.array(larger.shape[:2]) % stride).any()
                    assert (more[:2] < stride).all()
                    assert (more[2:] == 0).all()

    def test_what_is_added_mirrors(self):
        picture = noise(5, 6, 3)
        larger = padded(picture, 8)
        assert (larger[5:] == larger[3:0:-1]).all()
        assert (larger[:, 6:] == larger[:, 4:2:-1]).all()


class TestSamples:
    def test_spread_is_the_standard_deviation(self):
        samples = noise(5, 12, 14, 3)
        expected = np.sqrt((np.std(samples.astype(np.float64), axis=0) ** 2).mean(-1))
        found = spread(samples)
        assert found.shape == (12, 14)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert (spread(samples[:1]) == 0).all()

    def test_heat_grows_lighter(self):
        colours = heat(np.linspace(0, 2 * BRIGHTEST, 201)[None])[0]
        assert colours.dtype == np.uint8
        luma = colours @ [0.299, 0.587, 0.114]
        assert luma[0] < 2
        assert (np.diff(luma[:101]) > -0.6).all()  # rounding
        assert (np.diff(luma[:101:10]) > 5).all()
        assert (colours[100:] == colours[100]).all()
        assert luma[100] > 240

    def test_a_blend_of_one_is_that_sample(self):
        samples = noise(3, 9, 10, 3)
        for number in range(3):
            assert (blend(samples, 2.5 * np.eye(3)[number]) == samples[number]).all()
        assert (blend(samples[:1], [0.1]) == samples[0]).all()

    def test_a_blend_is_the_weighted_mean(self):
        samples = noise(3, 9, 10, 3)
        expected = np.average(samples.astype(np.float64), axis=0, weights=[1, 2, 5])
        assert np.abs(blend(samples, [1, 2, 5]) - expected).max() <= 0.5
        assert (blend(samples, [1, 2, 5]) == blend(samples, [2, 4, 10])).all()

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ([1], "1 for 3 samples; give each one"),
            ([1, 1, 1, 1], "4 for 3 samples"),
            ([1, -1, 1], "at least 0"),
            ([0, 0, 0], "not all 0"),
            ([1, float("nan"), 1], "must be numbers"),
            ([1, float("inf"), 1], "must be numbers"),
        ],
    )
    def test_weights_that_are_none(self, weights, message):
        with pytest.raises(UserError, match=message):
            blend(noise(3, 4, 4, 3), weights)


class TestLeastCertain:
    def test_finds_where_samples_differ(self):
        """In a hole of 60 x 60, whose corner of 20 x 20 is unsure; the known pixels' spread does
        not count.
        """
        mask, unsure = np.zeros((2, SIDE, SIDE), bool)
        mask[10:70, 10:70] = unsure[10:30, 10:30] = True
        values = np.where(mask, 1.0, 99.0) + 20 * unsure
        part = least_certain(values, mask, 400 / 3600)
        assert part.dtype == bool
        assert not (part & ~mask).any()
        assert (part & unsure).sum() > 0.97 * unsure.sum()
        assert part.sum() < 1.4 * unsure.sum()  # a margin of two pixels on two sides, and a few
        assert part[12, 30:32].all()

    def test_the_rim_of_a_hole_is_no_surer_for_its_known_neighbours(self):
        mask, unsure = np.zeros((2, SIDE, SIDE), bool)
        mask[10:70, 10:70] = unsure[10:13, 10:70] = True
        assert (
            least_certain(1 + 0.5 * unsure, mask, 180 / 3600) & unsure
        ).sum() > 0.97 * unsure.sum()

    @each_hole
    @pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
    def test_the_share(self, mask, share):
        values = ndimage.gaussian_filter(RNG.random((SIDE, SIDE)), 3)
        part = least_certain(values, mask, share)
        assert not (part & ~mask).any()
        assert share * mask.sum() - 1 <= part.sum() < (share + 0.35) * mask.sum()
        assert values[part].mean() > values[mask & ~part].mean()

    def test_none_and_all(self):
        mask = HOLES["strokes"]
        assert not least_certain(np.ones((SIDE, SIDE)), mask, 0).any()
        assert (least_certain(np.ones((SIDE, SIDE)), mask, 1) == mask).all()
        assert least_certain(np.ones((SIDE, SIDE)), mask, 0.2).sum() >= round(
            0.2 * mask.sum()
        )  # ties too
        assert not least_certain(np.ones((SIDE, SIDE)), np.zeros((SIDE, SIDE), bool), 0.5).any()
        with pytest.raises(UserError, match=r"share 25: not in \[0, 1\]"):
            least_certain(np.ones((SIDE, SIDE)), mask, 25)


class TestMembrane:
    def test_is_shepards_sum(self):
        at = RNG.random((11, 17)) < 0.1
        values = RNG.standard_normal((11, 17, 2))
        i, j = np.nonzero(at)
        y, x = np.mgrid[:11, :17]
        distance = np.hypot(y[..., None] - i, x[..., None] - j)
        weight = np.where(distance == 0, 1, distance.clip(1)) ** -3
        expected = weight @ values[i, j] / weight.sum(-1)[..., None]
        np.testing.assert_allclose(membrane(values, at), expected, atol=1e-9)

    def test_keeps_a_constant_and_the_range(self):
        at = np.zeros((700, 500), bool)
        at[3, 5] = at[40, 50] = True
        np.testing.assert_allclose(membrane(np.full((700, 500, 1), 7.0), at), 7, atol=1e-6)
        values = np.zeros((700, 500, 1))
        values[3, 5] = 1
        carried = membrane(values, at)
        assert -1e-6 < carried.min() < 0.01
        assert carried.max() <= 1 + 1e-6

    def test_detail_along_the_border_fades_and_its_mean_stays(self):
        """A wave of 8 pixels on the edge of a half plane: the harmonic function falls to exp(-2 pi
        d / 8).
        """
        at = np.zeros((128, 256), bool)
        at[0] = True
        values = np.zeros((128, 256, 1))
        values[0, :, 0] = 10 + 4 * np.cos(2 * np.pi * np.arange(256) / 8)
        carried = membrane(values, at)[:, 64:-64, 0]
        assert np.abs(carried[1].mean() - 10) < 0.05
        assert np.abs(carried[1] - 10).max() > 1
        assert np.abs(carried[8:] - 10).max() < 0.05


class TestFilled:
    def test_a_border_of_one_colour_fills_the_hole_and_the_known_stays(self):
        picture = np.random.default_rng(1).integers(0, 256, (20, 24, 3)).astype(np.float32)
        mask = np.zeros((20, 24), bool)
        mask[5:12, 0:9] = True
        border = ndimage.binary_dilation(mask) & ~mask
        picture[border] = (30, 90, 250)
        found = filled(picture, mask)
        np.testing.assert_array_equal(found[~mask], picture[~mask])
        np.testing.assert_allclose(
            found[mask], np.broadcast_to((30, 90, 250), found[mask].shape), atol=1e-3
        )
        other = np.where(mask[..., None], 0, picture)  # what was in the hole does not matter
        np.testing.assert_array_equal(filled(other, mask), found)

    def test_nothing_known_is_nothing_to_carry(self):
        assert not filled(np.ones((5, 4, 3), np.float32), np.ones((5, 4), bool)).any()

    def test_a_wide_hole_is_filled_exactly_from_float32(self):
        picture = np.random.default_rng(1).uniform(-1, 1, (300, 300, 3)).astype(np.float32)
        mask = np.zeros((300, 300), bool)
        mask[:, 10:] = True
        np.testing.assert_allclose(
            filled(picture, mask), filled(picture.astype(np.float64), mask), atol=1e-6
        )


class TestComposite:
    @each_hole
    def test_known_pixels_are_untouched(self, mask):
        picture, painted = noise(SIDE, SIDE, 3), noise(SIDE, SIDE, 3)
        before = picture.copy(), painted.copy(), mask.copy()
        found = composite(picture, painted, mask)
        assert found.dtype == np.uint8
        assert (found[~mask] == picture[~mask]).all()
        assert (found[mask] != picture[mask]).mean() > 0.5
        for array, was in zip((picture, painted, mask), before, strict=True):
            assert (array == was).all()

    @each_hole
    def test_only_the_painting_in_the_hole_counts(self, mask):
        picture, painted = square("coffee"), square("chelsea")
        other = np.where(mask[..., None], painted, noise(SIDE, SIDE, 3))
        masked = np.where(mask[..., None], noise(SIDE, SIDE, 3), picture)
        assert (composite(picture, painted, mask) == composite(masked, other, mask)).all()

    @each_hole
    def test_a_constant_shift_is_taken_away_exactly(self, mask):
        picture = np.full((SIDE, SIDE, 3), (100, 30, 200), np.uint8)
        assert (composite(picture, picture + np.array((20, -17, 9)), mask) == picture).all()

    @each_hole
    def test_a_slope_goes_on(self, mask):
        """Of two levels a pixel, of which one is expected across the border: without it, it would
        be off by two.
        """
        y, x = np.mgrid[:SIDE, :SIDE]
        picture = np.stack([20 + 2 * x, 220 - 2 * x, 20 + 2 * y], -1).astype(np.uint8)
        change = composite(picture, picture + np.array((20, -17, 9)), mask) - picture.astype(float)
        assert np.abs(change).max() <= 1

    @each_hole
    @pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
    def test_the_seam_does_not_show(self, mask, name):
        """A true painting of the wrong colour, and of a colour that is wrong by another amount
        everywhere.
        """
        picture = square(name)
        y, x = np.mgrid[:SIDE, :SIDE] / SIDE
        waves = np.stack([25 * np.sin(7 * x + 3 * y), 20 * y - 30, 30 + 15 * np.cos(5 * x)], -1)
        for shift in (np.array([30.0, -25, 35]), waves):
            painted = np.clip(picture + shift, 0, 255).astype(np.uint8)
            raw = seam(np.where(mask[..., None], painted, picture), mask)
            assert raw.across > 1.3 * max(raw.known, raw.painted)
            found = seam(composite(picture, painted, mask), mask)
            assert found.across <= max(found.known, found.painted)

    @each_hole
    def test_what_does_not_fit_at_all_joins(self, mask):
        picture, painted = square("coffee"), square("chelsea")
        raw = seam(np.where(mask[..., None], painted, picture), mask)
        found = seam(composite(picture, painted, mask), mask)
        assert found.across < raw.across / 4
        assert found.across <= 1.1 * max(found.known, found.painted)

    @each_hole
    @pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
    def test_comes_closer_to_the_truth(self, mask, name):
        """A painting of the wrong colour; one that is right is moved by less than the colour was
        wrong.
        """
        picture = (40 + 0.7 * square(name)).astype(np.uint8)  # no level leaves the range
        wrong = (picture + np.array((-35.0, 30, -40))).astype(np.uint8)

        def error(painted):
            return np.sqrt(((painted[mask].astype(float) - picture[mask]) ** 2).mean())

        assert error(composite(picture, wrong, mask)) < error(wrong) / 2
        assert error(composite(picture, picture, mask)) < error(wrong) / 2

    def test_nothing_and_everything(self):
        picture, painted = noise(20, 30, 3), noise(20, 30, 3)
        assert (composite(picture, painted, np.zeros((20, 30), bool)) == picture).all()
        assert (composite(picture, painted, np.ones((20, 30), bool)) == painted).all()

    def test_a_hole_of_one_pixel(self):
        picture, mask = np.full((5, 5, 3), 90, np.uint8), np.zeros((5, 5), bool)
        mask[2, 2] = True
        assert (composite(picture, noise(5, 5, 3), mask) == 90).all()

    def test_runs_over_no_edge(self):
        """Levels that the shift would bring below 0 or above 255 end there."""
        picture = np.zeros((16, 16, 3), np.uint8)
        painted = np.where(centre(16)[..., None], noise(16, 16, 3), 0)
        painted[4:12, 4:12][1:-1, 1:-1] = 0
        assert composite(picture, painted.astype(np.uint8), centre(16))[6:10, 6:10].max() <= 1


class TestSeam:
    def test_counts_the_three_kinds_of_pairs(self):
        picture, mask = np.zeros((20, 20, 3), np.uint8), half(20, "right")
        picture[:, 10:] = 50
        picture[::2, :10] += 6
        picture[::2, 10:] += 10
        found = seam(picture, mask)
        assert found.across == pytest.approx(52)  # 50 and 54 in turn
        # within four columns, 4 x 19 pairs down and 3 x 20 across
        assert found.known == pytest.approx(6 * 76 / 136)
        assert found.painted == pytest.approx(10 * 76 / 136)

    def test_what_is_far_does_not_count(self):
        picture, mask = np.zeros((20, 20, 3), np.uint8), half(20, "right")
        picture[:, 4:6] = picture[:, 15:] = 99
        assert seam(picture, mask) == (0, 0, 0)

    def test_without_a_border(self):
        across, known, painted = seam(noise(8, 8, 3), np.ones((8, 8), bool))
        assert np.isnan([across, known, painted]).all()
