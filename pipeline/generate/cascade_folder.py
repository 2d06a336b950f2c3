"""A cascade on disk: `cascade.json`, a folder for each stage, text encoder and tokenizer in Hugging
Face layout.

What ties the stages stands in their manifests; it is checked before a weight is read.
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
    Manifest,
    TextFacts,
    check_chain,
    read_manifest,
    read_weights,
    text_of,
)
from pipeline.text.fingerprint import TOKENIZER_FILES, fingerprint

FORMAT = 1  # of cascade.json
PARTS = ("text_encoder", "tokenizer")  # beside the stages
ENCODER_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True, kw_only=True)
class StageEntry:
    """A stage of a cascade: its name there and the file that it is trained from."""

    name: str
    config: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.-]*", self.name) or self.name in PARTS:
            raise ConfigError(
                f"name: {self.name!r} cannot be a stage's folder; take letters, digits and _ . -"
            )


@dataclass(frozen=True, kw_only=True)
class CascadeConfig:
    """configs/cascade.yaml: which stages, in order, and where the cascade folder goes."""

    folder: str
    stages: tuple[StageEntry, ...]


def read_cascade(folder: Path) -> tuple[dict[str, Manifest], TextFacts | None]:
    """The manifests of a cascade folder in order, checked against one another, and its text
    encoder's facts.

    The folder of one stage that needs no text is a cascade of that stage, under its kind's name.
    """
    path = folder / "cascade.json"
    if not path.exists() and (folder / "stage.json").exists():
        only = read_manifest(folder)
        if only.text:
            raise UserError(
                f"{folder}: this stage takes text; `python -m tools.export` joins it with its text encoder"
            )
        return {only.kind: only}, None
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; `python -m tools.export` makes a cascade folder"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); export the cascade again") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or not raw.get("stages"):
        raise UserError(
            f"{path}: format is not {FORMAT} or there are no stages; export the cascade with this version"
        )
    manifests = {name: read_manifest(folder / name) for name in raw["stages"]}
    check_chain(manifests)
    return manifests, text_of(manifests)[1]


def check_replaceable(folder: Path) -> None:
    """UserError unless `folder` is not there, is empty, or holds a cascade that `export` wrote and
    nothing else.
    """
    if not folder.name:
        raise UserError(
            f"{folder}: cannot be replaced by a cascade; name a folder of its own in `folder`"
        )
    if not folder.exists():
        return
    try:
        names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        if names:
            raw = json.loads((folder / "cascade.json").read_text())
            names -= {
                "cascade.json",
                *PARTS,
                *(name for name in raw["stages"] if (folder / name / "stage.json").exists()),
            }
    except NotADirectoryError:
        raise UserError(f"{folder}: is a file; name a folder of its own in `folder`") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder}: is there and is no cascade folder (it has no cascade.json of one), so it is not replaced; name "
            "another in `folder`"
        ) from None
    if names:
        raise UserError(
            f"{folder}: holds '{min(names)}', which no export wrote, so it is not replaced; move that away or name "
            "another in `folder`"
        )


def export(stages: Mapping[str, Path], encoder: Path | None, folder: Path) -> None:
    """Makes a cascade folder of stage folders and the text encoder of those that know text; whole
    or not at all.
    """
    manifests = {name: read_manifest(path) for name, path in stages.items()}
    check_chain(manifests)
    _, facts = text_of(manifests)
    if facts and encoder and (found := fingerprint(encoder, encoder)) != facts.fingerprint:
        raise UserError(
            f"{encoder}: fingerprint {found[:12]}, but the stages were trained with {facts.fingerprint[:12]}; "
            "give the encoder of the training"
        )
    folder = folder.resolve()
    check_replaceable(folder)
    side = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(side, ignore_errors=True)
    for name, path in stages.items():
        read_weights(path, manifests[name])
        shutil.copytree(path, side / name)
    for part, patterns in (
        zip(PARTS, (ENCODER_FILES, TOKENIZER_FILES), strict=True) if encoder else ()
    ):
        (side / part).mkdir()
        for pattern in patterns:
            for file in encoder.glob(pattern):  # type: ignore[union-attr]
                shutil.copy(file, side / part)
    (side / "cascade.json").write_text(
        json.dumps({"format": FORMAT, "stages": list(stages)}, indent=2) + "\n"
    )
    replace_folder(side, folder)
