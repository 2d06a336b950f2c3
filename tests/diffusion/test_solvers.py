"""Samplers against the Gaussians and the differential equation they come from.

`sample` is linear in its arrays and asks nothing else of them, so that most tests hand it float64
NumPy arrays.
"""

import numpy as np
import pytest
from mindspore import Tensor

from pipeline.config import ConfigError
from pipeline.diffusion.process import eps_from_x, target, x_from
from pipeline.diffusion.schedule import SCHEDULES, ScheduleConfig
from pipeline.diffusion.solvers import (
    SAMPLERS,
    SamplerConfig,
    Step,
    ddim,
    ddpm,
    linear_step,
    logsnr_steps,
    sample,
)

PREDICTIONS = ("eps", "x0", "v")
PAIRS = [(-20, -19.9), (-20, -5), (-3, -2.5), (-1, 1), (0, 0.01), (2, 3), (-20, 20), (19, 20)]

every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def by(denoise):
    """The steps of a network (z, logsnr) -> x."""

    def advance(logsnr, numbers, z, *terms):
        x = denoise(z, logsnr)
        return linear_step(numbers, z, x, *terms), x

    return advance


def rates(logsnr):
    angle = np.arctan(np.exp(-np.asarray(logsnr, np.float64) / 2))
    return np.cos(angle), np.sin(angle)


class Data:
    """Numbers drawn from Gaussians of these means, all of one deviation: their best denoiser and
    their score.
    """

    def __init__(self, *means, std):
        self.means, self.std = np.array(means).reshape(-1, 1), std

    def noisy(self, z, logsnr):
        """At this level: the variance of each Gaussian, z's distances from their means, the share
        of each in z.
        """
        alpha, sigma = rates(logsnr)
        variance = (alpha * self.std) ** 2 + sigma**2
        distances = z - alpha * self.means
        share = np.exp(-(distances**2) / (2 * variance))
        return variance, distances, share / share.sum(axis=0)

    def denoise(self, z, logsnr):
        variance, distances, share = self.noisy(z, logsnr)
        return (share * (self.means + rates(logsnr)[0] * self.std**2 / variance * distances)).sum(
            axis=0
        )

    def flow(self, z, logsnr):
        """dz / dlogsnr of the probability flow, sigma^2 / 2 (z + score)."""
        variance, distances, share = self.noisy(z, logsnr)
        return rates(logsnr)[1] ** 2 / 2 * (z - (share * distances).sum(axis=0) / variance)

    def integrate(self, z, first, last, steps=2000):
        """The flow from one level to another (Runge-Kutta of order 4)."""
        h = (last - first) / steps
        for now in first + h * np.arange(steps):
            a = self.flow(z, now)
            b = self.flow(z + h / 2 * a, now + h / 2)
            c = self.flow(z + h / 2 * b, now + h / 2)
            d = self.flow(z + h * c, now + h)
            z = z + h / 6 * (a + 2 * b + 2 * c + d)
        return z


class TestLevels:
    @every_schedule
    @pytest.mark.parametrize("steps", [1, 2, 3, 250])
    def test_rise_from_noise_to_the_image(self, schedule, steps):
        found = logsnr_steps(ScheduleConfig(schedule=schedule), steps)
        assert found.shape == (steps + 1,)
        assert found[0] == SCHEDULES[schedule](1.0)
        assert found[-1] == np.inf
        assert np.isfinite(found[:-1]).all()
        assert (np.diff(found) > 0).all()

    @every_schedule
    def test_are_even_in_time(self, schedule):
        np.testing.assert_allclose(
            logsnr_steps(ScheduleConfig(schedule=schedule), 4)[:4],
            SCHEDULES[schedule](np.array([1, 0.75, 0.5, 0.25])),
        )

    def test_discrete_time_is_respaced(self):
        """Ten of a hundred steps: every tenth."""
        schedule = ScheduleConfig(schedule="linear", timesteps=100)
        every = schedule.logsnr(np.arange(1, 101) / 100)
        np.testing.assert_array_equal(logsnr_steps(schedule, 10)[:-1], every[::-1][::10])
        np.testing.assert_array_equal(logsnr_steps(schedule, 100)[:-1], every[::-1])
        with pytest.raises(
            ConfigError, match="steps: 101 are more than the 100 of this stage's discrete time"
        ):
            logsnr_steps(schedule, 101)

    @pytest.mark.parametrize("timesteps", [None, 40])
    def test_extra_steps_lie_behind_the_last(self, timesteps):
        schedule = ScheduleConfig(timesteps=timesteps)
        plain, more = logsnr_steps(schedule, 10), logsnr_steps(schedule, 10, extra=3)
        assert len(more) == len(plain) + 3
        np.testing.assert_array_equal(more[:10], plain[:10])
        assert (np.diff(more[9:]) > 0).all()

    @pytest.mark.parametrize(("strength", "calls"), [(1.0, 10), (0.5, 5), (0.25, 3), (0.01, 1)])
    def test_strength_starts_later(self, strength, calls):
        found = logsnr_steps(ScheduleConfig(), 10, strength=strength)
        assert len(found) == calls + 1
        assert found[0] == ScheduleConfig().logsnr(strength)


