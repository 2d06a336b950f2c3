"""A run of one stage, from the first step or from where it was.

To resume, run the same command again: the newest good checkpoint holds parameters, optimizer, EMA and step; the order
of the data and every random draw follow from the seed and the step. On one machine with the same number of threads the
continued run gives the losses and weights of an uninterrupted one, bit for bit.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from mindspore import Tensor, nn

from pipeline import checkpoint
from pipeline.config import ConfigError, differences, dump, read_yaml, to_dict
from pipeline.data.loader import Arrays, Loader
from pipeline.data.shards import DataConfig, Shards
from pipeline.data.text import open_text
from pipeline.errors import UserError
from pipeline.files import lock, write_atomically
from pipeline.log import RunLog
from pipeline.manifest import write_stage
from pipeline.nn.parameters import assign, initialize, num_parameters
from pipeline.nn.text_encoder import TextConfig
from pipeline.train.optimizer import OptimizerConfig
from pipeline.train.step import TrainStep

log = logging.getLogger("cascade")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, and what is kept and shown on the way. `every` counts steps; 0 is never."""

    steps: int = 2_500_000
    accumulate: int = 1  # parts into which a process's batch is cut to save memory
    ema_decay: float = 0.9999
    checkpoint_every: int = 5_000
    keep_checkpoints: int = 3
    report_every: int = 10
    sample_every: int = 5_000
    num_samples: int = 8  # pictures in samples/step_*.png

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "checkpoint_every", "keep_checkpoints", "report_every", "num_samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not positive; give 1 or more")
        if self.sample_every < 0:
            raise ConfigError(f"sample_every: {self.sample_every} is negative; give a number of steps, or 0 for never")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay: {self.ema_decay} is not in [0, 1); 0.9999 is usual")


