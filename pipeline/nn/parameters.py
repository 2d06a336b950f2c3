"""The parameters of a network: first values, a count, and exchange with files."""

from collections.abc import Mapping

import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from pipeline.errors import UserError
from pipeline.rng import generator


def put(parameter: Parameter, values: np.ndarray) -> None:
    """Writes `values` into `parameter` in place, for graphs that have run before to see.

    `Parameter.set_data` would give it another tensor: a compiled graph keeps the one of its first
    run.
    """
    ops.assign(parameter, Tensor(values, parameter.dtype))


def initialize(net: nn.Cell, seed: int) -> None:
    """Weights of variance 1 / fan-in, biases of zero, and zero for what a block adds to its input.

    Drawn by Philox parameter by parameter, so that they depend on the seed and the network alone.
    """
    number = 0
    for _, cell in net.cells_and_names():
        if not isinstance(cell, nn.Conv2d | nn.Dense):
            continue
        shape = cell.weight.shape
        if getattr(cell, "starts_at_zero", False):
            weight = np.zeros(shape, np.float32)
        else:
            limit = np.sqrt(3.0 / np.prod(shape[1:]))
            weight = (
                generator(seed, "init", number).uniform(-limit, limit, shape).astype(np.float32)
            )
        put(cell.weight, weight)
        if cell.has_bias:
            put(cell.bias, np.zeros(cell.bias.shape))
        number += 1


def num_parameters(net: nn.Cell) -> int:
    """How many numbers `net` trains."""
    return sum(int(np.prod(parameter.shape)) for parameter in net.trainable_params())


def assign(net: nn.Cell, weights: Mapping[str, np.ndarray], where: str) -> None:
    """Puts `weights` into `net`: all of them, no others, of the same shapes; else UserError, and
    nothing is changed.
    """
    parameters = {parameter.name: parameter for parameter in net.trainable_params()}
    for name in [*parameters, *weights]:
        if name not in weights:
            raise UserError(
                f"{where}: has no '{name}', which the network needs; it was made by another configuration"
            )
        if name not in parameters:
            raise UserError(
                f"{where}: has '{name}', which the network lacks; it was made by another configuration"
            )
        wanted, found = tuple(parameters[name].shape), weights[name].shape
        if wanted != found:
            raise UserError(
                f"{where}: '{name}' is {list(found)} and the network wants {list(wanted)}; it was made by another "
                "configuration"
            )
    for name, parameter in parameters.items():
        put(parameter, weights[name])
