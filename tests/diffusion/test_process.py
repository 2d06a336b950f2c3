"""The forward process as a rotation of (x, eps) into (z, v): alpha and sigma are cosine and sine of
an angle.
"""

import numpy as np
import pytest
from mindspore import Tensor

from pipeline.diffusion.process import (
    add_noise,
    alpha_sigma,
    eps_from_x,
    gaussian_posterior,
    target,
    v_target,
    x_from,
    x_from_eps,
    x_from_v,
)
from pipeline.diffusion.schedule import SCHEDULES

PREDICTIONS = ("eps", "x0", "v")
SCHEDULE_LEVELS = [
    pytest.param(schedule(np.linspace(0, 1, 9)).astype(np.float32), id=name)
    for name, schedule in SCHEDULES.items()
]
RNG = np.random.default_rng(0)
X = RNG.uniform(-1, 1, (9, 3, 4, 4)).astype(np.float32)
EPS = RNG.standard_normal(X.shape).astype(np.float32)


def rates(logsnr):
    """Cosine and sine of the angle, in float64, to go with images."""
    angle = np.arctan(np.exp(-logsnr.astype(np.float64) / 2)).reshape(-1, 1, 1, 1)
    return np.cos(angle), np.sin(angle)


def call(function, *arrays):
    return function(*map(Tensor, arrays)).asnumpy()


def test_rates():
    logsnr = np.linspace(-20, 20, 401).astype(np.float32)
    alpha, sigma = (rate.asnumpy() for rate in alpha_sigma(Tensor(logsnr)))
    np.testing.assert_allclose(alpha, rates(logsnr)[0].ravel(), rtol=1e-5)
    np.testing.assert_allclose(sigma, rates(logsnr)[1].ravel(), rtol=1e-5)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-6)


@pytest.mark.parametrize("logsnr", SCHEDULE_LEVELS)
class TestEveryLevel:
    def test_noise_is_mixed_in(self, logsnr):
        alpha, sigma = rates(logsnr)
        np.testing.assert_allclose(
            call(add_noise, X, EPS, logsnr), alpha * X + sigma * EPS, atol=2e-6
        )
        np.testing.assert_allclose(
            call(v_target, X, EPS, logsnr), alpha * EPS - sigma * X, atol=2e-6
        )

    def test_z_and_v_keep_the_length(self, logsnr):
        z, v = call(add_noise, X, EPS, logsnr), call(v_target, X, EPS, logsnr)
        np.testing.assert_allclose(z**2 + v**2, X**2 + EPS**2, rtol=1e-5)

    def test_unit_variance_is_preserved(self, logsnr):
        x, eps = (
            np.random.default_rng(1).standard_normal((2, len(logsnr), 3, 64, 64)).astype(np.float32)
        )
        np.testing.assert_allclose(
            call(add_noise, x, eps, logsnr).var(axis=(1, 2, 3)), 1, atol=0.05
        )

    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_a_right_answer_gives_x(self, logsnr, prediction):
        """From eps within the rounding of z, magnified by 1 / alpha."""
        x, eps, logsnr_B = map(Tensor, (X, EPS, logsnr))
        z = add_noise(x, eps, logsnr_B)
        found = x_from(prediction, target(prediction, x, eps, logsnr_B), z, logsnr_B).asnumpy()
        alpha, _ = rates(logsnr)
        assert (np.abs(found - X) <= 1e-6 / (alpha if prediction == "eps" else 1)).all()

    def test_eps_from_x(self, logsnr):
        z = call(add_noise, X, EPS, logsnr)
        assert (np.abs(call(eps_from_x, z, X, logsnr) - EPS) <= 1e-6 / rates(logsnr)[1]).all()


@pytest.mark.parametrize("residual_std", [0.05, 0.25, 1.0])
def test_an_answer_counts_deviations_from_what_is_known(residual_std):
    """By Bayes' rule: of pixels that a prior_mean is off by N(0, residual_std^2), given z; -20 is the prior_mean,
    20 what z shows.
    """
    logsnr = np.linspace(-20, 20, 9).astype(np.float32)
    (alpha, sigma), prior_mean = rates(logsnr), X[::-1].astype(np.float64)
    z = alpha * X + sigma * EPS
    variance = 1 / (1 / residual_std**2 + alpha**2 / sigma**2)
    spreads = Tensor(np.full(9, residual_std, np.float32))
    inputs = (
        Tensor(prior_mean.astype(np.float32)),
        spreads,
        Tensor(z.astype(np.float32)),
        Tensor(logsnr),
    )
    found, deviation = (tensor.asnumpy() for tensor in gaussian_posterior(*inputs))
    np.testing.assert_allclose(
        found, variance * (prior_mean / residual_std**2 + alpha * z / sigma**2), atol=2e-5
    )
    np.testing.assert_allclose(deviation, np.sqrt(variance), rtol=1e-4)
    np.testing.assert_allclose(found[0], prior_mean[0], atol=1e-3)
    np.testing.assert_allclose(found[-1], X[-1], atol=1e-3)


def test_deviations_from_the_mean_have_one_size():
    """At all levels, if the prior_mean is off by its residual_std."""
    rng, logsnr = np.random.default_rng(0), np.linspace(-20, 10, 9).astype(np.float32)
    prior_mean, off, eps = rng.standard_normal((3, 9, 3, 64, 64)).astype(np.float32)
    truth = prior_mean + 0.1 * off
    x, eps, prior_mean, residual_std, logsnr = map(
        Tensor, (truth, eps, prior_mean, np.full(9, 0.1, np.float32), logsnr)
    )
    mean, deviation = (
        tensor.asnumpy()
        for tensor in gaussian_posterior(
            prior_mean, residual_std, add_noise(x, eps, logsnr), logsnr
        )
    )
    np.testing.assert_allclose(((truth - mean) / deviation).std((1, 2, 3)), 1, atol=0.03)


def test_v_is_the_speed_of_z_along_the_angle():
    angle, step = np.linspace(0.1, 1.4, len(X)), 0.01
    before, now, after = (
        (-2 * np.log(np.tan(angle + d))).astype(np.float32) for d in (-step, 0, step)
    )
    speed = (call(add_noise, X, EPS, after) - call(add_noise, X, EPS, before)) / (2 * step)
    np.testing.assert_allclose(call(v_target, X, EPS, now), speed, atol=1e-3)


def test_what_the_predictions_ask_for():
    x, eps, logsnr = map(Tensor, (X, EPS, np.zeros(len(X), np.float32)))
    wanted = {"eps": EPS, "x0": X, "v": (EPS - X) / np.sqrt(2)}
    for prediction in PREDICTIONS:
        np.testing.assert_allclose(
            target(prediction, x, eps, logsnr).asnumpy(), wanted[prediction], atol=1e-6
        )


@pytest.mark.parametrize("function", [add_noise, v_target, x_from_eps, x_from_v, eps_from_x])
def test_an_image_does_not_change_another(function):
    logsnr = np.linspace(-3, 3, len(X)).astype(np.float32)
    others = [np.concatenate((array[:1] + 1, array[1:])) for array in (X, EPS, logsnr)]
    first, *rest = call(function, X, EPS, logsnr) != call(function, *others)
    assert first.all()
    assert not np.any(rest)
