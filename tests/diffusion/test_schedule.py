"""Schedules against the forms in which their sources give them."""

from collections.abc import Callable

import numpy as np
import pytest

from pipeline.config import ConfigError
from pipeline.diffusion.schedule import (
    SCHEDULES,
    ScheduleConfig,
    ScheduleName,
    cosine,
    linear,
    offset_cosine,
)

Schedule = Callable[[np.ndarray], np.ndarray]

T = np.linspace(0, 1, 1001)


def logsnr_of(alpha: float | np.ndarray) -> np.ndarray:
    return np.log(alpha**2 / (1 - alpha**2))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_logsnr_falls(schedule: Schedule) -> None:
    logsnr = schedule(T)
    assert logsnr.dtype == np.float64
    assert np.isfinite(logsnr).all()
    assert (np.diff(logsnr) < 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_times_are_independent(schedule: Schedule) -> None:
    np.testing.assert_array_equal(schedule(T.reshape(7, -1)), schedule(T).reshape(7, -1))
    assert schedule(0.25) == schedule(T)[250]
    assert schedule(np.float32(0.25)) == schedule(0.25)


@pytest.mark.parametrize(
    ("schedule", "first", "last"),
    [
        (cosine, 20, -20),
        (offset_cosine, logsnr_of(0.95), logsnr_of(0.02)),
        (linear, 20, -np.log(np.exp(10.05) - 1)),
    ],
    ids=["cosine", "offset_cosine", "linear"],
)
def test_ends(schedule: Schedule, first: float, last: float) -> None:
    np.testing.assert_allclose(schedule(np.array([0, 1])), [first, last], atol=1e-8)


def test_cosine_is_a_cosine_except_at_its_ends() -> None:
    t = T[100:-99]
    np.testing.assert_allclose(cosine(t), logsnr_of(np.cos(np.pi / 2 * t)), atol=1e-3)


def test_cosine_is_symmetric_in_signal_and_noise() -> None:
    np.testing.assert_allclose(cosine(1 - T), -cosine(T), atol=1e-8)


def test_offset_cosine_has_a_linear_angle() -> None:
    angle = (1 - T) * np.arccos(0.95) + T * np.arccos(0.02)
    np.testing.assert_allclose(offset_cosine(T), logsnr_of(np.cos(angle)), atol=1e-8)


@pytest.mark.parametrize("num", [1000, 10_000, 100_000])
def test_linear_is_the_limit_of_many_small_betas(num: int) -> None:
    """1000 of them are DDPM's own, 1e-4 to 0.02."""
    signal = np.cumprod(1 - np.linspace(0.1, 20, num) / num)
    np.testing.assert_allclose(
        linear(np.arange(1, num + 1) / num), logsnr_of(np.sqrt(signal)), atol=100 / num
    )


@pytest.mark.parametrize("num", [200, 1000, 2000])
def test_discrete_linear_equals_ddpm(num: int) -> None:
    """alpha^2 is the product of 1 - beta, in float64, at the times k / T."""
    signal = np.cumprod(1 - np.linspace(1e-4, 0.02, num))
    config = ScheduleConfig(schedule="linear", timesteps=num)
    np.testing.assert_allclose(
        config.logsnr(np.arange(1, num + 1) / num), logsnr_of(np.sqrt(signal)), atol=1e-7
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_limit_of_discrete_time_is_continuous(schedule: ScheduleName) -> None:
    errors = []
    t = np.linspace(0.05, 0.95, 999)  # off the steps, where the two are equal
    for num in (1000, 10_000):
        betas = (0.1 / num, 20 / num) if schedule == "linear" else (1e-4, 0.02)
        discrete = ScheduleConfig(schedule=schedule, timesteps=num, betas=betas)
        errors.append(np.abs(discrete.logsnr(t) - SCHEDULES[schedule](t)).max())
    assert errors[1] < errors[0] / 5
    assert errors[1] < 0.02


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_uniform_times_make_every_step_equally_likely(schedule: ScheduleName) -> None:
    config = ScheduleConfig(schedule=schedule, timesteps=8)
    levels, counts = np.unique(config.logsnr((np.arange(8000) + 0.5) / 8000), return_counts=True)
    assert len(levels) == 8
    assert (counts == 1000).all()
    assert config.logsnr(0.0) == levels[-1]
    assert config.logsnr(1.0) == levels[0]


@pytest.mark.parametrize("timesteps", [None, 50])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_shift_is_added(schedule: ScheduleName, timesteps: int | None) -> None:
    plain, shifted = (
        ScheduleConfig(schedule=schedule, timesteps=timesteps, logsnr_shift=logsnr_shift)
        for logsnr_shift in (0.0, -1.5)
    )
    np.testing.assert_allclose(shifted.logsnr(T), plain.logsnr(T) - 1.5)


def test_betas_scale_continuous_linear() -> None:
    np.testing.assert_array_equal(ScheduleConfig(schedule="linear").logsnr(T), linear(T))
    assert (
        ScheduleConfig(schedule="linear", betas=(1e-6, 0.01)).logsnr(T[1:]) > linear(T[1:])
    ).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timesteps": 1}, "timesteps: 1 is less than 2"),
        (
            {"schedule": "linear", "betas": (0.02, 1e-4)},
            r"betas: \[0.02, 0.0001\] do not rise within \(0, 1\)",
        ),
        (
            {"betas": (1e-4, 0.01)},
            r"betas: \[0.0001, 0.01\] belong to the linear schedule, and schedule is cosine",
        ),
    ],
)
def test_invalid_schedules_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(**change)
