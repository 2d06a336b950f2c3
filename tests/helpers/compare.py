"""Compares a network with a reference that tools/references.py has written."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from mindspore import ParameterTuple, Tensor, nn, value_and_grad
from safetensors import safe_open

from pipeline import runtime
from pipeline.nn.parameters import assign
from tools.references import FOLDER, random_weights

Arrays = dict[str, np.ndarray]


class Reference(NamedTuple):
    """A stored reference."""

    inputs: Arrays
    outputs: Arrays  # output, cotangent and gradients.NAME, or what the model returns
    config: dict[str, Any]


def reference(name: str) -> Reference:
    """The reference in tests/references/`name`.safetensors."""
    with safe_open(FOLDER / f"{name}.safetensors", "numpy") as file:
        names = list(file.keys())
        arrays = {key: file.get_tensor(key) for key in names}
        config = json.loads(file.metadata()["config"])

    inputs = {}
    outputs = {}
    for key, array in arrays.items():
        if key.startswith("inputs."):
            inputs[key.removeprefix("inputs.")] = array
        else:
            outputs[key] = array
    return Reference(inputs, outputs, config)


def assign_random(net: nn.Cell, seed: int = 0) -> Arrays:
    """Gives `net` the random weights of references, none of which is zero; returns them by name."""
    weights = random_weights({p.name: p.shape for p in net.trainable_params()}, seed)
    assign(net, weights, "random weights")
    return weights


def differentiate(net: nn.Cell, call: Callable[..., Tensor] | None = None) -> Callable[..., Arrays]:
    """(cotangent, x, other inputs) -> output and gradients.NAME, named as in a reference, computed
    by one compiled graph.

    `call` is the function of x and the other inputs; by default it is `net` itself.
    """
    parameters = ParameterTuple(net.trainable_params())
    function = call or net

    def projection(cotangent: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        output = function(*inputs)
        return (output * cotangent).sum(), output

    gradient = runtime.jit(value_and_grad(projection, 1, parameters, has_aux=True))

    def run(*arrays: np.ndarray) -> Arrays:
        (_, output), (x_gradient, gradients) = gradient(*(Tensor(array) for array in arrays))
        outputs = {"output": output, "gradients.x": x_gradient}
        for parameter, value in zip(parameters, gradients, strict=True):
            outputs[f"gradients.{parameter.name}"] = value
        return {name: value.asnumpy() for name, value in outputs.items()}

    return run


def assert_close(
    actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], tolerance: float = 1e-4
) -> None:
    """Each array is within `tolerance`, relative to its largest value where that is above 1."""
    for name, array in expected.items():
        error = np.abs(actual[name] - array).max() / max(1.0, np.abs(array).max())
        assert error <= tolerance, f"{name}: off by {error:.1e}"
