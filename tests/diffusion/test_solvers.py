"""Solvers' coefficients against the Gaussians that they come from; levels and settings."""

import numpy as np
import pytest

from pipeline.config import ConfigError
from pipeline.diffusion.schedule import SCHEDULES, ScheduleConfig, ScheduleName
from pipeline.diffusion.solvers import (
    SOLVERS,
    Coefficients,
    SamplerConfig,
    SolverName,
    ddim,
    ddpm,
    logsnr_steps,
)

LEVEL_PAIRS = [
    (-20, -19.9),
    (-20, -5),
    (-3, -2.5),
    (-1, 1),
    (0, 0.01),
    (2, 3),
    (-20, 20),
    (19, 20),
]

every_solver = pytest.mark.parametrize("solver", SOLVERS)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def rates(logsnr: object) -> tuple[np.ndarray, np.ndarray]:
    """alpha and sigma, float64, by another formula than the library's."""
    angle = np.arctan(np.exp(-np.asarray(logsnr, np.float64) / 2))
    return np.cos(angle), np.sin(angle)


class TestLevels:
    @every_schedule
    @pytest.mark.parametrize("steps", [1, 2, 3, 250])
    def test_rise_from_noise_to_the_image(self, schedule: ScheduleName, steps: int) -> None:
        found = logsnr_steps(ScheduleConfig(schedule=schedule), steps)
        assert found.shape == (steps + 1,)
        assert found[0] == SCHEDULES[schedule](1.0)
        assert found[-1] == np.inf
        assert np.isfinite(found[:-1]).all()
        assert (np.diff(found) > 0).all()

    @every_schedule
    def test_are_even_in_time(self, schedule: ScheduleName) -> None:
        np.testing.assert_allclose(
            logsnr_steps(ScheduleConfig(schedule=schedule), 4)[:4],
            SCHEDULES[schedule](np.array([1, 0.75, 0.5, 0.25])),
        )

    def test_discrete_time_is_respaced(self) -> None:
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
    def test_extra_steps_lie_behind_the_last(self, timesteps: int | None) -> None:
        schedule = ScheduleConfig(timesteps=timesteps)
        plain, more = logsnr_steps(schedule, 10), logsnr_steps(schedule, 10, extra=3)
        assert len(more) == len(plain) + 3
        np.testing.assert_array_equal(more[:10], plain[:10])
        assert (np.diff(more[9:]) > 0).all()

    @pytest.mark.parametrize(("strength", "calls"), [(1.0, 10), (0.5, 5), (0.25, 3), (0.01, 1)])
    def test_strength_starts_later(self, strength: float, calls: int) -> None:
        found = logsnr_steps(ScheduleConfig(), 10, strength=strength)
        assert len(found) == calls + 1
        assert found[0] == ScheduleConfig().logsnr(strength)


class TestCoefficients:
    @every_solver
    @pytest.mark.parametrize("last", [None, -7.0])
    @pytest.mark.parametrize("now", [-20.0, -3.0, 0.0, 20.0])
    def test_the_final_one_gives_x(
        self, solver: SolverName, last: float | None, now: float
    ) -> None:
        if last is None or last < now:
            assert SOLVERS[solver].coefficients(last, now, np.inf) == Coefficients(
                z=0, x=1, x_prev=0, noise=0
            )

    @every_solver
    @pytest.mark.parametrize(("now", "following"), LEVEL_PAIRS)
    def test_keeps_to_the_path_of_the_image(
        self, solver: SolverName, now: float, following: float
    ) -> None:
        """If x is right, now and before, z' = alpha' x + sigma' eps' with unit noise eps'."""
        (alpha, sigma), (alpha_next, sigma_next) = rates(now), rates(following)
        step = SOLVERS[solver].coefficients(now - 1, now, following)
        assert step.z * alpha + step.x + step.x_prev == pytest.approx(alpha_next)
        assert np.hypot(step.z * sigma, step.noise) == pytest.approx(sigma_next)

    @pytest.mark.parametrize(("now", "following"), LEVEL_PAIRS)
    def test_ddim_keeps_eps(self, now: float, following: float) -> None:
        (alpha, sigma), (alpha_next, sigma_next) = rates(now), rates(following)
        x, eps = 0.3, -1.1
        step = ddim(None, now, following)
        assert step.z * (alpha * x + sigma * eps) + step.x * x == pytest.approx(
            alpha_next * x + sigma_next * eps
        )

    @pytest.mark.parametrize(("now", "following"), [*LEVEL_PAIRS, (0, np.inf)])
    def test_ddpm_is_the_gaussian_of_the_next_level_given_this_one(
        self, now: float, following: float
    ) -> None:
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


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("batch_size", 0), ("quantile", 0.0), ("quantile", 99.5), ("quantile", np.nan)],
)
def test_config_errors_name_the_field(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: {value} is not "):
        SamplerConfig(**{field: value})
