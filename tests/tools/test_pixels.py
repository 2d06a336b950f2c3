"""Mean and deviation of a data set's pixels, against the pixels themselves."""

import io
import tarfile

import numpy as np
import pytest
import yaml
from PIL import Image

from pipeline.config import build
from pipeline.errors import UserError
from pipeline.stage.stage import PixelConfig
from tools.pixels import VALUES, main, moments


def tar(path, pictures, kind="PNG"):
    with tarfile.open(path, "w") as file:
        for number, picture in enumerate(pictures):
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, kind)
            member = tarfile.TarInfo(f"{number:03d}.png")
            member.size = buffer.tell()
            buffer.seek(0)
            file.addfile(member, buffer)


@pytest.fixture(scope="module")
def pictures():
    """Of several sizes, and each channel of its own brightness."""
    rng = np.random.default_rng(0)
    return [(rng.random((8 + i, 12, 3)) * [255, 128, 40]).astype(np.uint8) for i in range(7)]


def test_they_are_numpys(pictures, tmp_path, capsys):
    tar(tmp_path / "a.tar", pictures[:4])
    tar(tmp_path / "b.tar", pictures[4:])
    main([str(tmp_path / "*.tar")])
    found = yaml.safe_load(capsys.readouterr().out)["pixels"]
    every = np.concatenate([picture.reshape(-1, 3) for picture in pictures]) / 127.5 - 1
    np.testing.assert_allclose(found["mean"], every.mean(axis=0), atol=5.1e-5)
    np.testing.assert_allclose(found["std"], every.std(axis=0), atol=5.1e-5)
    build(PixelConfig, found)


def test_moments_are_exact():
    rng = np.random.default_rng(1)
    values = rng.integers(0, VALUES, (3, 10_000))
    counts = np.stack([np.bincount(channel, minlength=VALUES) for channel in values])
    mean, std = moments(counts)
    np.testing.assert_allclose(mean, (values / 127.5 - 1).mean(axis=1), atol=1e-12)
    np.testing.assert_allclose(std, (values / 127.5 - 1).std(axis=1), atol=1e-12)
    plain = np.zeros((3, VALUES), int)
    plain[:, 255] = 7
    assert [each.tolist() for each in moments(plain)] == [[1.0] * 3, [0.0] * 3]


def test_a_picture_that_cannot_be_decoded_is_left_out_and_named(pictures, tmp_path, capsys):
    tar(tmp_path / "a.tar", pictures)
    main([str(tmp_path / "a.tar")])
    whole = capsys.readouterr().out
    data = bytearray((tmp_path / "a.tar").read_bytes())
    at = data.index(b"IDAT") + 8
    data[at : at + 20] = bytes(20)
    (tmp_path / "b.tar").write_bytes(data)
    main([str(tmp_path / "b.tar")])
    said, line = capsys.readouterr().out.splitlines()
    assert said.startswith("# left out: 1 that ")
    assert line != whole.strip()


def test_nothing_to_measure(tmp_path):
    with pytest.raises(UserError, match="matches no file"):
        main([str(tmp_path / "*.tar")])
