"""The sampling engine: a request to images, by the one loop and the one cut into batches.

Everything that samples goes through `sample`: the cascade, editing, restoring, inspecting and the
training loop's sample grids.

Shapes: N images of a request, B of a batch, S side.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

import numpy as np
from mindspore import Tensor, ops

from pipeline import runtime
from pipeline.diffusion.guidance import guide, threshold
from pipeline.diffusion.process import add_noise, x_from_prediction
from pipeline.diffusion.solvers import (
    SOLVERS,
    Coefficients,
    SamplerConfig,
    Solver,
    linear_step,
    logsnr_steps,
    renoise,
)
from pipeline.nn.tiling import tiled
from pipeline.rng import sampling_noise
from pipeline.stage.inputs import Inputs
from pipeline.stage.request import SampleRequest, batch_rows
from pipeline.stage.stage import Network, Stage


@dataclass(frozen=True, kw_only=True)
class SampleStep:
    """One call of the network: the level, z that went in and x that it stands for, (B, 3, S, S)."""

    logsnr: float
    z: Tensor
    x: Tensor


OnStep = Callable[[SampleStep], None]
CompiledStep = Callable[..., tuple[Tensor, Tensor]]
DenoiseStep = Callable[[float, Coefficients, Tensor, Mapping[str, Tensor]], tuple[Tensor, Tensor]]


def ignore(step: SampleStep) -> None:
    """Does nothing with a step."""


def sample(
    stage: Stage, config: SamplerConfig, request: SampleRequest, on_step: OnStep = ignore
) -> np.ndarray:
    """The images of a request, uint8 (N, S, S, 3).

    An image depends on the seed, its id and its own inputs alone: not on the batch it is in.

    Args:
        stage: whose network predicts.
        config: usually the stage's own, `stage.config.sample`.
        request: any number of images; they are cut into batches of `config.batch_size`.
        on_step: called after each call of the network.
    """
    batches = []
    for rows in batch_rows(request.num_images, config.batch_size):
        batches.append(sample_batch(stage, config, request.take(rows), on_step))

    # Without the rows that fill the last batch.
    return np.concatenate(batches)[: request.num_images]


def num_calls(
    stage: Stage,
    config: SamplerConfig,
    num_images: int,
    *,
    strength: float = 1.0,
    masked: bool = False,
) -> int:
    """How often `sample` calls the network, and `on_step`, for so many images."""
    schedule = config.schedule or stage.config.diffusion
    logsnrs = logsnr_steps(schedule, config.steps, config.extra_steps, strength)
    num_steps = len(logsnrs) - 1
    repaints = config.repaint_steps if masked else 1
    # The step to the image is taken once: nothing is left to renoise.
    num_batches = -(-num_images // config.batch_size)
    return num_batches * (1 + (num_steps - 1) * repaints)


def sample_batch(
    stage: Stage, config: SamplerConfig, request: SampleRequest, on_step: OnStep
) -> np.ndarray:
    """One batch of a request: initial noise, the loop, and back to pixels."""
    shape = stage.sample_shape(request)
    schedule = stage.sampling_schedule(request, config)
    logsnrs = logsnr_steps(schedule, config.steps, config.extra_steps, request.strength)
    draws = count()  # the first one is the initial noise

    def draw_noise() -> Tensor:
        return Tensor(sampling_noise(request.seed, request.image_ids, shape, next(draws)))

    # Drawn even if it is replaced, so that later draws have the same numbers.
    z = draw_noise()
    if request.initial_noise is not None:
        z = Tensor(request.initial_noise)

    # SDEdit: the image at the noise level of the first step.
    if request.edit is not None and request.strength < 1:
        start_B = Tensor(np.full(request.num_images, logsnrs[0], np.float32))
        z = add_noise(Tensor(stage.from_images(request.edit.images)), z, start_B)

    x = denoise(
        denoise_step(stage, config, request),
        z,
        logsnrs.tolist(),
        draw_noise=draw_noise,
        solver=SOLVERS[config.sampler],
        repaint_steps=config.repaint_steps if request.masked else 1,
        on_step=on_step,
    )
    return stage.to_images(x.asnumpy())


def denoise(
    step: DenoiseStep,
    z: Tensor,
    logsnrs: Sequence[float],
    *,
    draw_noise: Callable[[], Tensor],
    solver: Solver,
    repaint_steps: int = 1,
    on_step: OnStep = ignore,
) -> Tensor:
    """The image at the end of `logsnrs`, from z at their beginning.

    Args:
        step: (logsnr, coefficients, z, terms) -> z', x: the network at z, then `linear_step`.
        z: at `logsnrs[0]`.
        logsnrs: rising, one more than there are steps; infinity at the end for an image.
        draw_noise: new unit noise of z's shape at each call.
        solver: gives each step's coefficients, and names the terms that they belong to.
        repaint_steps: how often each step but the last is taken, each time from where it ended,
            with new noise, back at its own level (RePaint, arXiv 2201.09865, algorithm 1).
        on_step: called after each step.
    """
    logsnr_prev: float | None = None
    x_prev = z  # of no weight in the first step, which has no previous x

    for logsnr, logsnr_next in pairwise(logsnrs):
        coefficients = solver.coefficients(logsnr_prev, logsnr, logsnr_next)
        repeats = 1 if math.isinf(logsnr_next) else repaint_steps

        for remaining in reversed(range(repeats)):
            # A step that adds no noise draws none: z stands in for it, with a coefficient of 0.
            noise = draw_noise() if coefficients.noise else z
            z_next, x = step(logsnr, coefficients, z, {"x_prev": x_prev, "noise": noise})
            on_step(SampleStep(logsnr=logsnr, z=z, x=x))
            z = renoise(z_next, draw_noise(), logsnr, logsnr_next) if remaining else z_next

        logsnr_prev = logsnr
        x_prev = x
    return z


def denoise_step(stage: Stage, config: SamplerConfig, request: SampleRequest) -> DenoiseStep:
    """The step of a batch: its inputs as tensors, around the compiled function."""
    solver = SOLVERS[config.sampler]
    inputs = step_inputs(stage, solver, masked=request.masked)
    compiled = compiled_step(stage, config, inputs, masked=request.masked)

    arrays = stage.sampling_inputs(request, config)
    if request.edit is not None and request.edit.mask is not None:
        known = stage.from_images(request.edit.images)
        arrays = {**arrays, "known": known, "known_mask": request.edit.mask}

    # Made once, as they are the same at every step.
    fixed = {name: Tensor(np.asarray(array, np.float32)) for name, array in arrays.items()}
    # A tensor and not a constant, so that another weight needs no other graph.
    guidance = Tensor(np.float32(config.guidance))

    def step(
        logsnr: float, coefficients: Coefficients, z: Tensor, terms: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        # In the order of `linear_step`: z, x, then the solver's terms.
        values = [coefficients.z, coefficients.x]
        values += [getattr(coefficients, term) for term in solver.terms]
        logsnr_B = Tensor(np.full(request.num_images, logsnr, np.float32))
        tensors = inputs.flatten({**fixed, **terms})
        return compiled(guidance, Tensor(np.array(values, np.float32)), logsnr_B, z, *tensors)

    return step


def step_inputs(stage: Stage, solver: Solver, *, masked: bool) -> Inputs:
    """What a compiled step takes after z: the solver's terms, what is known, the stage's inputs."""
    known = ("known", "known_mask") if masked else ()
    return Inputs(
        leading=(*solver.terms, *known), prompt=stage.inputs.prompt, others=stage.inputs.others
    )


def compiled_step(
    stage: Stage, config: SamplerConfig, step_inputs: Inputs, *, masked: bool
) -> CompiledStep:
    """A step of sampling as one graph: (guidance, coefficients, logsnr_B, z, *inputs) -> z', x.

    Where `masked`, x is what is known outside of the mask; each step is linear in z and x, so that
    z there stays the known image with the noise it began with. Compiled once for whatever agrees in
    all that shapes it.
    """
    # At weight 1 the unconditional output cancels, and is not computed.
    guided = config.guidance != 1.0
    terms = SOLVERS[config.sampler].terms
    # What is constant in this graph. All else that shapes it is the stage's, which holds the cache.
    shaped_by = (guided, terms, config.threshold, config.quantile, masked)
    if shaped_by in stage.compiled_steps:
        return stage.compiled_steps[shaped_by]

    prediction = stage.config.diffusion.prediction
    predict = predictor(stage, tiled_network(stage), guided=guided)
    clip = clipper(stage, config)

    def step(
        guidance: Tensor, coefficients: Tensor, logsnr_B: Tensor, z: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        inputs = step_inputs.unpack(tensors)
        output = predict(z, logsnr_B, inputs, guidance)
        x = clip(x_from_prediction(prediction, output, z, logsnr_B))
        if masked:
            x = inputs["known"] + inputs["known_mask"] * (x - inputs["known"])

        used: tuple[Tensor, ...] = ()
        for term in terms:
            used = (*used, inputs[term])
        return linear_step(coefficients, z, x, *used), x

    stage.compiled_steps[shaped_by] = runtime.jit(step)
    return stage.compiled_steps[shaped_by]


def tiled_network(stage: Stage) -> Network:
    """The stage's network, large images in tiles: sampling keeps no activations for a gradient, so
    its memory can be bounded.
    """

    def network(*tensors: Any) -> Tensor:
        return tiled(stage.network, *tensors, limit=stage.tile_limit)

    return network


def predictor(stage: Stage, network: Network, *, guided: bool) -> Callable[..., Tensor]:
    """(z, logsnr_B, inputs, guidance) -> the prediction, by classifier-free guidance if `guided`:
    with the prompt and without it, in one call of the network. For a compiled function.
    """

    def predict(z: Tensor, logsnr_B: Tensor, inputs: dict[str, Tensor], guidance: Tensor) -> Tensor:
        return stage.predict(network, z, logsnr_B, inputs)

    def predict_guided(
        z: Tensor, logsnr_B: Tensor, inputs: dict[str, Tensor], guidance: Tensor
    ) -> Tensor:
        doubled = {}
        for name in stage.inputs.names:
            tensor = inputs[name]
            # Zeros, as training drops a prompt.
            without = ops.zeros_like(tensor) if name in stage.inputs.prompt else tensor
            doubled[name] = ops.cat((tensor, without))

        # One call of twice the batch: conditional rows, then unconditional ones.
        output = stage.predict(network, ops.cat((z, z)), ops.cat((logsnr_B, logsnr_B)), doubled)
        conditional, unconditional = ops.chunk(output, 2)
        return guide(conditional, unconditional, guidance)

    return predict_guided if guided else predict


def clipper(stage: Stage, config: SamplerConfig) -> Callable[[Tensor], Tensor]:
    """Thresholding of x, which is of pixels in [-1, 1]. For a compiled function."""
    kind = config.threshold
    quantile = config.quantile
    mean = Tensor(stage.mean)
    std = Tensor(stage.std)

    def clip(x: Tensor) -> Tensor:
        return threshold(x, kind, quantile)

    def clip_normalized(x: Tensor) -> Tensor:
        # Thresholds are for pixels in [-1, 1]; this x is in standard deviations of the data set.
        return (threshold(x * std + mean, kind, quantile) - mean) / std

    return clip_normalized if stage.config.pixels else clip
