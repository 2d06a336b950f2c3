"""A cascade on disk: `cascade.json`, a folder for each stage, text encoder and tokenizer in Hugging
Face layout.

What ties the stages is in their manifests; it is checked before a weight is read.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import ConfigError
from pipeline.errors import UserError
from pipeline.files import replace_folder
from pipeline.stage.manifest import (
    STAGE_FILES,
    Manifest,
    TextEncoderInfo,
    check_chain,
    read_manifest,
    read_weights,
    text_encoder_of,
)
from pipeline.text.fingerprint import CACHE_FILE, TOKENIZER_FILES, fingerprint

FORMAT = 1  # of cascade.json
ENCODER_FOLDER = "text_encoder"
TOKENIZER_FOLDER = "tokenizer"
ENCODER_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True, kw_only=True)
class StageEntry:
    """A stage of a cascade: its name there and the file that it is trained from."""

    name: str  # of the stage's folder in the cascade
    config: str  # YAML file that the stage is trained from

    def __post_init__(self) -> None:
        reserved = (ENCODER_FOLDER, TOKENIZER_FOLDER)
        if not re.fullmatch(r"\w[\w.-]*", self.name) or self.name in reserved:
            raise ConfigError(
                f"name: {self.name!r} cannot be a stage's folder; take letters, digits and _ . -"
            )


@dataclass(frozen=True, kw_only=True)
class CascadeConfig:
    """configs/cascade.yaml: which stages, in order, and where the cascade folder goes."""

    folder: str  # the cascade folder that export writes
    stages: tuple[StageEntry, ...]  # in order


def read_cascade(folder: Path) -> tuple[dict[str, Manifest], TextEncoderInfo | None]:
    """The manifests of a cascade folder in order, checked against one another, and its text
    encoder's.

    The folder of one stage that needs no text is a cascade of that stage, under its kind's name.

    Raises:
        UserError: the folder is neither, or its stages do not fit.
    """
    path = folder / "cascade.json"
    if not path.exists() and (folder / "stage.json").exists():
        manifest = read_manifest(folder)
        if manifest.text:
            raise UserError(
                f"{folder}: this stage takes text; `cascade export` joins it with its text encoder"
            )
        return {manifest.kind: manifest}, None

    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `cascade export` writes a cascade folder") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); export the cascade again") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or not raw.get("stages"):
        raise UserError(
            f"{path}: format is not {FORMAT} or there are no stages; export the cascade with this "
            "version"
        )

    # All manifests before any weights, which may be gigabytes.
    manifests = {name: read_manifest(folder / name) for name in raw["stages"]}
    check_chain(manifests)
    _, encoder = text_encoder_of(manifests)
    return manifests, encoder


def check_replaceable(folder: Path) -> None:
    """UserError unless `folder` is not there, is empty, or holds a cascade that `export` wrote and
    nothing else.
    """
    if not folder.name:
        raise UserError(f"folder: {folder} cannot be replaced by a cascade; name one of its own")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"folder: {folder} is a file; name a folder of its own")
    if not any(folder.iterdir()):
        return

    try:
        stages = json.loads((folder / "cascade.json").read_text())["stages"]
        own = [folder / name for name in stages]
        if not own or not all((path / "stage.json").exists() for path in own):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"folder: {folder} exists and is no cascade folder (it has no cascade.json of one), so "
            "it is not replaced; name another"
        ) from None

    expected = {"cascade.json", *stages, ENCODER_FOLDER, TOKENIZER_FOLDER}
    expected |= {f"{name}/{file}" for name in stages for file in STAGE_FILES}
    for part, patterns in ((ENCODER_FOLDER, ENCODER_FILES), (TOKENIZER_FOLDER, TOKENIZER_FILES)):
        # Loading a cascade remembers the fingerprint beside the files.
        for pattern in (*patterns, CACHE_FILE):
            expected |= {f"{part}/{path.name}" for path in (folder / part).glob(pattern)}

    # Hidden files count too: nothing of the user's is removed.
    others = {str(path.relative_to(folder)) for path in folder.rglob("*")} - expected
    if others:
        raise UserError(
            f"folder: {folder} holds '{min(others)}', which no export wrote, so it is not "
            "replaced; move that away or name another"
        )


def export(stages: Mapping[str, Path], encoder: Path | None, folder: Path) -> None:
    """Writes a cascade folder of stage folders and of the text encoder of those that are
    conditioned on text; whole or not at all.

    Raises:
        UserError: the stages do not fit one another or the encoder, or `folder` holds something
            else than a cascade.
    """
    manifests = {name: read_manifest(path) for name, path in stages.items()}
    check_chain(manifests)
    _, expected = text_encoder_of(manifests)

    if expected and encoder:
        found = fingerprint(encoder, encoder)
        if found != expected.fingerprint:
            raise UserError(
                f"{encoder}: fingerprint {found[:12]}, but the stages were trained with "
                f"{expected.fingerprint[:12]}; give the encoder of the training"
            )

    # A symbolic link is followed: the rename would replace the link itself.
    folder = folder.resolve()
    check_replaceable(folder)

    # Built beside the target and renamed when it is complete.
    side = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(side, ignore_errors=True)

    for name, path in stages.items():
        # For its check of the digest: a damaged file is not passed on.
        read_weights(path, manifests[name])
        copy_files(path, STAGE_FILES, side / name)
    if encoder:
        copy_files(encoder, ENCODER_FILES, side / ENCODER_FOLDER)
        copy_files(encoder, TOKENIZER_FILES, side / TOKENIZER_FOLDER)

    content = {"format": FORMAT, "stages": list(stages)}
    (side / "cascade.json").write_text(json.dumps(content, indent=2) + "\n")

    replace_folder(side, folder)


def copy_files(source: Path, patterns: tuple[str, ...], target: Path) -> None:
    """The files of `source` that match, into the new folder `target`."""
    target.mkdir(parents=True)
    for pattern in patterns:
        for path in source.glob(pattern):
            shutil.copy(path, target)
