"""Cropping and resizing against the mean of the area; conversions and their inverses."""

from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import skimage
from PIL import Image

from pipeline.data.decode import DecodedImage, decode
from pipeline.data.image import crop, crop_resize, downsample, to_float, to_uint8, upsample
from tests.helpers.image_files import decoded, encoded, psnr, smooth

# fmt: off
PHOTOGRAPHS = [
    "astronaut", "brick", "camera", "cell", "chelsea", "clock_motion", "coffee", "coins", "grass",
    "gravel", "hubble_deep_field", "ihc", "microaneurysms", "moon", "motorcycle_left",
    "motorcycle_right", "page", "retina", "rocket", "text",
]
# fmt: on


def photograph(name: str, short: int) -> np.ndarray:
    """One of the photographs of scikit-image, with this shorter side."""
    (path,) = (Path(skimage.__file__).parent / "data").glob(f"{name}.[pj][np]g")
    with Image.open(path) as opened:
        scale = short / min(opened.size)
        size = tuple(round(side * scale) for side in opened.size)
        return np.asarray(opened.convert("RGB").resize(size, Image.Resampling.BICUBIC))


def coverage(side: int, start: float, end: float, size: int) -> np.ndarray:
    """float64 (size, side): the fraction of each of `size` equal parts of [start, end) that each
    pixel covers.
    """
    edges = start + np.arange(size + 1) * (end - start) / size
    pixels = np.arange(side)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.clip(covered, 0, None) * size / (end - start)


