"""Training one stage, from the first step or from the newest checkpoint.

To resume, run the same command again: the newest undamaged checkpoint holds parameters, optimizer,
EMA and step; the order of the data and every random draw follow from the seed and the step. On one
machine with the same number of threads and ranks, a resumed run gives the losses and weights of an
uninterrupted one, bit for bit. With another number of ranks it sees the same samples and gives the
same losses up to rounding.

All ranks execute the same lines. Only rank 0 reads and writes the run folder, reports and samples;
the others wait for it, or learn the result, in their next collective.
"""

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from hashlib import blake2b
from pathlib import Path

from pipeline import runtime
from pipeline.config import dump
from pipeline.data.loader import Loader
from pipeline.data.shards import Shards
from pipeline.errors import JobError, UserError
from pipeline.files import lock
from pipeline.log import RunLog
from pipeline.nn.parameters import initialize, num_parameters
from pipeline.stage.config import StageConfig
from pipeline.stage.manifest import manifest_of, write_stage
from pipeline.stage.stage import Stage
from pipeline.text.prompts import Prompts, open_prompts
from pipeline.train import checkpoint
from pipeline.train.compile_cache import CompileCache
from pipeline.train.heartbeat import Heartbeat
from pipeline.train.precision import cast_matmuls
from pipeline.train.process_group import ProcessGroup
from pipeline.train.resume import Progress, prepare_run_dir, resumable_state, resume
from pipeline.train.state import TrainState
from pipeline.train.step import MicroBatches, StepResult, TrainStep, never, prefetch
from pipeline.train.validation import Validation, ValidationSet

log = logging.getLogger("cascade")


def train(stage: Stage, should_stop: Callable[[], bool] = never) -> bool:
    """Trains `stage` to its last step and writes its stage folder, as one of the job's ranks.

    Returns False if `should_stop()`, on any rank, ended it early, after saving. UserError if
    something is wrong with configuration, data or run folder; JobError if ranks are lost or
    disagree.
    """
    job = runtime.start_communication()
    if job.rank:
        # Rank 0 reports for all.
        log.setLevel(logging.WARNING)

    heartbeat = Heartbeat(runtime.attempt_dir(), job.rank)
    heartbeat.beat("starting")
    try:
        is_finished = train_in_group(
            stage, ProcessGroup(job.rank, job.world_size), heartbeat, should_stop
        )
    # Of any kind: the supervisor has to learn of an interrupt or an exit too.
    except BaseException as error:
        heartbeat.beat("failed", error=error)
        raise

    heartbeat.beat("finished")
    return is_finished


def train_in_group(
    stage: Stage, group: ProcessGroup, heartbeat: Heartbeat, should_stop: Callable[[], bool]
) -> bool:
    """`train`, as a rank of `group`."""
    config = stage.config
    folder = Path(config.run)

    # What may be wrong in configuration or data is found here: first the division of the batch, as
    # indexing the shards may take long.
    share = positions_of_rank(config, group.rank, group.world)
    shards = Shards.open(config.data, progress=group.is_main)
    validates = group.is_main and config.train.validate_every
    validation_shards = shards.open_validation() if validates else None
    data_sets = [shards] if validation_shards is None else [shards, validation_shards]
    prompts, *validation_prompts = open_prompts(config.text, config.classes, data_sets)
    cast_matmuls(stage.network, config.train.precision)

    # The run folder is made only now: a mistake in the configuration leaves none behind.
    with lock(folder) if group.is_main else nullcontext():
        newest = prepare_run_dir(folder, config) if group.is_main else None
        # When this returns, the run folder is there on all ranks.
        check_ranks_agree(group, config, shards)

        loader = open_loader(stage, shards, prompts, share)
        validation = None
        if validation_shards is not None:
            samples = ValidationSet(shards=validation_shards, prompts=validation_prompts[0])
            validation = Validation(stage, samples, loader.quarantine)
        trainer = Trainer(stage, loader, group, heartbeat, validation)
        trainer.resume(newest)

        is_finished = trainer.is_finished or trainer.train(should_stop)
        # Also where the last step was done by an attempt that did not get to the stage folder.
        if is_finished:
            trainer.write_stage(prompts)
        return is_finished


