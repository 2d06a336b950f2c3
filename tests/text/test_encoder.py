"""Captions to embeddings, with a tiny T5."""

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.errors import UserError
from pipeline.text.encoder import TextEncoder, calls, padded_lengths
from tools import tiny_t5

CAPTIONS = [
    f"a {size} {colour} circle on white"
    for size in ("small", "large")
    for colour in ("red", "green", "blue")
]
LENGTH = 12


@pytest.fixture(scope="module")
def folder(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("text") / "t5"
    tiny_t5.make(out, sorted(shards_folder.glob("*.tar")), width=32)
    return out


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return TextEncoder.load(folder, folder, LENGTH)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_shapes_and_padding(encoder: TextEncoder) -> None:
    text_NLD, mask_NL = encoder.encode(["a small red circle on white", ""])
    assert text_NLD.shape == (2, LENGTH, encoder.width) == (2, LENGTH, 32)
    assert text_NLD.dtype == np.float32
    assert mask_NL.dtype == bool
    assert mask_NL.sum(1).tolist() == [7, 1]  # words and the end token; the end token alone
    assert (text_NLD[~mask_NL] == 0).all()
    assert 0.9 < text_NLD[mask_NL].std() < 1.1
    assert [array.shape for array in encoder.encode([])] == [(0, LENGTH, 32), (0, LENGTH)]


def test_values_are_exact_in_half_precision(encoder: TextEncoder) -> None:
    text_NLD, _ = encoder.encode(CAPTIONS)
    np.testing.assert_array_equal(text_NLD, text_NLD.astype(np.float16))


def test_values_beyond_half_precision_are_clipped(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["encoder.final_layer_norm.weight"] *= 1e6
    save_file(weights, copy / "model.safetensors")
    text_NLD, _ = TextEncoder.load(copy, copy, LENGTH).encode(CAPTIONS[:1])
    assert np.abs(text_NLD).max() == np.finfo(np.float16).max


def test_a_caption_has_the_same_embeddings_alone_and_in_a_batch(encoder: TextEncoder) -> None:
    captions = [CAPTIONS[i % len(CAPTIONS)] + " and blue" * (i % 4) for i in range(150)]
    finished: list[int] = []
    text_NLD, mask_NL = encoder.encode(captions, progress=finished.append)
    assert sorted(set(mask_NL.sum(1))) == [7, 11, 12]
    # 7 tokens in calls of 64 captions, 11 and 12 tokens in calls of 42.
    assert finished == [38, 42, 42, 28]
    for row in (0, 1, 2, 3, 62, 148, 149):
        alone_NLD, alone_NL = encoder.encode([captions[row]])
        np.testing.assert_array_equal(alone_NLD[0], text_NLD[row])
        np.testing.assert_array_equal(alone_NL[0], mask_NL[row])


def test_the_amount_of_padding_changes_values_by_rounding_alone(encoder: TextEncoder) -> None:
    captions = ["", "a circle", *CAPTIONS]
    text_NLD, mask_NL = encoder.encode(captions)
    full_NLD = encoder.encoder(*encoder.tokenize(captions))  # all padded to the full length
    np.testing.assert_allclose(text_NLD[mask_NL], full_NLD[mask_NL], rtol=1e-3, atol=1e-4)


def test_encode_ragged_is_encode_without_padding(encoder: TextEncoder) -> None:
    captions = ["a circle", "", CAPTIONS[0], "a large blue cross on black " * 3]
    rows_TD, counts_N = encoder.encode_ragged(captions)
    text_NLD, mask_NL = encoder.encode(captions)
    assert (rows_TD.dtype, counts_N.dtype) == (np.float16, np.int64)
    np.testing.assert_array_equal(counts_N, mask_NL.sum(1))
    np.testing.assert_array_equal(rows_TD, text_NLD[mask_NL])
    assert [array.shape for array in encoder.encode_ragged([])] == [(0, 32), (0,)]


@pytest.mark.parametrize("length", [1, 12, 100, 128, 1000])
def test_calls_have_every_caption_once_in_few_shapes(length: int) -> None:
    counts_N = np.random.default_rng(0).integers(1, length + 1, 5000)
    result = list(calls(counts_N, length))
    assert sorted(np.concatenate([call.members for call in result])) == list(range(5000))
    for call in result:
        counts = counts_N[call.members]
        assert len(call.members) <= call.batch
        assert counts.max() <= call.length <= length
        assert call.batch == 1 or call.batch * call.length <= 512
        assert (padded_lengths(counts, length) == call.length).all()
    assert len({(call.batch, call.length) for call in result}) <= 4 + length / 16


def test_different_words_give_different_embeddings(encoder: TextEncoder) -> None:
    text_NLD, mask_NL = encoder.encode(CAPTIONS)
    colour_ND = text_NLD[:, 2] / np.linalg.norm(text_NLD[:, 2], axis=-1, keepdims=True)
    cosine_NN = colour_ND @ colour_ND.T  # red green blue red green blue
    assert mask_NL.sum(1).tolist() == [7] * 6
    for i in range(3):
        assert cosine_NN[i, i + 3] > 0.9  # the same colour, another size
        assert cosine_NN[i, (i + 1) % 3] < 0.7  # another colour


def test_truncated_captions_keep_the_end_token_and_are_reported(
    encoder: TextEncoder, caplog: pytest.LogCaptureFixture
) -> None:
    long = "a small red circle on white " * 3
    before = encoder.num_truncated
    with caplog.at_level(logging.WARNING, "cascade"):
        ids_NL, mask_NL = encoder.tokenize(["a circle", long, long + "a"])
    assert encoder.num_truncated - before == 2
    (record,) = caplog.records
    assert "2 of 3 captions" in record.message
    assert f"more than {LENGTH} tokens" in record.message
    assert "the first has 19: 'a small red circle" in record.message
    assert mask_NL[1].all()
    assert ids_NL[1, -1] == encoder.tokenizer.eos_token_id
    np.testing.assert_array_equal(
        ids_NL[1, :-1], encoder.tokenizer(long)["input_ids"][: LENGTH - 1]
    )


def test_tokens_equal_those_of_transformers(encoder: TextEncoder, folder: Path) -> None:
    from transformers import AutoTokenizer

    captions = [
        *CAPTIONS,
        "",
        "  two  spaces ",
        "Ünïcödé 漢字 ①",
        "<pad> in a caption",
        "a\nline",
        "circle " * 20,
    ]
    expected = AutoTokenizer.from_pretrained(folder, local_files_only=True)(
        captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="np"
    )
    ids_NL, mask_NL = encoder.tokenize(captions)
    np.testing.assert_array_equal(ids_NL, expected["input_ids"])
    np.testing.assert_array_equal(mask_NL, expected["attention_mask"])


def test_a_caption_with_an_end_token_gets_no_second_one(encoder: TextEncoder) -> None:
    # A warning of `transformers` would be an error here.
    ids_NL, mask_NL = encoder.tokenize(["a circle </s>", "a circle"])
    assert (ids_NL[0] == 1).sum() == 1
    assert mask_NL[0, mask_NL[0].sum() - 1]


def test_invalid_folders_are_named_in_the_error(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="length is 0"):
        TextEncoder.load(copy, copy, 0)
    with pytest.raises(UserError, match=r"absent.*spiece\.model: no such file; give"):
        TextEncoder.load(copy, tmp_path / "absent", LENGTH)
    with pytest.raises(UserError, match=r"absent.*config\.json: not readable"):
        TextEncoder.load(tmp_path / "absent", copy, LENGTH)

    captions = tmp_path / "captions.txt"
    captions.write_text(" ".join(chr(0x4E00 + i) for i in range(200)), encoding="utf-8")
    tiny_t5.make(tmp_path / "other", [captions], width=32, vocab=500)
    with pytest.raises(UserError, match="give the tokenizer of the same model"):
        TextEncoder.load(copy, tmp_path / "other", LENGTH)

    (copy / "spiece.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"spiece\.model: not a T5 tokenizer"):
        TextEncoder.load(copy, copy, LENGTH)


def test_a_token_that_the_encoder_lacks_is_named_in_the_error(copy: Path) -> None:
    (copy / "tokenizer_config.json").unlink()  # without it `transformers` adds 100 tokens
    encoder = TextEncoder.load(copy, copy, LENGTH)
    with pytest.raises(UserError, match="caption 'a <extra_id_0>': token"):
        encoder.encode(["a circle", "a <extra_id_0>"])
