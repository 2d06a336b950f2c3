"""The stage folder: what a run leaves behind, and all that one stage knows of another.

`stage.json` says what the stage takes and generates, how it was trained and with which text
encoder; `unet.safetensors` holds its EMA weights. Whether stages fit one another is decided from
the manifests alone, before a weight is read.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config import ConfigError, build, to_dict
from pipeline.errors import UserError
from pipeline.files import replace_folder, sha256_file, write_tensors

if TYPE_CHECKING:
    from pipeline.stage.stage import Stage

STAGE_FILES = ("stage.json", "unet.safetensors")
FORMAT = 2  # of stage.json; 1 had other names in its configuration


@dataclass(frozen=True, kw_only=True)
class TextEncoderInfo:
    """The text encoder that a stage was trained with."""

    fingerprint: str
    length: int
    width: int
    clean: bool = False


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """stage.json. Sizes are sides of square images, in pixels."""

    format: int
    kind: str
    size_in: int | None  # None: starts from noise alone
    size_out: int
    channels: int
    schedule: str
    prediction: str
    loss: str
    aug_range: tuple[float, float] | None  # levels of noise augmentation that were trained
    text: TextEncoderInfo | None = None
    classes: int | tuple[str, ...] | None = None  # their names in order, or how many
    tasks: tuple[str, ...] = ()  # of image to image
    ema_decay: float
    step: int
    sha256: str  # of unet.safetensors
    config: dict[str, Any]


def manifest_of(stage: "Stage", prompt_fields: Mapping[str, Any], step: int) -> dict[str, Any]:
    """stage.json of a stage trained for `step` steps, but for what `write_stage` adds.

    Args:
        stage: as trained.
        prompt_fields: what its prompts add (`pipeline.text.prompts`).
        step: of the weights.
    """
    config: dict[str, Any] = to_dict(stage.config)
    diffusion = config["diffusion"]
    return {
        "kind": config["kind"],
        "size_out": config["size"],
        "channels": 3,
        "schedule": diffusion["schedule"],
        "prediction": diffusion["prediction"],
        "loss": diffusion["loss"],
        **stage.manifest_fields(),
        **prompt_fields,
        "ema_decay": stage.config.train.ema_decay,
        "step": step,
        "config": config,
    }


def write_stage(folder: Path, manifest: dict[str, Any], weights: dict[str, np.ndarray]) -> None:
    """The stage folder, whole or not at all; adds `format` and `sha256` to the manifest."""
    # Beside the target, as a rename does not cross file systems.
    side = folder.with_name(f".tmp-{folder.name}")
    # A killed process may have left it.
    shutil.rmtree(side, ignore_errors=True)
    side.mkdir(parents=True)
    write_tensors(side / "unet.safetensors", weights)

    # The digest ties the manifest to these weights: a mixture of two folders is detected.
    full = {"format": FORMAT, **manifest, "sha256": sha256_file(side / "unet.safetensors")}
    (side / "stage.json").write_text(json.dumps(full, indent=2) + "\n")

    replace_folder(side, folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a stage folder.

    Raises:
        UserError: the folder is no stage's, or one of another format.
    """
    path = folder / "stage.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{folder}: no stage.json; a stage folder is what a finished run leaves in its stage/"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); export the stage again") from None

    # Before the fields: an older manifest is reported as one, and not by its first unknown field.
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        raise UserError(
            f"{path}: format is {found}, not {FORMAT}: another version of cascade wrote it; sample "
            "with that version, or train the stage with this one"
        )

    try:
        return build(Manifest, raw)
    except ConfigError as error:
        raise UserError(f"{path}: {error}") from None


def read_weights(folder: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """The stage's weights, checked against the manifest's SHA-256."""
    from safetensors.numpy import load_file

    path = folder / "unet.safetensors"
    if not path.exists():
        raise UserError(f"{path}: missing; export the stage again")
    if sha256_file(path) != manifest.sha256:
        raise UserError(
            f"{path}: its SHA-256 is not the one in stage.json; copy or export the stage again"
        )

    return load_file(path)


def check_chain(stages: Mapping[str, Manifest]) -> None:
    """UserError, naming the two facts that disagree, unless each stage enlarges what the one before
    generates and all that are conditioned on text have one text encoder.
    """
    names = list(stages)
    for name in names:
        # Alone it is a cascade of one stage, which `cascade restore` loads.
        if len(names) > 1 and stages[name].tasks:
            raise UserError(
                f"{name} restores images by itself (`cascade restore`); leave it out of the chain"
            )

    for before, name in pairwise(names):
        size_in = stages[name].size_in
        size_out = stages[before].size_out
        if size_in != size_out:
            takes = "no image" if size_in is None else f"{size_in} px"
            raise UserError(
                f"{before} generates {size_out} px and {name} takes {takes}; chain stages whose "
                "sizes agree"
            )

    # The cascade encodes the prompts once for all its stages.
    first, encoder = text_encoder_of(stages)
    for name in names:
        other = stages[name].text
        if encoder is None or other is None:
            continue

        # Not the fingerprint alone: length and cleaning change the embeddings of a prompt too.
        for field in fields(encoder):
            expected = getattr(encoder, field.name)
            value = getattr(other, field.name)
            if value != expected:
                raise UserError(
                    f"{first} was trained with text {field.name} {expected} and {name} with "
                    f"{value}; all stages need one text encoder"
                )


def text_encoder_of(stages: Mapping[str, Manifest]) -> tuple[str, TextEncoderInfo | None]:
    """The first stage that is conditioned on text, and its encoder; "" and None without any."""
    for name, stage in stages.items():
        if stage.text:
            return name, stage.text
    return "", None
