"""The sampling engine: its loop against the differential equation that solvers integrate, and its
batches.

The loop is linear in its arrays and asks nothing else of them, so that most tests hand it float64
NumPy arrays.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor, ops

from pipeline.diffusion.process import Prediction, eps_from_x, prediction_target, x_from_prediction
from pipeline.diffusion.schedule import SCHEDULES, ScheduleConfig, ScheduleName
from pipeline.diffusion.solvers import (
    SOLVERS,
    Coefficients,
    SamplerConfig,
    SolverName,
    linear_step,
    logsnr_steps,
)
from pipeline.generate import engine
from pipeline.generate.engine import denoise, num_calls
from pipeline.nn.parameters import assign
from pipeline.nn.unet import UNet
from pipeline.stage.request import SampleRequest, batch_rows
from tests.diffusion.test_solvers import every_schedule, every_solver, rates
from tests.stages.test_recipes import make, samples
from tools.references import random_weights

PREDICTIONS: tuple[Prediction, ...] = ("eps", "x0", "v")

Denoiser = Callable[[Any, float], Any]  # z, logsnr -> x


def run(
    denoiser: Denoiser,
    noises: Callable[[int], Any],
    solver: SolverName,
    logsnrs: np.ndarray,
    **options: Any,
) -> Any:
    """The loop with a denoiser in place of a network; noise 0 is where it starts."""
    drawn = iter(range(1, 10**6))

    def step(
        logsnr: float, coefficients: Coefficients, z: Any, terms: Mapping[str, Any]
    ) -> tuple[Any, Any]:
        x = denoiser(z, logsnr)
        names = SOLVERS[solver].terms
        values = [coefficients.z, coefficients.x, *(getattr(coefficients, n) for n in names)]
        return linear_step(values, z, x, *(terms[name] for name in names)), x

    return denoise(
        step,
        noises(0),
        logsnrs.tolist(),
        draw_noise=lambda: noises(next(drawn)),
        solver=SOLVERS[solver],
        **options,
    )


class Gaussians:
    """A mixture of Gaussians of these means, all of one deviation: its best
    denoiser and its score."""

    def __init__(self, *means: float, std: float) -> None:
        self.means, self.std = np.array(means).reshape(-1, 1), std

    def noisy(self, z: Any, logsnr: float) -> tuple[Any, Any, Any]:
        """At this level: the variance of each Gaussian, z's distances from their means, the share
        of each in z.
        """
        alpha, sigma = rates(logsnr)
        variance = (alpha * self.std) ** 2 + sigma**2
        distances = z - alpha * self.means
        share = np.exp(-(distances**2) / (2 * variance))
        return variance, distances, share / share.sum(axis=0)

    def denoise(self, z: Any, logsnr: float) -> Any:
        variance, distances, share = self.noisy(z, logsnr)
        return (share * (self.means + rates(logsnr)[0] * self.std**2 / variance * distances)).sum(
            axis=0
        )

    def flow(self, z: Any, logsnr: float) -> Any:
        """dz / dlogsnr of the probability flow, sigma^2 / 2 (z + score)."""
        variance, distances, share = self.noisy(z, logsnr)
        return rates(logsnr)[1] ** 2 / 2 * (z - (share * distances).sum(axis=0) / variance)

    def integrate(self, z: Any, first: float, last: float, steps: int = 2000) -> Any:
        """The flow from one level to another (Runge-Kutta of order 4)."""
        h = (last - first) / steps
        for now in first + h * np.arange(steps):
            a = self.flow(z, now)
            b = self.flow(z + h / 2 * a, now + h / 2)
            c = self.flow(z + h / 2 * b, now + h / 2)
            d = self.flow(z + h * c, now + h)
            z = z + h / 6 * (a + 2 * b + 2 * c + d)
        return z


def dpm_solver_2m(denoise: Denoiser, z: np.ndarray, logsnrs: np.ndarray) -> np.ndarray:
    """Algorithm 2 of arXiv 2211.01095, in its own terms."""
    (alpha, sigma), lam = rates(logsnrs), np.asarray(logsnrs) / 2
    h = np.diff(lam, prepend=np.nan)
    answers = [denoise(z, logsnrs[0])]
    z = sigma[1] / sigma[0] * z - alpha[1] * np.expm1(-h[1]) * answers[0]
    for i in range(2, len(logsnrs)):
        answers.append(denoise(z, logsnrs[i - 1]))
        r = h[i - 1] / h[i]
        d = (1 + 1 / (2 * r)) * answers[i - 1] - 1 / (2 * r) * answers[i - 2]
        z = sigma[i] / sigma[i - 1] * z - alpha[i] * np.expm1(-h[i]) * d
    return z


NOISE = np.random.default_rng(0).standard_normal(6)
ONE = Gaussians(0.3, std=0.5)
TWO = Gaussians(-0.6, 0.6, std=0.3)


@every_schedule
@pytest.mark.parametrize("steps", [2, 3, 10])
def test_dpm_solver_is_the_papers(schedule: ScheduleName, steps: int) -> None:
    logsnrs = logsnr_steps(ScheduleConfig(schedule=schedule), steps)
    found = run(TWO.denoise, lambda i: NOISE, "dpm_solver++", logsnrs[:-1])
    np.testing.assert_allclose(found, dpm_solver_2m(TWO.denoise, NOISE, logsnrs[:-1]), rtol=1e-9)
    whole = run(TWO.denoise, lambda i: NOISE, "dpm_solver++", logsnrs)
    np.testing.assert_allclose(whole, TWO.denoise(found, logsnrs[-2]), rtol=1e-9)


@pytest.mark.parametrize("data", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize(
    "logsnrs",
    [
        lambda steps: np.linspace(-5, 4, steps + 1),
        lambda steps: SCHEDULES["cosine"](np.linspace(0.9, 0.1, steps + 1)),
    ],
    ids=["even", "cosine"],
)
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm_solver++", 2)])
def test_order_of_convergence_to_the_flow(
    solver: SolverName, order: int, logsnrs: Callable[[int], np.ndarray], data: Gaussians
) -> None:
    ends = logsnrs(1)
    exact = data.integrate(NOISE, *ends)
    errors = [
        np.abs(run(data.denoise, lambda i: NOISE, solver, logsnrs(steps)) - exact).max()
        for steps in (40, 80, 160)
    ]
    assert errors[-1] < {1: 0.01, 2: 5e-4}[order]
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2**order, rtol=0.15)


@every_solver
@every_schedule
def test_gaussian_data_come_back_with_their_mean_and_variance(
    solver: SolverName, schedule: ScheduleName
) -> None:
    """Exactly, without a draw: an array holds the share of each independent noise in the image, and
    the constant.
    """
    steps, (mean,) = 1000, ONE.means[:, 0]
    constant, *noises = np.eye(steps + 1)
    logsnrs = logsnr_steps(ScheduleConfig(schedule=schedule), steps)
    alpha, sigma = rates(logsnrs[-2])

    def denoiser(z: Any, logsnr: float) -> Any:
        offset = ONE.denoise(0.0, logsnr)
        return offset * constant + (ONE.denoise(1.0, logsnr) - offset) * z

    image = run(denoiser, lambda i: noises[i], solver, logsnrs)
    known = (alpha * ONE.std) ** 2 / (
        (alpha * ONE.std) ** 2 + sigma**2
    )  # the last answer is a mean: what it can tell
    assert image[0] == pytest.approx(mean, abs=0.02)
    assert (image[1:] ** 2).sum() == pytest.approx(known * ONE.std**2, rel=0.02)


def perfect(prediction: Prediction, x: Tensor) -> Denoiser:
    """A network that knows the image, and answers what `prediction` asks for."""

    def denoiser(z: Any, logsnr: float) -> Any:
        logsnr_B = Tensor(np.full(len(x), logsnr, np.float32))
        output = prediction_target(prediction, x, eps_from_x(z, x, logsnr_B), logsnr_B)
        return x_from_prediction(prediction, output, z, logsnr_B)

    return denoiser


@every_schedule
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("solver", "steps"),
    [
        ("ddim", 1),
        ("ddim", 2),
        ("ddim", 3),
        ("ddim", 7),
        ("ddim", 50),
        ("ddpm", 7),
        ("dpm_solver++", 7),
    ],
)
def test_a_perfect_network_gives_its_image(
    solver: SolverName, steps: int, schedule: ScheduleName, prediction: Prediction
) -> None:
    """Within the rounding of the last answer: from eps, that of z over alpha."""
    draws = np.random.default_rng(1).standard_normal((steps + 1, 2, 1, 3, 3)).astype(np.float32)
    x = np.tanh(draws[-1])
    logsnrs = logsnr_steps(ScheduleConfig(schedule=schedule), steps)
    found = run(perfect(prediction, Tensor(x)), lambda i: Tensor(draws[i]), solver, logsnrs)
    assert isinstance(found, Tensor)
    assert found.asnumpy().dtype == np.float32
    np.testing.assert_allclose(
        found.asnumpy(), x, atol=1e-6 / (rates(logsnrs[-2])[0] if prediction == "eps" else 1)
    )


@every_solver
def test_tensors_as_arrays(solver: SolverName) -> None:
    draws = np.random.default_rng(1).standard_normal((10, 5)).astype(np.float32)
    logsnrs = logsnr_steps(ScheduleConfig(), 10)

    def denoiser(z: Any, logsnr: float) -> Any:
        return Tensor(TWO.denoise(z.asnumpy(), logsnr).astype(np.float32))

    found = run(denoiser, lambda i: Tensor(draws[i]), solver, logsnrs).asnumpy()
    np.testing.assert_allclose(
        found, run(TWO.denoise, lambda i: draws[i], solver, logsnrs), atol=1e-5
    )


@pytest.mark.parametrize(
    ("solver", "drawn"), [("ddpm", [0, 1, 2, 3, 4]), ("ddim", [0]), ("dpm_solver++", [0])]
)
def test_which_noise_is_drawn_and_which_levels_are_visited(
    solver: SolverName, drawn: list[int]
) -> None:
    noises: list[int] = []
    calls: list[float] = []

    def noise(i: int) -> np.ndarray:
        noises.append(i)
        return NOISE

    def denoiser(z: Any, logsnr: float) -> Any:
        calls.append(logsnr)
        return z

    logsnrs = logsnr_steps(ScheduleConfig(), 5)
    run(denoiser, noise, solver, logsnrs)
    assert noises == drawn
    assert calls == logsnrs[:-1].tolist()
    assert {type(logsnr) for logsnr in calls} == {float}


def test_repainting_goes_back_to_the_level_of_the_step() -> None:
    """A network that is right about x = 0: z at logsnr has variance sigma^2 however often a step is
    taken.
    """
    levels: list[tuple[float, float]] = []

    def denoiser(z: Tensor, logsnr: float) -> Tensor:
        levels.append((logsnr, float(z.asnumpy().std())))
        return z * 0

    def noise(i: int) -> Tensor:
        draws = np.random.default_rng(i).standard_normal((1, 1, 256, 256))
        return Tensor(draws.astype(np.float32))

    logsnrs = logsnr_steps(ScheduleConfig(), 4)
    run(denoiser, noise, "ddim", logsnrs, repaint_steps=3)
    assert [level for level, _ in levels] == [*np.repeat(logsnrs[:3], 3), logsnrs[3]]
    for level, deviation in levels:
        assert deviation == pytest.approx(np.sqrt(1 / (1 + np.exp(level))), rel=0.02)


@pytest.mark.parametrize(("num_images", "batch_size"), [(1, 4), (4, 4), (5, 4), (9, 2)])
def test_batches_have_one_size_and_every_image_once(num_images: int, batch_size: int) -> None:
    rows = list(batch_rows(num_images, batch_size))
    assert {len(batch) for batch in rows} == {batch_size}
    assert np.concatenate(rows)[:num_images].tolist() == list(range(num_images))
    assert (np.concatenate(rows)[num_images:] == num_images - 1).all()


def test_calls_are_counted_as_they_are_made() -> None:
    stage = make("sr64")
    config = SamplerConfig(steps=5, extra_steps=2, repaint_steps=3, batch_size=2)
    assert num_calls(stage, config, 4) == 2 * 7
    assert num_calls(stage, config, 3, strength=0.5) == 2 * 5
    assert num_calls(stage, config, 1, masked=True) == 6 * 3 + 1


def test_sampling_is_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit below the size of its images, and then with tiles of zeros."""
    stage = make("sr64")
    weights = {p.name: p.shape for p in stage.network.trainable_params()}
    assign(stage.network, random_weights(weights, 0), "sr64")
    images, prompt = samples(stage, 2)
    request = SampleRequest(prompt=prompt, seed=0, image_ids=range(2), low_res=images[:, ::2, ::2])
    config = replace(stage.config.sample, steps=2, guidance=2.0, batch_size=2)

    def sampled(limit: int) -> np.ndarray:
        stage.tile_limit = limit
        stage.compiled_steps.clear()
        return engine.sample(stage, config, request).astype(int)

    def zeros(unet: UNet, x_BCHW: Tensor, *inputs: Tensor, limit: int) -> Tensor:
        return ops.zeros_like(ops.narrow(x_BCHW, 1, 0, 3))

    small = 16 * 32 * 12
    expected = sampled(stage.tile_limit)
    assert np.abs(sampled(small) - expected).max() <= 1

    monkeypatch.setattr(engine, "tiled", zeros)
    assert np.abs(sampled(small) - expected).max() > 10
