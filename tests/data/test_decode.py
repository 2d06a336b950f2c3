"""Decoding: every kind of image file gives the right pixels or is refused with a reason."""

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from pipeline.data.decode import BadImage, DecodedImage, decode, dimensions
from pipeline.data.image import crop_resize
from tests.helpers import image_files
from tests.helpers.image_files import decoded, encoded, lossless_jpeg, psnr, quarters, smooth


def noise(side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)


def pixels(data: bytes, size: int = 1) -> np.ndarray:
    """The upright pixels, decoded for `size`."""
    return decode(data, size).upright()


def full_size(data: bytes) -> np.ndarray:
    """Not scaled: the size is larger than the image."""
    return pixels(data, 10_000)


def is_close(image: np.ndarray, expected: np.ndarray) -> bool:
    """Except at the borders of the quarters, where a JPEG rings."""
    assert image.shape == expected.shape
    equal = np.abs(image.astype(int) - expected).max(axis=-1) <= 8
    return bool(equal.mean() > 0.85)


def check_refused(data: bytes, match: str | None = None) -> None:
    """By the header: both functions raise."""
    with pytest.raises(BadImage, match=match):
        decode(data, 8)
    with pytest.raises(BadImage, match=match):
        dimensions(data)


class TestDecode:
    @pytest.mark.parametrize(
        ("short", "size", "num_pixels"),
        [
            (1024, 64, 128),  # 1/8: two pixels for one
            (1024, 128, 128),  # one for one
            (1024, 127, 256),  # 128 is less than 7/4 of it
            (1024, 73, 128),  # 7/4
            (1024, 74, 256),
            (1025, 64, 128.125),
            (1024, 256, 256),
            (1000, 256, 500),
            (1000, 512, 1000),  # no 5/8, no 6/8
            (300, 256, 300),
            (300, 1024, 300),
            (7, 1, 7),
        ],
    )
    def test_scales_that_jpegs_are_decoded_at(
        self, short: int, size: int, num_pixels: float
    ) -> None:
        black = np.zeros((short, short + 3, 3), np.uint8)
        image = decode(simplejpeg.encode_jpeg(black), size)
        scale = num_pixels / short
        assert (image.height, image.width) == (num_pixels, scale * (short + 3))
        assert image.pixels.shape == (int(np.ceil(image.height)), int(np.ceil(image.width)), 3)

    @pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
    def test_other_formats_are_exact(self, kind: str) -> None:
        image = smooth(40, 50)
        data = encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {}))
        assert (pixels(data) == image).all()
        assert dimensions(data) == (50, 40)

    @pytest.mark.parametrize("progressive", [False, True])
    @pytest.mark.parametrize("size", [16, 64, 200])
    def test_progressive_is_as_baseline(self, progressive: bool, size: int) -> None:
        image = smooth(256, 400)
        data = encoded(image, "JPEG", quality=95, progressive=progressive)
        assert (b"\xff\xc2" in data) == progressive
        assert dimensions(data) == (400, 256)
        expected = crop_resize(decoded(image), size, 0.5, 0.5)
        assert psnr(crop_resize(decode(data, size), size, 0.5, 0.5), expected) > 38

    @pytest.mark.parametrize("mode", ["L", "P", "1"])
    def test_other_modes_become_rgb(self, mode: str) -> None:
        image = Image.fromarray(quarters()).convert(mode)
        assert (pixels(encoded(image, "PNG")) == np.asarray(image.convert("RGB"))).all()

    @pytest.mark.parametrize("make", [image_files.cmyk_jpeg, image_files.ycck_jpeg])
    def test_inks_become_the_right_colours(self, make: Callable[[np.ndarray], bytes]) -> None:
        """Not their negatives; scaled too."""
        data = make(quarters(160, 240))
        assert (
            simplejpeg.decode_jpeg_header(data)[2]
            == {"cmyk_jpeg": "CMYK", "ycck_jpeg": "YCCK"}[make.__name__]
        )
        assert is_close(full_size(data), quarters(160, 240))
        assert (full_size(data) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()
        assert is_close(pixels(data, 20), quarters(20, 30))
        assert dimensions(data) == (240, 160)

    @pytest.mark.parametrize("padding", [b"", b"\xff\xff", b"\xff\1"])
    def test_lossless_jpegs_are_not_scaled(self, padding: bytes) -> None:
        """Decoded at 1/8, one would write beyond its buffer and end the process."""
        data = lossless_jpeg(512)
        frame = data.index(b"\xff\xc3")
        image = decode(data[:frame] + padding + data[frame:], 64)
        assert image.pixels.shape == (512, 512, 3)
        assert np.ptp(image.pixels) == 0

    def test_grey_jpeg(self) -> None:
        assert np.abs(full_size(image_files.grey_jpeg(90)).astype(int) - 90).max() <= 1
        assert full_size(image_files.grey_jpeg()).shape == (16, 16, 3)

    def test_sixteen_bits_become_the_upper_eight(self) -> None:
        assert pixels(image_files.png16())[..., 0].tolist() == [[0, 0x12], [0x80, 0xFF]]
        colours = np.array([[[0, 0x1234, 0xFFFF], [0xFF00, 0x00FF, 0x8000]]], np.uint16)
        assert pixels(image_files.png16(colours)).tolist() == [[[0, 0x12, 0xFF], [0xFF, 0, 0x80]]]

    def test_transparent_parts_become_white(self) -> None:
        red = Image.open(io.BytesIO(image_files.rgba_png()))
        grey = Image.merge("LA", (Image.new("L", (16, 16), 76), red.getchannel("A")))
        sixteen_bits = image_files.png(2, 1, zlib.compress(b"\0\x12\x34\0\0"), bits=16)
        sixteen_bits = sixteen_bits[:33] + image_files.chunk(b"tRNS", b"\0\0") + sixteen_bits[33:]
        palette = Image.new("P", (16, 16))
        palette.putpalette([255, 0, 0, 0, 0, 0])
        palette.paste(1, (8, 0, 16, 16))
        alphas = bytes([255, 0])  # of each colour
        for data, left in (
            (image_files.rgba_png(), [255, 0, 0]),
            (encoded(red, "WEBP", lossless=True), [255, 0, 0]),
            (encoded(grey, "PNG"), [76] * 3),
            (encoded(palette, "PNG", transparency=alphas), [255, 0, 0]),
            (encoded(palette, "PNG", transparency=1), [255, 0, 0]),
            (encoded(palette, "GIF", transparency=1), [255, 0, 0]),
            (sixteen_bits, [0x12] * 3),
        ):
            row = pixels(data)[0]
            assert row[0].tolist() == left
            assert row[-1].tolist() == [255] * 3

    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
    def test_animations_give_their_first_frame(self, kind: str) -> None:
        red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(red, kind, save_all=True, append_images=[blue, red], **options)
        assert (pixels(data) == [255, 0, 0]).all()

    def test_a_damaged_animation_of_a_png_is_ignored(self) -> None:
        data = encoded(
            Image.new("RGB", (16, 16), "red"),
            "PNG",
            save_all=True,
            append_images=[Image.new("RGB", (16, 16))],
        )
        none = image_files.chunk(b"acTL", struct.pack(">II", 0, 0))
        assert (pixels(data[:33] + none + none + data[33:]) == [255, 0, 0]).all()


class TestOrientation:
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_all_eight_orientations(self, orientation: int) -> None:
        """Against Pillow, which has another implementation; full size, scaled and cropped."""
        image = quarters(150, 203)
        data = image_files.rotated_jpeg(orientation, image)
        with Image.open(
            io.BytesIO(encoded(image, "PNG", exif=image_files.exif(orientation)))
        ) as opened:
            exact = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
        assert is_close(full_size(data), exact)
        assert dimensions(data) == exact.shape[1::-1]
        for position in (0, 0.4, 0.99):
            square = crop_resize(decode(data, 20), 20, position, 1 - position)
            assert psnr(square, crop_resize(decoded(exact), 20, position, 1 - position)) > 25

    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_orientation_of_other_formats(self, kind: str, orientation: int) -> None:
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(quarters(), kind, exif=image_files.exif(orientation), **options)
        assert (pixels(data) == DecodedImage(quarters(), 48, 64, orientation).upright()).all()
        assert dimensions(data) == ((64, 48) if orientation < 5 else (48, 64))

    def test_both_byte_orders_and_padding(self) -> None:
        for order in "<>":
            data = encoded(quarters(), "JPEG", exif=image_files.exif(6, order))
            assert dimensions(data) == (48, 64)
            assert dimensions(data[:2] + b"\xff\xff" + data[2:]) == (48, 64)

    @pytest.mark.parametrize(
        "block",
        [
            image_files.exif(0),
            image_files.exif(9),
            image_files.exif(6)[:20],
            image_files.exif(6).replace(b"II*", b"XX*"),
            image_files.exif(6).replace(struct.pack("<I", 8), struct.pack("<I", 4_000_000_000)),
            image_files.exif(6).replace(b"\x12\x01\x03", b"\x12\x01\x02"),  # a string
            b"Exif\0\0",
            b"Exif\0\0" + bytes(60_000),
        ],
    )
    def test_damaged_exif_is_ignored(self, block: bytes) -> None:
        for kind in ("JPEG", "PNG", "WEBP"):
            data = encoded(quarters(), kind, exif=block)
            assert dimensions(data) == (64, 48)
            assert full_size(data).shape == (48, 64, 3)

    def test_exif_after_the_pixels_of_a_png_is_ignored(self) -> None:
        data, block = (
            encoded(quarters(), "PNG"),
            image_files.chunk(b"eXIf", image_files.exif(6)[6:]),
        )
        assert dimensions(data[:-12] + block + data[-12:]) == (64, 48)
        assert pixels(data[:-12] + block + data[-12:]).shape == (48, 64, 3)
        assert dimensions(data[:33] + block + data[33:]) == (48, 64)


class TestRefusedFiles:
    def test_truncated_jpeg(self) -> None:
        data = simplejpeg.encode_jpeg(noise(48), 90)
        for end in range(len(data) - 1):
            with pytest.raises(BadImage):
                decode(data[:end], 64)

    @pytest.mark.parametrize("kind", ["baseline", "progressive"])
    def test_jpeg_with_flipped_bits(self, kind: str) -> None:
        """Refused, or an image of some size; no other error, and no warning."""
        data = encoded(
            smooth(64, 96), "JPEG", progressive=kind == "progressive", exif=image_files.exif(6)
        )
        outcomes = []
        for seed in range(400):
            position = int(np.random.default_rng(seed).integers(2, len(data)))
            byte = data[position] ^ 1 << seed % 8
            flipped = data[:position] + bytes([byte]) + data[position + 1 :]
            try:
                square = crop_resize(decode(flipped, 16), 16, 0.5, 0.5)
                outcomes.append(square.shape == (16, 16, 3))
                dimensions(flipped)
            except BadImage:
                outcomes.append(None)
        assert set(outcomes) == {True, None}

    @pytest.mark.parametrize("position", np.linspace(0.05, 0.9, 12))
    def test_jpeg_overwritten(self, position: float) -> None:
        data = simplejpeg.encode_jpeg(noise(256), 90)
        start = int(position * len(data))
        junk = np.random.default_rng(start).bytes(256)
        with pytest.raises(BadImage):
            decode(data[:start] + junk + data[start + 256 :], 64)

    @pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP"])
    def test_truncated_files(self, kind: str) -> None:
        data = encoded(noise(16), kind)
        for end in range(len(data) - 32):
            with pytest.raises(BadImage):
                decode(data[:end], 8)

    @pytest.mark.parametrize("interlaced", [False, True])
    @pytest.mark.parametrize("colours", [0, 2, 6])
    @pytest.mark.parametrize("level", [0, 7])  # black rows look like missing ones
    def test_png_with_too_few_or_too_many_pixels(
        self, interlaced: bool, colours: int, level: int
    ) -> None:
        width, height, channels = 13, 11, {0: 1, 2: 3, 6: 4}[colours]
        passes = (
            [(2, 2), (2, 2), (1, 4), (3, 3), (3, 7), (6, 6), (5, 13)]
            if interlaced
            else [(height, width)]
        )
        rows = b"".join(
            (b"\0" + bytes([level]) * columns * channels) * count for count, columns in passes
        )

        def png(content: bytes) -> bytes:
            return image_files.png(
                width, height, zlib.compress(content), colours=colours, interlaced=interlaced
            )

        expected = 255 - (255 - level) * level // 255 if colours == 6 else level
        for enough in (rows, rows * 1000):
            assert np.abs(full_size(png(enough)).astype(int) - expected).max() <= 1
        for end in range(len(rows)):
            with pytest.raises(BadImage):
                decode(png(rows[:end]), 8)

    def test_png_with_broken_compressed_data(self) -> None:
        for broken in (b"", b"\x78\x9c", b"not compressed", zlib.compress(bytes(17) * 16)[:-6]):
            with pytest.raises(BadImage):
                decode(image_files.png(16, 16, broken), 8)

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\xff\xd8",
            image_files.html(),
            bytes(1000),
            b"%!PS-Adobe-3.0 EPSF-3.0\n",
            b"RIFF....WAVE",
            b"BM",
            b"GIF89a",
        ],
    )
    def test_files_that_are_no_images(self, data: bytes) -> None:
        check_refused(data)

    def test_the_reason_names_the_supported_formats(self) -> None:
        check_refused(image_files.html(), "is none of JPEG, PNG, WEBP, GIF, BMP")

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "GIF frame", "BMP", "WEBP"])
    # Pillow warns up to twice its limit, then raises.
    @pytest.mark.parametrize("side", [9_434, 13_000, 16_000, 30_000])
    def test_images_that_are_too_large_are_refused_by_their_header(
        self, kind: str, side: int
    ) -> None:
        side = min(side, 16_383) if kind == "WEBP" else side
        if kind == "PNG":
            data = image_files.png_bomb(side)
        else:
            data = encoded(
                Image.new("L", (16, 16)),
                kind.split()[0],
                **({"lossless": True} if kind == "WEBP" else {}),
            )
            position, size = {
                "JPEG": (data.find(b"\xff\xc0") + 5, struct.pack(">HH", side, side)),
                "GIF": (6, struct.pack("<HH", side, side)),
                "GIF frame": (data.find(b",\0\0\0\0") + 5, struct.pack("<HH", side, side)),
                "BMP": (18, struct.pack("<ii", side, side)),
                "WEBP": (21, struct.pack("<I", (side - 1) * (1 + 2**14))),
            }[kind]
            data = data[:position] + size + data[position + len(size) :]
        tracemalloc.start()
        # Pillow 13 checks the size of a WebP itself, with a message of its own beyond twice its
        # limit.
        check_refused(data, r"\d pixels" if kind == "WEBP" else f"{side} x {side} pixels")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**24  # the images have 89 million bytes and more

    def test_the_png_bomb_is_valid_except_for_its_size(self) -> None:
        assert len(image_files.png_bomb()) < 1_000_000
        assert full_size(image_files.png_bomb(3000)).shape == (3000, 3000, 3)

    @pytest.mark.parametrize(("width", "height"), [(0, 16), (16, 0), (0, 0), (70_000, 1)])
    def test_impossible_sizes(self, width: int, height: int) -> None:
        check_refused(image_files.png(width, height, zlib.compress(bytes(100))))
        if width < 65_536:
            data = image_files.grey_jpeg()
            position = data.index(b"\xff\xc0") + 5
            check_refused(
                data[:position] + struct.pack(">HH", height, width) + data[position + 4 :]
            )
