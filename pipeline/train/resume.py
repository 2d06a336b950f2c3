"""Resuming: which checkpoint a run goes on from, and whether the configuration allows it."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import (
    ConfigError,
    Difference,
    build,
    differences,
    dump,
    read_yaml,
    to_dict,
)
from pipeline.data.shards import Shards
from pipeline.errors import UserError
from pipeline.files import write_atomically
from pipeline.stage.config import StageConfig
from pipeline.train import checkpoint
from pipeline.train.precision import LossScale
from pipeline.train.step import TrainStep

log = logging.getLogger("cascade")

COUNTS = ("step", "skipped", "loss_scale", "good_steps")  # of a checkpoint's state.json

# Fields, or beginnings of them, that may differ between two attempts of one run: the steps done so
# far would have been the same.
MAY_CHANGE = (
    "run",
    "train.steps",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.report_every",
    "train.sample_every",
    "train.num_samples",
    "train.validate_every",
    "train.num_validation",
    "train.max_skipped",
    "train.check_every",
    "train.shard_optimizer",
    "data.workers",
    "data.max_damage",
    "data.cache",
    "sample.",
)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is."""

    step: int = 0  # steps done
    num_skipped: int = 0  # of them, not applied


def forbidden_changes(run: Path, config: StageConfig) -> list[Difference]:
    """The changes from the configuration saved in `run` that are not in `MAY_CHANGE`.

    UserError if the saved one is of another version of this package.
    """
    path = run / "config.yaml"
    if not path.exists():
        return []

    return [
        change
        for change in differences(read_saved(path, config), to_dict(config))
        if not may_change(change)
    ]


def may_change(change: Difference) -> bool:
    """Whether the steps done so far would have been the same."""
    # Tars of their own have no influence on training, unlike a fraction that is held out.
    if change.path == "data.validation":
        return float not in map(type, (change.before, change.now))
    return change.path.startswith(MAY_CHANGE)


def read_saved(path: Path, config: StageConfig) -> dict[str, Any]:
    """The configuration in `path`, with the defaults of fields that are newer than the file.

    UserError if it has fields or values that are no longer valid.
    """
    saved = read_yaml(path)
    # Another kind has other fields: the difference to report is the kind.
    if saved.get("kind") != config.kind:
        return saved

    try:
        complete: dict[str, Any] = to_dict(build(type(config), saved))
    except ConfigError as error:
        problem = str(error).partition("; ")[0]
        raise UserError(
            f"{path}: was written by another version of cascade ({problem}); finish the run with "
            "that version, or take another run folder"
        ) from None
    return complete


def finished(config: StageConfig) -> bool:
    """Whether the run has already trained this configuration to its end and left the stage."""
    run = Path(config.run)
    try:
        step = json.loads((run / "stage" / "stage.json").read_bytes())["step"]
    except (FileNotFoundError, ValueError, KeyError):
        # There is no stage, or a broken one, which the last step writes again.
        return False
    return step >= config.train.steps and not forbidden_changes(run, config)


def prepare_run_dir(run: Path, config: StageConfig) -> Path | None:
    """Saves the configuration in the run folder and returns the checkpoint to resume from, if any.

    UserError if the configuration is not that of the checkpoint.
    """
    newest = checkpoint.newest(run / "checkpoints")
    if newest is not None:
        for change in forbidden_changes(run, config):
            raise UserError(
                f"{change.path}: was {change.before} when {run} was trained to {newest.name} and "
                f"is {change.now} now; take the old value, or another run folder"
            )

    # After the comparison, which needs the configuration of the attempts before.
    write_atomically(run / "config.yaml", dump(config).encode())
    return newest


def resume(newest: Path | None, train_step: TrainStep, shards: Shards) -> Progress:
    """Restores the checkpoint `newest` on all ranks; only rank 0 needs to know it.

    UserError if the samples are not those that it was trained on.
    """
    tensors: checkpoint.Tensors = {}
    state: dict[str, Any] = {}
    if newest is not None:
        tensors, state = checkpoint.load(newest)
        if state.get("data", shards.digest) != shards.digest:
            raise UserError(
                f"data.shards: the samples are no longer those that {newest} was trained on (there "
                f"are {len(shards):,} now; a shard was changed, added, lost or indexed anew): put "
                "them back, or take another run folder"
            )

    # The other ranks learn from rank 0 whether there is a checkpoint: at step 0 there is none.
    counts = (state.get(name, 0) for name in COUNTS)
    step, num_skipped, scale, good_steps = train_step.state.group.broadcast_ints(*counts)
    if step:
        train_step.state.load(tensors, str(newest))
        # A checkpoint without a loss scale leaves it as it is.
        train_step.loss_scale.value = float(scale) or train_step.loss_scale.value
        train_step.loss_scale.good_steps = good_steps
        log.info("resuming from %s", newest)
    return Progress(step=step, num_skipped=num_skipped)


def resumable_state(progress: Progress, loss_scale: LossScale, shards: Shards) -> dict[str, Any]:
    """A checkpoint's state.json, which `resume` reads."""
    counts = (
        progress.step,
        progress.num_skipped,
        # A power of two from 1 to MAX_SCALE, hence an integer without loss.
        int(loss_scale.value),
        loss_scale.good_steps,
    )
    return {**dict(zip(COUNTS, counts, strict=True)), "data": shards.digest}
