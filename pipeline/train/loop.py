"""A run of one stage, from the first step or from where it was.

To resume, run the same command again: the newest good checkpoint holds parameters, optimizer, EMA
and step; the order of the data and every random draw follow from the seed and the step. On one
machine with the same number of threads and ranks the continued run gives the losses and weights of
an uninterrupted one, bit for bit; with another number of ranks the same samples and, but for
rounding, the same losses.

All ranks go through the same lines. What only rank 0 does, which is to read and write the run
folder, to report and to sample, the others learn of, or wait for, in their next collective.
"""

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from hashlib import blake2b
from pathlib import Path

from pipeline import runtime
from pipeline.config import dump
from pipeline.data.loader import ImageSize, Loader
from pipeline.data.shards import Shards
from pipeline.errors import JobError, UserError
from pipeline.files import lock
from pipeline.log import RunLog
from pipeline.nn.parameters import initialize, num_parameters
from pipeline.stage.config import StageConfig
from pipeline.stage.manifest import manifest_of, write_stage
from pipeline.stage.stage import Stage
from pipeline.text.prompts import open_prompts
from pipeline.train import checkpoint
from pipeline.train.compile_cache import CompileCache
from pipeline.train.heartbeat import Heartbeat
from pipeline.train.precision import LossScale, cast_matmuls
from pipeline.train.process_group import ProcessGroup
from pipeline.train.resume import facts, prepare_run_dir, resume
from pipeline.train.state import TrainState
from pipeline.train.step import StepResult, TrainStep

log = logging.getLogger("cascade")


def train(stage: Stage, stop: Callable[[], bool] = bool) -> bool:
    """Trains `stage` to its last step and writes its stage folder, as one of the job's ranks.

    False if `stop()`, on any rank, ended it early, after saving. JobError if the ranks do not stay
    together.
    """
    job = runtime.start_communication()
    if job.rank:
        log.setLevel(logging.WARNING)  # rank 0 speaks for all
    heart = Heartbeat(runtime.attempt(), job.rank)
    heart.beat("starting")
    try:
        finished = run(stage, ProcessGroup(job.rank, job.world), heart, stop)
    except BaseException as error:
        heart.beat("failed", error=error)
        raise
    heart.beat("finished")
    return finished


def run(stage: Stage, ranks: ProcessGroup, heart: Heartbeat, stop: Callable[[], bool]) -> bool:
    """`train`, among `ranks`."""
    config, first = stage.config, ranks.rank == 0
    folder, places = Path(config.run), share(config, ranks.rank, ranks.world)
    shards = Shards.open(config.data, progress=first)
    prompts = open_prompts(config.text, config.classes, shards)
    cast_matmuls(stage.network, config.train.precision)
    with (
        lock(folder) if first else nullcontext()
    ):  # only now: a mistake leaves no run folder behind
        newest = prepare_run_dir(folder, config) if first else None
        check_ranks_agree(
            ranks, config, shards
        )  # and so, when the others go on, the run folder is there
        quarantine = folder / "quarantine.jsonl"
        loader = Loader(
            shards,
            prompts,
            seed=config.seed,
            size=ImageSize(side=config.size, window=stage.train_window),
            make_inputs=stage.training_inputs,
            quarantine=quarantine,
            share=places,
        )
        initialize(stage.network, config.seed)
        graphs = CompileCache(folder, ranks.rank, stage, f"{ranks.world} ranks\n{dump(config)}")
        state = TrainState(
            *(stage.network, config.optimizer, config.train.steps, config.train.ema_decay),
            *(ranks, config.train.shard_optimizer, graphs),
        )
        scale = LossScale(config.train.precision)
        trainer = TrainStep(
            stage.loss,
            state,
            config.optimizer.max_grad_norm,
            config.train.grad_accum_steps,
            scale,
            graphs,
        )
        done, skipped = resume(newest, trainer, shards)
        log.info(
            "%s: %.2fM parameters, %d samples in %d shards, %s, %d ranks, step %d of %d",
            *(
                folder,
                num_parameters(stage.network) / 1e6,
                len(shards),
                len(shards.indexes),
                shards.exclusion_summary(),
            ),
            *(ranks.world, done, config.train.steps),
        )
        finished = done >= config.train.steps or steps(
            stage, loader, trainer, graphs, heart, done, skipped, stop
        )
        average = state.average() if finished else {}
        if finished and first:
            write_stage(
                folder / "stage",
                manifest_of(stage, prompts.manifest_fields, max(done, config.train.steps)),
                average,
            )
            log.info("%s: done, the stage is in %s", folder, folder / "stage")
        return finished


