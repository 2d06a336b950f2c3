"""Stored embeddings: reading gives the encoder's outputs, or is refused."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from launch.cli.main import dispatch
from pipeline.config import build
from pipeline.data.config import DataConfig
from pipeline.data.shards import Shards
from pipeline.errors import JobError, UserError
from pipeline.text import store as module
from pipeline.text.store import Recipe, TextStore
from tests.conftest import stage_yaml
from tests.helpers.jobs import WAIT, leaving_nothing, until
from tests.helpers.tars import sample, tar

WIDTH = 5
RECIPE = Recipe(encoder="ab" * 32, width=WIDTH, length=6, clean=False)
CAPTIONS = [("abc", "d", "efghij"), ("k", "xyz", "a b", "A b"), ("solo",)]


class LetterEncoder:
    """One token a letter; records its inputs."""

    def __init__(self) -> None:
        self.inputs: list[str] = []

    def encode_ragged(
        self, captions: Sequence[str], progress: Callable[[int], object] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        self.inputs += captions
        rows = [embedding(caption) for caption in captions]
        lengths = np.array([len(row) for row in rows], np.int64)
        return np.concatenate([np.zeros((0, WIDTH), np.float16), *rows]), lengths


def embedding(caption: str) -> np.ndarray:
    rows = [
        np.random.default_rng([ord(letter), position]).standard_normal(WIDTH)
        for position, letter in enumerate(caption)
    ]
    return np.array(rows[: RECIPE.length], np.float16).reshape(-1, WIDTH)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard, captions in enumerate(CAPTIONS):
        members = []
        for row, caption in enumerate(captions):
            meta = b'{"alt": ["%d", "", "other"]}' % row
            members += sample(f"{shard}{row}", txt=caption.encode(), json=meta)
        (tmp_path / f"{shard}.tar").write_bytes(tar(members))
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
    for shard, captions in enumerate(CAPTIONS):
        for row, caption in enumerate(captions):
            result = store.read(shard, row, "txt", 0)
            np.testing.assert_array_equal(result, embedding(caption))
            assert result.dtype == np.float16


def test_several_captions_a_sample(folder: Path) -> None:
    """A list in a field of KEY.json is several captions; empty ones do not count."""
    store = built(folder, captions={"alt": 1, "txt": 1})
    for row in range(4):
        np.testing.assert_array_equal(store.read(1, row, "alt", 0), embedding(str(row)))
        np.testing.assert_array_equal(store.read(1, row, "alt", 1), embedding("other"))
        np.testing.assert_array_equal(store.read(1, row, "txt", 0), embedding(CAPTIONS[1][row]))
    assert store.path(0, "alt") != store.path(0, "txt")


def test_captions_are_cleaned_if_the_recipe_says_so(folder: Path) -> None:
    store = built(folder, recipe=Recipe(encoder="ab" * 32, width=WIDTH, length=6, clean=True))
    np.testing.assert_array_equal(store.read(1, 3, "txt", 0), embedding("a b"))


def test_files_contain_no_padding(folder: Path) -> None:
    store = built(folder)
    arrays = load_file(store.path(0, "txt"))
    assert arrays["embeddings"].shape == (10, WIDTH)
    assert arrays["embeddings"].dtype == np.float16
    assert arrays["offsets"].tolist() == [0, 3, 4, 10]


def test_build_writes_missing_files_only(folder: Path) -> None:
    encoder = LetterEncoder()
    store = built(folder, encoder)
    store.path(1, "txt").unlink()
    encoder.inputs.clear()
    assert store.build(lambda: encoder, progress=False) == 1
    assert encoder.inputs == list(CAPTIONS[1])
    assert store.build(lambda: pytest.fail("the encoder was loaded"), progress=False) == 0
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_only_samples_that_pass_the_filters_are_encoded(folder: Path) -> None:
    encoder = LetterEncoder()
    store = built(folder, encoder, filter={"max_caption": 1})
    assert encoder.inputs == ["d", "k"]
    assert store.read(1, 0, "txt", 0).shape == (1, WIDTH)
    wider = TextStore(opened(folder), RECIPE)
    assert {reason for *_, reason in wider.faults()} == {
        "lacks samples that pass the present filters"
    }
    assert wider.build(LetterEncoder, progress=False) == 3
    assert list(store.faults()) == []  # it has the samples of narrower filters too


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def change(**arrays: np.ndarray) -> Callable[[Path], None]:
    """Complete and of the right recipe, but with other arrays."""

    def spoil(path: Path) -> None:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata()
        save_file({**load_file(path), **arrays}, path, metadata)

    return spoil


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "is missing"),
    "truncated": (truncate, "is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "no metadata": (lambda path: save_file(load_file(path), path), "was made with another recipe"),
    "an offset short": (change(offsets=np.arange(4)), "sizes of its arrays do not match"),
    "another width": (
        change(embeddings=np.zeros((8, 4), np.float16)),
        "sizes of its arrays do not match",
    ),
    "other tensors": (lambda path: save_file({"a": np.zeros(1)}, path), "is damaged"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_unusable_files_are_reported_and_rebuilt(kind: str, folder: Path) -> None:
    spoil, message = FAULTS[kind]
    store = built(folder)
    spoil(store.path(1, "txt"))
    ((path, shard, field, reason),) = store.faults()
    assert (path, shard, field) == (store.path(1, "txt"), 1, "txt")
    assert message in reason
    assert store.build(LetterEncoder, progress=False) == 1
    assert list(store.faults()) == []


def test_a_flipped_bit_is_refused_when_it_is_read(folder: Path) -> None:
    store = built(folder)
    path = store.path(0, "txt")
    embeddings = load_file(path)["embeddings"].copy()
    embeddings.view(np.uint16)[5, 2] ^= 1
    change(embeddings=embeddings)(path)
    assert list(store.faults()) == []
    assert len(store.read(0, 0, "txt", 0)) == 3
    with pytest.raises(
        UserError,
        match=r"is damaged \(caption 0 of sample 2 .*remove it and run `cascade cache-text",
    ):
        store.read(0, 2, "txt", 0)


def test_embeddings_of_other_captions_are_refused(folder: Path) -> None:
    built(folder)
    (folder / "2.tar").write_bytes(tar(sample("20", txt=b"sola")))
    (folder / "2.index.safetensors").unlink()
    ((*_, reason),) = TextStore(opened(folder), RECIPE).faults()
    assert reason == "was made from other captions than the shard's"


@pytest.mark.parametrize(
    "other",
    [{"encoder": "cd" * 32}, {"length": 7}, {"clean": True}, {"encoder": "ab" * 6 + "cd" * 26}],
)
def test_another_recipe_has_another_file(other: dict[str, Any], folder: Path) -> None:
    store = built(folder)
    second = TextStore(store.shards, Recipe(**{**vars(RECIPE), **other}))
    assert {reason.partition(" (")[0] for *_, reason in second.faults()} == {"is missing"}
    assert all(
        "is of another text encoder, length, caption" in reason for *_, reason in second.faults()
    )
    second.build(LetterEncoder, progress=False)
    assert list(store.faults()) == list(second.faults()) == []  # both exist


def test_a_disk_that_returns_other_values_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corrupt(path: Path, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
        save_file({**arrays, "crc32": arrays["crc32"] + 1}, path, metadata)

    monkeypatch.setattr(module, "write_tensors_atomically", corrupt)
    with pytest.raises(JobError, match="reading it back gives other values"):
        built(folder)
    assert not list(folder.glob("*.text-*"))


# Folder, and seconds that each shard takes.
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


def test_processes_share_the_shards_and_take_over_from_a_killed_one(folder: Path) -> None:
    """Each shard is encoded once; that of the killed process by another."""
    opened(folder)
    command = [sys.executable, "-W", "error", "-c", WORKER, str(folder)]
    with leaving_nothing(folder) as start:
        slow = start([*command, "600"])
        until(lambda: list(folder.glob(".0.*.lock")), "a lock")
        others = [start([*command, "0.2"]) for _ in range(2)]
        until(lambda: len(list(folder.glob("[12].text-*"))) == 2, "the other shards")
        slow.kill()
        slow.wait(WAIT)
        written = [int(other.communicate(timeout=WAIT)[0]) for other in others]
    assert sum(written) == 3
    assert list(TextStore(opened(folder), RECIPE).faults()) == []
    assert not list(folder.glob(".*"))


def test_stored_embeddings_need_neither_mindspore_nor_transformers() -> None:
    code = (
        "import sys, pipeline.text.caption_embeddings; "
        "sys.exit('mindspore' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_held_out_for_validation_is_stored_too(folder: Path) -> None:
    """Training and validation read the same files."""
    data = build(DataConfig, {"shards": f"{folder}/*.tar", "validation": 0.5})
    training = Shards.open(data, progress=False)
    validation = training.open_validation()
    assert validation is not None
    assert 0 < len(training) < 8

    TextStore(training, RECIPE).build(LetterEncoder, progress=False)
    store = TextStore(validation, RECIPE)
    assert not store.faults()
    for i in range(len(validation)):
        shard, row = validation.location(i)
        expected = embedding(RECIPE.text(CAPTIONS[shard][row]))
        np.testing.assert_array_equal(store.read(shard, row, "txt", 0), expected)


def test_the_command_encodes_tars_for_validation_too(
    shards_folder: Path, t5_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("training", "validation"):
        (tmp_path / name).mkdir()
        shutil.copy(shards_folder / "00000.tar", tmp_path / name)
    raw = stage_yaml("base", tmp_path / "run", tmp_path / "training", t5_folder)
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(raw))
    pattern = f"data.validation={tmp_path}/validation/*.tar"

    for num_written in (1, 0):
        assert dispatch(["cache-text", f"{tmp_path}/stage.yaml", pattern]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 2
        for line in lines:
            assert line.startswith("12 samples in 1 shards: 1 files checked, ")
            assert f" {num_written} of them written now" in line
