"""Our side of `python -m tools.bench sample`: what it took, as JSON on the last line of stdout."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
from mindspore import Tensor

from pipeline import runtime
from pipeline.generate.cascade import Cascade, Sampler
from pipeline.nn.parameters import initialize, num_parameters
from pipeline.stage.registry import read_stage_config, stage_class
from pipeline.text.encoder import TextEncoder
from tools.bench.train_side import timed

PROMPT = "a small red circle on white"


def cascade(configs: list[str], encoder: str) -> Cascade:
    """Of these stages, with the weights that a training starts from."""
    stages: dict[str, Sampler] = {}
    for path in configs:
        config, _ = read_stage_config(path, [f"text.encoder={encoder}"])
        stages[Path(path).stem] = stage_class(config.kind)(config)
        initialize(stages[Path(path).stem].network, 0)
    return Cascade({}, stages, TextEncoder.load(encoder, encoder, config.text.length))


def sides(whole: Cascade, name: str, low: np.ndarray | None) -> dict[str, Callable[[], object]]:
    """A batch of pictures of stage `name`: by the orchestrator, and its network's calls alone.

    The text is encoded once for all stages, which is the first's to do.
    """
    stage: Any = whole.stages[name]
    encode = cast(TextEncoder, whole.text).encode
    config, numbers = stage.config.sample, range(stage.config.sample.batch_size)
    prompt = encode([PROMPT] * config.batch_size)

    def ours() -> np.ndarray:
        return whole.run(
            name,
            encode([PROMPT] * config.batch_size) if low is None else prompt,
            0,
            numbers,
            low,
            {},
        )

    shape, condition = stage.condition(low, 0, numbers, config.aug_level)
    inputs = [np.zeros((config.batch_size, *shape)), np.zeros(config.batch_size), *prompt]
    weight = [] if config.guidance == 1.0 else [config.guidance]
    call = runtime.jit(stage.predict_guided if weight else stage.predict)
    tensors = [Tensor(np.asarray(array, np.float32)) for array in (*weight, *inputs, *condition)]

    def network() -> None:
        for _ in range(config.steps):
            call(*tensors).asnumpy()

    return {"ours": ours, "network": network}


def measure(whole: Cascade, rounds: int) -> dict[str, Any]:
    """Of each stage and side: seconds a batch, in turns."""
    found: dict[str, Any] = {}
    first: Any = next(iter(whole.stages.values())).config
    size = first.low_res.size if hasattr(first, "low_res") else 0
    low = np.full((1, size, size, 3), 128, np.uint8) if size else None
    for name, stage in whole.stages.items():
        config: Any = stage.config.sample
        runs = sides(whole, name, None if low is None else low[:1].repeat(config.batch_size, 0))
        told = {
            "steps": config.steps,
            "batch": config.batch_size,
            "parameters": num_parameters(stage.network),
        }
        for side, run in runs.items():
            found[f"{name}/{side}"] = {**timed(run, 0), **told}
        for side, run in list(runs.items()) * rounds:
            found[f"{name}/{side}"]["seconds"].append(timed(run, 0)["first"])
        low = cast(np.ndarray, runs["ours"]())
    return found


if __name__ == "__main__":
    rounds, encoder, *configs = sys.argv[1:]
    print(json.dumps(measure(cascade(configs, encoder), int(rounds))))
