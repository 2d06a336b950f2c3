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
from pipeline.generate.cascade import Cascade
from pipeline.generate.engine import predictor, sample
from pipeline.nn.parameters import initialize, num_parameters
from pipeline.stage.inputs import Arrays
from pipeline.stage.registry import read_stage_config, stage_class
from pipeline.stage.request import SampleRequest
from pipeline.stage.stage import Stage
from pipeline.text.caption_embeddings import encode_text
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
    return Cascade({}, stages, TextEncoder.load(encoder, encoder, length))


def sample_request(stage: Stage, prompt: Arrays, low_res: np.ndarray | None) -> SampleRequest:
    """One batch of images."""
    image_ids = range(stage.config.sample.batch_size)
    return SampleRequest(prompt=prompt, seed=0, image_ids=image_ids, low_res=low_res)


def network_calls(stage: Stage, request: SampleRequest) -> Callable[[], None]:
    """The network's calls of a batch, and nothing else."""
    config = stage.config.sample
    inputs = stage.inputs
    guided = config.guidance != 1.0
    predict = predictor(stage, stage.network, guided=guided)

    def call(guidance: Tensor, z: Tensor, logsnr_B: Tensor, *tensors: Tensor) -> Tensor:
        return predict(z, logsnr_B, inputs.unpack(tensors), guidance)

    compiled = runtime.jit(call)
    num = request.num_images
    z = np.zeros((num, *stage.sample_shape(request)))
    arrays = inputs.flatten(stage.sampling_inputs(request, config))
    tensors = [
        Tensor(np.asarray(array, np.float32))
        for array in (config.guidance, z, np.zeros(num), *arrays)
    ]

    def run() -> None:
        for _ in range(config.steps):
            compiled(*tensors).asnumpy()

    return run


# Measurement.


def implementations(
    cascade: Cascade, name: str, low_res: np.ndarray | None
) -> dict[str, Callable[[], Any]]:
    """A batch of stage `name`: by the orchestrator, and its network's calls alone.

    The first stage encodes the prompt itself; later ones take it encoded, as in a cascade.
    """
    stage = cascade.stages[name]
    encoder = cascade.text_encoder
    assert encoder
    prompts = [PROMPT] * stage.config.sample.batch_size
    prompt = encode_text(encoder, prompts)

    def ours() -> np.ndarray:
        # A cascade encodes the prompts once, for its first stage.
        encoded = encode_text(encoder, prompts) if low_res is None else prompt
        return sample(stage, stage.config.sample, sample_request(stage, encoded, low_res))

    request = sample_request(stage, prompt, low_res)
    return {"ours": ours, "network": network_calls(stage, request)}


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
            # Any image will do, and this stage's batch may be larger than the last one's.
            low_res = low_res[:1].repeat(config.batch_size, 0)
        runs = implementations(cascade, name, low_res)

        for side, run in runs.items():
            answers[f"{name}/{side}"] = {
                # The first call, with its compilation, apart from the batches below.
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
