"""The T5 encoder against that of `transformers`, live; the stored references of test_t5.py need no
PyTorch.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from pipeline.text.encoder import TextEncoder
from pipeline.text.t5 import T5Encoder
from tools import references, tiny_t5

torch = pytest.importorskip("torch", reason="PyTorch is not installed: run `make test-parity`")
pytestmark = pytest.mark.parity


@pytest.mark.parametrize("kind", ["v1_0", "v1_1"])
@pytest.mark.parametrize("with_decoder", [False, True])
def test_equals_transformers(
    kind: Literal["v1_0", "v1_1"], with_decoder: bool, tmp_path: Path
) -> None:
    model = references.t5_model(
        kind, with_decoder, d_model=32, num_layers=3, relative_attention_num_buckets=16
    )
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    ids, mask = references.t5_inputs(length=70)
    out = T5Encoder.load(tmp_path)(ids, mask)
    np.testing.assert_allclose(out, references.t5_output(model, ids, mask), atol=1e-4)


@pytest.mark.parametrize("kind", ["v1_0", "v1_1"])
def test_stored_references_are_current(kind: str) -> None:
    from safetensors.numpy import load_file

    stored = load_file(references.FOLDER / f"t5_{kind}.safetensors")
    arrays, _ = references.REFERENCES[f"t5_{kind}"]()
    assert stored.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(stored[name], array, atol=1e-5, err_msg=name)


def test_text_encoder_equals_transformers(shards_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    folder = tmp_path / "t5"
    tiny_t5.make(folder, sorted(shards_folder.glob("*.tar")))
    captions = ["a small red circle on white", "a large blue cross on black, at the left", ""]
    text_NLD, mask_NL = TextEncoder.load(folder, folder, 16).encode(captions)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = T5EncoderModel.from_pretrained(folder, local_files_only=True).eval()
    inputs = tokenizer(
        captions, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected_NLD = model(**inputs).last_hidden_state.numpy()
    np.testing.assert_array_equal(mask_NL, inputs["attention_mask"].numpy().astype(bool))
    np.testing.assert_allclose(text_NLD[mask_NL], expected_NLD[mask_NL], atol=2e-3)  # float16
