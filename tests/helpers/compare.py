"""How tests compare a network with a reference that tools/references.py has made."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from mindspore import ParameterTuple, Tensor, nn, value_and_grad
from safetensors import safe_open

from pipeline import runtime
from tools.references import FOLDER

Arrays = dict[str, np.ndarray]


def reference(name: str) -> tuple[Arrays, Arrays, dict[str, Any]]:
    """Inputs, answers (output, cotangent, gradients.NAME) and configuration in
    tests/data/`name`.safetensors.
    """
    with safe_open(FOLDER / f"{name}.safetensors", "numpy") as file:
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (the file is no dict)
        config = json.loads(file.metadata()["config"])
    inputs = {
        key.removeprefix("inputs."): value
        for key, value in arrays.items()
        if key.startswith("inputs.")
    }
    return (
        inputs,
        {key: value for key, value in arrays.items() if not key.startswith("inputs.")},
        config,
    )


def differentiate(net: nn.Cell, call: Callable[..., Tensor] | None = None) -> Callable[..., Arrays]:
    """(cotangent, x, other inputs) -> output and gradients.NAME as the tool has them, in one
    compiled graph.

    `call` is how `net` is called with these inputs, if not with them as they are.
    """
    parameters, call = ParameterTuple(net.trainable_params()), call or net

    def projection(cotangent: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        output = call(*inputs)
        return (output * cotangent).sum(), output

    gradient = runtime.jit(value_and_grad(projection, 1, parameters, has_aux=True))

    def answers(*arrays: np.ndarray) -> Arrays:
        (_, output), (of_x, of_parameters) = gradient(*(Tensor(array) for array in arrays))
        found = {"output": output, "gradients.x": of_x}
        for parameter, value in zip(parameters, of_parameters, strict=True):
            found[f"gradients.{parameter.name}"] = value
        return {name: value.asnumpy() for name, value in found.items()}

    return answers


def assert_close(
    found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray], tolerance: float = 1e-4
) -> None:
    """Each array within `tolerance`, times its largest value where that is above 1."""
    for name, array in wanted.items():
        error = np.abs(found[name] - array).max() / max(1.0, np.abs(array).max())
        assert error <= tolerance, f"{name}: off by {error:.1e}"
