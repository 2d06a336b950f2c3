"""One side of `python -m tools.bench whole`: what it took, as JSON on the last line of stdout."""

import json
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from pipeline.nn import tiling
from pipeline.nn.parameters import initialize, num_parameters
from pipeline.stage.registry import read_stage_config, stage_class
from tools.bench.train_side import timed


def measure(side: str, path: str, guidance: float) -> dict[str, Any]:
    """The super-resolution stage in `path` and a step of one picture."""
    if side == "at_once":
        tiling.LIMIT = sys.maxsize
    config: Any = read_stage_config(path, [])[0]
    stage: Any = stage_class(config.kind)(config)
    initialize(stage.network, 0)
    text = np.zeros((1, config.text.length, config.text.width), np.float32)
    low = np.zeros((1, config.low_res.size, config.low_res.size, 3), np.uint8)
    sampler = replace(config.sample, steps=1, guidance=guidance)
    step = partial(stage.sample, sampler, (text, np.ones(text.shape[:2], np.float32)), 0, [0], low)
    return {"parameters": num_parameters(stage.network), **timed(step, 1)}


if __name__ == "__main__":
    side, path, guidance = sys.argv[1:]
    print(json.dumps(measure(side, path, float(guidance))))
