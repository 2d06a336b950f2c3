"""Kinds of stage, by the name that a configuration or a manifest gives.

They are entry points of installed distributions: so the library need not import the recipes that
are written upon it, and another distribution can add one.
"""

from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline.config import ConfigError, apply_overrides, build, read_yaml
from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.stage.config import StageConfig
    from pipeline.stage.stage import Stage

GROUP = "imagen_cascade.stages"


def stage_class(kind: str) -> "type[Stage]":
    """The class of `kind`, a subclass of `pipeline.stage.stage.Stage`.

    Raises:
        UserError: no installed distribution has one of that name.
    """
    points = entry_points(group=GROUP)
    if kind not in list(points.names):
        known = ", ".join(sorted(points.names))
        raise UserError(f"kind: {kind!r} is no kind of stage; there are {known}")

    # Loaded only now: this imports the recipe, and MindSpore with it.
    return cast("type[Stage]", points[kind].load())


def read_stage_config(
    path: str | Path, overrides: Sequence[str] = ()
) -> "tuple[StageConfig, dict[str, Any]]":
    """The stage's configuration in a YAML file, and the file's `launch` section, which is the
    launcher's to read.
    """
    raw = apply_overrides(read_yaml(path), overrides)
    # Taken out, as `build` refuses fields that the configuration does not have.
    launch = raw.pop("launch", None) or {}

    if "kind" not in raw:
        raise ConfigError(f"{path}: kind: missing; name a kind of stage, as base")
    try:
        return build(stage_class(raw["kind"]).Config, raw), launch
    except UserError as error:
        raise ConfigError(f"{path}: {error}") from None
