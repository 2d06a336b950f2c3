"""Compositing: padding, statistics and blends of samples, and a seam that does not show."""

from collections.abc import Sequence

import numpy as np
import pytest
from scipy import ndimage

from pipeline.errors import UserError
from pipeline.imaging.compositing import (
    HEATMAP_MAX,
    blend,
    composite,
    fill_hole,
    heatmap,
    membrane,
    most_uncertain,
    pad_to_multiple,
    sample_std,
    seam,
)
from pipeline.imaging.degradations import center_mask, half_mask, rectangle_mask, stroke_mask
from pipeline.rng import generator
from tests.data.test_image import photograph

RNG = np.random.default_rng(0)
SIDE = 96
PHOTOGRAPHS = ["astronaut", "coffee", "chelsea", "rocket"]
MASKS = {
    "strokes": stroke_mask(SIDE, generator(0, "damage", 1)),
    "rectangles": rectangle_mask(SIDE, generator(0, "damage", 2)),
    "center": center_mask(SIDE),
    "right": half_mask(SIDE, "right"),
    "around": half_mask(SIDE, "around"),
}
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def square(name: str) -> np.ndarray:
    return photograph(name, 2 * SIDE)[SIDE // 2 :, SIDE // 2 :][:SIDE, :SIDE]


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


class TestPadding:
    def test_slicing_undoes_it(self) -> None:
        for height in range(1, 41):
            width = 41 - height
            image = noise(height, width, 3)
            mask = RNG.random((height, width)) < 0.5

            for stride in range(1, 17):
                for array in (image, mask):
                    padded = pad_to_multiple(array, stride)
                    assert padded.dtype == array.dtype
                    assert (padded[:height, :width] == array).all()
                    assert not (np.array(padded.shape[:2]) % stride).any()

                    added = np.subtract(padded.shape, array.shape)
                    assert (added[:2] < stride).all()
                    assert (added[2:] == 0).all()

    def test_the_padding_mirrors_the_image(self) -> None:
        image = noise(5, 6, 3)
        padded = pad_to_multiple(image, 8)
        assert (padded[5:] == padded[3:0:-1]).all()
        assert (padded[:, 6:] == padded[:, 4:2:-1]).all()


class TestSamples:
    def test_standard_deviation(self) -> None:
        samples = noise(5, 12, 14, 3)
        expected = np.sqrt((np.std(samples.astype(np.float64), axis=0) ** 2).mean(-1))

        std = sample_std(samples)

        assert std.shape == (12, 14)
        np.testing.assert_allclose(std, expected, rtol=1e-5)
        assert (sample_std(samples[:1]) == 0).all()

    def test_a_heatmap_grows_lighter_up_to_its_maximum(self) -> None:
        colors = heatmap(np.linspace(0, 2 * HEATMAP_MAX, 201)[None])[0]
        assert colors.dtype == np.uint8

        luma = colors @ [0.299, 0.587, 0.114]
        assert luma[0] < 2
        assert (np.diff(luma[:101]) > -0.6).all()  # rounding
        assert (np.diff(luma[:101:10]) > 5).all()
        assert (colors[100:] == colors[100]).all()
        assert luma[100] > 240

    def test_a_blend_of_one_sample_is_that_sample(self) -> None:
        samples = noise(3, 9, 10, 3)
        for i in range(3):
            assert (blend(samples, 2.5 * np.eye(3)[i]) == samples[i]).all()
        assert (blend(samples[:1], [0.1]) == samples[0]).all()

    def test_a_blend_is_the_weighted_mean(self) -> None:
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
    def test_invalid_weights(self, weights: Sequence[float], message: str) -> None:
        with pytest.raises(UserError, match=message):
            blend(noise(3, 4, 4, 3), weights)


class TestMostUncertain:
    def test_selects_where_samples_differ(self) -> None:
        """A hole of 60 x 60 with an uncertain corner of 20 x 20; known pixels do not count."""
        mask = np.zeros((SIDE, SIDE), bool)
        mask[10:70, 10:70] = True
        uncertain = np.zeros((SIDE, SIDE), bool)
        uncertain[10:30, 10:30] = True
        std = np.where(mask, 1.0, 99.0) + 20 * uncertain

        part = most_uncertain(std, mask, 400 / 3600)

        assert part.dtype == bool
        assert not (part & ~mask).any()
        assert (part & uncertain).sum() > 0.97 * uncertain.sum()
        # The margin of two pixels on two sides, and a few pixels.
        assert part.sum() < 1.4 * uncertain.sum()
        assert part[12, 30:32].all()

    def test_known_neighbours_do_not_make_the_border_more_certain(self) -> None:
        mask = np.zeros((SIDE, SIDE), bool)
        mask[10:70, 10:70] = True
        uncertain = np.zeros((SIDE, SIDE), bool)
        uncertain[10:13, 10:70] = True

        part = most_uncertain(1 + 0.5 * uncertain, mask, 180 / 3600)

        assert (part & uncertain).sum() > 0.97 * uncertain.sum()

    @each_mask
    @pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
    def test_selects_the_share_and_a_margin(self, mask: np.ndarray, share: float) -> None:
        std = ndimage.gaussian_filter(RNG.random((SIDE, SIDE)), 3)
        part = most_uncertain(std, mask, share)
        assert not (part & ~mask).any()
        assert share * mask.sum() - 1 <= part.sum() < (share + 0.35) * mask.sum()
        assert std[part].mean() > std[mask & ~part].mean()

    def test_shares_of_none_and_all(self) -> None:
        mask = MASKS["strokes"]
        std = np.ones((SIDE, SIDE))
        assert not most_uncertain(std, mask, 0).any()
        assert (most_uncertain(std, mask, 1) == mask).all()
        assert not most_uncertain(std, np.zeros_like(mask), 0.5).any()

    def test_ties_do_not_reduce_the_share(self) -> None:
        mask = MASKS["strokes"]
        part = most_uncertain(np.ones((SIDE, SIDE)), mask, 0.2)
        assert part.sum() >= round(0.2 * mask.sum())

    def test_an_invalid_share(self) -> None:
        with pytest.raises(UserError, match=r"share 25: not in \[0, 1\]"):
            most_uncertain(np.ones((SIDE, SIDE)), MASKS["strokes"], 25)


class TestMembrane:
    def test_equals_shepards_sum(self) -> None:
        border = RNG.random((11, 17)) < 0.1
        values = RNG.standard_normal((11, 17, 2))

        i, j = np.nonzero(border)
        y, x = np.mgrid[:11, :17]
        distance = np.hypot(y[..., None] - i, x[..., None] - j)
        weight = np.where(distance == 0, 1, distance.clip(1)) ** -3
        expected = weight @ values[i, j] / weight.sum(-1)[..., None]

        np.testing.assert_allclose(membrane(values, border), expected, atol=1e-9)

    def test_keeps_a_constant_and_the_range(self) -> None:
        border = np.zeros((700, 500), bool)
        border[3, 5] = border[40, 50] = True
        np.testing.assert_allclose(membrane(np.full((700, 500, 1), 7.0), border), 7, atol=1e-6)

        values = np.zeros((700, 500, 1))
        values[3, 5] = 1
        interpolated = membrane(values, border)
        assert -1e-6 < interpolated.min() < 0.01
        assert interpolated.max() <= 1 + 1e-6

    def test_detail_along_the_border_decays_and_its_mean_stays(self) -> None:
        """A wave of period 8 on the edge of a half plane; the harmonic function decays as
        exp(-2 pi d / 8).
        """
        border = np.zeros((128, 256), bool)
        border[0] = True
        values = np.zeros((128, 256, 1))
        values[0, :, 0] = 10 + 4 * np.cos(2 * np.pi * np.arange(256) / 8)

        interpolated = membrane(values, border)[:, 64:-64, 0]

        assert np.abs(interpolated[1].mean() - 10) < 0.05
        assert np.abs(interpolated[1] - 10).max() > 1
        assert np.abs(interpolated[8:] - 10).max() < 0.05


class TestFillHole:
    def test_a_border_of_one_color_fills_the_hole(self) -> None:
        image = np.random.default_rng(1).integers(0, 256, (20, 24, 3)).astype(np.float32)
        mask = np.zeros((20, 24), bool)
        mask[5:12, 0:9] = True
        border = ndimage.binary_dilation(mask) & ~mask
        image[border] = (30, 90, 250)

        filled = fill_hole(image, mask)

        np.testing.assert_array_equal(filled[~mask], image[~mask])
        expected = np.broadcast_to((30, 90, 250), filled[mask].shape)
        np.testing.assert_allclose(filled[mask], expected, atol=1e-3)

        # Pixels in the hole have no influence.
        other = np.where(mask[..., None], 0, image)
        np.testing.assert_array_equal(fill_hole(other, mask), filled)

    def test_without_known_pixels_it_is_zero(self) -> None:
        assert not fill_hole(np.ones((5, 4, 3), np.float32), np.ones((5, 4), bool)).any()

    def test_a_wide_hole_is_filled_as_exactly_from_float32(self) -> None:
        image = np.random.default_rng(1).uniform(-1, 1, (300, 300, 3)).astype(np.float32)
        mask = np.zeros((300, 300), bool)
        mask[:, 10:] = True
        expected = fill_hole(image.astype(np.float64), mask)
        np.testing.assert_allclose(fill_hole(image, mask), expected, atol=1e-6)


class TestComposite:
    @each_mask
    def test_known_pixels_are_unchanged(self, mask: np.ndarray) -> None:
        image = noise(SIDE, SIDE, 3)
        generated = noise(SIDE, SIDE, 3)
        arguments = (image, generated, mask)
        before = [array.copy() for array in arguments]

        result = composite(image, generated, mask)

        assert result.dtype == np.uint8
        assert (result[~mask] == image[~mask]).all()
        assert (result[mask] != image[mask]).mean() > 0.5
        for array, copy in zip(arguments, before, strict=True):
            assert (array == copy).all()

    @each_mask
    def test_only_generated_pixels_in_the_hole_have_influence(self, mask: np.ndarray) -> None:
        image = square("coffee")
        generated = square("chelsea")
        other_generated = np.where(mask[..., None], generated, noise(SIDE, SIDE, 3))
        other_image = np.where(mask[..., None], noise(SIDE, SIDE, 3), image)

        result = composite(image, generated, mask)

        assert (composite(other_image, other_generated, mask) == result).all()

    @each_mask
    def test_a_constant_offset_is_removed_exactly(self, mask: np.ndarray) -> None:
        image = np.full((SIDE, SIDE, 3), (100, 30, 200), np.uint8)
        assert (composite(image, image + np.array((20, -17, 9)), mask) == image).all()

    @each_mask
    def test_a_slope_is_continued(self, mask: np.ndarray) -> None:
        """A slope of two levels per pixel, half of which is expected across the border: with no
        expected step the error would be two levels.
        """
        y, x = np.mgrid[:SIDE, :SIDE]
        image = np.stack([20 + 2 * x, 220 - 2 * x, 20 + 2 * y], -1).astype(np.uint8)
        error = composite(image, image + np.array((20, -17, 9)), mask) - image.astype(float)
        assert np.abs(error).max() <= 1

    @each_mask
    @pytest.mark.parametrize("name", PHOTOGRAPHS)
    def test_the_seam_does_not_show(self, mask: np.ndarray, name: str) -> None:
        """Correct pixels with a constant color offset, and with one that varies smoothly."""
        image = square(name)
        y, x = np.mgrid[:SIDE, :SIDE] / SIDE
        waves = np.stack([25 * np.sin(7 * x + 3 * y), 20 * y - 30, 30 + 15 * np.cos(5 * x)], -1)

        for offset in (np.array([30.0, -25, 35]), waves):
            generated = np.clip(image + offset, 0, 255).astype(np.uint8)
            uncorrected = seam(np.where(mask[..., None], generated, image), mask)
            assert uncorrected.across > 1.3 * max(uncorrected.known, uncorrected.painted)

            corrected = seam(composite(image, generated, mask), mask)
            assert corrected.across <= max(corrected.known, corrected.painted)

    @each_mask
    def test_another_image_has_no_seam_either(self, mask: np.ndarray) -> None:
        image = square("coffee")
        generated = square("chelsea")
        uncorrected = seam(np.where(mask[..., None], generated, image), mask)
        corrected = seam(composite(image, generated, mask), mask)
        assert corrected.across < uncorrected.across / 4
        assert corrected.across <= 1.1 * max(corrected.known, corrected.painted)

    @each_mask
    @pytest.mark.parametrize("name", PHOTOGRAPHS)
    def test_the_correction_reduces_the_error(self, mask: np.ndarray, name: str) -> None:
        """An offset is more than halved, and correct pixels change by less than half as much."""
        # Levels that do not leave the range with the offset.
        image = (40 + 0.7 * square(name)).astype(np.uint8)
        shifted = (image + np.array((-35.0, 30, -40))).astype(np.uint8)

        def error(result: np.ndarray) -> float:
            return float(np.sqrt(((result[mask].astype(float) - image[mask]) ** 2).mean()))

        assert error(composite(image, shifted, mask)) < error(shifted) / 2
        assert error(composite(image, image, mask)) < error(shifted) / 2

    def test_empty_and_full_masks(self) -> None:
        image = noise(20, 30, 3)
        generated = noise(20, 30, 3)
        assert (composite(image, generated, np.zeros((20, 30), bool)) == image).all()
        assert (composite(image, generated, np.ones((20, 30), bool)) == generated).all()

    def test_a_hole_of_one_pixel(self) -> None:
        image = np.full((5, 5, 3), 90, np.uint8)
        mask = np.zeros((5, 5), bool)
        mask[2, 2] = True
        assert (composite(image, noise(5, 5, 3), mask) == 90).all()

    def test_levels_are_clipped(self) -> None:
        """Levels that the correction moves below 0 or above 255 do not wrap around."""
        image = np.zeros((16, 16, 3), np.uint8)
        mask = center_mask(16)
        generated = np.where(mask[..., None], noise(16, 16, 3), 0)
        generated[5:11, 5:11] = 0
        assert composite(image, generated.astype(np.uint8), mask)[6:10, 6:10].max() <= 1


class TestSeam:
    def test_means_of_the_three_kinds_of_pairs(self) -> None:
        image = np.zeros((20, 20, 3), np.uint8)
        image[:, 10:] = 50
        image[::2, :10] += 6
        image[::2, 10:] += 10

        result = seam(image, half_mask(20, "right"))

        assert result.across == pytest.approx(52)  # 50 and 54 alternate
        # Within four columns there are 4 x 19 vertical pairs and 3 x 20 horizontal ones.
        assert result.known == pytest.approx(6 * 76 / 136)
        assert result.painted == pytest.approx(10 * 76 / 136)

    def test_distant_pixels_do_not_count(self) -> None:
        image = np.zeros((20, 20, 3), np.uint8)
        image[:, 4:6] = image[:, 15:] = 99
        assert seam(image, half_mask(20, "right")) == (0, 0, 0)

    def test_without_a_border_it_is_nan(self) -> None:
        assert np.isnan(seam(noise(8, 8, 3), np.ones((8, 8), bool))).all()