class Config(Protocol):
    """What the loop reads of a stage's configuration."""

    @property
    def run(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def text(self) -> TextConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def optimizer(self) -> OptimizerConfig: ...
    @property
    def train(self) -> TrainConfig: ...


class Trainee(Protocol):
    """What the loop asks of a stage."""

    network: nn.Cell

    @property
    def config(self) -> Config: ...
    @property
    def window(self) -> int | None: ...
    def batch(
        self, step: int, positions: Sequence[int], pictures: np.ndarray, text_BLD: np.ndarray, mask_BL: np.ndarray
    ) -> Arrays: ...
    def loss(self, *tensors: Tensor) -> Tensor: ...
    def picture(self, pictures: np.ndarray, text_BLD: np.ndarray, mask_BL: np.ndarray) -> np.ndarray: ...
    def facts(self) -> dict[str, Any]: ...


# What may change between two attempts of one run, because the steps done so far would have been the same.
FREE = ("run", "train.steps", "train.checkpoint_every", "train.keep_checkpoints", "train.report_every",
        "train.sample_every", "train.num_samples", "data.workers", "data.max_damage", "data.cache",
        "sample.")  # fmt: skip


def train(stage: Trainee, stop: Callable[[], bool] = bool) -> bool:
    """Trains `stage` to its last step and writes its stage folder; False if `stop()` ended it early, after saving."""
    config = stage.config
    run, places = Path(config.run), share(config)
    shards = Shards.open(config.data)
    text = open_text(config.text, shards)
    with lock(run):  # only now: a mistake in the data leaves no run folder behind
        newest = settle(run, config)
        quarantine = run / "quarantine.jsonl"
        loader = Loader(shards, text, config.seed, config.size, stage.window, stage.batch, quarantine, places)
        initialize(stage.network, config.seed)
        trainer = TrainStep(
            stage.network,
            stage.loss,
            config.optimizer,
            config.train.steps,
            config.train.ema_decay,
            config.train.accumulate,
        )
        done = resume(newest, trainer, stage.network, shards) if newest else 0
        log.info(
            "%s: %.2fM parameters, %d samples in %d shards, %s, step %d of %d",
            *(run, num_parameters(stage.network) / 1e6, len(shards), len(shards.indexes), shards.account(), done),
            config.train.steps,
        )
        finished = done >= config.train.steps or steps(stage, loader, trainer, done, stop)
        if finished:
            write_stage(
                run / "stage", manifest(stage, text.recipe.encoder, max(done, config.train.steps)), trainer.average()
            )
            log.info("%s: done, the stage is in %s", run, run / "stage")
        return finished


def steps(stage: Trainee, loader: Loader, trainer: TrainStep, done: int, stop: Callable[[], bool]) -> bool:
    """From step `done` to the last; False if stopped before."""
    config, run = stage.config.train, Path(stage.config.run)
    log.info("compiling the training step, once a run")
    with RunLog(run, done, config.steps) as report:
        since, last = time.perf_counter(), done
        for step, parts in enumerate(trainer.ahead(loader.batches(done, config.steps)), done + 1):
            loss, norm = trainer(parts)
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise ArithmeticError(
                    f"{run}: step {step}: loss {loss}, gradient norm {norm}; the checkpoint before is intact: lower "
                    "optimizer.lr or look at the data"
                )
            report.advance(step)
            if step % config.report_every == 0 or step == config.steps:
                seconds = (time.perf_counter() - since) / (step - last)
                report.report(
                    step,
                    {
                        "loss": loss,
                        "lr": trainer.lr(step - 1),
                        "grad_norm": norm,
                        "images_per_second": stage.config.data.global_batch / seconds,
                        "seconds": seconds,
                        "quarantined": len(loader.quarantine.known),
                    },
                )
                since, last = time.perf_counter(), step
            if config.sample_every and step % config.sample_every == 0:
                with trainer.averaged():
                    report.picture(step, stage.picture(*loader.first(config.num_samples)))
            stopping = stop()
            if step % config.checkpoint_every == 0 or step == config.steps or stopping:
                state = {"step": step, "data": loader.shards.digest}
                checkpoint.save(run / "checkpoints", step, trainer.state(), state, keep=config.keep_checkpoints)
            if stopping and step < config.steps:
                log.info("%s: stopped after step %d, saved; the same command goes on from there", run, step)
                return False
    return True


def settle(run: Path, config: Config) -> Path | None:
    """The checkpoint to go on from, if any, once the configuration is known to be the run's own; saves it."""
    newest = checkpoint.newest(run / "checkpoints")
    saved = run / "config.yaml"
    if newest and saved.exists():
        for path, before, now in differences(read_yaml(saved), to_dict(config)):
            if not path.startswith(FREE):
                raise UserError(
                    f"{path}: was {before} when {run} was trained to {newest.name} and is {now} now; take the old "
                    "value, or another run folder"
                )
    write_atomically(saved, dump(config).encode())
    return newest


def resume(path: Path, trainer: TrainStep, network: nn.Cell, shards: Shards) -> int:
    """Loads the checkpoint and answers its step. UserError if the data are no longer those that led to it."""
    tensors, state = checkpoint.load(path)
    if state.get("data", shards.digest) != shards.digest:
        raise UserError(
            f"data.shards: the samples are no longer those that {path} was trained on (there are {len(shards):,} now; "
            "a shard was changed, added, lost or indexed anew): put them back, or take another run folder"
        )
    assign(network, tensors["model"], str(path / "model.safetensors"))
    trainer.load(tensors, str(path))
    log.info("resuming from %s", path)
    return int(state["step"])


def share(config: Config) -> range:
    """This process's places in the global batch: all of them, as a job is one process."""
    if config.data.global_batch % config.train.accumulate:
        raise UserError(
            f"data.global_batch: {config.data.global_batch} is not a multiple of {config.train.accumulate}, the parts "
            "that train.accumulate cuts it into"
        )
    return range(config.data.global_batch)


def manifest(stage: Trainee, fingerprint: str, step: int) -> dict[str, Any]:
    """stage.json, but for the weights' sum."""
    config: dict[str, Any] = to_dict(stage.config)
    return {
        "kind": config["kind"],
        "size_out": config["size"],
        "channels": 3,
        **{name: config["diffusion"][name] for name in ("schedule", "prediction", "loss")},
        **stage.facts(),
        "text": {
            "fingerprint": fingerprint,
            "length": stage.config.text.length,
            "width": stage.config.text.width,
            "clean": stage.config.text.clean,
        },
        "ema_decay": stage.config.train.ema_decay,
        "step": step,
        "config": config,
    }
