"""Batches by step: the same whoever asks; what cannot be used is replaced, written down, and not
lost in silence.
"""

import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import build
from pipeline.data.decode import decode
from pipeline.data.image import crop_resize
from pipeline.data.loader import ATTEMPTS, Arrays, Loader
from pipeline.data.shards import DataConfig, Shards
from pipeline.errors import UserError
from tests.helpers.jobs import WAIT, leaving_nothing, until
from tests.helpers.tars import jpeg, sample, tar

SIZE, BATCH, STEPS = 8, 6, 5
GOOD, BROKEN = "abcdefg", "xy"  # keys of the samples in `crawl`


class Numbers:
    """In the place of embeddings: whose they would be."""

    def __init__(self, threadsafe: bool = True) -> None:
        self.threadsafe, self.facts = threadsafe, {}
        self.askers: set[str] = set()

    def embed(
        self, numbers: Sequence[int], seed: int, step: int, positions: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        self.askers.add(threading.current_thread().name)
        return np.array(numbers, np.float32).reshape(-1, 1, 1), np.ones((len(numbers), 1), bool)


def arrange(
    step: int, positions: Sequence[int], pictures: np.ndarray, text: np.ndarray, mask: np.ndarray
) -> Arrays:
    return np.full(len(positions), step), np.array(positions), pictures, text, mask


def write(path: Path, pictures: dict[str, bytes]) -> Path:
    path.write_bytes(
        tar([file for key, data in pictures.items() for file in sample(key, jpg=data)])
    )
    return path


@pytest.fixture(scope="module")
def crawl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars as they come: nine samples, two of whose pictures are broken though their headers are
    not.
    """
    folder = tmp_path_factory.mktemp("crawl")
    pictures = {key: jpeg(20, 12, number) for number, key in enumerate("abxcdyefg")}
    for key in BROKEN:
        pictures[key] = pictures[key][:-20]
    items = list(pictures.items())
    for number in range(3):
        write(folder / f"{number}.tar", dict(items[3 * number : 3 * number + 3]))
    return folder


def make(
    shards: Path,
    run: Path,
    share: range = range(BATCH),
    arrange: Any = arrange,
    cut: int | None = None,
    **options: Any,
) -> Loader:
    raw = {
        "shards": f"{shards}/*.tar",
        "global_batch": BATCH,
        "shuffle_shards": 2,
        "crop": "random",
        "max_damage": 1.0,
    }
    text = Numbers(options.pop("threadsafe", True))
    config = build(DataConfig, raw | options)
    run.mkdir(exist_ok=True)
    return Loader(
        Shards.open(config, progress=False),
        text,
        seed=3,
        size=SIZE,
        window=cut,
        arrange=arrange,
        quarantine=run / "quarantine.jsonl",
        share=share,
    )


def pictures_of(batch: Arrays) -> list[int]:
    """The samples of a batch."""
    return [int(number) for number in batch[3].ravel()]


def listed(run: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]


def assert_equal(a: list[Arrays], b: list[Arrays]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x, y)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.fixture(scope="module")
def whole(crawl: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Arrays]:
    """All batches, made by one process and one thread."""
    return list(make(crawl, tmp_path_factory.mktemp("whole"), workers=1).batches(0, STEPS))


def test_a_batch_is_the_samples_of_its_step(shards_folder: Path, tmp_path: Path) -> None:
    loader = make(shards_folder, tmp_path, crop="center")
    for step, batch in enumerate(loader.batches(0, STEPS)):
        steps, positions, pictures, _, mask = batch
        assert steps.tolist() == [step] * BATCH
        assert positions.tolist() == list(range(BATCH))
        assert (
            pictures_of(batch)
            == loader.ids(step).tolist()
            == loader.order.ids(step, BATCH).tolist()
        )
        assert mask.all()
        for picture, number in zip(pictures, loader.ids(step), strict=True):
            expected = crop_resize(decode(loader.shards.image(int(number)), SIZE), SIZE, 0.5, 0.5)
            np.testing.assert_array_equal(picture, expected)
    assert not (tmp_path / "quarantine.jsonl").exists()


@pytest.mark.parametrize("world", [2, 3, 6])
def test_the_ranks_batches_are_the_whole_batch(
    world: int, whole: list[Arrays], crawl: Path, tmp_path: Path
) -> None:
    """Fewer shards than ranks, of uneven sizes: every rank has every step."""
    each = BATCH // world
    ranks = [
        make(crawl, tmp_path / "run", range(rank * each, (rank + 1) * each))
        for rank in range(world)
    ]
    parts = [list(rank.batches(0, STEPS)) for rank in ranks]
    joined = [
        tuple(np.concatenate(arrays) for arrays in zip(*step, strict=True))
        for step in zip(*parts, strict=True)
    ]
    assert_equal(joined, whole)


@pytest.mark.parametrize(("start", "workers"), [(0, 1), (0, 4), (2, 2), (STEPS - 1, 3), (STEPS, 1)])
@pytest.mark.parametrize("threadsafe", [True, False])
def test_batches_do_not_depend_on_start_workers_or_where_text_comes_from(
    start: int, workers: int, threadsafe: bool, whole: list[Arrays], crawl: Path, tmp_path: Path
) -> None:
    loader = make(crawl, tmp_path / "run", workers=workers, threadsafe=threadsafe)
    assert_equal(list(loader.batches(start, STEPS)), whole[start:])
    assert threads() == []
    assert isinstance(loader.prompts, Numbers)
    if not threadsafe:
        assert loader.prompts.askers <= {threading.current_thread().name}


RANK = """
import sys
from pathlib import Path
sys.path.insert(0, ".")
from tests.data.test_loader import make, pictures_of
rank, world, start, folder = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
each = 6 // world
loader = make(Path(sys.argv[5]), folder, range(rank * each, (rank + 1) * each))
with open(folder / f"seen-{world}-{rank}", "w", buffering=1) as file:
    for step, batch in enumerate(loader.batches(start, start + 10_000), start):
        print(step, *pictures_of(batch), file=file)
"""


def run_ranks(
    world: int, start: int, steps: int, crawl: Path, folder: Path
) -> dict[int, list[int]]:
    """The samples of each step, as `world` processes saw them before they were killed with -9
    somewhere.
    """
    files = [folder / f"seen-{world}-{rank}" for rank in range(world)]
    with leaving_nothing(folder) as begin:
        given = [map(str, (rank, world, start, folder, crawl)) for rank in range(world)]
        ranks = [begin([sys.executable, "-W", "error", "-c", RANK, *words]) for words in given]

        def seen_enough() -> bool:
            assert all(rank.poll() is None for rank in ranks)
            return all(file.exists() and file.read_text().count("\n") >= steps for file in files)

        until(seen_enough, f"{steps} steps")
        for rank in ranks:
            rank.kill()
            rank.wait(WAIT)
    seen: dict[int, list[int]] = {}
    for file in files:
        for line in file.read_text().splitlines(keepends=True)[:steps]:
            step, *ids = map(int, line.split())
            seen.setdefault(step, []).extend(ids)
    return seen


def test_killed_and_resumed_on_another_number_of_ranks(crawl: Path, tmp_path: Path) -> None:
    """The state is one integer, the step: what comes after it is what an uninterrupted run would
    have seen.
    """
    first = run_ranks(2, 0, 7, crawl, tmp_path)
    later = run_ranks(3, 7, 9, crawl, tmp_path)
    assert list(first) == list(range(7))
    assert list(later) == list(range(7, 16))
    whole = [pictures_of(batch) for batch in make(crawl, tmp_path / "run").batches(0, 16)]
    assert [*first.values(), *later.values()] == whole


def test_the_crop_is_drawn_for_the_place(crawl: Path, tmp_path: Path) -> None:
    """The same sample comes cut elsewhere in another step, and in the middle if that is asked for."""
    loader = make(crawl, tmp_path)
    cuts = {
        loader.picture(0, step, position).tobytes() for step in range(4) for position in range(4)
    }
    assert len(cuts) > 3
    assert all(loader.picture(0, 1, 2).tobytes() in cuts for _ in range(2))
    centered = make(crawl, tmp_path, crop="center")
    assert len({centered.picture(0, step, 0).tobytes() for step in range(8)}) == 1


def test_windows_are_drawn_for_the_place(shards_folder: Path, tmp_path: Path) -> None:
    """From all over the picture; in the middle where they are looked at."""
    loader, whole = (make(shards_folder, tmp_path, cut=cut, crop="center") for cut in (3, None))
    square = whole.picture(0, 0, 0)
    windows = np.lib.stride_tricks.sliding_window_view(square, (3, 3), axis=(0, 1)).transpose(
        0, 1, 3, 4, 2
    )
    seen = set()
    for step in range(60):
        found = (windows == loader.picture(0, step, 5)).all(axis=(2, 3, 4))
        assert found.any()
        seen.add(tuple(np.argwhere(found)[0]))
    assert len(seen) > 8
    middle = windows[(SIZE - 3 + 1) // 2, (SIZE - 3 + 1) // 2]
    assert (loader.first(1)[0][0] == middle).all()
    assert next(loader.batches(0, 1))[2].shape == (BATCH, 3, 3, 3)


def test_first_starts_again_from_the_first(crawl: Path, tmp_path: Path) -> None:
    pictures, text, mask = make(crawl, tmp_path).first(11)
    assert pictures.shape == (11, SIZE, SIZE, 3)
    assert mask.shape == (11, 1)
    assert (text[9:] == text[:2]).all()


def test_what_cannot_be_decoded_is_replaced_and_listed_once(crawl: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second = (
        make(crawl, run, share) for share in (range(3), range(3, BATCH))
    )  # two processes of a job
    names = {i: first.shards.name(i)[1] for i in range(9)}
    seen = set()
    for loader in (first, second, make(crawl, run)):  # and a later run
        for batch in loader.batches(0, 3 * STEPS):
            seen |= {names[number] for number in pictures_of(batch)}
    assert seen == set(GOOD)
    entries = {entry["key"]: entry for entry in listed(run)}
    assert len(listed(run)) == len(entries) == 2
    assert entries.keys() == set(BROKEN)
    assert entries["x"]["shard"] == str(crawl / "0.tar")
    assert entries["x"]["reason"].startswith("cannot be decoded (")


def test_what_the_index_left_out_is_listed_too(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", {"good": jpeg(), "empty": b""})
    for _ in range(2):
        make(tmp_path, tmp_path)
    (entry,) = listed(tmp_path)
    assert (entry["shard"], entry["key"]) == (str(tmp_path / "a.tar"), "empty")


def test_nothing_that_can_be_decoded(tmp_path: Path) -> None:
    loader = make(write(tmp_path / "a.tar", {"one": jpeg()[:-20]}).parent, tmp_path)
    with pytest.raises(UserError) as error:
        next(loader.batches(0, STEPS))
    assert str(error.value) == (
        f"data.shards: {tmp_path}/a.tar:one and {ATTEMPTS} stand-ins cannot be used; the reasons are in "
        f"{tmp_path}/quarantine.jsonl; repair or remove those shards"
    )
    assert len(listed(tmp_path)) == 1
    assert threads() == []


def test_too_many_that_cannot_be_decoded_end_the_run(crawl: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"data\.max_damage: 2 of about 9 samples looked at cannot be used, more than 15",
    ):
        list(make(crawl, tmp_path, max_damage=0.15).batches(0, 3 * STEPS))
    assert threads() == []


def test_a_tar_that_is_gone_ends_the_run(tmp_path: Path) -> None:
    loader = make(write(tmp_path / "a.tar", {"one": jpeg()}).parent, tmp_path)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(UserError, match=r"a\.tar"):
        next(loader.batches(0, 1))
    assert threads() == []


@pytest.mark.parametrize("threadsafe", [True, False])
def test_an_error_in_a_thread_surfaces_at_its_step(
    threadsafe: bool, crawl: Path, tmp_path: Path
) -> None:
    def fail(step: int, positions: Sequence[int], *arrays: np.ndarray) -> Arrays:
        if step == 2:
            raise ZeroDivisionError("step 2")
        return arrange(step, positions, *arrays)

    batches = make(crawl, tmp_path, arrange=fail, threadsafe=threadsafe).batches(0, STEPS)
    assert [next(batches)[0][0] for _ in range(2)] == [0, 1]
    with pytest.raises(ZeroDivisionError, match="step 2"):
        next(batches)
    assert threads() == []


def test_a_loop_that_is_left_early_leaves_no_threads(crawl: Path, tmp_path: Path) -> None:
    made: list[int] = []

    def count(step: int, positions: Sequence[int], *arrays: np.ndarray) -> Arrays:
        made.append(step)
        return arrange(step, positions, *arrays)

    batches = make(crawl, tmp_path, arrange=count).batches(0, 10_000)
    next(batches)
    assert threads()
    batches.close()
    assert threads() == []
    assert max(made) <= 3  # the one taken, and those ahead of it
