"""The stage folder: what a run leaves behind, and all that one stage knows of another.

`stage.json` says what the stage takes and gives, how it was trained and with which text encoder;
`unet.safetensors` holds its EMA weights. Whether stages fit one another is decided from the
manifests alone, before a weight is read.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import ConfigError, build, to_dict
from pipeline.errors import UserError
from pipeline.files import replace_folder, sha256_file, write_tensors

FORMAT = 1  # of stage.json


@dataclass(frozen=True, kw_only=True)
class TextFacts:
    """The text encoder that a stage was trained with."""

    fingerprint: str
    length: int
    width: int
    clean: bool = False


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """stage.json. Sizes are sides of square pictures, in pixels."""

    format: int
    kind: str
    size_in: int | None  # None: from text alone
    size_out: int
    channels: int
    schedule: str
    prediction: str
    loss: str
    aug_range: tuple[float, float] | None  # noise levels of the low resolution that were trained
    text: TextFacts | None = None
    classes: int | tuple[str, ...] | None = None  # their names in order, or how many
    tasks: tuple[str, ...] = ()  # of image to image
    ema_decay: float
    step: int
    sha256: str  # of unet.safetensors
    config: dict[str, Any]


def write_stage(folder: Path, manifest: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    """The stage folder, whole or not at all; adds `format` and `sha256` to the facts given."""
    side = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(side, ignore_errors=True)
    side.mkdir(parents=True)
    write_tensors(side / "unet.safetensors", weights)
    full = {"format": FORMAT, **manifest, "sha256": sha256_file(side / "unet.safetensors")}
    (side / "stage.json").write_text(json.dumps(full, indent=2) + "\n")
    replace_folder(side, folder)


def read_manifest(folder: Path) -> Manifest:
    """UserError if the folder is no stage's, or one of another format."""
    path = folder / "stage.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no stage.json; a stage folder is what a finished run leaves in its stage/"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); export the stage again") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UserError(f"{path}: format is not {FORMAT}; export the stage with this version")
    try:
        return build(Manifest, raw)
    except ConfigError as error:
        raise UserError(f"{path}: {error}") from None


def read_weights(folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """The stage's weights, checked against the manifest's sum."""
    from safetensors.numpy import load_file

    path = folder / "unet.safetensors"
    if not path.exists():
        raise UserError(f"{path}: missing; export the stage again")
    if sha256_file(path) != manifest.sha256:
        raise UserError(
            f"{path}: its SHA-256 is not the one in stage.json; copy or export the stage again"
        )
    return load_file(path)


def check_chain(stages: dict[str, Manifest]) -> None:
    """UserError unless each stage takes what the one before gives and all that know text have one
    text encoder.
    """
    names = list(stages)
    for name in names if len(names) > 1 else ():
        if stages[name].tasks:
            raise UserError(
                f"{name} restores pictures by itself (`cascade restore`); leave it out of the chain"
            )
    first, text = text_of(stages)
    for before, name in zip([None, *names], names, strict=False):
        size_in = stages[name].size_in
        if before is None:
            continue
        size_out = stages[before].size_out
        if size_in != size_out:
            takes = "no picture" if size_in is None else f"{size_in} px"
            raise UserError(
                f"{before} gives {size_out} px and {name} takes {takes}; chain stages whose sizes agree"
            )
        for fact, value in to_dict(text).items() if stages[name].text else ():
            other = getattr(stages[name].text, fact)
            if value != other:
                raise UserError(
                    f"{first} was trained with text {fact} {value} and {name} with {other}; "
                    "all stages need one text encoder"
                )


def text_of(stages: Mapping[str, Manifest]) -> tuple[str, TextFacts | None]:
    """The first stage that knows text, and its text encoder's facts; "" and None if there is none."""
    return next(((name, stage.text) for name, stage in stages.items() if stage.text), ("", None))
