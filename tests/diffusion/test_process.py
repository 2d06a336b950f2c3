"""The forward process as a rotation of (x, eps) into (z, v): alpha and sigma are cosine and sine of
an angle.
"""

from collections.abc import Callable

import numpy as np
import pytest
from mindspore import Tensor

from pipeline.diffusion.process import (
    Prediction,
    add_noise,
    alpha_sigma,
    eps_from_x,
    gaussian_posterior,
    prediction_target,
    v_target,
    x_from_eps,
    x_from_prediction,
    x_from_v,
)
from pipeline.diffusion.schedule import SCHEDULES

PREDICTIONS: tuple[Prediction, ...] = ("eps", "x0", "v")
SCHEDULE_LEVELS = [
    pytest.param(schedule(np.linspace(0, 1, 9)).astype(np.float32), id=name)
    for name, schedule in SCHEDULES.items()
]
RNG = np.random.default_rng(0)
X = RNG.uniform(-1, 1, (9, 3, 4, 4)).astype(np.float32)
EPS = RNG.standard_normal(X.shape).astype(np.float32)


def rates(logsnr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of the angle, float64 (B, 1, 1, 1)."""
    angle = np.arctan(np.exp(-logsnr.astype(np.float64) / 2)).reshape(-1, 1, 1, 1)
    return np.cos(angle), np.sin(angle)


def call(function: Callable[..., Tensor], *arrays: np.ndarray) -> np.ndarray:
    return function(*map(Tensor, arrays)).asnumpy()


def test_alpha_and_sigma_are_cosine_and_sine() -> None:
    logsnr = np.linspace(-20, 20, 401).astype(np.float32)
    alpha, sigma = (rate.asnumpy() for rate in alpha_sigma(Tensor(logsnr)))
    np.testing.assert_allclose(alpha, rates(logsnr)[0].ravel(), rtol=1e-5)
    np.testing.assert_allclose(sigma, rates(logsnr)[1].ravel(), rtol=1e-5)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, atol=1e-6)


@pytest.mark.parametrize("logsnr", SCHEDULE_LEVELS)
class TestEveryLevel:
    def test_add_noise_and_v_target_equal_their_definitions(self, logsnr: np.ndarray) -> None:
        alpha, sigma = rates(logsnr)
        np.testing.assert_allclose(
            call(add_noise, X, EPS, logsnr), alpha * X + sigma * EPS, atol=2e-6
        )
        np.testing.assert_allclose(
            call(v_target, X, EPS, logsnr), alpha * EPS - sigma * X, atol=2e-6
        )

    def test_rotation_preserves_the_length(self, logsnr: np.ndarray) -> None:
        z = call(add_noise, X, EPS, logsnr)
        v = call(v_target, X, EPS, logsnr)
        np.testing.assert_allclose(z**2 + v**2, X**2 + EPS**2, rtol=1e-5)

    def test_unit_variance_is_preserved(self, logsnr: np.ndarray) -> None:
        x, eps = (
            np.random.default_rng(1).standard_normal((2, len(logsnr), 3, 64, 64)).astype(np.float32)
        )
        np.testing.assert_allclose(
            call(add_noise, x, eps, logsnr).var(axis=(1, 2, 3)), 1, atol=0.05
        )

    @pytest.mark.parametrize("prediction", PREDICTIONS)
    def test_the_exact_prediction_gives_x(self, logsnr: np.ndarray, prediction: Prediction) -> None:
        """From eps, within the rounding of z times 1 / alpha."""
        x, eps, logsnr_B = map(Tensor, (X, EPS, logsnr))
        z = add_noise(x, eps, logsnr_B)
        target = prediction_target(prediction, x, eps, logsnr_B)
        output = x_from_prediction(prediction, target, z, logsnr_B).asnumpy()
        alpha, _ = rates(logsnr)
        assert (np.abs(output - X) <= 1e-6 / (alpha if prediction == "eps" else 1)).all()

    def test_eps_from_x(self, logsnr: np.ndarray) -> None:
        z = call(add_noise, X, EPS, logsnr)
        assert (np.abs(call(eps_from_x, z, X, logsnr) - EPS) <= 1e-6 / rates(logsnr)[1]).all()


@pytest.mark.parametrize("residual_std", [0.05, 0.25, 1.0])
def test_gaussian_posterior_follows_from_bayes_rule(residual_std: float) -> None:
    """At logsnr -20 its mean is the prior's, at 20 it is the image in z."""
    logsnr = np.linspace(-20, 20, 9).astype(np.float32)
    alpha, sigma = rates(logsnr)
    prior_mean = X[::-1].astype(np.float64)
    z = alpha * X + sigma * EPS
    variance = 1 / (1 / residual_std**2 + alpha**2 / sigma**2)
    inputs = (
        Tensor(prior_mean.astype(np.float32)),
        Tensor(np.full(9, residual_std, np.float32)),
        Tensor(z.astype(np.float32)),
        Tensor(logsnr),
    )
    mean, deviation = (tensor.asnumpy() for tensor in gaussian_posterior(*inputs))
    np.testing.assert_allclose(
        mean, variance * (prior_mean / residual_std**2 + alpha * z / sigma**2), atol=2e-5
    )
    np.testing.assert_allclose(deviation, np.sqrt(variance), rtol=1e-4)
    np.testing.assert_allclose(mean[0], prior_mean[0], atol=1e-3)
    np.testing.assert_allclose(mean[-1], X[-1], atol=1e-3)


def test_posterior_deviations_have_unit_size_at_all_levels() -> None:
    rng = np.random.default_rng(0)
    logsnr = np.linspace(-20, 10, 9).astype(np.float32)
    prior_mean, residual, eps = rng.standard_normal((3, 9, 3, 64, 64)).astype(np.float32)
    x = prior_mean + 0.1 * residual
    z = call(add_noise, x, eps, logsnr)

    residual_std = np.full(9, 0.1, np.float32)
    posterior = gaussian_posterior(*map(Tensor, (prior_mean, residual_std, z, logsnr)))
    mean, deviation = (tensor.asnumpy() for tensor in posterior)
    np.testing.assert_allclose(((x - mean) / deviation).std((1, 2, 3)), 1, atol=0.03)


def test_v_is_the_derivative_of_z_by_the_angle() -> None:
    angle = np.linspace(0.1, 1.4, len(X))
    step = 0.01
    before, now, after = (
        (-2 * np.log(np.tan(angle + d))).astype(np.float32) for d in (-step, 0, step)
    )
    speed = (call(add_noise, X, EPS, after) - call(add_noise, X, EPS, before)) / (2 * step)
    np.testing.assert_allclose(call(v_target, X, EPS, now), speed, atol=1e-3)


def test_prediction_targets() -> None:
    x, eps, logsnr = map(Tensor, (X, EPS, np.zeros(len(X), np.float32)))
    expected = {"eps": EPS, "x0": X, "v": (EPS - X) / np.sqrt(2)}
    for prediction in PREDICTIONS:
        np.testing.assert_allclose(
            prediction_target(prediction, x, eps, logsnr).asnumpy(), expected[prediction], atol=1e-6
        )


@pytest.mark.parametrize("function", [add_noise, v_target, x_from_eps, x_from_v, eps_from_x])
def test_images_are_independent(function: Callable[..., Tensor]) -> None:
    logsnr = np.linspace(-3, 3, len(X)).astype(np.float32)
    others = [np.concatenate((array[:1] + 1, array[1:])) for array in (X, EPS, logsnr)]
    first, *rest = call(function, X, EPS, logsnr) != call(function, *others)
    assert first.all()
    assert not np.any(rest)
