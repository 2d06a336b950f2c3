"""One training step: gradients of micro-batches, their sum over ranks, and the update.

A rank's batch is split into `train.grad_accum_steps` equal micro-batches, so that memory holds the
activations of one micro-batch only. A step whose loss or gradient is not finite is skipped:
parameters, optimizer and EMA stay as they are, on all ranks, as all of them see the same sum.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from mindspore import Tensor, ops, value_and_grad
from mindspore import dtype as mstype

from pipeline import device
from pipeline.train.compile_cache import CompileCache
from pipeline.train.config import TrainConfig
from pipeline.train.optimizer import OptimizerConfig
from pipeline.train.precision import LossScale
from pipeline.train.state import TrainState

Batch = tuple[np.ndarray, ...]  # what the loss takes, each array with one row per image
MicroBatches = list[tuple[Tensor, ...]]
Source = TypeVar("Source")
Ready = TypeVar("Ready")


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The outcome of a step, the same on all ranks."""

    loss: float  # mean over the images of the global batch
    grad_norm: float  # of the mean gradient, before clipping
    num_stop_requests: int = 0  # ranks that asked to stop
    loss_scale_overflow: bool = False  # not finite because the loss scale was too large

    @property
    def applied(self) -> bool:
        """Whether the parameters were updated."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def never() -> bool:
    """Asks never to stop."""
    return False


class TrainStep:
    """The training step of one rank.

    Args:
        loss: positional tensors -> loss of each image (B,), through the network whose parameters
            are `state`'s.
        state: what is updated.
        optimizer_config: its `max_grad_norm` is the norm to which a longer gradient is clipped.
        train_config: `grad_accum_steps`, and `precision`, which decides the loss scale.
        compile_cache: compiles the gradient.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        state: TrainState,
        optimizer_config: OptimizerConfig,
        train_config: TrainConfig,
        compile_cache: CompileCache | None = None,
    ) -> None:
        self.state = state
        self.max_grad_norm = optimizer_config.max_grad_norm
        self.grad_accum_steps = train_config.grad_accum_steps
        self.loss_scale = LossScale(train_config.precision)

        cache = compile_cache or CompileCache()
        self.gradient = cache.compile(self.bucket_gradients(loss), state.parameters)

    def bucket_gradients(self, loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        """(loss scale, *micro-batch) -> the scaled loss, its gradient as one vector per bucket."""
        lengths = [(len(bucket.parameters), bucket.padding) for bucket in self.state.buckets]

        def scaled_loss(scale: Tensor, *micro_batch: Tensor) -> Tensor:
            # Scaled before the gradient is computed, whose small values float16 would lose.
            return loss(*micro_batch).mean() * scale

        gradient = value_and_grad(scaled_loss, None, self.state.parameters)

        def compute(scale: Tensor, *micro_batch: Tensor) -> tuple[Tensor, ...]:
            value, gradients = gradient(scale, *micro_batch)

            # The gradients are in the order of the parameters, so each bucket is a run of them.
            vectors: tuple[Tensor, ...] = ()
            first = 0
            for length, padding in lengths:
                pieces: tuple[Tensor, ...] = ()
                for piece in gradients[first : first + length]:
                    pieces = (*pieces, piece.reshape(-1))
                if padding:
                    pieces = (*pieces, ops.zeros(padding, mstype.float32))
                vectors = (*vectors, ops.cat(pieces))
                first = first + length
            return value, *vectors

        return compute

    def micro_batches(self, batch: Batch) -> MicroBatches:
        """`batch` on the device, split into as many micro-batches as are accumulated."""
        return split(batch, self.grad_accum_steps)

    def __call__(
        self, micro_batches: MicroBatches, should_stop: Callable[[], bool] = never
    ) -> StepResult:
        """Trains on `micro_batches`, together with the other ranks.

        `should_stop` is whether this rank wants the job to stop; the result has the number of ranks
        that do.
        """
        group = self.state.group
        scale = self.loss_scale.value
        vectors, scaled_loss = self.accumulate(micro_batches, scale)

        # One collective per bucket; the loss and the stop requests share the last one.
        sums, (loss_sum, num_stop_requests) = group.all_reduce_sum(
            vectors, (scaled_loss / scale, should_stop())
        )

        num_micro_batches = self.grad_accum_steps * group.world
        # Turns the sum over micro-batches of scaled gradients into the gradient of the mean loss.
        factor = 1 / (num_micro_batches * scale)

        # Padding is left out of the norm, as its length depends on the number of ranks.
        lengths = [bucket.size - bucket.padding for bucket in self.state.buckets]
        grad_norm = math.sqrt(device.sum_of_squares(sums, lengths)) * factor
        loss = loss_sum / num_micro_batches

        # All ranks see the same sums, so all of them apply the step or none does.
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            # Clipping is a part of the factor, so that no vector is scaled twice.
            clip = min(1.0, self.max_grad_norm / max(grad_norm, 1e-12))
            self.state.update(sums, factor * clip)
        return StepResult(
            loss=loss,
            grad_norm=grad_norm,
            num_stop_requests=int(num_stop_requests),
            loss_scale_overflow=self.loss_scale.update(finite),
        )

    def accumulate(
        self, micro_batches: MicroBatches, loss_scale: float
    ) -> tuple[list[Tensor], float]:
        """The sums over the micro-batches of the gradient, one vector per bucket, and of the loss,
        both scaled.
        """
        scale = Tensor(loss_scale, mstype.float32)
        sums: list[Tensor] = []
        loss_sum = 0.0

        for micro_batch in micro_batches:
            loss, *vectors = self.gradient(scale, *micro_batch)
            loss_sum += float(loss.asnumpy())
            if sums:
                sums = [total + vector for total, vector in zip(sums, vectors, strict=True)]
            else:
                sums = vectors

        return sums, loss_sum


def split(batch: Batch, num_parts: int) -> MicroBatches:
    """`batch` as tensors on the device, in `num_parts` equal parts."""
    parts = zip(*(np.split(array, num_parts) for array in batch), strict=True)
    return [tuple(map(device.to_device, part)) for part in parts]


def prefetch(sources: Iterator[Source], prepare: Callable[[Source], Ready]) -> Iterator[Ready]:
    """`prepare` of each source, called for the next one before this one is yielded: a copy to the
    device then overlaps the step.
    """
    current = None
    for source in sources:
        following = prepare(source)
        if current is not None:
            yield current
        current = following

    if current is not None:
        yield current