def test_resampling_goes_back_to_the_level_of_the_step():
    """A network that is right about x = 0: z at logsnr has variance sigma^2 however often a step is
    made.
    """
    seen = []

    def advance(logsnr, numbers, z, *terms):
        seen.append((logsnr, float(z.asnumpy().std())))
        return linear_step(numbers, z, z * 0, *terms), z * 0

    def noise(draw):
        return Tensor(
            np.random.default_rng(draw).standard_normal((1, 1, 256, 256)).astype(np.float32)
        )

    logsnrs = logsnr_steps(ScheduleConfig(), 4)
    sample(advance, noise, "ddim", logsnrs, repaint_steps=3)
    assert [level for level, _ in seen] == [*np.repeat(logsnrs[:3], 3), logsnrs[3]]
    for level, deviation in seen:
        assert deviation == pytest.approx(np.sqrt(1 / (1 + np.exp(level))), rel=0.02)


class TestStep:
    @every_sampler
    @pytest.mark.parametrize("last", [None, -7.0])
    @pytest.mark.parametrize("now", [-20.0, -3.0, 0.0, 20.0])
    def test_the_final_one_gives_x(self, sampler, last, now):
        if last is None or last < now:
            assert SAMPLERS[sampler](last, now, np.inf) == Step(z=0, x=1, x_last=0, noise=0)

    @every_sampler
    @pytest.mark.parametrize(("now", "following"), PAIRS)
    def test_keeps_to_the_path_of_the_image(self, sampler, now, following):
        """If x is right, now and before, z' = alpha' x + sigma' eps' with unit noise eps'."""
        (alpha, sigma), (alpha_next, sigma_next) = rates(now), rates(following)
        step = SAMPLERS[sampler](now - 1, now, following)
        assert step.z * alpha + step.x + step.x_last == pytest.approx(alpha_next)
        assert np.hypot(step.z * sigma, step.noise) == pytest.approx(sigma_next)

    @pytest.mark.parametrize(("now", "following"), PAIRS)
    def test_ddim_keeps_eps(self, now, following):
        (alpha, sigma), (alpha_next, sigma_next) = rates(now), rates(following)
        x, eps = 0.3, -1.1
        step = ddim(None, now, following)
        assert step.z * (alpha * x + sigma * eps) + step.x * x == pytest.approx(
            alpha_next * x + sigma_next * eps
        )

    @pytest.mark.parametrize(("now", "following"), [*PAIRS, (0, np.inf)])
    def test_ddpm_is_the_gaussian_of_the_next_level_given_this_one(self, now, following):
        """z comes from z' by more noise: their joint Gaussian given x, conditioned on z."""
        (alpha, sigma), (alpha_next, sigma_next) = rates(now), rates(following)
        kept = alpha / alpha_next
        covariance = np.array(
            [[sigma_next**2, kept * sigma_next**2], [kept * sigma_next**2, sigma**2]]
        )
        gain = covariance[0, 1] / covariance[1, 1]
        variance = covariance[0, 0] - gain * covariance[1, 0]
        step = ddpm(None, now, following)
        assert step.z == pytest.approx(gain)
        assert step.x == pytest.approx(alpha_next - gain * alpha)
        assert step.noise**2 == pytest.approx(variance)


def dpm_solver_2m(denoise, z, logsnrs):
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
ONE = Data(0.3, std=0.5)
TWO = Data(-0.6, 0.6, std=0.3)


