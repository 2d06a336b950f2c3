import io
import json
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.data.shards import Shards
from pipeline.errors import UserError


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def good(key: str) -> dict[str, bytes]:
    return {f"{key}.jpg": b"image of " + key.encode(), f"{key}.txt": b"caption of " + key.encode()}


@pytest.fixture
def shards(shards_folder):
    return Shards.open((f"{shards_folder}/{{00000..00001}}.tar",))


def test_every_sample_in_order(shards, shards_folder):
    """The truth is what tarfile reads."""
    assert len(shards) == 24
    assert shards.skipped == []
    for i in range(24):
        shard, row = divmod(i, 12)
        sample = shards.read(i)
        with tarfile.open(shards_folder / f"{shard:05d}.tar") as tar:
            parts = {kind: tar.extractfile(f"{i:08d}.{kind}").read() for kind in ("jpg", "txt", "json")}
        assert sample == (f"{i:08d}", parts["jpg"], parts["txt"].decode(), json.loads(parts["json"]))
        assert shards.key(i) == f"{shard:05d}.tar:{i:08d}"
        assert shards.location(i) == (shard, row)


def test_locations_point_into_captions(shards, shards_folder):
    captions = shards.captions()
    assert [shard.path for shard in captions] == [shards_folder / "00000.tar", shards_folder / "00001.tar"]
    for i in range(len(shards)):
        shard, row = shards.location(i)
        sample = shards.read(i)
        assert (captions[shard].keys[row], captions[shard].captions[row]) == (sample.key, sample.caption)


@pytest.mark.parametrize("i", [-1, 24])
def test_numbers_outside(shards, i):
    with pytest.raises(IndexError, match=f"sample {i} of 24"):
        shards.read(i)


def test_threads_read_the_same(shards):
    alone = [shards.read(i) for i in range(24)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(shards.read, list(range(24)) * 10)) == alone * 10


def test_patterns(shards_folder):
    first, second = (str(shards_folder / f"0000{number}.tar") for number in (0, 1))
    for patterns in ((first, second), (f"{shards_folder}/*.tar",), (f"{shards_folder}/0000{{0,1}}.tar",)):
        assert [str(shard.path) for shard in Shards.open(patterns).shards] == [first, second]
    assert [str(shard.path) for shard in Shards.open((second, first)).shards] == [second, first]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("pipe:cat {folder}/00000.tar", "a URL"),
        ("https://example.com/{{00000..00001}}.tar", "a URL"),
        ("{folder}/00007.tar", "00007.tar: no such file"),
        ("{folder}/{{00000..00002}}.tar", "00002.tar: no such file"),
        ("{folder}/*.tgz", "matches no file"),
        ("{folder}", r"a folder; add /\*.tar"),
        ("{folder}/{{00000..00001.tar", "write it like"),
        ("${{NO_SUCH_NAME}}.tar", "write it like"),
    ],
)
def test_bad_patterns(shards_folder, pattern, message):
    with pytest.raises(UserError, match=message):
        Shards.open((pattern.format(folder=shards_folder),))


def test_no_pattern_and_repeated_shards(shards_folder):
    with pytest.raises(UserError, match="empty"):
        Shards.open(())
    with pytest.raises(UserError, match="named twice"):
        Shards.open((f"{shards_folder}/*.tar", f"{shards_folder}/00001.tar"))


def test_unusable_samples_are_listed(tmp_path):
    files = {
        **good("a"),
        "no_caption.jpg": b"image",
        "no_image.txt": b"caption",
        "empty_caption.jpg": b"image",
        "empty_caption.txt": b" \n",
        "not_utf8.jpg": b"image",
        "not_utf8.txt": b"\xff\xfe\xfd",
        "empty_image.jpg": b"",
        "empty_image.txt": b"caption",
        "bad_meta.png": b"image",
        "bad_meta.txt": b"caption",
        "bad_meta.json": b"{",
        **good("b"),
    }
    path = write_tar(tmp_path / "0.tar", files)
    shards = Shards.open((str(path),))
    assert [shards.read(i).key for i in range(len(shards))] == ["a", "b"]
    assert shards.location(1) == (0, 1)
    assert {(reject.key, reject.reason) for reject in shards.skipped} == {
        ("no_caption", "no caption"),
        ("no_image", "no image"),
        ("empty_caption", "no caption"),
        ("not_utf8", "no caption"),
        ("empty_image", "no image"),
        ("bad_meta", "metadata that is no JSON object"),
    }
    assert {reject.shard for reject in shards.skipped} == {str(path)}


def test_names(tmp_path):
    """The key ends at the first dot; types in capitals, folders, hidden files and spread-out samples are fine."""
    files = {
        "x/1.JPEG": b"image 1",
        "x/._1.jpg": b"hidden",
        "x/2.webp": b"image 2",
        "x/1.txt": "  zwölf Äpfel \n".encode(),
        "x/2.seg.png": b"not the image",
        "x/2.txt": b"two",
        "README": b"",
    }
    shards = Shards.open((str(write_tar(tmp_path / "0.tar", files)),))
    assert shards.read(0) == ("x/1", b"image 1", "zwölf Äpfel", {})
    assert shards.read(1) == ("x/2", b"image 2", "two", {})
    assert shards.skipped == []


def test_long_names(tmp_path):
    key = "k" * 300  # needs a second header in front
    shards = Shards.open((str(write_tar(tmp_path / "0.tar", good(key))),))
    assert shards.read(0).image == b"image of " + key.encode()


def test_nothing_usable(tmp_path):
    path = write_tar(tmp_path / "0.tar", {"a.jpg": b"image", "b.jpg": b"image"})
    with pytest.raises(
        UserError, match=r"none of the 2 samples can be used, the first, .*0\.tar:a, because it has no caption"
    ):
        Shards.open((str(path),))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: bytes(len(data)),  # an end and nothing before it
        lambda data: b"<html>not found</html>" * 100,
        lambda data: data[:700],  # inside the first file
        lambda data: data[: 7 * 512 + 5],  # inside the last file
        lambda data: data[: 4 * 512],  # between two files, which tarfile itself takes for the end
        lambda data: data[: 4 * 512] + b"x" * 512 + data[5 * 512 :],  # a broken header, likewise
        lambda data: data[: 4 * 512 + 100],
    ],
)
def test_damaged_tars(tmp_path, damage):
    path = write_tar(tmp_path / "0.tar", {**good("a"), **good("b")})
    path.write_bytes(damage(path.read_bytes()))
    write_tar(tmp_path / "1.tar", good("c"))
    with pytest.raises(UserError, match=r"0\.tar: cannot be read as a tar"):
        Shards.open((f"{tmp_path}/*.tar",))


def test_compressed_tars_are_refused(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w:gz"):
        pass
    with pytest.raises(UserError, match="cannot be read as a tar"):
        Shards.open((f"{tmp_path}/0.tar",))


def test_a_repeated_file(tmp_path):
    path = write_tar(tmp_path / "0.tar", good("a"))
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"), io.BytesIO())
    with pytest.raises(UserError, match=r"holds a\.txt twice"):
        Shards.open((str(path),))


def test_a_tar_that_changes_later(tmp_path):
    path = write_tar(tmp_path / "0.tar", {**good("a"), **good("b")})
    shards = Shards.open((str(path),))
    os.truncate(path, 4 * 512)
    assert shards.read(0).key == "a"
    with pytest.raises(UserError, match=r"0\.tar: ends before byte"):
        shards.read(1)
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        shards.read(0)
