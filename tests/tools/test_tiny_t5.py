"""The tiny T5 that the demo and the tests use."""

import hashlib
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.errors import UserError
from tests.helpers.tools import run_tool
from tools import tiny_t5

LINES = [
    f"a {size} {colour} circle"
    for size in ("small", "large")
    for colour in ("red", "green", "blue")
]


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    path = tmp_path / "captions.txt"
    path.write_text("\n".join([*LINES, "", "a café"]), encoding="utf-8")
    return path


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_same_arguments_give_the_same_bytes(captions: Path, tmp_path: Path) -> None:
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        tiny_t5.make(tmp_path / name, [captions], width=16, heads=2, seed=seed)

    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert a == b
    assert set(a) == {
        *("config.json", "model.safetensors", "spiece.model"),
        *("tokenizer_config.json", "special_tokens_map.json"),
    }
    assert {name for name in a if a[name] != c[name]} == {"model.safetensors"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "captions.txt"]


def test_tokens_are_words_under_t5_conventions(captions: Path, tmp_path: Path) -> None:
    from transformers import T5Tokenizer

    tiny_t5.make(tmp_path / "t5", [captions], width=16, heads=2)
    tokenizer = T5Tokenizer.from_pretrained(tmp_path / "t5", local_files_only=True)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("a small red circle")["input_ids"])
    assert tokens == ["▁a", "▁small", "▁red", "▁circle", "</s>"]
    assert load_file(tmp_path / "t5" / "model.safetensors")["shared.weight"].shape == (
        len(tokenizer),
        16,
    )


def test_captions_come_from_tars_and_text_files(shards_folder: Path, captions: Path) -> None:
    scenes = [
        caption
        for path in sorted(shards_folder.glob("*.tar"))
        for caption in tiny_t5.read_captions(path)
    ]
    assert len(scenes) == 24
    assert all(scene.startswith("a ") for scene in scenes)
    assert list(tiny_t5.read_captions(captions)) == [*LINES, "a café"]


def test_projections_keep_the_variance(captions: Path, tmp_path: Path) -> None:
    tiny_t5.make(tmp_path / "t5", [captions], width=64)
    weights = load_file(tmp_path / "t5" / "model.safetensors")
    assert weights["shared.weight"].std() == pytest.approx(1, rel=0.1)

    values = weights["encoder.block.0.layer.0.SelfAttention.v.weight"]
    outputs = values @ np.random.default_rng(0).standard_normal((64, 500))
    assert outputs.std() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 10}, "width: 10 is not a multiple of heads, 4"),
        ({"vocab": 5}, "vocab: 5 is refused by SentencePiece .*Vocabulary size is smaller"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    captions: Path, tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        tiny_t5.make(tmp_path / "t5", [captions], **changes)
    assert not (tmp_path / "t5").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.tar", None, r"absent\.tar: captions cannot be read"),
        ("damaged.tar", b"no tar" * 1000, r"damaged\.tar: captions cannot be read"),
        ("empty.txt", b"\n\n", "captions: all files are empty"),
    ],
)
def test_files_without_captions_are_refused(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        tiny_t5.make(tmp_path / "t5", [tmp_path / name])
    assert not (tmp_path / "t5").exists()


def test_an_existing_folder_is_not_replaced(captions: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists already"):
        tiny_t5.make(tmp_path, [captions])
    assert captions.exists()


def test_the_command(captions: Path, tmp_path: Path) -> None:
    done = run_tool("tiny_t5", tmp_path / "t5", "--captions", captions, "--width", 16)
    assert (done.returncode, done.stderr) == (0, "")  # SentencePiece is silent

    again = run_tool("tiny_t5", tmp_path / "t5", "--captions", captions)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1


def test_help_does_not_import_mindspore() -> None:
    start = time.perf_counter()
    assert run_tool("tiny_t5", "--help").returncode == 0
    assert time.perf_counter() - start < 2  # about 0.2 s; MindSpore's import alone takes as long
