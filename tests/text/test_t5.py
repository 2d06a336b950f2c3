"""The T5 encoder: equal to that of `transformers` (stored references here, live in
test_parity_t5.py), and the properties of its architecture.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor, ops
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from pipeline.errors import UserError
from pipeline.text.hugging_face import as_float32
from pipeline.text.t5 import T5Encoder, buckets, gelu, rms_norm
from pipeline.text.t5_folder import T5Config, encoder_shapes, hugging_face_names

DATA = Path(__file__).parents[1] / "references"
KINDS = ("v1_0", "v1_1")


def reference(kind: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, Any]]:
    """weights, inputs and outputs, configuration"""
    path = DATA / f"t5_{kind}.safetensors"
    with safe_open(path, "numpy") as file:
        config = json.loads(file.metadata()["config"])
    arrays = load_file(path)
    weights = {name: arrays.pop(name) for name in list(arrays) if name.startswith("weights.")}
    return (
        {name.removeprefix("weights."): values for name, values in weights.items()},
        arrays,
        config,
    )


def write(folder: Path, weights: dict[str, np.ndarray], config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    weights, _, config = reference("v1_1")
    return write(tmp_path / "t5", weights, config)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> T5Encoder:
    weights, _, config = reference("v1_1")
    return T5Encoder.load(write(tmp_path_factory.mktemp("t5"), weights, config))


@pytest.fixture
def text() -> tuple[np.ndarray, np.ndarray]:
    """ids (3, 12) and mask of captions of 12, 7 and 1 tokens"""
    ids_BL = np.random.default_rng(1).integers(2, 64, (3, 12), dtype=np.int32)
    return ids_BL, np.arange(12) < np.array([[12], [7], [1]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask_type", [bool, np.int32])
def test_equals_transformers(kind: str, mask_type: type, tmp_path: Path) -> None:
    weights, arrays, config = reference(kind)
    encoder = T5Encoder.load(write(tmp_path / "t5", weights, config))
    out_BLD = encoder(arrays["ids"], arrays["mask"].astype(mask_type))
    assert out_BLD.dtype == np.float32
    # Padded tokens included.
    np.testing.assert_allclose(out_BLD, arrays["last_hidden_state"], atol=1e-4)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (32, 100), (16, 64), (8, 20)])
def test_buckets_follow_the_definition(num_buckets: int, max_distance: int) -> None:
    num_side = num_buckets // 2
    num_exact = num_buckets // 4

    def bucket(distance: int) -> int:
        first = 0 if distance <= 0 else num_side
        if abs(distance) < num_exact:
            return first + abs(distance)
        growth = math.log(abs(distance) / num_exact) / math.log(max_distance / num_exact)
        wide = num_exact + math.floor(growth * (num_side - num_exact) + 1e-9)
        return first + min(wide, num_side - 1)

    expected = [bucket(distance) for distance in range(-max_distance, max_distance + 1)]
    assert buckets(num_buckets, max_distance).tolist() == expected
    # So clamping the distance is exact.
    assert bucket(max_distance) == bucket(10 * max_distance) == num_buckets - 1


def test_rms_norm_follows_the_definition() -> None:
    x_BLD = np.random.default_rng(0).normal(1, 3, (2, 5, 24))
    gain = np.linspace(0.5, 2, 24)
    expected = x_BLD / np.sqrt((x_BLD**2).mean(-1, keepdims=True) + 1e-6) * gain
    out = rms_norm(Tensor(x_BLD.astype(np.float32)), Tensor(gain.astype(np.float32)), 1e-6)
    np.testing.assert_allclose(out.asnumpy(), expected, rtol=1e-5)


def test_gelu_equals_that_of_mindspore() -> None:
    x = Tensor(np.linspace(-9, 9, 1001, dtype=np.float32))
    np.testing.assert_allclose(
        gelu(x).asnumpy(), ops.gelu(x, approximate="tanh").asnumpy(), rtol=1e-5, atol=1e-6
    )


def test_masked_tokens_have_no_influence(
    encoder: T5Encoder, text: tuple[np.ndarray, np.ndarray]
) -> None:
    ids_BL, mask_BL = text
    other_BL = np.where(mask_BL, ids_BL, 63 - ids_BL).astype(np.int32)
    out_BLD = encoder(ids_BL, mask_BL)
    changed_BLD = encoder(other_BL, mask_BL)
    np.testing.assert_array_equal(out_BLD[mask_BL], changed_BLD[mask_BL])
    assert np.abs(out_BLD - changed_BLD)[~mask_BL].max() > 0.1  # at their own positions


def test_captions_have_no_influence_on_each_other(
    encoder: T5Encoder, text: tuple[np.ndarray, np.ndarray]
) -> None:
    ids_BL, mask_BL = text
    order = [2, 0, 1]
    np.testing.assert_array_equal(
        encoder(ids_BL, mask_BL)[order], encoder(ids_BL[order], mask_BL[order])
    )


def test_more_padding_changes_nothing(
    encoder: T5Encoder, text: tuple[np.ndarray, np.ndarray]
) -> None:
    ids_BL, mask_BL = text
    padding = ((0, 0), (0, 9))
    longer_BLD = encoder(np.pad(ids_BL, padding), np.pad(mask_BL, padding))
    np.testing.assert_allclose(
        longer_BLD[:, :12][mask_BL], encoder(ids_BL, mask_BL)[mask_BL], atol=1e-5
    )


def test_positions_are_relative_but_order_matters(
    encoder: T5Encoder, text: tuple[np.ndarray, np.ndarray]
) -> None:
    ids_BL = text[0][1:2]  # 7 tokens
    mask_BL = text[1][1:2]
    out_BLD = encoder(ids_BL, mask_BL)
    shifted_BLD = encoder(np.roll(ids_BL, 5, 1), np.roll(mask_BL, 5, 1))
    np.testing.assert_allclose(shifted_BLD[:, 5:], out_BLD[:, :7], atol=1e-5)
    reversed_BLD = encoder(ids_BL[:, ::-1].copy(), mask_BL[:, ::-1].copy())
    assert np.abs(reversed_BLD[:, ::-1][:, :7] - out_BLD[:, :7]).max() > 0.1


def values(encoder: T5Encoder) -> dict[str, np.ndarray]:
    """All weights by their names in `encoder_shapes`."""
    layers = [weight.asnumpy() for weights in encoder.layers for weight in weights]
    names = list(encoder_shapes(encoder.config))
    bias = encoder.position_bias.asnumpy()
    norm = encoder.norm.asnumpy()
    return dict(zip(names, [encoder.embedding, bias, *layers, norm], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_of_the_folder_is_used_once(kind: str, tmp_path: Path) -> None:
    weights, _, config = reference(kind)
    encoder = T5Encoder.load(write(tmp_path / "t5", weights, config))
    names = {name: hugging_face_names(name)[0] for name in values(encoder)}
    assert sorted(names.values()) == sorted(weights)
    for name, array in values(encoder).items():
        expected = weights[names[name]]
        np.testing.assert_array_equal(array, expected.T if name.startswith("layers.") else expected)


def rename_embedding(folder: Path, weights: dict[str, np.ndarray]) -> None:
    weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")
    save_file(weights, folder / "model.safetensors")


def with_decoder(folder: Path, weights: dict[str, np.ndarray]) -> None:
    extra = {
        "decoder.final_layer_norm.weight": np.ones(24, np.float32),
        "lm_head.weight": weights["shared.weight"],
    }
    save_file(weights | extra, folder / "model.safetensors")


def shards(folder: Path, weights: dict[str, np.ndarray]) -> None:
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {
        "model-00001-of-00002.safetensors": names[:7],
        "model-00002-of-00002.safetensors": names[7:],
    }
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


@pytest.mark.parametrize("rewrite", [rename_embedding, with_decoder, shards])
def test_every_layout_of_a_folder_loads(
    rewrite: Callable[[Path, dict[str, np.ndarray]], None], folder: Path
) -> None:
    before = values(T5Encoder.load(folder))
    rewrite(folder, reference("v1_1")[0])
    after = values(T5Encoder.load(folder))
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)


def save_bfloat16(weights: dict[str, np.ndarray], path: Path) -> None:
    """The upper halves of float32, for which NumPy has no type."""
    header, start = {}, 0
    for name, array in weights.items():
        offsets = [start, start + 2 * array.size]
        header[name] = {"dtype": "BF16", "shape": array.shape, "data_offsets": offsets}
        start = offsets[1]
    header_bytes = json.dumps(header).encode()
    upper = b"".join(
        (array.view(np.uint32) >> 16).astype("<u2").tobytes() for array in weights.values()
    )
    path.write_bytes(len(header_bytes).to_bytes(8, "little") + header_bytes + upper)


def as_float16(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float16).astype(np.float32)


def as_bfloat16(array: np.ndarray) -> np.ndarray:
    return (array.view(np.uint32) & 0xFFFF0000).view(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", [as_float16, as_bfloat16])
def test_half_precision_weights_are_kept_as_stored_and_give_equal_outputs(
    kind: str,
    half: Callable[[np.ndarray], np.ndarray],
    text: tuple[np.ndarray, np.ndarray],
    tmp_path: Path,
) -> None:
    weights, _, config = reference(kind)
    rounded = {name: half(array) for name, array in weights.items()}
    encoder = T5Encoder.load(write(tmp_path / "full", rounded, config))
    folder = write(
        tmp_path / "half",
        {name: array.astype(np.float16) for name, array in rounded.items()},
        config,
    )
    if half is as_bfloat16:
        save_bfloat16(rounded, folder / "model.safetensors")
    stored = T5Encoder.load(folder)
    assert {
        array.itemsize
        for array in [stored.embedding, *(w for layer in stored.layers for w in layer)]
    } == {2}
    np.testing.assert_array_equal(as_float32(stored.embedding), encoder.embedding)
    np.testing.assert_array_equal(stored(*text), encoder(*text))


def test_config_defaults_equal_those_of_old_checkpoints(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
    }
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "t5", "num_decoder_layers": 6, **sizes})
    )
    assert T5Config.read(tmp_path) == T5Config(
        **sizes,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        layer_norm_epsilon=1e-6,
        feed_forward_proj="relu",
    )


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(
        json.dumps({name: value for name, value in config.items() if value is not None})
    )


def edit_weights(folder: Path, name: str, array: np.ndarray | None) -> None:
    weights = reference("v1_1")[0]
    weights.pop(name)
    save_file(weights if array is None else weights | {name: array}, folder / "model.safetensors")


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


GAIN = "encoder.final_layer_norm.weight"
Q = "encoder.block.1.layer.0.SelfAttention.q.weight"

# Name: the change of a folder, and parts of the message.
INVALID_FOLDERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ("config.json", "give")),
    "config is a list": (
        lambda folder: (folder / "config.json").write_text("[1]"),
        ("config.json",),
    ),
    "other model": (
        lambda folder: edit_config(folder, model_type="bert"),
        ("model_type", "'bert'", "T5"),
    ),
    "no d_kv": (lambda folder: edit_config(folder, d_kv=None), ("config.json", "d_kv is missing")),
    "silu": (
        lambda folder: edit_config(folder, feed_forward_proj="gated-silu"),
        ("gated-silu", "gated-gelu"),
    ),
    "v1.0 config": (
        lambda folder: edit_config(folder, feed_forward_proj="relu"),
        ("layer.1.DenseReluDense.wi.weight",),
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        ("model.safetensors", "save_pretrained"),
    ),
    "lost parameter": (
        lambda folder: edit_weights(folder, GAIN, None),
        (GAIN, "is not among the 20 tensors"),
    ),
    "lost embedding": (
        lambda folder: edit_weights(folder, "shared.weight", None),
        ("shared.weight or encoder.embed_tokens.weight",),
    ),
    "wrong shape": (
        lambda folder: edit_weights(folder, Q, np.ones((16, 25), np.float32)),
        (Q, "(16, 25)", "(16, 24)"),
    ),
    "integers": (
        lambda folder: edit_weights(folder, Q, np.ones((16, 24), np.int8)),
        ("I8", "BF16"),
    ),
    "cut short": (
        lambda folder: truncate(folder / "model.safetensors", 30_000),
        ("model.safetensors", "30000 bytes"),
    ),
    "cut in the header": (
        lambda folder: truncate(folder / "model.safetensors", 99),
        ("model.safetensors", "99 bytes"),
    ),
    "empty": (
        lambda folder: truncate(folder / "model.safetensors", 0),
        ("model.safetensors", "again"),
    ),
}


@pytest.mark.parametrize("kind", INVALID_FOLDERS)
def test_invalid_folders_are_named_in_the_error(kind: str, folder: Path) -> None:
    spoil, parts = INVALID_FOLDERS[kind]
    spoil(folder)
    with pytest.raises(UserError) as caught:
        T5Encoder.load(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_missing_shard_is_named_in_the_error(folder: Path) -> None:
    shards(folder, reference("v1_1")[0])
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors"):
        T5Encoder.load(folder)