class Trainer:
    """A rank's training of one stage: the loop, and what each step leaves.

    Args:
        stage: what is trained. Its network is initialized here.
        loader: this rank's share of the batches.
        group: the ranks of the job.
        heartbeat: reports what this rank does.
        validation: of rank 0, if there is one.
    """

    def __init__(
        self,
        stage: Stage,
        loader: Loader,
        group: ProcessGroup,
        heartbeat: Heartbeat,
        validation: Validation | None = None,
    ) -> None:
        self.stage = stage
        self.loader = loader
        self.group = group
        self.heartbeat = heartbeat
        self.validation = validation
        self.config = stage.config.train
        self.folder = Path(stage.config.run)
        self.progress = Progress()
        self.skipped_in_a_row = 0

        # From the seed alone, so that all ranks start with the same weights.
        initialize(stage.network, stage.config.seed)
        shaped_by = f"{group.world} ranks\n{dump(stage.config)}"
        self.compile_cache = CompileCache(self.folder, group.rank, stage, shaped_by)

        optimizer = stage.config.optimizer
        self.state = TrainState(stage.network, optimizer, self.config, group, self.compile_cache)
        self.train_step = TrainStep(
            stage.loss, self.state, optimizer, self.config, self.compile_cache
        )

    @property
    def is_finished(self) -> bool:
        return self.progress.step >= self.config.steps

    def resume(self, newest: Path | None) -> None:
        """Restores the checkpoint `newest`, which only rank 0 needs to know."""
        self.progress = resume(newest, self.train_step, self.loader.shards)

        shards = self.loader.shards
        log.info(
            "%s: %.2fM parameters, %d samples in %d shards, %s, %d ranks, step %d of %d",
            self.folder,
            num_parameters(self.stage.network) / 1e6,
            len(shards),
            len(shards.indexes),
            shards.exclusion_summary(),
            self.group.world,
            self.progress.step,
            self.config.steps,
        )

    def train(self, should_stop: Callable[[], bool]) -> bool:
        """Trains from here to the last step; False if it was stopped before."""
        log.info("%s the training step", "loading" if self.compile_cache.warm else "compiling")
        self.heartbeat.beat("compiling", self.progress.step)
        config = self.config
        done = self.progress.step

        with (
            RunLog(self.folder, done, config.steps, enabled=self.group.is_main) as run_log,
            checkpoint.Writer(self.folder / "checkpoints", config.keep_checkpoints) as writer,
        ):
            timer = StepTimer(done)

            arrays = self.loader.batches(done, config.steps)
            batches = map(self.stage.loss_inputs.flatten, arrays)
            for micro_batches in prefetch(batches, self.train_step.micro_batches):
                result = self.next_step(micro_batches, should_stop)
                is_stopping = result.num_stop_requests > 0
                # A save that failed in the background ends the training now, not at the next save.
                writer.check()

                run_log.advance(self.progress.step)
                if self.is_due(config.report_every) or self.is_finished:
                    self.report(run_log, result, timer)
                if self.is_due(config.check_every) or self.is_finished:
                    self.state.check_weights_agree(self.progress.step)

                # Saved before what may fail.
                if self.is_due(config.checkpoint_every) or self.is_finished or is_stopping:
                    self.save(writer)
                if self.stage.config.data.validation and self.is_due(config.validate_every):
                    self.validate(run_log)
                if self.is_due(config.sample_every):
                    self.sample(run_log)

                if is_stopping and not self.is_finished:
                    # The save has only begun: the message must not come before it is on the disk.
                    writer.join()
                    log.info("%s: stopped and saved; the same command resumes the run", self.where)
                    return False
        return True

    def next_step(self, micro_batches: MicroBatches, should_stop: Callable[[], bool]) -> StepResult:
        """Runs one step and counts it. JobError if too many in a row were skipped."""
        result = self.train_step(micro_batches, should_stop)
        if result.applied:
            # Both the gradient and the update have run, and so were compiled.
            self.compile_cache.commit()

        self.progress = Progress(
            step=self.progress.step + 1,
            num_skipped=self.progress.num_skipped + (not result.applied),
        )
        self.heartbeat.beat("training", self.progress.step)
        self.skipped_in_a_row = count_skipped(
            result, self.skipped_in_a_row, self.config.max_skipped, self.where
        )
        return result

    @property
    def where(self) -> str:
        """The run and its step, for messages."""
        return f"{self.folder}: step {self.progress.step}"

    def is_due(self, every: int) -> bool:
        """Whether this is one of the steps that come `every` so many; 0 is never."""
        return every > 0 and self.progress.step % every == 0

    def report(self, run_log: RunLog, result: StepResult, timer: "StepTimer") -> None:
        """Writes the metrics of this step."""
        if not self.group.is_main:
            return

        seconds = timer.seconds_per_step(self.progress.step)
        # The learning-rate schedule counts applied steps only, from 0.
        applied = self.progress.step - 1 - self.progress.num_skipped
        run_log.report(
            self.progress.step,
            {
                "loss": result.loss,
                "lr": self.state.lr(applied),
                "grad_norm": result.grad_norm,
                "images_per_second": self.stage.config.data.global_batch / seconds,
                "seconds": seconds,
                "quarantined": len(self.loader.quarantine.listed),
                "skipped": self.progress.num_skipped,
            },
        )

    def save(self, writer: checkpoint.Writer) -> None:
        """Starts to write a checkpoint. All ranks have to call it, as each gives its shard."""
        self.heartbeat.beat("checkpoint")
        files = self.state.files()
        if self.group.is_main:
            state = resumable_state(self.progress, self.train_step.loss_scale, self.loader.shards)
            writer.save(self.progress.step, files, state)

    def validate(self, run_log: RunLog) -> None:
        """Reports the loss of the validation samples. All ranks have to call it, as each gives its
        shard of the EMA weights.
        """
        self.heartbeat.beat("validation")
        # Before the network has other weights.
        raw_losses = self.validation.losses() if self.validation else None
        with self.state.ema_in_network():
            if self.validation and raw_losses is not None:
                metrics = self.validation.metrics(self.validation.losses(), raw_losses)
                run_log.report_validation(self.progress.step, metrics)

    def sample(self, run_log: RunLog) -> None:
        """Samples with the EMA weights. All ranks have to call it, as each gives its shard."""
        self.heartbeat.beat("sampling")
        with self.state.ema_in_network():
            if self.group.is_main:
                images, prompt = self.loader.first(self.config.num_samples)
                run_log.image(self.progress.step, self.stage.sample_grid(images, prompt))

    def write_stage(self, prompts: Prompts) -> None:
        """Writes the stage folder. All ranks have to call it, as each gives its shard."""
        weights = self.state.ema_weights()
        if self.group.is_main:
            # A run that was finished before may have more steps than are configured now.
            step = max(self.progress.step, self.config.steps)
            manifest = manifest_of(self.stage, prompts.manifest_fields, step)
            write_stage(self.folder / "stage", manifest, weights)
            log.info("%s: done, the stage is in %s", self.folder, self.folder / "stage")


