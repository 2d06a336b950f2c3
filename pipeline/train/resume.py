"""From a run folder back into a run: which checkpoint to go on from, and whether it may be."""

import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, build, differences, dump, read_yaml, to_dict
from pipeline.data.shards import Shards
from pipeline.errors import UserError
from pipeline.files import write_atomically
from pipeline.stage.config import StageConfig
from pipeline.train import checkpoint
from pipeline.train.precision import LossScale
from pipeline.train.step import TrainStep

log = logging.getLogger("cascade")

COUNTS = ("step", "skipped", "loss_scale", "good_steps")  # of a checkpoint's state.json

# What may change between two attempts of one run, because the steps done so far would have been the
# same.
FREE = ("run", "train.steps", "train.checkpoint_every", "train.keep_checkpoints", "train.report_every",
        "train.sample_every", "train.num_samples", "train.max_skipped", "train.check_every",
        "train.shard_optimizer", "data.workers", "data.max_damage", "data.cache", "sample.")  # fmt: skip


def changed(run: Path, config: StageConfig) -> Iterator[tuple[str, Any, Any]]:
    """(field, what it was when `run` was trained, what it is now) of each that may not change."""
    saved = run / "config.yaml"
    for field, before, now in (
        differences(complete(read_yaml(saved), config), to_dict(config)) if saved.exists() else ()
    ):
        if not field.startswith(FREE):
            yield field, before, now


def complete(saved: dict[str, Any], config: StageConfig) -> dict[str, Any]:
    """`saved` with the defaults of fields that are younger than it, if it is still one of this
    kind.
    """
    with suppress(ConfigError):
        return to_dict(build(type(config), saved))
    return saved


def finished(config: StageConfig) -> bool:
    """Whether its run has left the stage that this configuration trains: then there is nothing to
    start.
    """
    run = Path(config.run)
    try:
        step = json.loads((run / "stage" / "stage.json").read_bytes())["step"]
    except (
        FileNotFoundError,
        ValueError,
        KeyError,
    ):  # none, or a broken one that the last step will write anew
        return False
    return step >= config.train.steps and not list(changed(run, config))


def prepare_run_dir(run: Path, config: StageConfig) -> Path | None:
    """The checkpoint to go on from, if any, once the configuration is known to be the run's own;
    saves it.
    """
    newest = checkpoint.newest(run / "checkpoints")
    for field, before, now in changed(run, config) if newest else ():
        raise UserError(
            f"{field}: was {before} when {run} was trained to {newest and newest.name} and is {now} now; take the old "
            "value, or another run folder"
        )
    write_atomically(run / "config.yaml", dump(config).encode())
    return newest


def resume(newest: Path | None, trainer: TrainStep, shards: Shards) -> tuple[int, int]:
    """Brings all ranks to the checkpoint `newest`, of which rank 0 knows; its step, and how many
    were skipped before.

    UserError if the data are no longer those that led to it.
    """
    tensors, state = checkpoint.Tensors(), dict[str, Any]()
    if newest:
        tensors, state = checkpoint.load(newest)
        if state.get("data", shards.digest) != shards.digest:
            raise UserError(
                f"data.shards: the samples are no longer those that {newest} was trained on (there are {len(shards):,} "
                "now; a shard was changed, added, lost or indexed anew): put them back, or take another run folder"
            )
    done, skipped, scale, good = trainer.state.ranks.broadcast_ints(
        *(state.get(name, 0) for name in COUNTS)
    )
    if done:
        trainer.state.load(tensors, str(newest))
        trainer.scale.value, trainer.scale.good = float(scale) or trainer.scale.value, good
        log.info("resuming from %s", newest)
    return done, skipped


def facts(step: int, skipped: int, scale: LossScale, shards: Shards) -> dict[str, Any]:
    """What a checkpoint's state.json says, for `resume` to read."""
    counts = (step, skipped, int(scale.value), scale.good)
    return {**dict(zip(COUNTS, counts, strict=True)), "data": shards.digest}
