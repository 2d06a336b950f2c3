"""Data sets as one row of samples: numbers, names and bytes as the tars have them, and what is
refused.
"""

import json
import os
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import ConfigError, build
from pipeline.data.shards import Damaged, DataConfig, Shards, indexed
from pipeline.errors import UserError
from tests.helpers.image_files import html
from tests.helpers.server import Server
from tests.helpers.tars import sample, tar


def opened(shards: Any, **options: Any) -> Shards:
    return Shards.open(build(DataConfig, {"shards": shards, **options}), progress=False)


@pytest.fixture
def shards(shards_folder: Path) -> Shards:
    return opened(f"{shards_folder}/{{00000..00001}}.tar")


def test_every_sample_in_order(shards: Shards, shards_folder: Path) -> None:
    """The truth is what tarfile reads."""
    assert len(shards) == 24
    assert (shards.sizes, shards.weights, shards.removed, list(shards.faults)) == (
        [[12, 12]],
        [1.0],
        {},
        [],
    )
    for i in range(24):
        shard, row = divmod(i, 12)
        with tarfile.open(shards_folder / f"{shard:05d}.tar") as file:
            parts = [file.extractfile(f"{i:08d}.{kind}") for kind in ("jpg", "txt")]
            image, words = (part.read() for part in parts if part)
        assert shards.image(i) == image
        assert shards.name(i) == (str(shards_folder / f"{shard:05d}.tar"), f"{i:08d}")
        assert shards.location(i) == (shard, row)
        assert list(shards.captions(shard, np.array([row]))) == [{"txt": [words.decode()]}]


@pytest.mark.parametrize("i", [-1, 24])
def test_numbers_outside(shards: Shards, i: int) -> None:
    with pytest.raises(IndexError, match=f"sample {i} of 24"):
        shards.image(i)


def test_threads_read_the_same(shards: Shards) -> None:
    alone = [shards.image(i) for i in range(24)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(shards.image, list(range(24)) * 10)) == alone * 10


