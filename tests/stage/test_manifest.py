"""The stage folder: it reads as it was written, or is refused; and which stages make a chain."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.errors import UserError
from pipeline.stage.manifest import Manifest, check_chain, read_manifest, read_weights, write_stage

FIELDS: dict[str, Any] = {
    "kind": "base",
    "size_in": None,
    "size_out": 64,
    "channels": 3,
    "schedule": "cosine",
    "prediction": "v",
    "loss": "sigmoid",
    "aug_range": None,
    "text": {"fingerprint": "ab" * 32, "length": 16, "width": 64},
    "ema_decay": 0.99,
    "step": 600,
    "config": {"kind": "base", "unet": {"channel_mults": [1, 2]}, "sample": {"steps": None}},
}
SR = {"kind": "super_resolution", "size_in": 64, "size_out": 256, "aug_range": [0.0, 1.0]}
WEIGHTS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    write_stage(tmp_path / "stage", FIELDS, WEIGHTS)
    return tmp_path / "stage"


def rewrite(stage: Path, change: dict[str, Any], drop: str = "") -> None:
    raw = json.loads((stage / "stage.json").read_text()) | change
    raw.pop(drop, None)
    (stage / "stage.json").write_text(json.dumps(raw))


def refusal(stage: Path) -> str:
    with pytest.raises(UserError) as error:
        read_weights(stage, read_manifest(stage))
    return str(error.value)


@pytest.mark.parametrize("fields", [FIELDS, FIELDS | SR])
def test_round_trip(fields: dict[str, Any], tmp_path: Path) -> None:
    write_stage(tmp_path / "new" / "stage", fields, WEIGHTS)
    manifest = read_manifest(tmp_path / "new" / "stage")
    written = json.loads((tmp_path / "new" / "stage" / "stage.json").read_text())
    assert written == fields | {"format": 2, "sha256": manifest.sha256}
    assert manifest.config == fields["config"]
    assert (manifest.size_in, manifest.size_out) == (fields["size_in"], fields["size_out"])
    assert manifest.aug_range == (fields["aug_range"] and tuple(fields["aug_range"]))
    assert manifest.text.fingerprint == "ab" * 32
    weights = read_weights(tmp_path / "new" / "stage", manifest)
    assert weights.keys() == WEIGHTS.keys()
    for name, array in WEIGHTS.items():
        np.testing.assert_array_equal(weights[name], array)


def test_a_second_write_replaces_the_first(stage: Path) -> None:
    (stage / "stray").touch()
    write_stage(stage, FIELDS | {"step": 700}, {"b": np.zeros(2, np.float32)})
    assert sorted(path.name for path in stage.iterdir()) == ["stage.json", "unet.safetensors"]
    assert read_manifest(stage).step == 700
    assert read_weights(stage, read_manifest(stage)).keys() == {"b"}
    assert [path.name for path in stage.parent.iterdir()] == ["stage"]


def test_a_flipped_bit_of_the_weights(stage: Path) -> None:
    path = stage / "unet.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert (
        refusal(stage)
        == f"{path}: its SHA-256 is not the one in stage.json; copy or export the stage again"
    )


def test_weights_that_are_missing(stage: Path) -> None:
    (stage / "unet.safetensors").unlink()
    assert refusal(stage) == f"{stage}/unet.safetensors: missing; export the stage again"


def test_a_folder_that_is_no_stages(tmp_path: Path) -> None:
    message = (
        f"{tmp_path}: no stage.json; a stage folder is what a finished run leaves in its stage/"
    )
    assert refusal(tmp_path) == message


def test_a_manifest_that_is_not_json(stage: Path) -> None:
    (stage / "stage.json").write_text('{"format": 2,')
    assert refusal(stage).startswith(f"{stage}/stage.json: not JSON (Expecting property name")
    assert refusal(stage).endswith("; export the stage again")


@pytest.mark.parametrize(
    ("text", "found"),
    [("[]", "None"), ("{}", "None"), ('{"format": 1}', "1"), ('{"format": "2"}', "2")],
)
def test_a_manifest_of_another_format(text: str, found: str, stage: Path) -> None:
    (stage / "stage.json").write_text(text)
    assert refusal(stage) == (
        f"{stage}/stage.json: format is {found}, not 2: another version of cascade wrote it; "
        "sample with that version, or train the stage with this one"
    )


@pytest.mark.parametrize(
    ("change", "drop", "message"),
    [
        ({"size_ot": 64}, "", "size_ot: no such field in Manifest; did you mean 'size_out'?"),
        ({}, "size_out", "size_out: missing, and Manifest has no default for it; give a value"),
        ({}, "config", "config: missing, and Manifest has no default for it; give a value"),
        ({"config": [1]}, "", "config: expected a section, got the list [1]; give a section"),
        ({"config": 5}, "", "config: expected a section, got 5; give a section"),
        ({"size_out": "64"}, "", "size_out: expected a whole number, got text '64'; write 64"),
        ({"aug_range": [0.0]}, "", "aug_range: expected 2 values, got the list [0.0]; give 2"),
        (
            {"text": {}},
            "",
            "text.fingerprint: missing, and TextEncoderInfo has no default for it; give a value",
        ),
    ],
)
def test_fields_that_are_refused(
    change: dict[str, Any], drop: str, message: str, stage: Path
) -> None:
    rewrite(stage, change, drop)
    assert refusal(stage) == f"{stage}/stage.json: {message}"


def chain(tmp_path: Path, **stages: dict[str, Any]) -> dict[str, Manifest]:
    """Stages by name, each the base or `sr` with something changed."""
    for name, change in stages.items():
        write_stage(
            tmp_path / name, FIELDS | (SR if name.startswith("sr") else {}) | change, WEIGHTS
        )
    return {name: read_manifest(tmp_path / name) for name in stages}


def test_chains_that_fit(tmp_path: Path) -> None:
    sr1024 = {"size_in": 256, "size_out": 1024}
    three = chain(tmp_path, base={}, sr256={}, sr1024=sr1024)
    check_chain(three)
    check_chain({"sr256": three["sr256"], "sr1024": three["sr1024"]})
    check_chain({"base": three["base"]})
    check_chain({})


def text(**change: Any) -> dict[str, Any]:
    return {"text": FIELDS["text"] | change}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            {"base": {"size_out": 32}, "sr": {}},
            "base generates 32 px and sr takes 64 px; chain stages whose sizes agree",
        ),
        (
            {"sr": {}, "base": {}},
            "sr generates 256 px and base takes no image; chain stages whose sizes agree",
        ),
        (
            {"base": {}, "sr256": {}, "sr1024": {"size_in": 512, "size_out": 1024}},
            "sr256 generates 256 px and sr1024 takes 512 px; chain stages whose sizes agree",
        ),
        (
            {"base": {}, "sr": text(fingerprint="cd" * 32)},
            f"base was trained with text fingerprint {'ab' * 32} and sr with {'cd' * 32}; "
            "all stages need one text encoder",
        ),
        (
            {"base": {}, "sr": text(length=128)},
            "base was trained with text length 16 and sr with 128; all stages need one text "
            "encoder",
        ),
        (
            {"base": text(width=4096), "sr": {}},
            "base was trained with text width 4096 and sr with 64; all stages need one text "
            "encoder",
        ),
    ],
)
def test_chains_that_do_not_fit(
    stages: dict[str, dict[str, Any]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        check_chain(chain(tmp_path, **stages))
    assert str(error.value) == message
