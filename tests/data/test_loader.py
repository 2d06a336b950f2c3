"""Batches by step: the same in any process and any thread; an image that cannot be used is replaced
and listed, never lost without a line.
"""

import json
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from pipeline.config import build
from pipeline.data.config import DataConfig
from pipeline.data.decode import decode
from pipeline.data.image import ImageSize, crop_resize
from pipeline.data.loader import MAX_ATTEMPTS, Loader, MakeInputs
from pipeline.data.shards import Shards
from pipeline.errors import UserError
from pipeline.rng import Draws
from pipeline.stage.inputs import Arrays
from tests.helpers.jobs import WAIT, leaving_nothing, until
from tests.helpers.tars import jpeg, sample, tar

SIZE = 8  # side of the images, in pixels
BATCH = 6
STEPS = 5
SEED = 3
USABLE = "abcdefg"  # keys of the samples in `crawl`
BROKEN = "xy"


class SampleIdPrompts:
    """In the place of embeddings: the ids of the samples whose embeddings they would be."""

    manifest_fields: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, threadsafe: bool = True) -> None:
        self.threadsafe = threadsafe
        self.calling_threads: set[str] = set()

    def embed(
        self, sample_ids: Sequence[int], seed: int, step: int, positions: Sequence[int]
    ) -> Arrays:
        self.calling_threads.add(threading.current_thread().name)
        return {
            "text": np.array(sample_ids, np.float32).reshape(-1, 1, 1),
            "text_mask": np.ones((len(sample_ids), 1), bool),
        }


def make_inputs(images: np.ndarray, prompt: Arrays, draws: Draws) -> Arrays:
    """In the place of a stage's: all that the loader hands to it."""
    return {
        "seed": np.full(len(images), draws.seed),
        "step": np.full(len(images), draws.step),
        "position": np.array(draws.positions),
        "image": images,
        **prompt,
    }


def write_tar(path: Path, images: dict[str, bytes]) -> Path:
    path.write_bytes(tar([file for key, data in images.items() for file in sample(key, jpg=data)]))
    return path


@pytest.fixture(scope="module")
def crawl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tars of nine samples; two of the images have whole headers and are broken behind."""
    folder = tmp_path_factory.mktemp("crawl")
    images = {key: jpeg(20, 12, seed) for seed, key in enumerate("abxcdyefg")}
    for key in BROKEN:
        images[key] = images[key][:-20]
    items = list(images.items())
    for shard in range(3):
        write_tar(folder / f"{shard}.tar", dict(items[3 * shard : 3 * shard + 3]))
    return folder


def make_loader(
    shards: Path,
    run: Path,
    share: range = range(BATCH),
    *,
    make_inputs: MakeInputs = make_inputs,
    window: int | None = None,
    threadsafe: bool = True,
    **data: Any,
) -> Loader:
    """A loader of the tars in the folder `shards`; `data` as in a configuration."""
    raw = {
        "shards": f"{shards}/*.tar",
        "global_batch": BATCH,
        "shuffle_shards": 2,
        "crop": "random",
        "max_damage": 1.0,
    }
    config = build(DataConfig, raw | data)
    run.mkdir(exist_ok=True)
    return Loader(
        Shards.open(config, progress=False),
        SampleIdPrompts(threadsafe),
        seed=SEED,
        size=ImageSize(side=SIZE, window=window),
        make_inputs=make_inputs,
        quarantine=run / "quarantine.jsonl",
        share=share,
    )


def sample_ids_of(batch: Arrays) -> list[int]:
    """The samples in a batch, replaced ones by their replacements."""
    return [int(sample_id) for sample_id in batch["text"].ravel()]


def quarantined(run: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]


def assert_equal(batches: Sequence[Arrays], expected: Sequence[Arrays]) -> None:
    assert len(batches) == len(expected)
    for batch, expected_batch in zip(batches, expected, strict=True):
        assert batch.keys() == expected_batch.keys()
        for name, array in batch.items():
            assert array.dtype == expected_batch[name].dtype
            np.testing.assert_array_equal(array, expected_batch[name])


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]


@pytest.fixture(scope="module")
def reference(crawl: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Arrays]:
    """All batches, from one process and one thread."""
    return list(make_loader(crawl, tmp_path_factory.mktemp("whole"), workers=1).batches(0, STEPS))


# Which samples, and where they come from.


def test_a_batch_is_the_samples_of_its_step(shards_folder: Path, tmp_path: Path) -> None:
    loader = make_loader(shards_folder, tmp_path, crop="center")
    for step, batch in enumerate(loader.batches(0, STEPS)):
        assert batch["seed"].tolist() == [SEED] * BATCH
        assert batch["step"].tolist() == [step] * BATCH
        assert batch["position"].tolist() == list(range(BATCH))
        assert batch["text_mask"].all()

        sample_ids = loader.sample_ids(step).tolist()
        assert sample_ids_of(batch) == sample_ids == loader.order.ids(step, BATCH).tolist()
        for image, sample_id in zip(batch["image"], sample_ids, strict=True):
            expected = crop_resize(decode(loader.shards.image(sample_id), SIZE), SIZE, 0.5, 0.5)
            np.testing.assert_array_equal(image, expected)
    assert not (tmp_path / "quarantine.jsonl").exists()


@pytest.mark.parametrize("world", [2, 3, 6])
def test_the_batches_of_all_ranks_are_the_global_batch(
    world: int, reference: list[Arrays], crawl: Path, tmp_path: Path
) -> None:
    """Fewer shards than ranks, of uneven sizes: every rank has every step."""
    size = BATCH // world
    shares = [range(rank * size, (rank + 1) * size) for rank in range(world)]
    loaders = [make_loader(crawl, tmp_path / "run", share) for share in shares]
    by_rank = [list(loader.batches(0, STEPS)) for loader in loaders]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*by_rank, strict=True)
    ]
    assert_equal(joined, reference)


@pytest.mark.parametrize(("start", "workers"), [(0, 1), (0, 4), (2, 2), (STEPS - 1, 3), (STEPS, 1)])
@pytest.mark.parametrize("threadsafe", [True, False])
def test_batches_do_not_depend_on_start_workers_or_the_thread_that_embeds(
    start: int, workers: int, threadsafe: bool, reference: list[Arrays], crawl: Path, tmp_path: Path
) -> None:
    loader = make_loader(crawl, tmp_path / "run", workers=workers, threadsafe=threadsafe)
    assert_equal(list(loader.batches(start, STEPS)), reference[start:])
    assert loader_threads() == []
    assert isinstance(loader.prompts, SampleIdPrompts)
    if not threadsafe:
        assert loader.prompts.calling_threads <= {threading.current_thread().name}


RANK = """
import sys
from pathlib import Path
sys.path.insert(0, ".")
from tests.data.test_loader import make_loader, sample_ids_of
rank, world, start = map(int, sys.argv[1:4])
folder, shards = map(Path, sys.argv[4:])
size = 6 // world
loader = make_loader(shards, folder, range(rank * size, (rank + 1) * size))
with open(folder / f"log-{world}-{rank}", "w", buffering=1) as file:
    for step, batch in enumerate(loader.batches(start, start + 10_000), start):
        print(step, *sample_ids_of(batch), file=file)
