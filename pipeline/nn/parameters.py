"""The parameters of a network: initialization, count, and values from outside."""

from collections.abc import Mapping

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from pipeline.errors import UserError
from pipeline.rng import generator


def put(parameter: Parameter, values: np.ndarray) -> None:
    """Writes `values` into `parameter` in place, so that compiled graphs see them.

    After `Parameter.set_data` a graph that has run before would still use the old tensor.
    """
    ops.assign(parameter, Tensor(values, parameter.dtype))


def initialize(net: nn.Cell, seed: int) -> None:
    """Weights uniform with variance 1 / fan-in, biases zero, and zero for what `zero_init` marks.

    Drawn by Philox, one stream per layer, so that they depend on the seed and the network alone.
    """
    index = 0
    for _, cell in net.cells_and_names():
        if not isinstance(cell, nn.Conv2d | nn.Dense):
            continue

        shape = cell.weight.shape
        if getattr(cell, "starts_at_zero", False):
            weight = np.zeros(shape, np.float32)
        else:
            # A uniform variable in [-a, a] has variance a^2 / 3.
            limit = np.sqrt(3.0 / np.prod(shape[1:]))
            stream = generator(seed, "init", index)
            weight = stream.uniform(-limit, limit, shape).astype(np.float32)

        put(cell.weight, weight)
        if cell.has_bias:
            put(cell.bias, np.zeros(cell.bias.shape))
        # Layers that start at zero count too: to mark one changes no other layer's draw.
        index += 1


def num_parameters(net: nn.Cell) -> int:
    """The number of trainable values of `net`."""
    return sum(int(np.prod(parameter.shape)) for parameter in net.trainable_params())


def assign(net: nn.Cell, weights: Mapping[str, np.ndarray], where: str) -> None:
    """Puts `weights`, by name, into `net`.

    `where` is the source of the weights, for errors. UserError unless names and shapes agree
    exactly; then nothing has been changed.
    """
    parameters = {parameter.name: parameter for parameter in net.trainable_params()}
    # All are checked before the first one is written.
    for name in [*parameters, *weights]:
        if name not in weights:
            raise UserError(mismatch(where, f"has no '{name}', which the network needs"))
        if name not in parameters:
            raise UserError(mismatch(where, f"has '{name}', which the network does not have"))

        expected = list(parameters[name].shape)
        shape = list(weights[name].shape)
        if expected != shape:
            raise UserError(
                mismatch(where, f"'{name}' has shape {shape}, but the network's is {expected}")
            )

    for name, parameter in parameters.items():
        put(parameter, weights[name])


def mismatch(where: str, difference: str) -> str:
    """The message about weights that do not fit."""
    return f"{where}: {difference}; it was made by another configuration"
