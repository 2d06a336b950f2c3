"""Batches by step: the same whoever asks; what cannot be used is replaced, written down, and not lost in silence."""

import io
import json
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config import ConfigError
from pipeline.data.image import crop_resize, decode
from pipeline.data.loader import ATTEMPTS, Arrays, DataConfig, Loader
from pipeline.data.order import sample_ids
from pipeline.data.shards import Shards
from pipeline.errors import UserError

SIZE, BATCH, STEPS = 8, 6, 5
GOOD, BROKEN = "abcdefg", "xy"  # keys of the samples in `crawl`


class Places:
    """In the place of embeddings: where they would be read from."""

    def __getitem__(self, place: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([place], np.float32), np.array([True])


def arrange(step: int, positions: range, pictures: np.ndarray, text: np.ndarray, mask: np.ndarray) -> Arrays:
    return np.full(len(positions), step), np.array(positions), pictures, text, mask


def jpeg(seed: int) -> bytes:
    """Wider than high, so that it matters where the square is cut."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (3, 5, 3)).astype(np.uint8)
    Image.fromarray(noise).resize((20, 12)).save(buffer, "JPEG")
    return buffer.getvalue()


def write(path: Path, pictures: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, data in pictures.items():
            for name, content in ((f"{key}.jpg", data), (f"{key}.txt", f"caption of {key}".encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def crawl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tar as they come: nine samples, two of them broken."""
    pictures = {key: jpeg(number) for number, key in enumerate("abxcdyefg")}
    pictures |= {"x": pictures["x"][:-100], "y": b"<html>gone</html>"}
    return write(tmp_path_factory.mktemp("crawl") / "00000.tar", pictures)


def make(shards: Path, run: Path, share: range = range(BATCH), workers: int = 2, **options: Any) -> Loader:
    config = DataConfig(shards=str(shards), global_batch=BATCH, workers=workers, crop="random")
    values = {"text": Places(), "arrange": arrange} | options
    run.mkdir(exist_ok=True)
    return Loader(
        config,
        seed=3,
        shards=Shards.open(config.patterns),
        size=SIZE,
        quarantine=run / "quarantine.jsonl",
        share=share,
        **values,
    )


def listed(run: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]


def assert_equal(a: list[Arrays], b: list[Arrays]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x, y)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.fixture
def whole(crawl: Path, tmp_path: Path) -> list[Arrays]:
    """All batches, one after the other, without threads."""
    loader = make(crawl, tmp_path / "whole")
    return [loader.batch(step) for step in range(STEPS)]


def test_a_batch_is_the_samples_of_its_step(shards_folder: Path, tmp_path: Path) -> None:
    loader = make(shards_folder / "*.tar", tmp_path)
    for step, (steps, positions, pictures, text, mask) in enumerate(loader.batches(0, STEPS)):
        assert steps.tolist() == [step] * BATCH
        assert positions.tolist() == list(range(BATCH))
        ids = sample_ids(3, step, BATCH, 24)
        assert [tuple(place) for place in text[:, 0].astype(int)] == [loader.shards.location(int(i)) for i in ids]
        assert mask.all()
        for picture, number in zip(pictures, ids, strict=True):
            expected = crop_resize(decode(loader.shards.read(int(number)).image, SIZE), SIZE, 0.5, 0.5)
            np.testing.assert_array_equal(picture, expected)
    assert not (tmp_path / "quarantine.jsonl").exists()


@pytest.mark.parametrize("world", [2, 3, 6])
def test_the_ranks_batches_are_the_whole_batch(world: int, whole: list[Arrays], crawl: Path, tmp_path: Path) -> None:
    each = BATCH // world
    ranks = [make(crawl, tmp_path / "run", range(rank * each, (rank + 1) * each)) for rank in range(world)]
    parts = [list(rank.batches(0, STEPS)) for rank in ranks]
    joined = [tuple(np.concatenate(arrays) for arrays in zip(*step, strict=True)) for step in zip(*parts, strict=True)]
    assert_equal(joined, whole)


@pytest.mark.parametrize(("start", "workers"), [(0, 1), (0, 4), (2, 2), (STEPS - 1, 3), (STEPS, 1)])
def test_batches_do_not_depend_on_start_or_workers(
    start: int, workers: int, whole: list[Arrays], crawl: Path, tmp_path: Path
) -> None:
    assert_equal(list(make(crawl, tmp_path / "run", workers=workers).batches(start, STEPS)), whole[start:])
    assert threads() == []


def test_the_crop_is_drawn_for_the_place(crawl: Path, tmp_path: Path) -> None:
    """The same sample comes cut elsewhere in another step, and in the middle if that is asked for."""
    loader = make(crawl, tmp_path)
    number = next(i for i in range(9) if loader.shards.key(i).endswith(":a"))
    cuts = {loader.picture(number, step, position).tobytes() for step in range(4) for position in range(4)}
    assert len(cuts) > 3
    assert all(loader.picture(number, 1, 2).tobytes() in cuts for _ in range(2))
    loader.config = DataConfig(shards="", crop="center")
    assert len({loader.picture(number, step, 0).tobytes() for step in range(8)}) == 1


def test_first_starts_again_from_the_first(crawl: Path, tmp_path: Path) -> None:
    loader = make(crawl, tmp_path)
    pictures, text, mask = loader.first(11)
    assert pictures.shape == (11, SIZE, SIZE, 3)
    assert mask.shape == (11, 1)
    assert (text[9:] == text[:2]).all()


def test_what_cannot_be_decoded_is_replaced_and_listed_once(crawl: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second = (make(crawl, run, share) for share in (range(3), range(3, BATCH)))  # two processes of a job
    rows = {first.shards.key(i).partition(":")[2]: i for i in range(9)}
    seen = set()
    for loader in (first, second, make(crawl, run)):  # and a later run
        for *_, text, _ in loader.batches(0, STEPS):
            seen |= {int(row) for row in text[:, 0, 1]}
    assert seen == {rows[key] for key in GOOD}
    entries = {entry["key"]: entry for entry in listed(run)}
    assert len(listed(run)) == len(entries) == 2
    assert {entry["shard"] for entry in entries.values()} == {str(crawl)}
    assert entries.keys() == set(BROKEN)
    assert entries["x"]["reason"].startswith("cannot be decoded (")
    assert entries["y"]["reason"] == "is none of JPEG, PNG, WEBP, GIF, BMP"
    assert first.quarantine.known | second.quarantine.known == {(str(crawl), key) for key in BROKEN}


def test_what_the_scan_skipped_is_listed_too(tmp_path: Path) -> None:
    tar = write(tmp_path / "a.tar", {"good": jpeg(1), "empty": b""})
    for _ in range(2):
        make(tar, tmp_path)
    assert listed(tmp_path) == [{"shard": str(tar), "key": "empty", "reason": "no image"}]


def test_a_line_that_a_full_disk_cut_short_does_not_count(crawl: Path, tmp_path: Path) -> None:
    list(make(crawl, tmp_path).batches(0, STEPS))
    path = tmp_path / "quarantine.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-9])
    list(make(crawl, tmp_path).batches(0, STEPS))
    assert sorted(path.read_text().splitlines()) == sorted(whole.splitlines())


def test_nothing_that_can_be_decoded(tmp_path: Path) -> None:
    loader = make(write(tmp_path / "a.tar", {"one": b"no picture"}), tmp_path)
    with pytest.raises(UserError) as error:
        next(loader.batches(0, STEPS))
    assert str(error.value) == (
        f"data.shards: a.tar:one and {ATTEMPTS} stand-ins cannot be decoded; the reasons are in "
        f"{tmp_path}/quarantine.jsonl; repair or remove those shards"
    )
    assert len(listed(tmp_path)) == 1
    assert threads() == []


def test_a_tar_that_is_gone_ends_the_run(tmp_path: Path) -> None:
    tar = write(tmp_path / "a.tar", {"one": jpeg(1)})
    loader = make(tar, tmp_path)
    tar.unlink()
    with pytest.raises(UserError, match=r"a\.tar: .* unlike at the start; put it back and start again"):
        next(loader.batches(0, 1))


def test_an_error_in_a_thread_surfaces_at_its_step(crawl: Path, tmp_path: Path) -> None:
    def fail(step: int, positions: range, *arrays: np.ndarray) -> Arrays:
        if step == 2:
            raise ZeroDivisionError("step 2")
        return arrange(step, positions, *arrays)

    batches = make(crawl, tmp_path, arrange=fail).batches(0, STEPS)
    assert [next(batches)[0][0] for _ in range(2)] == [0, 1]
    with pytest.raises(ZeroDivisionError, match="step 2"):
        next(batches)
    assert threads() == []


def test_a_loop_that_is_left_early_leaves_no_threads(crawl: Path, tmp_path: Path) -> None:
    made: list[int] = []

    def count(step: int, positions: range, *arrays: np.ndarray) -> Arrays:
        made.append(step)
        return arrange(step, positions, *arrays)

    batches = make(crawl, tmp_path, arrange=count).batches(0, 10_000)
    next(batches)
    assert threads()
    batches.close()
    assert threads() == []
    assert len(made) <= 5  # the one taken, and those ahead of it


@pytest.mark.parametrize("name", ["global_batch", "workers"])
def test_settings_that_cannot_be(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        DataConfig(shards="a.tar", **{name: 0})
    assert str(error.value) == f"{name}: 0 is not positive; give 1 or more"


def test_shards_are_one_pattern_or_several() -> None:
    assert DataConfig(shards="a.tar").patterns == ("a.tar",)
    assert DataConfig(shards=("a.tar", "b.tar")).patterns == ("a.tar", "b.tar")
