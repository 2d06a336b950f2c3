"""The fingerprint of a T5: equal for equal content in any layout, and different for any other
content.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.errors import UserError
from pipeline.text.fingerprint import CACHE_FILE, fingerprint


@pytest.fixture
def folder(t5_folder: Path, tmp_path: Path) -> Path:
    return Path(
        shutil.copytree(t5_folder, tmp_path / "t5", ignore=shutil.ignore_patterns(CACHE_FILE))
    )


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return apply


def shards(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"part-{i % 3}.safetensors" for i, name in enumerate(weights)}
    for file in set(weight_map.values()):
        save_file(
            {name: weights[name] for name in weights if weight_map[name] == file}, folder / file
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def links(folder: Path) -> None:
    blobs = folder.with_name("blobs")
    folder.rename(blobs)
    folder.mkdir()
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(path)


def written_by_transformers(folder: Path) -> None:
    from transformers import T5Tokenizer

    T5Tokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(folder)


SAME = {
    "a copy": lambda folder: None,
    "links": links,
    "shards": shards,
    "an additional decoder": rewrite(
        lambda weights: weights.update({"decoder.final_layer_norm.weight": np.ones(16)})
    ),
    "the embedding's other name": rewrite(
        lambda weights: weights.update(
            {"encoder.embed_tokens.weight": weights.pop("shared.weight")}
        )
    ),
    "fields of the decoder": lambda folder: edit(
        folder / "config.json", num_decoder_layers=2, dropout_rate=0.1
    ),
    "JSON of another program": written_by_transformers,
}


@pytest.mark.parametrize("change", SAME)
def test_equal_content_has_an_equal_fingerprint(change: str, folder: Path, t5_folder: Path) -> None:
    SAME[change](folder)
    assert fingerprint(folder, folder) == fingerprint(t5_folder, t5_folder)


def flip(name: str, offset: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[offset] ^= 1
        (folder / name).write_bytes(content)

    return apply


def half(weights: dict[str, np.ndarray]) -> None:
    weights.update({name: array.astype(np.float16) for name, array in weights.items()})


OTHER = {
    "the last byte of the weights": flip("model.safetensors", -1),
    "the embedding": rewrite(lambda weights: weights["shared.weight"].__setitem__((7, 7), 1)),
    "half precision": rewrite(half),
    "the norm's epsilon": lambda folder: edit(folder / "config.json", layer_norm_epsilon=1e-5),
    "an added token": lambda folder: (folder / "added_tokens.json").write_text('{"circle": 64}'),
    "another end token": lambda folder: edit(folder / "special_tokens_map.json", eos_token="<pad>"),
    "sentinels": lambda folder: edit(folder / "tokenizer_config.json", extra_ids=3),
    "legacy": lambda folder: edit(folder / "tokenizer_config.json", legacy=False),
}


@pytest.mark.parametrize("change", OTHER)
def test_other_content_has_another_fingerprint(change: str, folder: Path, t5_folder: Path) -> None:
    OTHER[change](folder)
    assert fingerprint(folder, folder) != fingerprint(t5_folder, t5_folder)


def set_age(folder: Path, seconds: float = 60) -> None:
    """Sets the modification time of all files."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - seconds,) * 2)


def test_the_fingerprint_is_cached_until_a_file_changes(folder: Path) -> None:
    set_age(folder)
    first = fingerprint(folder, folder)

    # Another content with the same size and date is not noticed: nothing was read.
    weights = folder / "model.safetensors"
    modified = weights.stat().st_mtime_ns
    flip("model.safetensors", -1)(folder)
    os.utime(weights, ns=(modified, modified))
    assert fingerprint(folder, folder) == first

    os.utime(weights)
    assert fingerprint(folder, folder) != first
    flip("model.safetensors", -1)(folder)
    assert fingerprint(folder, folder) == first


def test_the_fingerprint_of_recent_files_is_not_cached(folder: Path) -> None:
    set_age(folder, seconds=0)
    fingerprint(folder, folder)
    assert not (folder / CACHE_FILE).exists()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 1, "files": {}, "fingerprint": "ab"}']
)
def test_a_damaged_cache_is_replaced(content: str, folder: Path, t5_folder: Path) -> None:
    set_age(folder)
    (folder / CACHE_FILE).write_text(content)
    assert fingerprint(folder, folder) == fingerprint(t5_folder, t5_folder)
    assert json.loads((folder / CACHE_FILE).read_text())["fingerprint"] == fingerprint(
        folder, folder
    )


def test_a_cache_that_cannot_be_written_is_no_error(folder: Path) -> None:
    set_age(folder)
    (folder / CACHE_FILE).mkdir()
    assert len(fingerprint(folder, folder)) == 64


def test_invalid_folders_are_named_in_the_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.*config\.json: not readable"):
        fingerprint(tmp_path / "absent", folder)
    with pytest.raises(UserError, match=r"absent.*spiece\.model: no such file"):
        fingerprint(folder, tmp_path / "absent")


def test_a_fingerprint_needs_no_mindspore(folder: Path) -> None:
    code = (
        "import sys; from pipeline.text.fingerprint import fingerprint; "
        f"print(fingerprint({str(folder)!r}, {str(folder)!r})); "
        "sys.exit('mindspore' in sys.modules)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (process.returncode, process.stdout.strip()) == (0, fingerprint(folder, folder))