def mean_of_area(image: np.ndarray, size: int) -> np.ndarray:
    """float64 (size, size, 3): the ideal result of `crop_resize` at the centre of a full image."""
    short = min(image.shape[:2])
    starts = [int((side * size // short - size + 1) / 2) * short / size for side in image.shape[:2]]
    down, across = (
        coverage(side, start, start + short, size)
        for side, start in zip(image.shape, starts, strict=False)
    )
    return np.einsum("ih,hwc,jw->ijc", down, image.astype(float), across, optimize=True)


class TestGeometry:
    @pytest.mark.parametrize("name", PHOTOGRAPHS)
    def test_photographs_look_like_the_mean_of_the_area(self, name: str) -> None:
        # 1025 ends within the last pixel at any scale.
        for short, quality in ((1024, 90), (1025, 95)):
            data = encoded(photograph(name, short), "JPEG", quality=quality, subsampling="4:2:0")
            full = simplejpeg.decode_jpeg(data)
            for size in (64, 256):
                square = crop_resize(decode(data, size), size, 0.5, 0.5)
                assert psnr(square, mean_of_area(full, size)) >= 35, (short, size)

    def test_the_reference_equals_pillows_box_kernel(self) -> None:
        image = photograph("coffee", 300)[:, :300]
        boxed = np.asarray(Image.fromarray(image).resize((50, 50), Image.Resampling.BOX))
        assert np.abs(mean_of_area(image, 50) - boxed).max() < 1

    def test_fine_stripes_do_not_alias(self) -> None:
        stripes = np.zeros((512, 512, 3), np.uint8)
        stripes[:, ::2] = 255  # far finer than 64 px: must become uniform grey
        assert crop_resize(decoded(stripes), 64, 0.5, 0.5)[4:-4, 4:-4].std() < 2

    def test_the_square_is_a_crop_of_the_resized_image(self) -> None:
        image = smooth(120, 200)
        small = np.asarray(
            Image.fromarray(image).resize((100, 60), Image.Resampling.HAMMING)
        ).astype(int)
        for u in (0, 0.3, 0.5, 0.999):
            assert (
                np.abs(crop_resize(decoded(image), 60, u, 0.5) - crop(small, 60, u, 0.5)).max() <= 1
            )
            assert (
                crop_resize(decoded(image[:60]), 60, u, 0.5) == crop(image[:60], 60, u, 0.5)
            ).all()

    def test_a_thin_image_is_not_enlarged_in_full(self) -> None:
        assert (crop_resize(decoded(np.full((1, 60_000, 3), 7, np.uint8)), 64, 0.5, 0.5) == 7).all()

    def test_crop(self) -> None:
        image = np.arange(10 * 14, dtype=np.uint8).reshape(10, 14, 1).repeat(3, 2)
        assert (crop(image, 10, 0.5, 0.5) == image[:, 2:12]).all()
        assert (crop(image, 4, 0, 0) == image[:4, :4]).all()
        assert (crop(image, 4, 1, 1) == image[-4:, -4:]).all()
        assert (crop(image, 4, 0, 1) == image[-4:, :4]).all()
        with pytest.raises(ValueError, match="a square of 11 pixels does not fit into 14 x 10"):
            crop(image, 11, 0.5, 0.5)

    def test_all_positions_are_equally_likely(self) -> None:
        image = np.arange(5, dtype=np.uint8).reshape(1, 5, 1).repeat(3, 2)
        positions = [int(crop(image, 1, u, 0)[0, 0, 0]) for u in (np.arange(1000) + 0.5) / 1000]
        assert np.bincount(positions).tolist() == [200] * 5

    @pytest.mark.parametrize("shape", [(90, 130), (130, 90), (90, 90), (20, 31), (1, 1)])
    def test_crop_resize_of_any_shape(self, shape: tuple[int, int]) -> None:
        image = crop_resize(decoded(smooth(*shape)), 48, 0.3, 0.9)
        assert image.shape == (48, 48, 3)
        assert image.dtype == np.uint8

    def test_every_size_from_every_size(self) -> None:
        """Rounding never moves the box out of the image, in any orientation."""
        random = np.random.default_rng(0)
        for _ in range(300):
            height, width, size = random.integers(1, 90, 3)
            scale = random.choice([1, 0.125, 0.25, 0.5])
            image = np.zeros(
                (int(np.ceil(height * scale)), int(np.ceil(width * scale)), 3), np.uint8
            )
            orientation = int(random.integers(1, 9))
            scaled = DecodedImage(image, height * scale, width * scale, orientation)
            u, v = random.choice([0, 0.5, 0.999, 1], 2)
            assert crop_resize(scaled, int(size), u, v).shape == (size, size, 3)


class TestConversion:
    def test_round_trip_is_exact(self) -> None:
        levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
        x = to_float(levels)
        assert x.shape == (1, 3, 16, 16)
        assert x.dtype == np.float32
        assert x.flags.c_contiguous
        assert (x.min(), x.max()) == (-1, 1)
        assert (to_uint8(x) == levels).all()
        assert (to_uint8(x.astype(np.float64)[0]) == levels[0]).all()

    def test_values_beyond_the_range_are_clipped(self) -> None:
        x = np.array([-7, -1.001, 1.001, 300], np.float32).reshape(1, 2, 2)
        assert to_uint8(x).ravel().tolist() == [0, 0, 255, 255]


class TestResizing:
    @pytest.mark.parametrize(("low", "high"), [(4, 16), (16, 64), (5, 12), (7, 7), (1, 3)])
    def test_upsample_equals_pillow(self, low: int, high: int) -> None:
        x = np.random.default_rng(0).standard_normal((2, 3, low, low)).astype(np.float32)
        planes = [
            Image.fromarray(plane).resize((high, high), Image.Resampling.BILINEAR)
            for plane in x.reshape(-1, low, low)
        ]
        expected = np.stack([np.asarray(plane) for plane in planes]).reshape(2, 3, high, high)
        assert upsample(x, high) == pytest.approx(expected, abs=1e-6)

    def test_upsample_is_the_same_alone_and_in_a_batch(self) -> None:
        x = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
        assert upsample(x, 64).dtype == np.float32
        assert (upsample(x, 64)[1] == upsample(x[1], 64)).all()

    def test_upsample_reproduces_a_slope(self) -> None:
        slope = np.linspace(-1, 1, 8, dtype=np.float32).reshape(1, 1, 8).repeat(8, 1)
        enlarged = upsample(slope, 32)[0, 5]
        assert np.diff(enlarged[2:-2]) == pytest.approx(np.full(27, 2 / 7 / 4), abs=1e-6)

    @pytest.mark.parametrize("value", [-1.0, 0.3, 1.0])
    def test_constants_stay(self, value: float) -> None:
        x = np.full((2, 3, 16, 16), value, np.float32)
        assert (upsample(x, 50) == x[0, 0, 0, 0]).all()
        assert downsample(x, 4) == pytest.approx(np.full((2, 3, 4, 4), value), abs=1e-7)

    def test_downsample_is_the_mean_of_each_square(self) -> None:
        x = np.random.default_rng(0).standard_normal((2, 3, 12, 12)).astype(np.float32)
        expected = np.zeros((2, 3, 3, 3))
        for i, j in np.ndindex(3, 3):
            expected[:, :, i, j] = x[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean(axis=(2, 3))
        assert downsample(x, 3) == pytest.approx(expected, abs=1e-6)
        assert downsample(x, 3).dtype == np.float32
        assert (downsample(x, 12) == x).all()

    def test_sizes_that_do_not_fit(self) -> None:
        x = np.zeros((3, 16, 16), np.float32)
        with pytest.raises(ValueError, match="16 x 16 image cannot be divided into 5 x 5"):
            downsample(x, 5)
        with pytest.raises(ValueError, match="use downsample"):
            upsample(x, 8)
