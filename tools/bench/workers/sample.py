"""`BATCHES ENCODER CONFIG ...`: samples through a chain of stages, and calls their networks alone.

The weights are those with which a training starts, as speed does not depend on values.
"""

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
from tools.bench.workers.timing import print_answer, time_calls, timed

PROMPT = "a small red circle on white"
GREY = 128  # level of the first stage's low resolution, if it has one


def new_stage(path: str, *overrides: str) -> Any:
    """The stage of a configuration, with initial weights."""
    config, _ = read_stage_config(path, list(overrides))
    stage = stage_class(config.kind)(config)
    initialize(stage.network, 0)
    return stage


def new_cascade(configs: list[str], encoder: str) -> Cascade:
    """A cascade of these stages, with initial weights."""
    stages = {Path(path).stem: new_stage(path, f"text.encoder={encoder}") for path in configs}
    length = next(reversed(stages.values())).config.text.length
    return Cascade({}, cast(dict[str, Sampler], stages), TextEncoder.load(encoder, encoder, length))


# The only two calls of a stage's methods.


def sample_batch(
    cascade: Cascade, name: str, prompt: tuple[np.ndarray, ...], low_res: np.ndarray | None
) -> np.ndarray:
    """A batch of images of stage `name`, uint8 (B, S, S, 3), as the orchestrator samples it."""
    num = cascade.stages[name].config.sample.batch_size
    return cascade.run(name, prompt, 0, range(num), low_res, {})


def network_calls(
    stage: Any, prompt: tuple[np.ndarray, ...], low_res: np.ndarray | None
) -> Callable[[], None]:
    """The network's calls of a batch, and nothing else."""
    config = stage.config.sample
    num = config.batch_size
    shape, conditions = stage.condition(low_res, 0, range(num), config.aug_level)
    z = np.zeros((num, *shape))
    logsnr = np.zeros(num)

    guided = config.guidance != 1.0
    weight = [config.guidance] if guided else []
    call = runtime.compile(stage.predict_guided if guided else stage.predict)
    arrays = (*weight, z, logsnr, *prompt, *conditions)
    tensors = [Tensor(np.asarray(array, np.float32)) for array in arrays]

    def run() -> None:
        for _ in range(config.steps):
            call(*tensors).asnumpy()

    return run


# Measurement.


def implementations(
    cascade: Cascade, name: str, low_res: np.ndarray | None
) -> dict[str, Callable[[], Any]]:
    """A batch of stage `name`: by the orchestrator, and its network's calls alone.

    The first stage encodes the prompt itself; later ones take it encoded, as in a cascade.
    """
    stage: Any = cascade.stages[name]
    encoder = cast(TextEncoder, cascade.text)
    prompts = [PROMPT] * stage.config.sample.batch_size
    prompt = encoder.encode(prompts)

    def ours() -> np.ndarray:
        encoded = encoder.encode(prompts) if low_res is None else prompt
        return sample_batch(cascade, name, encoded, low_res)

    return {"ours": ours, "network": network_calls(stage, prompt, low_res)}


def first_low_res(cascade: Cascade) -> np.ndarray | None:
    """A grey image, uint8 (1, s, s, 3), if the first stage enlarges one."""
    config: Any = next(iter(cascade.stages.values())).config
    if not hasattr(config, "low_res"):
        return None
    return np.full((1, config.low_res.size, config.low_res.size, 3), GREY, np.uint8)


def measure(cascade: Cascade, batches: int) -> dict[str, Any]:
    """Answers by STAGE/IMPLEMENTATION: seconds of the batches, taken in turns, memory and sizes."""
    answers: dict[str, Any] = {}
    low_res = first_low_res(cascade)

    for name, stage in cascade.stages.items():
        config: Any = stage.config.sample
        if low_res is not None:
            low_res = low_res[:1].repeat(config.batch_size, 0)
        runs = implementations(cascade, name, low_res)

        for side, run in runs.items():
            answers[f"{name}/{side}"] = {
                **time_calls(run, 0),
                "steps": config.steps,
                "batch": config.batch_size,
                "parameters": num_parameters(stage.network),
            }

        # In turns, so that a change of the machine's load meets both.
        for _ in range(batches):
            for side, run in runs.items():
                answers[f"{name}/{side}"]["seconds"].append(timed(run)[0])

        low_res = cast(np.ndarray, runs["ours"]())

    return answers


if __name__ == "__main__":
    batches, encoder, *configs = sys.argv[1:]
    print_answer(measure(new_cascade(configs, encoder), int(batches)))
