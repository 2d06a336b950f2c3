"""One training step as one compiled graph: loss, gradients, clip, optimizer, EMA.

With accumulation the batch is cut into equal parts: each adds its gradient to a buffer by one graph, and a second one
takes the step, so that memory holds the activations of one part only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops, value_and_grad
from mindspore import dtype as mstype

from pipeline import runtime
from pipeline.errors import UserError
from pipeline.nn.parameters import put
from pipeline.train.optimizer import OptimizerConfig, clip, learning_rate, optimizer


class TrainStep:
    """Parameters in training with their optimizer and their exponential moving average.

    Args:
        network: whose parameters are trained.
        loss: positional tensors -> loss of each image (B,), through `network`.
        config, steps: the optimizer, and the length of its learning-rate schedule.
        ema_decay: share of the average that stays, each step. It grows from 0.1 to this as (1 + step) / (10 + step), so
            that the average of a young run is not its initial weights.
        accumulate: how many parts a batch is cut into.
    """

    def __init__(
        self,
        network: nn.Cell,
        loss: Callable[..., Tensor],
        config: OptimizerConfig,
        steps: int,
        ema_decay: float,
        accumulate: int,
    ) -> None:
        self.parameters = ParameterTuple(network.trainable_params())
        self.rate = learning_rate(config, steps)
        self.optimizer = optimizer(config, list(self.parameters), self.rate)
        self.ema = self.parameters.clone("ema", init="same")
        self.accumulate = accumulate
        self.buffers = self.parameters.clone("sum", init="zeros") if accumulate > 1 else ()
        parameters, average, buffers, update_weights = self.parameters, self.ema, self.buffers, self.optimizer
        limit = clip(config)
        ema_step = Parameter(Tensor(0.0, mstype.float32), name="ema_step", requires_grad=False)
        own = {p.name for p in self.parameters}
        self.moments = [*(p for p in self.optimizer.get_parameters() if p.name not in own), ema_step]

        def mean_loss(*batch: Tensor) -> Tensor:
            return loss(*batch).mean()

        gradient = value_and_grad(mean_loss, None, parameters)

        def update(gradients: tuple[Tensor, ...]) -> Tensor:
            clipped, norm = limit(gradients)
            norm = ops.depend(norm, update_weights(clipped))
            decay = ops.minimum((1.0 + ema_step) / (10.0 + ema_step), ema_decay)
            for mean, parameter in zip(average, parameters):  # noqa: B905  (the compiler has no `strict`)
                ops.assign(mean, mean * decay + ops.depend(parameter, norm) * (1.0 - decay))
            ops.assign(ema_step, ema_step + 1.0)
            return norm

        def whole(*batch: Tensor) -> tuple[Tensor, Tensor]:
            value, gradients = gradient(*batch)
            return value, update(gradients)

        def part(*batch: Tensor) -> Tensor:
            value, gradients = gradient(*batch)
            for total, new in zip(buffers, gradients):  # noqa: B905
                ops.assign_add(total, new)
            return value

        def finish() -> Tensor:
            gradients: tuple[Tensor, ...] = ()
            for total in buffers:
                gradients = (*gradients, total / accumulate)
            norm = update(gradients)
            for total in buffers:
                ops.assign(total, ops.depend(ops.zeros_like(total), norm))
            return norm

        self._whole, self._part, self._finish = map(runtime.compile, (whole, part, finish))

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

    def __call__(self, parts: list[tuple[Tensor, ...]]) -> tuple[float, float]:
        """Trains on what `parts` gave; answers the mean loss and the gradient's norm before clipping."""
        if self.accumulate == 1:
            loss, norm = self._whole(*parts[0])
            return float(loss.asnumpy()), float(np.squeeze(norm.asnumpy()))
        losses = [float(self._part(*part).asnumpy()) for part in parts]
        return sum(losses) / self.accumulate, float(np.squeeze(self._finish().asnumpy()))

    def lr(self, step: int) -> float:
        """The learning rate of step `step`, from 0."""
        return float(np.squeeze(self.rate(Tensor(step, mstype.int32)).asnumpy()))

    def average(self) -> dict[str, np.ndarray]:
        """The EMA weights under the names of the network's parameters."""
        return {p.name: mean.asnumpy() for p, mean in zip(self.parameters, self.ema, strict=True)}

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
