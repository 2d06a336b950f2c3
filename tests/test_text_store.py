"""Embeddings beside the shards: what comes back is what the encoder said, or a refusal."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.data import text_store
from pipeline.data.text_store import ShardCaptions, TextStore, build, store_path
from pipeline.errors import UserError

LENGTH, WIDTH = 6, 5


class LetterEncoder:
    """One token a letter; counts what it was asked."""

    width, length = WIDTH, LENGTH

    def __init__(self, fingerprint: str = "ab" * 32) -> None:
        self.fingerprint = fingerprint
        self.asked: list[str] = []

    def encode(
        self, captions: Sequence[str], progress: Callable[[int], object] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        self.asked += captions
        text_NLD = np.zeros((len(captions), LENGTH, WIDTH), np.float32)
        mask_NL = np.zeros((len(captions), LENGTH), bool)
        for row, caption in enumerate(captions):
            for place, letter in enumerate(caption[:LENGTH]):
                rng = np.random.default_rng([ord(letter), place])
                text_NLD[row, place] = rng.standard_normal(WIDTH).astype(np.float16)
                mask_NL[row, place] = True
        if progress is not None:
            progress(len(captions))
        return text_NLD, mask_NL


@pytest.fixture
def shards(tmp_path: Path) -> list[ShardCaptions]:
    captions = [("abc", "d", "efghij"), ("", "xyz", "", "a"), ()]
    return [
        ShardCaptions(tmp_path / f"{n:05}.tar", tuple(f"{n}{i}" for i in range(len(words))), words)
        for n, words in enumerate(captions)
    ]


@pytest.fixture
def encoder() -> LetterEncoder:
    return LetterEncoder()


@pytest.mark.parametrize("chunk", [2, 512])
def test_round_trip(
    chunk: int, shards: list[ShardCaptions], encoder: LetterEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_store, "CHUNK", chunk)
    paths = build(shards, encoder, progress=False)
    assert [path.name for path in paths] == [f"{n:05}.text-abababababab.safetensors" for n in range(3)]
    store = TextStore.open(shards, encoder.fingerprint, LENGTH)
    for n, shard in enumerate(shards):
        for row, caption in enumerate(shard.captions):
            (expected_LD,), (expected_L,) = encoder.encode([caption])
            text_LD, mask_L = store[n, row]
            np.testing.assert_array_equal(text_LD, expected_LD)
            np.testing.assert_array_equal(mask_L, expected_L)
            assert text_LD.dtype == np.float32
            assert mask_L.dtype == bool


def test_files_hold_no_padding(shards: list[ShardCaptions], encoder: LetterEncoder) -> None:
    arrays = load_file(build(shards, encoder, progress=False)[0])
    assert arrays["embeddings"].shape == (10, WIDTH)
    assert arrays["embeddings"].dtype == np.float16
    assert arrays["offsets"].tolist() == [0, 3, 4, 10]


def test_build_does_what_is_missing(shards: list[ShardCaptions], encoder: LetterEncoder, tmp_path: Path) -> None:
    build(shards[:1], encoder, progress=False)
    encoder.asked.clear()
    assert len(build(shards, encoder, progress=False)) == 2
    assert encoder.asked == list(shards[1].captions)
    encoder.asked.clear()
    assert build(shards, encoder, progress=False) == []
    assert encoder.asked == []
    assert len(list(tmp_path.iterdir())) == 3  # nothing unfinished is left


def test_an_interrupted_build_leaves_no_file(
    shards: list[ShardCaptions], encoder: LetterEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_half(arrays: dict[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(text_store, "save_file", save_half)
    with pytest.raises(OSError, match="disk full"):
        build(shards, encoder, progress=False)
    assert list(tmp_path.iterdir()) == []


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def drop_caption(path: Path) -> None:
    """Whole and of the right encoder, but one offset short."""
    arrays = load_file(path)
    with text_store.safe_open(path, "numpy") as file:
        metadata = file.metadata()
    save_file({**arrays, "offsets": arrays["offsets"][:-1]}, path, metadata)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "is missing"),
    "truncated": (truncate, "is damaged"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "no metadata": (lambda path: save_file(load_file(path), path), "another text encoder"),
    "partial": (drop_caption, "do not fit together"),
    "other tensors": (lambda path: save_file({"a": np.zeros(1)}, path), "is damaged"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_cannot_be_used_is_refused_then_mended(
    kind: str, shards: list[ShardCaptions], encoder: LetterEncoder
) -> None:
    spoil, words = FAULTS[kind]
    path = build(shards, encoder, progress=False)[1]
    spoil(path)
    with pytest.raises(UserError) as caught:
        TextStore.open(shards, encoder.fingerprint, LENGTH)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)
    assert str(caught.value).endswith("run `python -m tools.cache_text CONFIG`")
    assert build(shards, encoder, progress=False) == [path]
    TextStore.open(shards, encoder.fingerprint, LENGTH)


@pytest.mark.parametrize(
    ("keys", "captions"),
    [
        (("00", "01", "02"), ("abc", "D", "efghij")),
        (("00", "01", "3"), ("abc", "d", "efghij")),
        (("00", "01"), ("abc", "d")),
    ],
)
def test_other_captions_are_refused(
    keys: tuple[str, ...], captions: tuple[str, ...], shards: list[ShardCaptions], encoder: LetterEncoder
) -> None:
    build(shards, encoder, progress=False)
    with pytest.raises(UserError, match=r"00000\.text-.* was made from other captions"):
        TextStore.open([ShardCaptions(shards[0].path, keys, captions), *shards[1:]], encoder.fingerprint, LENGTH)


def test_another_encoder_is_refused(shards: list[ShardCaptions], encoder: LetterEncoder) -> None:
    build(shards, encoder, progress=False)
    with pytest.raises(UserError, match=r"is missing \(00000\.text-abababababab\.safetensors is of another"):
        TextStore.open(shards, "cd" * 32, LENGTH)
    with pytest.raises(UserError, match="was made by another text encoder"):
        TextStore.open(shards, "ab" * 6 + "cd" * 26, LENGTH)  # the same name
    build(shards, LetterEncoder("cd" * 32), progress=False)  # both may be kept
    TextStore.open(shards, "ab" * 32, LENGTH)
    TextStore.open(shards, "cd" * 32, LENGTH)


def test_another_length_is_refused(shards: list[ShardCaptions], encoder: LetterEncoder) -> None:
    build(shards, encoder, progress=False)
    with pytest.raises(UserError, match=f"was made with {LENGTH} tokens a caption instead of {LENGTH + 1}"):
        TextStore.open(shards, encoder.fingerprint, LENGTH + 1)


def test_the_file_is_named_after_shard_and_encoder() -> None:
    path = store_path(Path("data/laion.00007.tar"), "0123456789abcdef")
    assert path == Path("data/laion.00007.text-0123456789ab.safetensors")


def test_needs_no_mindspore() -> None:
    code = "import sys, pipeline.data.text_store; sys.exit('mindspore' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
