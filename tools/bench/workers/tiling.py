"""`IMPLEMENTATION CONFIG GUIDANCE`: one step of sampling one image of a super-resolution stage.

`untiled` computes it at once, `ours` in tiles where the image is large (pipeline/nn/tiling.py).
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.generate.engine import sample
from pipeline.nn.parameters import num_parameters
from pipeline.stage.request import SampleRequest
from tools.bench.workers.sample import new_stage
from tools.bench.workers.timing import print_answer, time_calls


def sample_step(stage: Any, guidance: float) -> Callable[[], np.ndarray]:
    """The only call of a stage's methods: one step, from noise, with an empty caption."""
    config = stage.config
    text = np.zeros((1, config.text.length, config.text.width), np.float32)
    request = SampleRequest(
        prompt={"text": text, "text_mask": np.ones(text.shape[:2], np.float32)},
        seed=0,
        image_ids=[0],
        low_res=np.zeros((1, config.low_res.size, config.low_res.size, 3), np.uint8),
    )
    sampler = replace(config.sample, steps=1, guidance=guidance, batch_size=1)

    def run() -> np.ndarray:
        return sample(stage, sampler, request)

    return run


def measure(implementation: str, path: str, guidance: float) -> dict[str, Any]:
    """Seconds and peak memory of the first step, with its compilation, and of another one."""
    stage = new_stage(path)
    if implementation == "untiled":
        stage.tile_limit = sys.maxsize  # no image is then large enough for tiles
    timing = time_calls(sample_step(stage, guidance), 1)
    return {"parameters": num_parameters(stage.network), **timing}


if __name__ == "__main__":
    implementation, path, guidance = sys.argv[1:]
    print_answer(measure(implementation, path, float(guidance)))