def write(path: Path, scores: range) -> None:
    """Four samples, 0 to 3."""
    metas = [json.dumps({"score": score}).encode() for score in scores]
    path.write_bytes(
        tar([file for n, meta in enumerate(metas) for file in sample(f"{n}", n, json=meta)])
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.tar with four samples, b.tar with three of which one is damaged."""
    write(tmp_path / "a.tar", range(4))
    (tmp_path / "b.tar").write_bytes(
        tar([*sample("x", 4), ("y.jpg", html()), ("y.txt", b"y"), *sample("z", 5)])
    )
    return tmp_path


def test_filters_number_what_is_left(folder: Path) -> None:
    shards = opened(f"{folder}/a.tar", filter={"fields": {"score": [1, 3]}})
    assert [shards.name(i)[1] for i in range(len(shards))] == ["1", "3"]
    assert shards.image(1) == opened(f"{folder}/a.tar").image(3)
    assert shards.rows(0).tolist() == [1, 3]
    assert shards.account() == "left out: 2 score not [1, 3]"


def test_several_sets_with_weights(folder: Path) -> None:
    shards = opened({f"{folder}/a.tar": 3, f"{folder}/b.tar": 1}, max_damage=1)
    assert (shards.sizes, shards.weights, len(shards)) == ([[4], [2]], [3.0, 1.0], 6)
    assert [shards.name(i)[1] for i in range(6)] == ["0", "1", "2", "3", "x", "z"]
    listed = opened([f"{folder}/a.tar", f"{folder}/b.tar"], max_damage=1)
    assert (listed.sizes, listed.weights) == ([[4, 2]], [1.0])


def test_too_much_damage_is_refused_before_the_run(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        opened(f"{folder}/b.tar", max_damage=0.3)
    assert str(caught.value) == (
        "data.max_damage: 33.3% of the samples are damaged, more than 30.0%; left out: 1 damaged (the first, "
        f"{folder}/b.tar:y, its jpg is none of JPEG, PNG, WEBP, GIF, BMP); repair the shards or raise it"
    )
    assert len(opened(f"{folder}/b.tar", max_damage=0.34)) == 2


def test_a_lost_shard_counts_as_the_samples_it_would_hold(folder: Path) -> None:
    whole = (folder / "a.tar").read_bytes()
    for number in range(9):
        (folder / f"whole{number}.tar").write_bytes(whole)
    (folder / "c.tar").write_bytes(os.urandom(len(whole)))
    shards = opened(f"{folder}/[!b]*.tar", max_damage=1)
    assert len(shards) == 40
    assert shards.damage == pytest.approx(1 / 11, rel=0.01)


def test_nothing_left(folder: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"data\.shards: .*a\.tar: no sample is left; left out: 6 shorter side under 99",
    ):
        opened({f"{folder}/a.tar": 1, f"{folder}/b.tar": 1}, filter={"min_size": 99})


def test_one_shard_in_two_sets(folder: Path) -> None:
    with pytest.raises(UserError, match=r"a\.tar: in two data sets"):
        opened({f"{folder}/a.tar": 1, f"{folder}/[ab].tar": 1})


def touch(path: Path) -> None:
    os.utime(path, (1, 1))


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(512))


def rewrite(path: Path) -> None:
    write(path, range(5, 9))


@pytest.mark.parametrize(
    ("change", "words"), [(grow, "bytes and had"), (rewrite, "has changed at byte")]
)
def test_an_index_that_no_longer_fits_is_refused_and_mended(
    change: Callable[[Path], None], words: str, folder: Path
) -> None:
    pattern = f"{folder}/a.tar"
    before = opened(pattern)
    change(folder / "a.tar")
    with pytest.raises(UserError) as caught:
        opened(pattern)
    assert words in str(caught.value)
    assert str(caught.value).endswith(f"run `cascade index '{pattern}'`")
    config = build(DataConfig, {"shards": pattern})
    indexed(config, config.sources(), outdated=True, progress=False)
    after = opened(pattern)
    assert (after.digest == before.digest) == (change is grow)


def test_a_copy_needs_no_new_index(folder: Path) -> None:
    before = opened(f"{folder}/a.tar")
    made = (folder / "a.index.safetensors").stat().st_mtime_ns
    touch(folder / "a.tar")
    assert opened(f"{folder}/a.tar").digest == before.digest
    assert (folder / "a.index.safetensors").stat().st_mtime_ns == made


def test_bytes_that_changed_since_are_noticed(folder: Path) -> None:
    shards = opened(f"{folder}/a.tar")
    offset = int(shards.indexes[0].column("offset")[2, 0])
    with (folder / "a.tar").open("r+b") as file:
        file.seek(offset + 200)
        byte = file.read(1)
        file.seek(offset + 200)
        file.write(bytes([byte[0] ^ 1]))
    assert shards.image(1)
    with pytest.raises(Damaged, match="its bytes are no longer those that were indexed"):
        shards.image(2)


def test_a_tar_that_is_cut_or_gone_later(folder: Path) -> None:
    shards = opened(f"{folder}/a.tar")
    os.truncate(folder / "a.tar", 2048)
    with pytest.raises(UserError, match=r"a\.tar: ends before byte"):
        shards.image(3)
    (folder / "a.tar").unlink()
    with pytest.raises(UserError, match=r"a\.tar"):
        shards.image(0)


def test_indexes_in_a_cache_folder(folder: Path) -> None:
    cache = folder / "cache"
    shards = opened(f"{folder}/a.tar", cache=str(cache))
    assert not list(folder.glob("*.safetensors"))
    assert len(list(cache.rglob("*.index.safetensors"))) == 1
    assert opened(f"{folder}/a.tar", cache=str(cache)).digest == shards.digest


def test_shards_on_a_server(folder: Path, tmp_path: Path) -> None:
    """Indexed from end to end, read by ranges, and from the cache when the server is gone."""
    local = opened(f"{folder}/a.tar")
    with Server(folder) as server:
        remote = opened(server.url("a.tar"), cache=str(tmp_path / "cache"))
        assert remote.digest == local.digest
        read = [remote.image(i) for i in range(4)]
    assert read == [local.image(i) for i in range(4)] == [remote.image(i) for i in range(4)]


def test_a_server_without_a_cache_folder(folder: Path) -> None:
    with Server(folder) as server, pytest.raises(UserError, match=r"name one in data\.cache"):
        opened(server.url("a.tar"))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"global_batch": 0}, "global_batch: 0 is not positive"),
        ({"shuffle_shards": 0}, "shuffle_shards: 0 is not positive"),
        ({"workers": 0}, "workers: 0 is not positive"),
        ({"max_damage": 1.5}, r"max_damage: 1.5 is not a share in \[0, 1\]"),
        ({"shards": {}}, "shards: {}; give each entry a weight above 0"),
        ({"shards": {"a": 1, "b": 0}}, "give each entry a weight above 0"),
        (
            {"shards": {"a": 1, "b": 1e-6}},
            "a weight is so small that 10,000 samples have none of it",
        ),
        ({"shards": {"a": "much"}}, "shards.a: expected a number, got text 'much'"),
        ({"captions": {"txt": -1}}, "captions: {'txt': -1.0}; give each entry a weight above 0"),
    ],
)
def test_settings_that_cannot_be(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(DataConfig, {"shards": "a.tar", **raw})


def test_shards_are_one_pattern_several_or_sets() -> None:
    for raw, sets in (
        ("a.tar", {("a.tar",): 1.0}),
        (["a.tar", "b.tar"], {("a.tar", "b.tar"): 1.0}),
        ({"a.tar": 2, "b.tar": 0.5}, {("a.tar",): 2.0, ("b.tar",): 0.5}),
    ):
        assert build(DataConfig, {"shards": raw}).sets == sets


@pytest.mark.parametrize("fits", [True, False])
def test_an_index_on_the_server_is_taken_over_if_it_fits(
    fits: bool, folder: Path, tmp_path: Path
) -> None:
    """Rather than reading the whole shard; and it is asked once."""
    local = opened(f"{folder}/a.tar")
    if not fits:
        rewrite(folder / "a.tar")
    whole = f"bytes=0-{(folder / 'a.tar').stat().st_size - 1}"
    with Server(folder) as server:
        remote = opened(server.url("a.tar"), cache=str(tmp_path / "cache"))
        assert (remote.digest == local.digest) == fits
        assert (whole in [asked for *_, asked in server.requests]) != fits
        asked = len(server.requests)
        opened(server.url("a.tar"), cache=str(tmp_path / "cache"))
        assert len(server.requests) == asked + 1  # its size and date
