"""Schedules against the forms in which their sources give them."""

import numpy as np
import pytest

from pipeline.diffusion.schedule import SCHEDULES, cosine, linear, offset_cosine

T = np.linspace(0, 1, 1001)


def logsnr_of(alpha):
    return np.log(alpha**2 / (1 - alpha**2))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_logsnr_falls(schedule):
    logsnr = schedule(T)
    assert logsnr.dtype == np.float64
    assert np.isfinite(logsnr).all()
    assert (np.diff(logsnr) < 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_each_time_by_itself(schedule):
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
def test_ends(schedule, first, last):
    np.testing.assert_allclose(schedule(np.array([0, 1])), [first, last], atol=1e-8)


def test_cosine_is_a_cosine_but_for_its_ends():
    t = T[100:-99]
    np.testing.assert_allclose(cosine(t), logsnr_of(np.cos(np.pi / 2 * t)), atol=1e-3)


def test_cosine_treats_signal_and_noise_alike():
    np.testing.assert_allclose(cosine(1 - T), -cosine(T), atol=1e-8)


def test_offset_cosine_turns_evenly():
    angle = (1 - T) * np.arccos(0.95) + T * np.arccos(0.02)
    np.testing.assert_allclose(offset_cosine(T), logsnr_of(np.cos(angle)), atol=1e-8)


@pytest.mark.parametrize("num", [1000, 10_000, 100_000])
def test_linear_is_the_limit_of_many_small_betas(num):
    """1000 of them are DDPM's own, 1e-4 to 0.02."""
    signal = np.cumprod(1 - np.linspace(0.1, 20, num) / num)
    np.testing.assert_allclose(linear(np.arange(1, num + 1) / num), logsnr_of(np.sqrt(signal)), atol=100 / num)