@every_schedule
@pytest.mark.parametrize("steps", [2, 3, 10])
def test_dpm_solver_is_the_papers(schedule, steps):
    logsnrs = logsnr_steps(ScheduleConfig(schedule=schedule), steps)
    found = sample(by(TWO.denoise), lambda i: NOISE, "dpm_solver++", logsnrs[:-1])
    np.testing.assert_allclose(found, dpm_solver_2m(TWO.denoise, NOISE, logsnrs[:-1]), rtol=1e-9)
    whole = sample(by(TWO.denoise), lambda i: NOISE, "dpm_solver++", logsnrs)
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
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm_solver++", 2)])
def test_order_of_convergence_to_the_flow(sampler, order, logsnrs, data):
    ends = logsnrs(1)
    exact = data.integrate(NOISE, *ends)
    errors = [
        np.abs(sample(by(data.denoise), lambda i: NOISE, sampler, logsnrs(steps)) - exact).max()
        for steps in (40, 80, 160)
    ]
    assert errors[-1] < {1: 0.01, 2: 5e-4}[order]
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2**order, rtol=0.15)


@every_sampler
@every_schedule
def test_gaussian_data_come_back_with_their_mean_and_variance(sampler, schedule):
    """Exactly, without a draw: an array holds the share of each independent noise in the image, and
    the constant.
    """
    steps, (mean,) = 1000, ONE.means[:, 0]
    constant, *noises = np.eye(steps + 1)
    logsnrs = logsnr_steps(ScheduleConfig(schedule=schedule), steps)
    alpha, sigma = rates(logsnrs[-2])

    def denoise(z, logsnr):
        offset = ONE.denoise(0.0, logsnr)
        return offset * constant + (ONE.denoise(1.0, logsnr) - offset) * z

    image = sample(by(denoise), lambda i: noises[i], sampler, logsnrs)
    known = (alpha * ONE.std) ** 2 / (
        (alpha * ONE.std) ** 2 + sigma**2
    )  # the last answer is a mean: what it can tell
    assert image[0] == pytest.approx(mean, abs=0.02)
    assert (image[1:] ** 2).sum() == pytest.approx(known * ONE.std**2, rel=0.02)


def perfect(prediction, x):
    """A network that knows the image, and answers what `prediction` asks for."""

    def denoise(z, logsnr):
        logsnr_B = Tensor(np.full(len(x), logsnr, np.float32))
        output = target(prediction, x, eps_from_x(z, x, logsnr_B), logsnr_B)
        return x_from(prediction, output, z, logsnr_B)

    return denoise


@every_schedule
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("sampler", "steps"),
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
def test_a_perfect_network_gives_its_image(sampler, steps, schedule, prediction):
    """Within the rounding of the last answer: from eps, that of z over alpha."""
    draws = np.random.default_rng(1).standard_normal((steps + 1, 2, 1, 3, 3)).astype(np.float32)
    x = np.tanh(draws[-1])
    logsnrs = logsnr_steps(ScheduleConfig(schedule=schedule), steps)
    found = sample(by(perfect(prediction, Tensor(x))), lambda i: Tensor(draws[i]), sampler, logsnrs)
    assert isinstance(found, Tensor)
    assert found.asnumpy().dtype == np.float32
    np.testing.assert_allclose(
        found.asnumpy(), x, atol=1e-6 / (rates(logsnrs[-2])[0] if prediction == "eps" else 1)
    )


@every_sampler
def test_tensors_as_arrays(sampler):
    draws = np.random.default_rng(1).standard_normal((10, 5)).astype(np.float32)
    logsnrs = logsnr_steps(ScheduleConfig(), 10)

    def denoise(z, logsnr):
        return Tensor(TWO.denoise(z.asnumpy(), logsnr).astype(np.float32))

    found = sample(by(denoise), lambda i: Tensor(draws[i]), sampler, logsnrs).asnumpy()
    np.testing.assert_allclose(
        found, sample(by(TWO.denoise), lambda i: draws[i], sampler, logsnrs), atol=1e-5
    )


@pytest.mark.parametrize(
    ("sampler", "asked"), [("ddpm", [0, 1, 2, 3, 4]), ("ddim", [0]), ("dpm_solver++", [0])]
)
def test_what_is_asked_of_noise_and_network(sampler, asked):
    noises, calls = [], []

    def noise(i):
        noises.append(i)
        return NOISE

    def denoise(z, logsnr):
        calls.append(logsnr)
        return z

    logsnrs = logsnr_steps(ScheduleConfig(), 5)
    sample(by(denoise), noise, sampler, logsnrs)
    assert noises == asked
    assert calls == logsnrs[:-1].tolist()
    assert {type(logsnr) for logsnr in calls} == {float}


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("batch_size", 0), ("quantile", 0.0), ("quantile", 99.5), ("quantile", np.nan)],
)
def test_config_errors_name_the_field(field, value):
    with pytest.raises(ConfigError, match=f"^{field}: {value} is not "):
        SamplerConfig(**{field: value})
