"""The samples of data sets: numbers, names and bytes equal to those of the tars, and refusals."""

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
from pipeline.data.config import DataConfig
from pipeline.data.shards import DamagedSample, Shards, is_held_out, open_indexes
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
    """Against tarfile."""
    assert len(shards) == 24
    assert (shards.sizes, shards.weights) == ([[12, 12]], [1.0])
    assert not shards.removed
    assert not list(shards.faults)
    for i in range(24):
        shard, row = divmod(i, 12)
        with tarfile.open(shards_folder / f"{shard:05d}.tar") as file:
            parts = [file.extractfile(f"{i:08d}.{kind}") for kind in ("jpg", "txt")]
            image, caption = (part.read() for part in parts if part)
        assert shards.image(i) == image
        assert shards.name(i) == (str(shards_folder / f"{shard:05d}.tar"), f"{i:08d}")
        assert shards.location(i) == (shard, row)
        assert list(shards.captions(shard, np.array([row]))) == [{"txt": [caption.decode()]}]


@pytest.mark.parametrize("i", [-1, 24])
def test_sample_numbers_out_of_range(shards: Shards, i: int) -> None:
    with pytest.raises(IndexError, match=f"sample {i} of 24"):
        shards.image(i)


def test_threads_read_the_same_bytes(shards: Shards) -> None:
    expected = [shards.image(i) for i in range(24)]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(shards.image, list(range(24)) * 10)) == expected * 10


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


def test_the_samples_that_pass_are_numbered_consecutively(folder: Path) -> None:
    shards = opened(f"{folder}/a.tar", filter={"fields": {"score": [1, 3]}})
    assert [shards.name(i)[1] for i in range(len(shards))] == ["1", "3"]
    assert shards.image(1) == opened(f"{folder}/a.tar").image(3)
    assert shards.rows(0).tolist() == [1, 3]
    assert shards.exclusion_summary() == "left out: 2 score not [1, 3]"


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
        "data.max_damage: 33.3% of the samples are damaged, more than 30.0%; left out: 1 damaged "
        f"(the first: {folder}/b.tar:y, its jpg is none of JPEG, PNG, WEBP, GIF, BMP); repair the "
        "shards or raise it"
    )
    assert len(opened(f"{folder}/b.tar", max_damage=0.34)) == 2


def test_a_lost_shard_counts_by_its_size(folder: Path) -> None:
    content = (folder / "a.tar").read_bytes()
    for i in range(9):
        (folder / f"whole{i}.tar").write_bytes(content)
    (folder / "c.tar").write_bytes(os.urandom(len(content)))
    shards = opened(f"{folder}/[!b]*.tar", max_damage=1)
    assert len(shards) == 40
    assert shards.damaged_fraction == pytest.approx(1 / 11, rel=0.01)


def test_a_set_without_samples_is_refused(folder: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"data\.shards: .*a\.tar: no sample passes; left out: 6 shorter side under 99",
    ):
        opened({f"{folder}/a.tar": 1, f"{folder}/b.tar": 1}, filter={"min_size": 99})


def test_one_shard_in_two_sets_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"a\.tar: in two data sets"):
        opened({f"{folder}/a.tar": 1, f"{folder}/[ab].tar": 1})


def touch(path: Path) -> None:
    os.utime(path, (1, 1))


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(512))


def rewrite(path: Path) -> None:
    write(path, range(5, 9))


@pytest.mark.parametrize(
    ("change", "reason"), [(grow, "bytes and had"), (rewrite, "has changed at byte")]
)
def test_an_outdated_index_is_refused_and_rebuilt_on_demand(
    change: Callable[[Path], None], reason: str, folder: Path
) -> None:
    pattern = f"{folder}/a.tar"
    before = opened(pattern)
    change(folder / "a.tar")
    with pytest.raises(UserError) as caught:
        opened(pattern)
    assert reason in str(caught.value)
    assert str(caught.value).endswith(f"run `cascade index '{pattern}'`")
    config = build(DataConfig, {"shards": pattern})
    open_indexes(config, config.sources(), rebuild_outdated=True, progress=False)
    after = opened(pattern)
    assert (after.digest == before.digest) == (change is grow)


def test_a_copy_needs_no_new_index(folder: Path) -> None:
    before = opened(f"{folder}/a.tar")
    written = (folder / "a.index.safetensors").stat().st_mtime_ns
    touch(folder / "a.tar")
    assert opened(f"{folder}/a.tar").digest == before.digest
    assert (folder / "a.index.safetensors").stat().st_mtime_ns == written


def test_a_changed_image_is_refused_when_it_is_read(folder: Path) -> None:
    shards = opened(f"{folder}/a.tar")
    offset = int(shards.indexes[0].column("offset")[2, 0])
    with (folder / "a.tar").open("r+b") as file:
        file.seek(offset + 200)
        byte = file.read(1)
        file.seek(offset + 200)
        file.write(bytes([byte[0] ^ 1]))
    assert shards.image(1)
    with pytest.raises(DamagedSample, match="has changed since it was indexed"):
        shards.image(2)


def test_a_tar_that_is_truncated_or_removed_later(folder: Path) -> None:
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
    """Indexed from end to end, read by ranges, and from the cache when the server has stopped."""
    local = opened(f"{folder}/a.tar")
    with Server(folder) as server:
        remote = opened(server.url("a.tar"), cache=str(tmp_path / "cache"))
        assert remote.digest == local.digest
        images = [remote.image(i) for i in range(4)]
    assert images == [local.image(i) for i in range(4)] == [remote.image(i) for i in range(4)]


