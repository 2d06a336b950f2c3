"""Mean and deviation of a data set's pixels, against the pixels themselves."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.config import build
from pipeline.errors import UserError
from pipeline.stage.stage import PixelConfig
from tools.pixels import LEVELS, main, moments


def write_pngs(path: Path, images: Sequence[np.ndarray]) -> None:
    """A tar of 000.png, 001.png, ..."""
    with tarfile.open(path, "w") as tar:
        for index, image in enumerate(images):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            member = tarfile.TarInfo(f"{index:03d}.png")
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Of several sizes, and another brightness in each channel."""
    rng = np.random.default_rng(0)
    return [(rng.random((8 + i, 12, 3)) * [255, 128, 40]).astype(np.uint8) for i in range(7)]


def test_the_command_agrees_with_numpy(
    images: list[np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pngs(tmp_path / "a.tar", images[:4])
    write_pngs(tmp_path / "b.tar", images[4:])
    main([str(tmp_path / "*.tar")])

    printed = yaml.safe_load(capsys.readouterr().out)["pixels"]
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]) / 127.5 - 1
    np.testing.assert_allclose(printed["mean"], pixels.mean(axis=0), atol=5.1e-5)
    np.testing.assert_allclose(printed["std"], pixels.std(axis=0), atol=5.1e-5)
    build(PixelConfig, printed)


def test_moments_are_exact() -> None:
    rng = np.random.default_rng(1)
    levels = rng.integers(0, LEVELS, (3, 10_000))
    counts = np.stack([np.bincount(channel, minlength=LEVELS) for channel in levels])
    mean, std = moments(counts)
    np.testing.assert_allclose(mean, (levels / 127.5 - 1).mean(axis=1), atol=1e-12)
    np.testing.assert_allclose(std, (levels / 127.5 - 1).std(axis=1), atol=1e-12)

    white = np.zeros((3, LEVELS), int)
    white[:, 255] = 7
    assert [each.tolist() for each in moments(white)] == [[1.0] * 3, [0.0] * 3]


def test_a_damaged_image_is_skipped_and_reported(
    images: list[np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pngs(tmp_path / "a.tar", images)
    main([str(tmp_path / "a.tar")])
    undamaged = capsys.readouterr().out

    data = bytearray((tmp_path / "a.tar").read_bytes())
    pixels = data.index(b"IDAT") + 8
    data[pixels : pixels + 20] = bytes(20)
    (tmp_path / "b.tar").write_bytes(data)
    main([str(tmp_path / "b.tar")])

    message, line = capsys.readouterr().out.splitlines()
    assert message.startswith("# skipped 1: ")
    assert line != undamaged.strip()


def test_a_pattern_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="matches no file"):
        main([str(tmp_path / "*.tar")])
