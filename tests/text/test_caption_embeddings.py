"""The text of a batch: stored or encoded now, the same; each sample's caption drawn by weight; no
bad store used.
"""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import build
from pipeline.data.shards import DataConfig, Shards
from pipeline.errors import UserError
from pipeline.text.caption_embeddings import (
    LiveText,
    StoredText,
    choose,
    load_encoder,
    open_text,
    recipe,
)
from pipeline.text.encoder import TextConfig
from pipeline.text.store import TextStore
from tests.helpers.tars import sample, tar

LENGTH, NUM = 12, 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    members = []
    for number in range(NUM):
        alts = [f"a small blue square {k}" for k in range(number % 3)]
        meta = json.dumps({"alt": alts, "title": f"Large RED circle {number}"}).encode()
        members += sample(
            f"{number}", txt=f"a large red circle on white {number}".encode(), json=meta
        )
    (tmp_path / "0.tar").write_bytes(tar(members))
    return tmp_path


def opened(folder: Path, **options: Any) -> Shards:
    return Shards.open(build(DataConfig, {"shards": f"{folder}/*.tar", **options}), progress=False)


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("captions", [{"txt": 1}, {"txt": 1, "alt": 2, "title": 0.5}])
def test_live_text_is_stored_text(
    captions: dict[str, float], clean: bool, folder: Path, t5_folder: Path
) -> None:
    config = build(
        TextConfig, {"encoder": str(t5_folder), "width": 16, "length": LENGTH, "clean": clean}
    )
    shards = opened(folder, captions=captions)
    live = open_text(config, shards)
    assert isinstance(live, LiveText)
    assert TextStore(shards, recipe(config)).build(
        partial(load_encoder, config), progress=False
    ) == len(captions)
    stored = open_text(config, shards)
    assert isinstance(stored, StoredText)
    assert stored.recipe == live.recipe
    for numbers in ([0], [3, 1, 3], list(range(NUM))):
        text, mask = live.embed(numbers, 0, 5, range(len(numbers)))
        assert text.shape == (len(numbers), LENGTH, 16)
        assert mask.any(axis=1).all()
        for a, b in zip(
            (text, mask), stored.embed(numbers, 0, 5, range(len(numbers))), strict=True
        ):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


def test_without_a_store_a_word_of_warning(
    folder: Path, t5_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "cascade"):
        open_text(TextConfig(encoder=str(t5_folder), width=16, length=LENGTH), opened(folder))
    assert (
        "captions are encoded while training, which slows it; run `cascade cache-text CONFIG`"
        in caplog.text
    )


def test_captions_are_drawn_by_weight(folder: Path) -> None:
    """Among the fields that a sample has; and evenly within a field."""
    shards = opened(folder, captions={"txt": 1, "alt": 3})
    for number in range(3):
        found = [choose(shards, number, 0, step, 7) for step in range(2000)]
        assert {place[:2] for place in found} == {(0, number)}
        share = np.mean([place[2] == "alt" for place in found])
        assert share == pytest.approx(0.75 if number else 0, abs=0.05)
        if number == 2:
            assert np.mean([place[3] for place in found if place[2] == "alt"]) == pytest.approx(
                0.5, abs=0.06
            )
    only = opened(folder, captions={"absent": 9, "title": 1})
    assert choose(only, 4, 0, 0, 0) == (0, 4, "title", 0)


def test_a_partial_store_is_refused(folder: Path, t5_folder: Path) -> None:
    config = TextConfig(encoder=str(t5_folder), width=16, length=LENGTH)
    (folder / "1.tar").write_bytes((folder / "0.tar").read_bytes())
    one = Shards.open(build(DataConfig, {"shards": f"{folder}/0.tar"}), progress=False)
    TextStore(one, recipe(config)).build(partial(load_encoder, config), progress=False)
    with pytest.raises(
        UserError, match=r"1\.text-.* is missing; run `python -m tools\.cache_text CONFIG`"
    ):
        open_text(config, opened(folder))


@pytest.mark.parametrize(
    ("text", "data"), [({"length": 9}, {}), ({"clean": True}, {}), ({}, {"captions": {"title": 1}})]
)
def test_a_stale_store_is_refused(
    text: dict[str, Any], data: dict[str, Any], folder: Path, t5_folder: Path
) -> None:
    raw = {"encoder": str(t5_folder), "width": 16, "length": LENGTH}
    config = build(TextConfig, raw)
    TextStore(opened(folder), recipe(config)).build(partial(load_encoder, config), progress=False)
    with pytest.raises(
        UserError, match="is of another text encoder, length, caption field or cleaning"
    ):
        open_text(build(TextConfig, raw | text), opened(folder, **data))


def test_another_width_than_the_encoders(folder: Path, t5_folder: Path) -> None:
    with pytest.raises(UserError, match=r"text\.width: 17, but the encoder in .* has 16; set that"):
        open_text(TextConfig(encoder=str(t5_folder), width=17), opened(folder))
