"""One training step: gradients, their sum over parts and ranks, and from it the clip, the optimizer and the EMA.

    part     compiled: loss and gradient of a part of this rank's batch, added up in a buffer for each parameter
    sum      over the ranks, in one call of `collectives`
    norm     of the mean gradient
    finish   compiled: clip, optimizer, EMA

The batch of a rank is cut into `accumulate` equal parts, so that memory holds the activations of one part only. Before
`finish` stands the decision that a step whose loss or gradient is not finite is not taken: parameters, optimizer and
EMA stay as they are, on all ranks, as all of them see the same sum.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops, value_and_grad
from mindspore import dtype as mstype

from pipeline import runtime
from pipeline.errors import UserError
from pipeline.nn.parameters import put
from pipeline.train.collectives import Ranks
from pipeline.train.optimizer import OptimizerConfig, clip, learning_rate, optimizer


class Outcome(NamedTuple):
    """Of a step: mean loss and norm of the gradient before clipping, over all ranks; how many asked to stop."""

    loss: float
    norm: float
    stops: int = 0

    @property
    def taken(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class TrainStep:
    """Parameters in training with their optimizer and their exponential moving average.

    Args:
        network: whose parameters are trained.
        loss: positional tensors -> loss of each image (B,), through `network`.
        config, steps: the optimizer, and the length of its learning-rate schedule.
        ema_decay: share of the average that stays, each step. It grows from 0.1 to this as (1 + step) / (10 + step), so
            that the average of a young run is not its initial weights.
        accumulate: how many parts a rank's batch is cut into.
        ranks: among whom the global batch is divided.
    """

    def __init__(
        self,
        network: nn.Cell,
        loss: Callable[..., Tensor],
        config: OptimizerConfig,
        steps: int,
        ema_decay: float,
        accumulate: int,
        ranks: Ranks | None = None,
    ) -> None:
        self.parameters = ParameterTuple(network.trainable_params())
        self.rate = learning_rate(config, steps)
        self.optimizer = optimizer(config, list(self.parameters), self.rate)
        self.ema = self.parameters.clone("ema", init="same")
        self.accumulate, self.ranks = accumulate, ranks or Ranks()
        self.buffers = self.parameters.clone("sum", init="zeros")
        num_parts = accumulate * self.ranks.world
        parameters, average, buffers, update_weights = self.parameters, self.ema, self.buffers, self.optimizer
        limit = clip(config)
        ema_step = Parameter(Tensor(0.0, mstype.float32), name="ema_step", requires_grad=False)
        own = {p.name for p in self.parameters}
        self.moments = [*(p for p in self.optimizer.get_parameters() if p.name not in own), ema_step]

        def mean_loss(*batch: Tensor) -> Tensor:
            return loss(*batch).mean()

        gradient = value_and_grad(mean_loss, None, parameters)

        def part(*batch: Tensor) -> Tensor:
            value, gradients = gradient(*batch)
            for total, new in zip(buffers, gradients):  # noqa: B905  (the compiler has no `strict`)
                if accumulate == 1:
                    ops.assign(total, new)
                else:
                    ops.assign_add(total, new)
            return value

        def finish() -> Tensor:
            gradients: tuple[Tensor, ...] = ()
            for total in buffers:
                gradients = (*gradients, total if num_parts == 1 else total / num_parts)
            clipped, norm = limit(gradients)
            norm = ops.depend(norm, update_weights(clipped))
            decay = ops.minimum((1.0 + ema_step) / (10.0 + ema_step), ema_decay)
            for mean, parameter in zip(average, parameters):  # noqa: B905
                ops.assign(mean, mean * decay + ops.depend(parameter, norm) * (1.0 - decay))
            ops.assign(ema_step, ema_step + 1.0)
            if accumulate > 1:
                for total in buffers:
                    ops.assign(total, ops.depend(ops.zeros_like(total), norm))
            return norm

        self._part, self._finish = map(runtime.compile, (part, finish))

    def parts(self, batch: tuple[np.ndarray, ...]) -> list[tuple[Tensor, ...]]:
        """What a step takes: `batch` on the device, in as many parts as are accumulated."""
        parts = zip(*(np.split(array, self.accumulate) for array in batch), strict=True)
        return [tuple(map(runtime.to_device, part)) for part in parts]

    def ahead(self, batches: Iterator[tuple[np.ndarray, ...]]) -> Iterator[list[tuple[Tensor, ...]]]:
        """The parts of each batch, those of the next one already on their way while a step is made of these."""
        now = None
        for batch in batches:
            later = self.parts(batch)
            if now is not None:
                yield now
            now = later
        if now is not None:
            yield now

    def __call__(self, parts: list[tuple[Tensor, ...]], stop: Callable[[], bool] = bool) -> Outcome:
        """Trains on what `parts` gave, together with the other ranks; `stop` says whether this one is to end."""
        losses = [float(self._part(*part).asnumpy()) for part in parts]
        loss, stops = self.ranks.sum(self.buffers, (sum(losses) / self.accumulate, stop()))
        norm = math.sqrt(runtime.sum_of_squares(self.buffers)) / self.accumulate / self.ranks.world
        outcome = Outcome(loss / self.ranks.world, norm, int(stops))
        if outcome.taken:
            self._finish().asnumpy()  # waits: whoever reads the parameters next shall not see half a step
        else:
            for total in self.buffers if self.accumulate > 1 else ():
                put(total, np.zeros(total.shape, np.float32))
        return outcome

    def lr(self, step: int) -> float:
        """The learning rate of step `step`, from 0."""
        return float(np.squeeze(self.rate(Tensor(step, mstype.int32)).asnumpy()))

    def average(self) -> dict[str, np.ndarray]:
        """The EMA weights under the names of the network's parameters."""
        return {p.name: mean.asnumpy() for p, mean in zip(self.parameters, self.ema, strict=True)}

    def begin(self) -> None:
        """Gives all ranks what rank 0 has: parameters, average, optimizer."""
        self.ranks.broadcast([*self.parameters, *self.ema, *self.moments])

    def differing(self) -> list[int]:
        """The ranks whose parameters are no longer those of the others, bit for bit."""
        digest = blake2b(digest_size=8)
        for parameter in self.parameters if self.ranks.world > 1 else ():
            digest.update(np.ascontiguousarray(parameter.asnumpy()).data)
        return self.ranks.differing(digest.digest())

    def state(self) -> dict[str, dict[str, np.ndarray]]:
        """What a checkpoint holds: `model`, `ema` and `optimizer`, each name -> array.

        On a CPU the arrays are the parameters' own memory: save or copy them before the next step.
        """
        return {
            "model": {p.name: p.asnumpy() for p in self.parameters},
            "ema": self.average(),
            "optimizer": {p.name: p.asnumpy() for p in self.moments},
        }

    def load(self, state: dict[str, dict[str, np.ndarray]], where: str) -> None:
        """Puts back what `state` gave, except for the model's own parameters. UserError where something is missing."""
        wanted = [("ema", p.name, mean) for p, mean in zip(self.parameters, self.ema, strict=True)]
        wanted += [("optimizer", p.name, p) for p in self.moments]
        for file, name, parameter in wanted:
            found = state[file].get(name)
            if found is None or found.shape != tuple(parameter.shape):
                raise UserError(
                    f"{where}/{file}.safetensors: '{name}' is {'missing' if found is None else list(found.shape)} and "
                    f"this run wants {list(parameter.shape)}; it was made by another configuration"
                )
            put(parameter, found)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network has its EMA weights inside, its own again after."""
        own = [p.asnumpy().copy() for p in self.parameters]
        for p, mean in zip(self.parameters, self.ema, strict=True):
            put(p, mean.asnumpy())
        try:
            yield
        finally:
            for p, array in zip(self.parameters, own, strict=True):
                put(p, array)