"""


def run_ranks(
    world: int, start: int, steps: int, crawl: Path, folder: Path
) -> dict[int, list[int]]:
    """The samples of each step, as `world` processes logged them until they were killed with -9."""
    files = [folder / f"log-{world}-{rank}" for rank in range(world)]
    with leaving_nothing(folder) as begin:
        arguments = [map(str, (rank, world, start, folder, crawl)) for rank in range(world)]
        ranks = [begin([sys.executable, "-W", "error", "-c", RANK, *each]) for each in arguments]

        def all_logged() -> bool:
            assert all(rank.poll() is None for rank in ranks)
            return all(file.exists() and file.read_text().count("\n") >= steps for file in files)

        until(all_logged, f"{steps} steps")
        for rank in ranks:
            rank.kill()
            rank.wait(WAIT)

    sample_ids: dict[int, list[int]] = {}
    for file in files:
        for line in file.read_text().splitlines()[:steps]:
            step, *ids = map(int, line.split())
            sample_ids.setdefault(step, []).extend(ids)
    return sample_ids


def test_killed_and_resumed_on_another_number_of_ranks(crawl: Path, tmp_path: Path) -> None:
    """The state is one integer, the step: later batches are those of a run without a stop."""
    before = run_ranks(2, 0, 7, crawl, tmp_path)
    after = run_ranks(3, 7, 9, crawl, tmp_path)
    assert list(before) == list(range(7))
    assert list(after) == list(range(7, 16))
    batches = make_loader(crawl, tmp_path / "run").batches(0, 16)
    uninterrupted = [sample_ids_of(batch) for batch in batches]
    assert [*before.values(), *after.values()] == uninterrupted


# Crops and windows.


def test_a_random_crop_is_drawn_for_step_and_position(crawl: Path, tmp_path: Path) -> None:
    loader = make_loader(crawl, tmp_path)
    crops = {
        loader.image(0, step, position).tobytes() for step in range(4) for position in range(4)
    }
    assert len(crops) > 3
    assert all(loader.image(0, 1, 2).tobytes() in crops for _ in range(2))


def test_a_center_crop_is_the_same_in_every_step(crawl: Path, tmp_path: Path) -> None:
    loader = make_loader(crawl, tmp_path, crop="center")
    assert len({loader.image(0, step, 0).tobytes() for step in range(8)}) == 1


def test_windows_are_drawn_for_step_and_position(shards_folder: Path, tmp_path: Path) -> None:
    """From all over the image; from its middle in sample grids."""
    side = 3
    whole = make_loader(shards_folder, tmp_path, crop="center").image(0, 0, 0)
    loader = make_loader(shards_folder, tmp_path, crop="center", window=side)
    windows = sliding_window_view(whole, (side, side, 3))[:, :, 0]  # (y, x, side, side, 3)

    corners = set()
    for step in range(60):
        matches = (windows == loader.image(0, step, 5)).all(axis=(2, 3, 4))
        assert matches.any()
        corners.add(tuple(np.argwhere(matches)[0]))
    assert len(corners) > 8

    middle = (SIZE - side + 1) // 2
    images, _ = loader.first(1)
    assert (images[0] == windows[middle, middle]).all()
    assert next(loader.batches(0, 1))["image"].shape == (BATCH, side, side, 3)


def test_the_first_samples_repeat_where_there_are_fewer(crawl: Path, tmp_path: Path) -> None:
    images, prompt = make_loader(crawl, tmp_path).first(11)
    assert images.shape == (11, SIZE, SIZE, 3)
    assert prompt["text_mask"].shape == (11, 1)
    assert (prompt["text"][9:] == prompt["text"][:2]).all()


# What cannot be used.


def test_broken_images_are_replaced_and_listed_once(crawl: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first_rank = make_loader(crawl, run, range(3))
    second_rank = make_loader(crawl, run, range(3, BATCH))
    later_run = make_loader(crawl, run)

    keys = {i: first_rank.shards.name(i)[1] for i in range(9)}
    used = set()
    for loader in (first_rank, second_rank, later_run):
        for batch in loader.batches(0, 3 * STEPS):
            used |= {keys[sample_id] for sample_id in sample_ids_of(batch)}
    assert used == set(USABLE)

    entries = {entry["key"]: entry for entry in quarantined(run)}
    assert len(quarantined(run)) == len(entries) == 2
    assert entries.keys() == set(BROKEN)
    assert entries["x"]["shard"] == str(crawl / "0.tar")
    assert entries["x"]["reason"].startswith("cannot be decoded (")


def test_what_the_index_left_out_is_listed_once(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"usable": jpeg(), "empty": b""})
    for _ in range(2):
        make_loader(tmp_path, tmp_path)
    (entry,) = quarantined(tmp_path)
    assert (entry["shard"], entry["key"]) == (str(tmp_path / "a.tar"), "empty")


def test_a_data_set_without_a_usable_image_ends_the_run(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"one": jpeg()[:-20]})
    loader = make_loader(tmp_path, tmp_path)
    with pytest.raises(UserError) as error:
        next(loader.batches(0, STEPS))
    assert str(error.value) == (
        f"data.shards: {tmp_path}/a.tar:one and {MAX_ATTEMPTS - 1} replacements cannot be used; "
        f"the reasons are in {tmp_path}/quarantine.jsonl; repair or remove those shards"
    )
    assert len(quarantined(tmp_path)) == 1
    assert loader_threads() == []


def test_too_many_broken_images_end_the_run(crawl: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"data\.max_damage: 2 of about 9 drawn samples are unusable, more than 15",
    ):
        list(make_loader(crawl, tmp_path, max_damage=0.15).batches(0, 3 * STEPS))
    assert loader_threads() == []


def test_a_tar_that_is_gone_ends_the_run(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"one": jpeg()})
    loader = make_loader(tmp_path, tmp_path)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(UserError, match=r"a\.tar"):
        next(loader.batches(0, 1))
    assert loader_threads() == []


# Threads.


@pytest.mark.parametrize("threadsafe", [True, False])
def test_an_error_in_a_thread_is_raised_at_its_step(
    threadsafe: bool, crawl: Path, tmp_path: Path
) -> None:
    def fail(images: np.ndarray, prompt: Arrays, draws: Draws) -> Arrays:
        if draws.step == 2:
            raise ZeroDivisionError("step 2")
        return make_inputs(images, prompt, draws)

    loader = make_loader(crawl, tmp_path, make_inputs=fail, threadsafe=threadsafe)
    batches = loader.batches(0, STEPS)
    assert [batch["step"][0] for batch in islice(batches, 2)] == [0, 1]
    with pytest.raises(ZeroDivisionError, match="step 2"):
        next(batches)
    assert loader_threads() == []


def test_a_loop_that_ends_early_leaves_no_threads(crawl: Path, tmp_path: Path) -> None:
    steps: list[int] = []

    def count(images: np.ndarray, prompt: Arrays, draws: Draws) -> Arrays:
        steps.append(draws.step)
        return make_inputs(images, prompt, draws)

    batches = make_loader(crawl, tmp_path, make_inputs=count).batches(0, 10_000)
    next(batches)
    assert loader_threads()
    assert isinstance(batches, Generator)
    batches.close()
    assert loader_threads() == []
    assert max(steps) <= 3  # the one taken, and those ahead of it
