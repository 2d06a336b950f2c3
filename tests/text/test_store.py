"""Embeddings beside the shards: what comes back is what the encoder said, or a refusal."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from pipeline.config import build
from pipeline.data.shards import DataConfig, Shards
from pipeline.errors import JobError, UserError
from pipeline.text import store as module
from pipeline.text.store import Recipe, TextStore
from tests.helpers.jobs import WAIT, leaving_nothing, until
from tests.helpers.tars import sample, tar

WIDTH = 5
RECIPE = Recipe(encoder="ab" * 32, width=WIDTH, length=6, clean=False)
CAPTIONS = [("abc", "d", "efghij"), ("k", "xyz", "a b", "A b"), ("solo",)]


class LetterEncoder:
    """One token a letter; counts what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode_ragged(
        self, captions: Sequence[str], progress: Callable[[int], object] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        self.asked += captions
        rows = [embedding(caption) for caption in captions]
        return np.concatenate([np.zeros((0, WIDTH), np.float16), *rows]), np.array(
            [len(row) for row in rows], np.int64
        )


def embedding(caption: str) -> np.ndarray:
    rows = [
        np.random.default_rng([ord(letter), place]).standard_normal(WIDTH)
        for place, letter in enumerate(caption)
    ]
    return np.array(rows[: RECIPE.length], np.float16).reshape(-1, WIDTH)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, words in enumerate(CAPTIONS):
        members = [
            file
            for row, caption in enumerate(words)
            for file in sample(
                f"{number}{row}", txt=caption.encode(), json=b'{"alt": ["%d", "", "other"]}' % row
            )
        ]
        (tmp_path / f"{number}.tar").write_bytes(tar(members))
    return tmp_path


def opened(folder: Path, **options: Any) -> Shards:
    return Shards.open(build(DataConfig, {"shards": f"{folder}/*.tar", **options}), progress=False)


def built(
    folder: Path, encoder: LetterEncoder | None = None, recipe: Recipe = RECIPE, **options: Any
) -> TextStore:
    store = TextStore(opened(folder, **options), recipe)
    store.build(lambda: encoder or LetterEncoder(), progress=False)
    return store


def test_round_trip(folder: Path) -> None:
    store = built(folder)
    assert list(store.faults()) == []
    for shard, words in enumerate(CAPTIONS):
        for row, caption in enumerate(words):
            found = store.read(shard, row, "txt", 0)
            np.testing.assert_array_equal(found, embedding(caption))
            assert found.dtype == np.float16


def test_several_captions_a_sample(folder: Path) -> None:
    """A list in a field of KEY.json is several captions; empty ones do not count."""
    store = built(folder, captions={"alt": 1, "txt": 1})
    for row in range(4):
        np.testing.assert_array_equal(store.read(1, row, "alt", 0), embedding(str(row)))
        np.testing.assert_array_equal(store.read(1, row, "alt", 1), embedding("other"))
        np.testing.assert_array_equal(store.read(1, row, "txt", 0), embedding(CAPTIONS[1][row]))
    assert store.path(0, "alt") != store.path(0, "txt")


def test_captions_are_cleaned_if_asked(folder: Path) -> None:
    store = built(folder, recipe=Recipe(encoder="ab" * 32, width=WIDTH, length=6, clean=True))
    np.testing.assert_array_equal(store.read(1, 3, "txt", 0), embedding("a b"))


def test_files_hold_no_padding(folder: Path) -> None:
    store = built(folder)
    arrays = load_file(store.path(0, "txt"))
    assert arrays["embeddings"].shape == (10, WIDTH)
    assert arrays["embeddings"].dtype == np.float16
    assert arrays["offsets"].tolist() == [0, 3, 4, 10]


def test_build_does_what_is_missing(folder: Path) -> None:
    encoder = LetterEncoder()
    store = built(folder, encoder)
    store.path(1, "txt").unlink()
    encoder.asked.clear()
    assert store.build(lambda: encoder, progress=False) == 1
    assert encoder.asked == list(CAPTIONS[1])
    assert store.build(lambda: pytest.fail("loaded for nothing"), progress=False) == 0
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_only_what_the_filters_let_pass_is_encoded(folder: Path) -> None:
    encoder = LetterEncoder()
    store = built(folder, encoder, filter={"max_caption": 1})
    assert encoder.asked == ["d", "k"]
    assert store.read(1, 0, "txt", 0).shape == (1, WIDTH)
    wider = TextStore(opened(folder), RECIPE)
    assert {reason for *_, reason in wider.faults()} == {
        "lacks samples that the filters now let pass"
    }
    assert wider.build(LetterEncoder, progress=False) == 3
    assert list(store.faults()) == []  # what fits many fits few


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def change(**arrays: np.ndarray) -> Callable[[Path], None]:
    """Whole and of the right recipe, but with other arrays."""

    def spoil(path: Path) -> None:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata()
        save_file({**load_file(path), **arrays}, path, metadata)

    return spoil


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "is missing"),
    "truncated": (truncate, "is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "no metadata": (lambda path: save_file(load_file(path), path), "was made by another recipe"),
    "an offset short": (change(offsets=np.arange(4)), "do not fit together"),
    "another width": (change(embeddings=np.zeros((8, 4), np.float16)), "do not fit together"),
    "other tensors": (lambda path: save_file({"a": np.zeros(1)}, path), "is damaged"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_cannot_be_used_is_found_then_mended(kind: str, folder: Path) -> None:
    spoil, words = FAULTS[kind]
    store = built(folder)
    spoil(store.path(1, "txt"))
    ((path, shard, field, reason),) = store.faults()
    assert (path, shard, field) == (store.path(1, "txt"), 1, "txt")
    assert words in reason
    assert store.build(LetterEncoder, progress=False) == 1
    assert list(store.faults()) == []


def test_a_flipped_bit_is_noticed_when_it_is_read(folder: Path) -> None:
    store = built(folder)
    path = store.path(0, "txt")
    embeddings = load_file(path)["embeddings"].copy()
    embeddings.view(np.uint16)[5, 2] ^= 1
    change(embeddings=embeddings)(path)
    assert list(store.faults()) == []
    assert len(store.read(0, 0, "txt", 0)) == 3
    with pytest.raises(
        UserError, match=r"is damaged \(caption 0 of sample 2 .*remove it and run `python -m"
    ):
        store.read(0, 2, "txt", 0)


def test_other_captions_are_refused(folder: Path) -> None:
    built(folder)
    (folder / "2.tar").write_bytes(tar(sample("20", txt=b"sola")))
    (folder / "2.index.safetensors").unlink()
    ((*_, reason),) = TextStore(opened(folder), RECIPE).faults()
    assert reason == "was made from other captions than the shard's"


@pytest.mark.parametrize(
    "other",
    [{"encoder": "cd" * 32}, {"length": 7}, {"clean": True}, {"encoder": "ab" * 6 + "cd" * 26}],
)
def test_another_recipe_is_another_file(other: dict[str, Any], folder: Path) -> None:
    store = built(folder)
    theirs = TextStore(store.shards, Recipe(**{**vars(RECIPE), **other}))
    assert {reason.partition(" (")[0] for *_, reason in theirs.faults()} == {"is missing"}
    assert all(
        "is of another text encoder, length, caption" in reason for *_, reason in theirs.faults()
    )
    theirs.build(LetterEncoder, progress=False)
    assert list(store.faults()) == list(theirs.faults()) == []  # both are kept


def test_what_does_not_read_back_is_no_success(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def careless(path: Path, arrays: dict[str, np.ndarray], facts: dict[str, str]) -> None:
        save_file({**arrays, "crc32": arrays["crc32"] + 1}, path, facts)

    monkeypatch.setattr(module, "write_tensors_atomically", careless)
    with pytest.raises(JobError, match="does not read back the same"):
        built(folder)
    assert not list(folder.glob("*.text-*"))


WORKER = """
import sys, time
sys.path.insert(0, ".")
from pathlib import Path
import tests.text.test_store as t
class Slow(t.LetterEncoder):
    def encode_ragged(self, captions, progress=None):
        time.sleep(float(sys.argv[2]))
        return super().encode_ragged(captions, progress)
print(t.TextStore(t.opened(Path(sys.argv[1])), t.RECIPE).build(Slow, progress=False))
"""


def test_processes_share_the_work_and_take_over_from_the_dead(folder: Path) -> None:
    """Each shard is encoded once, by one of them; the one that is killed in its work leaves it to
    the others.
    """
    opened(folder)
    command = [sys.executable, "-W", "error", "-c", WORKER, str(folder)]
    with leaving_nothing(folder) as start:
        slow = start([*command, "600"])
        until(lambda: list(folder.glob(".0.*.lock")), "a try_lock")
        others = [start([*command, "0.2"]) for _ in range(2)]
        until(lambda: len(list(folder.glob("[12].text-*"))) == 2, "the other shards")
        slow.kill()
        slow.wait(WAIT)
        written = [int(other.communicate(timeout=WAIT)[0]) for other in others]
    assert sum(written) == 3
    assert list(TextStore(opened(folder), RECIPE).faults()) == []
    assert not list(folder.glob(".*"))


def test_needs_no_mindspore() -> None:
    code = "import sys, pipeline.text.caption_embeddings; sys.exit('mindspore' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
