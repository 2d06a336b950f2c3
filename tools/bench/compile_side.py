"""The gradient of a stage's loss, compiled and not run, for `python -m tools.bench compile`.

Its network has shapes and no values, so that the base of two billion parameters is compiled on a
laptop.
"""

import json
import re
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from mindspore import ParameterTuple, Tensor, nn, value_and_grad
from mindspore.nn.utils import no_init_parameters

from pipeline import runtime
from pipeline.nn.parameters import num_parameters
from pipeline.stage.registry import read_stage_config, stage_class


def inputs(stage: Any) -> list[Tensor]:
    """One picture's worth of what the loss takes, all zeros."""
    side, text = stage.window or stage.config.size, stage.config.text
    pictures = np.zeros((1, side, side, 3), np.uint8)
    words, mask = (
        np.zeros((1, text.length, text.width), np.float32),
        np.ones((1, text.length), np.float32),
    )
    return [Tensor(array) for array in stage.batch(0, [0], pictures, words, mask)]


def measure(path: str, folder: str) -> dict[str, Any]:
    """Seconds, nodes of the optimized graph, parameters."""
    runtime.save_graphs(folder)
    config, _ = read_stage_config(path, [])
    with no_init_parameters():
        stage = stage_class(config.kind)(config)
    parameters = ParameterTuple(stage.network.trainable_params())

    def loss(*batch: Tensor) -> Tensor:
        return stage.loss(*batch).mean()

    gradient = value_and_grad(loss, None, parameters)

    class Gradient(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.gradient, self.held = gradient, parameters

        def construct(self, *batch: Tensor) -> Any:
            return self.gradient(*batch)

    tensors, start = inputs(stage), time.perf_counter()
    Gradient().compile(*tensors)
    seconds = time.perf_counter() - start
    (graph,) = Path(folder).glob("*_validate_*.ir")
    (nodes,) = re.findall(r"Total number of nodes: (\d+)", graph.read_text())
    return {"seconds": seconds, "nodes": int(nodes), "parameters": num_parameters(stage.network)}


if __name__ == "__main__":
    with TemporaryDirectory() as place:
        print(json.dumps(measure(sys.argv[1], place)))
