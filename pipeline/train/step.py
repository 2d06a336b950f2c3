"""One training step: gradients, their sum over parts and ranks, and what `TrainState` makes of it.

The batch of a rank is cut into `grad_accum_steps` equal parts, so that memory holds the activations of
one part only. A step whose loss or gradient is not finite is not taken: parameters, optimizer and
EMA stay as they are, on all ranks, as all of them see the same sum.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from mindspore import Tensor, ops, value_and_grad
from mindspore import dtype as mstype

from pipeline import device
from pipeline.train.compile_cache import CompileCache
from pipeline.train.precision import LossScale
from pipeline.train.state import TrainState


class StepResult(NamedTuple):
    """Of a step: mean loss and norm of the gradient before clipping, over all ranks; how many asked
    to stop; whether the loss scale had been too large.
    """

    loss: float
    norm: float
    stops: int = 0
    overflow: bool = False

    @property
    def taken(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class TrainStep:
    """The step of one rank.

    Args:
        loss: positional tensors -> loss of each image (B,), through the network whose parameters
            are `state`'s.
        state: what is trained.
        max_grad_norm: largest norm of the mean gradient; a longer one is shortened to it.
        grad_accum_steps: how many parts a rank's batch is cut into.
        scale: by which the loss is multiplied while its gradient is taken.
        graphs: what compiles.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        state: TrainState,
        max_grad_norm: float,
        grad_accum_steps: int = 1,
        scale: LossScale | None = None,
        graphs: CompileCache | None = None,
    ) -> None:
        self.state, self.max_grad_norm, self.grad_accum_steps, self.scale = (
            state,
            max_grad_norm,
            grad_accum_steps,
            scale or LossScale(),
        )
        self.gradient = (graphs or CompileCache()).compile(self.part(loss), state.parameters)

    def part(self, loss: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        """(loss scale, batch) -> the scaled loss, and its gradient as a vector for each bucket."""
        lengths = [(len(bucket.parameters), bucket.padding) for bucket in self.state.buckets]

        def scaled(scale: Tensor, *batch: Tensor) -> Tensor:
            return loss(*batch).mean() * scale

        gradient = value_and_grad(scaled, None, self.state.parameters)

        def part(scale: Tensor, *batch: Tensor) -> tuple[Tensor, ...]:
            value, gradients = gradient(scale, *batch)
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

        return part

    def parts(self, batch: tuple[np.ndarray, ...]) -> list[tuple[Tensor, ...]]:
        """What a step takes: `batch` on the device, in as many parts as are accumulated."""
        parts = zip(*(np.split(array, self.grad_accum_steps) for array in batch), strict=True)
        return [tuple(map(device.to_device, part)) for part in parts]

    def ahead(
        self, batches: Iterator[tuple[np.ndarray, ...]]
    ) -> Iterator[list[tuple[Tensor, ...]]]:
        """The parts of each batch, those of the next one already on their way while a step is made
        of these.
        """
        now = None
        for batch in batches:
            later = self.parts(batch)
            if now is not None:
                yield now
            now = later
        if now is not None:
            yield now

    def __call__(
        self, parts: list[tuple[Tensor, ...]], stop: Callable[[], bool] = bool
    ) -> StepResult:
        """Trains on what `parts` gave, together with the other ranks; `stop` says whether this one
        is to end.
        """
        ranks = self.state.ranks
        scale, sums, mine = Tensor(self.scale.value, mstype.float32), list[Tensor](), 0.0
        for part in parts:
            value, *vectors = self.gradient(scale, *part)
            mine += float(value.asnumpy())
            sums = (
                [total + new for total, new in zip(sums, vectors, strict=True)] if sums else vectors
            )
        sums, (total, stops) = ranks.sum(sums, (mine / self.scale.value, stop()))
        factor = 1 / (self.grad_accum_steps * ranks.world * self.scale.value)
        lengths = [bucket.size - bucket.padding for bucket in self.state.buckets]
        norm = math.sqrt(device.sum_of_squares(sums, lengths)) * factor
        outcome = StepResult(total / (self.grad_accum_steps * ranks.world), norm, int(stops))
        overflow = self.scale.after(outcome.taken)
        if outcome.taken:
            self.state.update(sums, factor * min(1.0, self.max_grad_norm / max(norm, 1e-12)))
        return outcome._replace(overflow=overflow)