def test_remote_shards_need_a_cache_folder(folder: Path) -> None:
    with Server(folder) as server, pytest.raises(UserError, match=r"name one in data\.cache"):
        opened(server.url("a.tar"))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"global_batch": 0}, "global_batch: 0 is not positive"),
        ({"shuffle_shards": 0}, "shuffle_shards: 0 is not positive"),
        ({"workers": 0}, "workers: 0 is not positive"),
        ({"max_damage": 1.5}, r"max_damage: 1.5 is not a fraction in \[0, 1\]"),
        ({"shards": {}}, "shards: {}; give at least one data set"),
        ({"shards": {"a": 1, "b": 0}}, "give each entry a weight above 0"),
        (
            {"shards": {"a": 1, "b": 1e-6}},
            "a weight is so small that 10,000 samples have none of it",
        ),
        ({"shards": {"a": "much"}}, "shards.a: expected a number, got text 'much'"),
        ({"captions": {"txt": -1}}, "captions: {'txt': -1.0}; give each entry a weight above 0"),
    ],
)
def test_invalid_configurations(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(DataConfig, {"shards": "a.tar", **raw})


def test_shards_are_a_pattern_or_several_or_weighted_sets() -> None:
    for raw, sets in (
        ("a.tar", {("a.tar",): 1.0}),
        (["a.tar", "b.tar"], {("a.tar", "b.tar"): 1.0}),
        ({"a.tar": 2, "b.tar": 0.5}, {("a.tar",): 2.0, ("b.tar",): 0.5}),
    ):
        assert build(DataConfig, {"shards": raw}).sets == sets


@pytest.mark.parametrize("fits", [True, False])
def test_an_index_on_the_server_is_reused_if_it_fits(
    fits: bool, folder: Path, tmp_path: Path
) -> None:
    """Instead of reading the whole shard; and it is requested once."""
    local = opened(f"{folder}/a.tar")
    if not fits:
        rewrite(folder / "a.tar")
    full_range = f"bytes=0-{(folder / 'a.tar').stat().st_size - 1}"
    with Server(folder) as server:
        remote = opened(server.url("a.tar"), cache=str(tmp_path / "cache"))
        assert (remote.digest == local.digest) == fits
        assert (full_range in [request.range for request in server.requests]) != fits
        num_requests = len(server.requests)
        opened(server.url("a.tar"), cache=str(tmp_path / "cache"))
        assert len(server.requests) == num_requests + 1  # size and version


# Validation.


def names(shards: Shards | None) -> set[tuple[str, str]]:
    assert shards is not None
    return {shards.name(i) for i in range(len(shards))}


def held_out(shards: Any, **options: Any) -> Shards | None:
    return opened(shards, **options).open_validation()


def test_a_fraction_of_the_keys_is_held_out(shards_folder: Path) -> None:
    pattern = f"{shards_folder}/*.tar"
    everything = opened(pattern)
    training = opened(pattern, validation=0.3)
    validation = held_out(pattern, validation=0.3)
    assert names(training) | names(validation) == names(everything)
    assert not names(training) & names(validation)
    assert training.removed["held out for validation"] == len(names(validation))
    assert validation is not None
    assert validation.image(0) == everything.image(
        [everything.name(i) for i in range(len(everything))].index(validation.name(0))
    )

    # By key alone: whatever the other shards are, and nested.
    first = held_out(f"{shards_folder}/00000.tar", validation=0.3)
    assert names(first) == {name for name in names(validation) if "00000.tar" in name[0]}
    assert names(validation) < names(held_out(pattern, validation=0.6))


def test_the_fraction_is_about_the_one_that_is_asked_for() -> None:
    keys = [b"%09d" % number for number in range(20_000)]
    for fraction in (0.01, 0.5):
        share = np.mean([is_held_out(key, fraction) for key in keys])
        # Five standard deviations of the mean of so many draws.
        assert abs(share - fraction) < 5 * np.sqrt(fraction * (1 - fraction) / len(keys))


def test_validation_by_tars_of_their_own(folder: Path) -> None:
    options = {"validation": f"{folder}/a.tar", "max_damage": 1}
    assert names(held_out(f"{folder}/b.tar", **options)) == {
        (f"{folder}/a.tar", f"{number}") for number in range(4)
    }
    assert names(opened(f"{folder}/b.tar", **options)) == names(
        opened(f"{folder}/b.tar", max_damage=1)
    )
    assert held_out(f"{folder}/a.tar") is None


def test_nothing_held_out_is_refused(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        held_out(f"{folder}/a.tar", validation=1e-9)
    assert str(caught.value) == (
        "data.validation: 1e-09 of the keys of data.shards holds out none of 4 samples; raise it, "
        "or give tars of their own"
    )
    with pytest.raises(UserError, match=r"data\.shards: .*: no sample passes; .* 4 held out"):
        opened(f"{folder}/a.tar", validation=0.999999)


@pytest.mark.parametrize("fraction", [0, 1, 2.5, -0.1])
def test_a_fraction_that_is_none_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"validation: .* is not a fraction between 0 and 1"):
        build(DataConfig, {"shards": "a.tar", "validation": fraction})


def test_tars_that_are_trained_on_are_refused_for_validation(folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        held_out(f"{folder}/*.tar", validation=f"{folder}/./a.tar", max_damage=1)
    assert str(caught.value) == (
        f"data.shards: {folder}/a.tar: in data.validation too, which is not to be trained on; "
        "take it out of one"
    )


def test_errors_of_tars_for_validation_name_their_field(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.validation: .*/none\.tar: no such file"):
        held_out(f"{folder}/a.tar", validation=f"{folder}/none.tar")
    with pytest.raises(ConfigError, match=r"validation: expected a number.* write 1\.0e-2 without"):
        build(DataConfig, {"shards": "a.tar", "validation": "1e-2"})
