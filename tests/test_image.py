import io
import zlib

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.data.image import (
    BadImage,
    crop_resize,
    decode,
    downsample,
    resize,
    to_float,
    to_uint8,
    upsample,
    window,
)


def smooth(height, width):
    """A picture of slow waves, another in each channel."""
    y, x = np.mgrid[:height, :width] / 200
    waves = [np.sin(3 * x + 2 * y), np.cos(4 * x - y), np.sin(2 * x * y)]
    return (127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)


def noise(side):
    return np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)


def encoded(image, kind, **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


class TestDecode:
    @pytest.mark.parametrize("min_side", [64, 96, 200])
    def test_scaled_is_close_to_full(self, min_side):
        data = simplejpeg.encode_jpeg(smooth(700, 1000), 95)
        scaled = decode(data, min_side)
        assert min_side <= min(scaled.shape[:2]) < 700
        small = [crop_resize(picture, min_side, 0.5, 0.5) for picture in (scaled, decode(data, 700))]
        assert psnr(*small) >= 35

    def test_scale_is_the_smallest_that_suffices(self):
        data = simplejpeg.encode_jpeg(smooth(800, 1000), 90)
        assert [min(decode(data, side).shape[:2]) for side in (1, 100, 101, 300, 800, 900)] == [
            100,
            100,
            200,
            300,
            800,
            800,
        ]

    @pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
    def test_other_formats_are_exact(self, kind):
        image = smooth(40, 50)
        assert (decode(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})), 8) == image).all()

    @pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK"])
    def test_other_modes_become_rgb(self, mode):
        kind = "JPEG" if mode == "CMYK" else "PNG"
        image = Image.fromarray(np.full((16, 16, 3), 255, np.uint8)).convert(mode)
        assert (decode(encoded(image, kind), 8) == np.full((16, 16, 3), 255)).all()

    def test_grey_jpeg_becomes_rgb(self):
        assert decode(encoded(Image.new("L", (16, 16), 90), "JPEG"), 16).shape == (16, 16, 3)

    def test_sixteen_bits_are_scaled(self):
        levels = np.array([[0, 0x1234], [0x8000, 0xFFFF]], np.uint16)
        assert decode(encoded(levels, "PNG"), 1)[..., 0].tolist() == [[0, 0x12], [0x80, 0xFF]]

    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_alpha_lies_on_white(self, kind):
        image = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
        image.paste((0, 0, 0, 0), (8, 0, 16, 16))
        pixels = decode(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})), 8)
        assert pixels[0, 0].tolist() == [255, 0, 0]
        assert pixels[0, 15].tolist() == [255, 255, 255]

    def test_jpeg_cut_short(self):
        data = simplejpeg.encode_jpeg(noise(256), 90)
        scan = data.index(b"\xff\xda")
        for end in (scan // 2, scan + 1, len(data) // 2, len(data) - 2):
            with pytest.raises(BadImage):
                decode(data[:end], 64)

    @pytest.mark.parametrize("place", np.linspace(0.05, 0.9, 12))
    def test_jpeg_overwritten(self, place):
        data = simplejpeg.encode_jpeg(noise(256), 90)
        start = int(place * len(data))
        junk = np.random.default_rng(start).bytes(256)
        with pytest.raises(BadImage):
            decode(data[:start] + junk + data[start + 256 :], 64)

    @pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP"])
    def test_cut_short(self, kind):
        data = encoded(smooth(64, 64), kind)
        with pytest.raises(BadImage):
            decode(data[: len(data) // 2], 8)

    @pytest.mark.parametrize(
        "data", [b"", b"\xff\xd8", b"<html>not found</html>", bytes(1000), b"%!PS-Adobe-3.0 EPSF-3.0\n"]
    )
    def test_not_a_picture(self, data):
        with pytest.raises(BadImage):
            decode(data, 8)

    @pytest.mark.parametrize("kind", ["PNG", "JPEG"])
    def test_bombs_are_refused_by_their_header(self, kind):
        data = encoded(Image.new("L", (16, 16)), kind)
        if kind == "PNG":  # width and height stand at byte 16, big-endian; the checksum of the header follows
            header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + data[24:29]
            data = data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]
        else:  # in the frame header: marker, length, precision, height, width
            place = data.index(b"\xff\xc0") + 5
            data = data[:place] + (30_000).to_bytes(2, "big") * 2 + data[place + 4 :]
        with pytest.raises(BadImage, match=r"30000 x 30000|exceeds limit"):
            decode(data, 8)


class TestGeometry:
    def test_resize_keeps_the_shape(self):
        assert resize(smooth(120, 200), 60).shape == (60, 100, 3)
        assert resize(smooth(200, 120), 60).shape == (100, 60, 3)
        assert resize(smooth(60, 7000), 30).shape == (30, 3500, 3)

    def test_resize_does_not_alias(self):
        stripes = np.zeros((512, 512, 3), np.uint8)
        stripes[:, ::2] = 255  # far finer than 64 px can show: must become even grey
        assert resize(stripes, 64)[4:-4, 4:-4].std() < 2

    def test_windows(self):
        image = np.arange(10 * 14, dtype=np.uint8).reshape(10, 14, 1).repeat(3, 2)
        assert (window(image, 10, 0.5, 0.5) == image[:, 2:12]).all()
        assert (window(image, 4, 0, 0) == image[:4, :4]).all()
        assert (window(image, 4, 1, 1) == image[-4:, -4:]).all()
        assert (window(image, 4, 0, 1) == image[-4:, :4]).all()
        with pytest.raises(ValueError, match="11 pixels does not fit into 14 x 10"):
            window(image, 11, 0.5, 0.5)

    def test_each_place_is_equally_likely(self):
        image = np.arange(5, dtype=np.uint8).reshape(1, 5, 1).repeat(3, 2)
        places = [int(window(image, 1, u, 0)[0, 0, 0]) for u in (np.arange(1000) + 0.5) / 1000]
        assert np.bincount(places).tolist() == [200] * 5

    @pytest.mark.parametrize("shape", [(90, 130), (130, 90), (90, 90), (20, 31)])
    def test_crop_resize(self, shape):
        image = crop_resize(smooth(*shape), 48, 0.3, 0.9)
        assert image.shape == (48, 48, 3)
        assert image.dtype == np.uint8


class TestFloats:
    def test_round_trip_is_exact(self):
        levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
        x = to_float(levels)
        assert x.shape == (1, 3, 16, 16)
        assert x.dtype == np.float32
        assert x.flags.c_contiguous
        assert (x.min(), x.max()) == (-1, 1)
        assert (to_uint8(x) == levels).all()
        assert (to_uint8(x.astype(np.float64)[0]) == levels[0]).all()

    def test_clips(self):
        x = np.array([-7, -1.001, 1.001, 300], np.float32).reshape(1, 2, 2)
        assert to_uint8(x).ravel().tolist() == [0, 0, 255, 255]


class TestMaps:
    @pytest.mark.parametrize(("low", "high"), [(4, 16), (16, 64), (5, 12), (7, 7), (1, 3)])
    def test_upsample_equals_pillow(self, low, high):
        x = np.random.default_rng(0).standard_normal((2, 3, low, low)).astype(np.float32)
        planes = [
            Image.fromarray(plane).resize((high, high), Image.Resampling.BILINEAR) for plane in x.reshape(-1, low, low)
        ]
        expected = np.stack([np.asarray(plane) for plane in planes]).reshape(2, 3, high, high)
        assert upsample(x, high) == pytest.approx(expected, abs=1e-6)

    def test_upsample_is_the_same_alone_and_in_a_batch(self):
        x = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
        assert upsample(x, 64).dtype == np.float32
        assert (upsample(x, 64)[1] == upsample(x[1], 64)).all()

    def test_upsample_reproduces_a_slope(self):
        slope = np.linspace(-1, 1, 8, dtype=np.float32).reshape(1, 1, 8).repeat(8, 1)
        enlarged = upsample(slope, 32)[0, 5]
        assert np.diff(enlarged[2:-2]) == pytest.approx(np.full(27, 2 / 7 / 4), abs=1e-6)

    @pytest.mark.parametrize("value", [-1.0, 0.3, 1.0])
    def test_constants_stay(self, value):
        x = np.full((2, 3, 16, 16), value, np.float32)
        assert (upsample(x, 50) == x[0, 0, 0, 0]).all()
        assert downsample(x, 4) == pytest.approx(np.full((2, 3, 4, 4), value), abs=1e-7)

    def test_downsample_is_the_mean_of_each_square(self):
        x = np.random.default_rng(0).standard_normal((2, 3, 12, 12)).astype(np.float32)
        expected = np.zeros((2, 3, 3, 3))
        for i, j in np.ndindex(3, 3):
            expected[:, :, i, j] = x[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean(axis=(2, 3))
        assert downsample(x, 3) == pytest.approx(expected, abs=1e-6)
        assert downsample(x, 3).dtype == np.float32
        assert (downsample(x, 12) == x).all()

    def test_refusals(self):
        x = np.zeros((3, 16, 16), np.float32)
        with pytest.raises(ValueError, match="16 x 16 picture is not cut into 5 x 5"):
            downsample(x, 5)
        with pytest.raises(ValueError, match="use downsample"):
            upsample(x, 8)