def steps(
    stage: Stage,
    loader: Loader,
    trainer: TrainStep,
    graphs: CompileCache,
    heart: Heartbeat,
    done: int,
    skipped: int,
    stop: Callable[[], bool],
) -> bool:
    """From step `done`, of which `skipped` were not taken, to the last; False if stopped before."""
    config, folder, first = (
        stage.config.train,
        Path(stage.config.run),
        trainer.state.ranks.rank == 0,
    )
    log.info("%s the training step", "loading" if graphs.warm else "compiling")
    heart.beat("compiling", done)
    with (
        RunLog(folder, done, config.steps, enabled=first) as report,
        checkpoint.Writer(folder / "checkpoints", config.keep_checkpoints) as writer,
    ):
        since, last, in_a_row = time.perf_counter(), done, 0
        for step, parts in enumerate(
            trainer.ahead(map(stage.training.flatten, loader.batches(done, config.steps))), done + 1
        ):
            outcome = trainer(parts, stop)
            if outcome.taken:
                graphs.keep()
            heart.beat("training", step)
            writer.check()
            skipped += not outcome.taken
            in_a_row = count_skipped(
                outcome, in_a_row, config.max_skipped, f"{folder}: step {step}"
            )
            stopping, ending = outcome.stops > 0, step == config.steps
            report.advance(step)
            if first and (step % config.report_every == 0 or ending):
                seconds = (time.perf_counter() - since) / (step - last)
                report.report(
                    step,
                    {
                        "loss": outcome.loss,
                        "lr": trainer.state.lr(step - 1 - skipped),
                        "grad_norm": outcome.norm,
                        "images_per_second": stage.config.data.global_batch / seconds,
                        "seconds": seconds,
                        "quarantined": len(loader.quarantine.listed),
                        "skipped": skipped,
                    },
                )
                since, last = time.perf_counter(), step
            if ending or (config.check_every and step % config.check_every == 0):
                trainer.state.check_alike(step)
            if (
                step % config.checkpoint_every == 0 or ending or stopping
            ):  # before a picture, which may fail
                heart.beat("checkpoint")
                tensors = trainer.state.files()
                if first:
                    writer.save(step, tensors, facts(step, skipped, trainer.scale, loader.shards))
            if config.sample_every and step % config.sample_every == 0:
                heart.beat("sampling")
                with trainer.state.averaged():
                    if first:
                        report.image(step, stage.sample_grid(*loader.first(config.num_samples)))
            if stopping and not ending:
                writer.join()
                log.info(
                    "%s: stopped after step %d, saved; the same command goes on from there",
                    folder,
                    step,
                )
                return False
    return True


def check_ranks_agree(ranks: ProcessGroup, config: StageConfig, shards: Shards) -> None:
    """Returns when all ranks are here. UserError if they are not about to train the same on the
    same samples.
    """
    others = ranks.mismatching_ranks(
        blake2b(f"{shards.digest} {dump(config)}".encode(), digest_size=8).digest()
    )
    if others:
        raise UserError(
            f"rank {', '.join(map(str, others))} has another configuration or other samples than the other ranks: give "
            f"all {ranks.world} the same command, and the same shards in data.shards"
        )


def count_skipped(outcome: StepResult, before: int, limit: int, where: str) -> int:
    """Steps in a row that were not taken, `before` of them before this one. JobError if they are
    `limit`.
    """
    if outcome.taken:
        return 0
    if outcome.overflow:  # what a loss scale is there for
        log.info("%s: the gradient overflows, the loss scale is halved", where)
        return before
    said = f"{where}: loss {outcome.loss}, gradient norm {outcome.norm}"
    if before + 1 == limit:
        raise JobError(
            f"{said}, and so for {limit} steps in a row (train.max_skipped), none of which was taken; lower "
            "optimizer.lr or look at the data; the last checkpoint is good"
        )
    log.warning("%s: the step is not taken", said)
    return before + 1


def share(config: StageConfig, rank: int = 0, world: int = 1) -> range:
    """The places of `rank` in the global batch. UserError if it cannot be cut into equal parts."""
    batch, parts = config.data.global_batch, world * config.train.grad_accum_steps
    if batch % parts:
        raise UserError(
            f"data.global_batch: {batch} is not a multiple of {parts}, the parts that {world} ranks and "
            f"train.grad_accum_steps={config.train.grad_accum_steps} cut it into; give {-(-batch // parts) * parts}"
        )
    return range(rank * batch // world, (rank + 1) * batch // world)
