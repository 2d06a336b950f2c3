"""`CONFIG`: compiles the gradient of a stage's loss without running it.

The network's parameters have shapes and no values, so that the base of two billion parameters
compiles on a laptop.
"""

import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from mindspore import ParameterTuple, Tensor, nn, value_and_grad
from mindspore.nn.utils import no_init_parameters

from pipeline import runtime
from pipeline.nn.parameters import num_parameters
from pipeline.rng import Draws
from pipeline.stage.registry import read_stage_config, stage_class
from tools.bench.workers.timing import print_answer, timed


class StageGradient(nn.Cell):
    """Loss and gradient of a stage, a compiled function of the loss's inputs."""

    def __init__(self, stage: Any) -> None:
        super().__init__()

        def mean_loss(*inputs: Tensor) -> Tensor:
            return stage.loss(*inputs).mean()

        self.parameters = ParameterTuple(stage.network.trainable_params())
        self.gradient = value_and_grad(mean_loss, None, self.parameters)

    def construct(self, *inputs: Tensor) -> Any:
        return self.gradient(*inputs)


def loss_inputs(stage: Any) -> list[Tensor]:
    """The inputs of the loss for one image and an empty caption."""
    side = stage.image_size.used
    text = stage.config.text

    images = np.zeros((1, side, side, 3), np.uint8)
    prompt = {
        "text": np.zeros((1, text.length, text.width), np.float32),
        "text_mask": np.ones((1, text.length), np.float32),
    }
    arrays = stage.training_inputs(images, prompt, Draws(seed=0, step=0, positions=[0]))
    return [Tensor(array) for array in stage.loss_inputs.flatten(arrays)]


def measure(path: str, graphs: str) -> dict[str, Any]:
    """Seconds, nodes of the optimized graph, parameters.

    Args:
        path: the stage's configuration.
        graphs: an empty folder for the compiler's files.
    """
    # Before anything is compiled: only graphs after this call are written.
    runtime.save_graphs(graphs)
    config, _ = read_stage_config(path, [])
    # Shapes suffice for compiling.
    with no_init_parameters():
        stage = stage_class(config.kind)(config)

    gradient = StageGradient(stage)
    inputs = loss_inputs(stage)
    seconds, _ = timed(lambda: gradient.compile(*inputs))

    # The compiler writes the optimized graph as text.
    (graph,) = Path(graphs).glob("*_validate_*.ir")
    (nodes,) = re.findall(r"Total number of nodes: (\d+)", graph.read_text())
    return {"seconds": seconds, "nodes": int(nodes), "parameters": num_parameters(stage.network)}


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        print_answer(measure(sys.argv[1], folder))