class StepTimer:
    """Measures the mean duration of steps between two reports."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.time = time.perf_counter()

    def seconds_per_step(self, step: int) -> float:
        """Seconds per step since the last call; `step` is how many are done."""
        now = time.perf_counter()
        seconds = (now - self.time) / (step - self.step)
        self.step = step
        self.time = now
        return seconds


def open_loader(stage: Stage, shards: Shards, prompts: Prompts, share: range) -> Loader:
    """The loader of this rank's `share` of the global batch."""
    config = stage.config
    return Loader(
        shards,
        prompts,
        seed=config.seed,
        size=stage.image_size,
        make_inputs=stage.training_inputs,
        quarantine=Path(config.run) / "quarantine.jsonl",
        share=share,
    )


def positions_of_rank(config: StageConfig, rank: int = 0, world: int = 1) -> range:
    """The positions in the global batch that `rank` trains on.

    UserError if the batch cannot be divided into equal micro-batches.
    """
    batch = config.data.global_batch
    accumulated = config.train.grad_accum_steps
    parts = world * accumulated
    if batch % parts:
        raise UserError(
            f"data.global_batch: {batch} is not a multiple of {parts}, the number of micro-batches "
            f"with {world} ranks and train.grad_accum_steps={accumulated}; give "
            f"{-(-batch // parts) * parts}"
        )

    # Exact, as the batch is a multiple of the number of ranks.
    return range(rank * batch // world, (rank + 1) * batch // world)


def check_ranks_agree(group: ProcessGroup, config: StageConfig, shards: Shards) -> None:
    """Waits for all ranks. UserError unless they have the same configuration and samples."""
    # Digests, as an all-gather takes equally long inputs.
    text = f"{shards.digest} {dump(config)}"
    mismatching = group.mismatching_ranks(blake2b(text.encode(), digest_size=8).digest())
    if mismatching:
        raise UserError(
            f"rank {', '.join(map(str, mismatching))} has another configuration or other samples "
            f"than the other ranks: give all {group.world} the same command, and the same shards "
            "in data.shards"
        )


def count_skipped(result: StepResult, in_a_row: int, limit: int, where: str) -> int:
    """How many consecutive steps were skipped, given that `in_a_row` were before this one.

    JobError if they are `limit`. A step whose loss scale overflowed is expected and does not count.
    """
    if result.applied:
        return 0
    if result.loss_scale_overflow:
        log.info("%s: gradient overflow, the loss scale is halved", where)
        return in_a_row

    problem = f"{where}: loss {result.loss}, gradient norm {result.grad_norm}"
    if in_a_row + 1 == limit:
        raise JobError(
            f"{problem}, the last of {limit} consecutive steps that were skipped "
            "(train.max_skipped); lower optimizer.lr or look at the data; the last checkpoint is "
            "good"
        )
    log.warning("%s: step skipped", problem)
    return in_a_row + 1
