"""The text of a batch: stored or encoded now, the same arrays; each sample's caption drawn by
weight; stores that do not fit refused.
"""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.config import build
from pipeline.data.config import DataConfig
from pipeline.data.shards import Shards
from pipeline.errors import UserError
from pipeline.text.caption_embeddings import (
    CaptionChoice,
    LiveText,
    StoredText,
    choose_caption,
    load_encoder,
    open_caption_embeddings,
    recipe,
)
from pipeline.text.encoder import TextConfig, TextEncoder
from pipeline.text.prompts import PROMPT_INPUTS
from pipeline.text.store import TextStore
from tests.helpers.tars import sample, tar

LENGTH = 12  # tokens per caption
NUM_SAMPLES = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One tar whose sample i has a caption, a title and i % 3 alternative texts."""
    members = []
    for i in range(NUM_SAMPLES):
        alts = [f"a small blue square {k}" for k in range(i % 3)]
        meta = json.dumps({"alt": alts, "title": f"Large RED circle {i}"}).encode()
        members += sample(f"{i}", txt=f"a large red circle on white {i}".encode(), json=meta)
    (tmp_path / "0.tar").write_bytes(tar(members))
    return tmp_path


def open_shards(folder: Path, **options: Any) -> Shards:
    return Shards.open(build(DataConfig, {"shards": f"{folder}/*.tar", **options}), progress=False)


def text_config(encoder: Path, **options: Any) -> TextConfig:
    raw = {"encoder": str(encoder), "width": 16, "length": LENGTH}
    return build(TextConfig, raw | options)


@pytest.fixture(scope="module")
def encoder(t5_folder: Path) -> TextEncoder:
    """One for all tests: it compiles each shape once."""
    return load_encoder(text_config(t5_folder))


def build_store(config: TextConfig, shards: Shards, encoder: TextEncoder) -> int:
    """Encodes all captions; how many files it wrote."""
    return TextStore(shards, recipe(config)).build(lambda: encoder, progress=False)


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("captions", [{"txt": 1}, {"txt": 1, "alt": 2, "title": 0.5}])
def test_live_text_equals_stored_text(
    captions: dict[str, float], clean: bool, folder: Path, t5_folder: Path, encoder: TextEncoder
) -> None:
    config = text_config(t5_folder, clean=clean)
    shards = open_shards(folder, captions=captions)
    (opened,) = open_caption_embeddings(config, [shards])
    assert isinstance(opened, LiveText)
    assert not opened.threadsafe
    live = LiveText(shards, opened.recipe, encoder)

    assert build_store(config, shards, encoder) == len(captions)
    (stored,) = open_caption_embeddings(config, [shards])
    assert isinstance(stored, StoredText)
    assert stored.threadsafe
    assert stored.recipe == live.recipe
    assert stored.manifest_fields == live.manifest_fields

    for sample_ids in ([0], [3, 1, 3], list(range(NUM_SAMPLES))):
        positions = range(len(sample_ids))
        encoded = live.embed(sample_ids, 0, 5, positions)
        read = stored.embed(sample_ids, 0, 5, positions)
        assert tuple(encoded) == tuple(read) == PROMPT_INPUTS["text"]
        assert encoded["text"].shape == (len(sample_ids), LENGTH, 16)
        assert encoded["text_mask"].any(axis=1).all()
        for name in encoded:
            np.testing.assert_array_equal(encoded[name], read[name])
            assert encoded[name].dtype == read[name].dtype


def test_encoding_during_training_is_warned_of(
    folder: Path, t5_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "cascade"):
        open_caption_embeddings(text_config(t5_folder), [open_shards(folder)])
    assert (
        "no stored embeddings: captions are encoded during training, which slows it down; run "
        "`cascade cache-text CONFIG` to encode them ahead" in caplog.text
    )


def test_captions_are_drawn_by_weight(folder: Path) -> None:
    """Among the fields that a sample has; and evenly within a field."""
    shards = open_shards(folder, captions={"txt": 1, "alt": 3})
    for row in range(3):
        choices = [
            choose_caption(shards, row, seed=0, step=step, position=7) for step in range(2000)
        ]
        assert {(choice.shard, choice.row) for choice in choices} == {(0, row)}

        alts = [choice.caption for choice in choices if choice.field == "alt"]
        assert len(alts) / len(choices) == pytest.approx(0.75 if row else 0, abs=0.05)
        if row == 2:  # the sample with two of them
            assert np.mean(alts) == pytest.approx(0.5, abs=0.06)


def test_only_fields_that_the_sample_has_are_drawn(folder: Path) -> None:
    shards = open_shards(folder, captions={"absent": 9, "title": 1})
    choice = choose_caption(shards, 4, seed=0, step=0, position=0)
    assert choice == CaptionChoice(shard=0, row=4, field="title", caption=0)


def test_a_partial_store_is_refused(folder: Path, t5_folder: Path, encoder: TextEncoder) -> None:
    config = text_config(t5_folder)
    (folder / "1.tar").write_bytes((folder / "0.tar").read_bytes())
    first_shard = Shards.open(build(DataConfig, {"shards": f"{folder}/0.tar"}), progress=False)
    build_store(config, first_shard, encoder)
    with pytest.raises(UserError, match=r"1\.text-.* is missing; run `cascade cache-text CONFIG`$"):
        open_caption_embeddings(config, [open_shards(folder)])


def test_data_sets_are_stored_all_or_none(
    folder: Path, t5_folder: Path, encoder: TextEncoder
) -> None:
    """Else an encoder of many gigabytes would be loaded for a few samples of validation."""
    config = text_config(t5_folder)
    (folder / "1.tar").write_bytes((folder / "0.tar").read_bytes())
    training, validation = (
        Shards.open(build(DataConfig, {"shards": f"{folder}/{name}.tar"}), progress=False)
        for name in "01"
    )
    live = open_caption_embeddings(config, [training, validation])
    assert [type(text) for text in live] == [LiveText, LiveText]

    build_store(config, training, encoder)
    with pytest.raises(UserError, match=r"1\.text-.* is missing; run `cascade cache-text CONFIG`$"):
        open_caption_embeddings(config, [training, validation])

    build_store(config, validation, encoder)
    stored = open_caption_embeddings(config, [training, validation])
    assert [type(text) for text in stored] == [StoredText, StoredText]


@pytest.mark.parametrize(
    ("text", "data"), [({"length": 9}, {}), ({"clean": True}, {}), ({}, {"captions": {"title": 1}})]
)
def test_a_stale_store_is_refused(
    text: dict[str, Any],
    data: dict[str, Any],
    folder: Path,
    t5_folder: Path,
    encoder: TextEncoder,
) -> None:
    build_store(text_config(t5_folder), open_shards(folder), encoder)
    with pytest.raises(
        UserError, match="is of another text encoder, length, caption field or cleaning"
    ):
        open_caption_embeddings(text_config(t5_folder, **text), [open_shards(folder, **data)])


def test_another_width_than_the_encoders_is_refused(folder: Path, t5_folder: Path) -> None:
    with pytest.raises(UserError, match=r"text\.width: 17, but the encoder in .* has 16; set that"):
        open_caption_embeddings(text_config(t5_folder, width=17), [open_shards(folder)])
