"""Losses against their definitions, and compiled with their gradients as in training."""

from collections.abc import Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from pipeline.config import ConfigError
from pipeline.diffusion.objective import (
    DiffusionConfig,
    diffusion_loss,
    loss_weight,
    pointwise_loss,
)
from pipeline.diffusion.process import Prediction, add_noise, prediction_target, x_from_prediction

PREDICTIONS: tuple[Prediction, ...] = ("eps", "x0", "v")
LOGSNR = np.array([-20, -3, 0, 1, 1.7, 4, 20], np.float32)
RNG = np.random.default_rng(0)
X, EPS, OUTPUT = RNG.standard_normal((3, len(LOGSNR), 3, 4, 4)).astype(np.float32)

LOSSES = {
    "l1": np.abs,
    "l2": np.square,
    "huber": lambda d: np.where(np.abs(d) <= 1, d**2 / 2, np.abs(d) - 0.5),
}
MIN_SNR = {
    "eps": lambda snr, gamma: np.where(snr < gamma, 1, gamma / snr),
    "x0": lambda snr, gamma: np.where(snr < gamma, snr, gamma),
    "v": lambda snr, gamma: np.where(snr < gamma, snr, gamma) / (snr + 1),
}


def rates(logsnr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    angle = np.arctan(np.exp(-logsnr.astype(np.float64) / 2)).reshape(-1, 1, 1, 1)
    return np.cos(angle), np.sin(angle)


def reference(
    config: DiffusionConfig,
    output: np.ndarray,
    x: np.ndarray,
    eps: np.ndarray,
    logsnr: np.ndarray,
) -> np.ndarray:
    alpha, sigma = rates(logsnr)
    target = {"eps": eps, "x0": x, "v": alpha * eps - sigma * x}[config.prediction]
    loss_B = LOSSES[config.loss](output - target).mean(axis=(1, 2, 3))
    if config.min_snr is None:
        return loss_B
    return loss_B * MIN_SNR[config.prediction]((alpha / sigma).ravel() ** 2, config.min_snr)


@pytest.mark.parametrize("kind", LOSSES)
def test_pointwise_loss(kind: str) -> None:
    d = np.array([-100, -1.5, -1, -0.3, 0, 1e-3, 0.5, 1, 1 + 1e-6, 7], np.float32)
    output = pointwise_loss(kind, Tensor(d + 0.25), Tensor(np.full_like(d, 0.25))).asnumpy()
    np.testing.assert_allclose(output, LOSSES[kind](d.astype(np.float64)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_weight(prediction: Prediction, gamma: float) -> None:
    config = DiffusionConfig(prediction=prediction, min_snr=gamma)
    output = loss_weight(config, Tensor(LOGSNR)).asnumpy()
    np.testing.assert_allclose(
        output, MIN_SNR[prediction](np.exp(LOGSNR.astype(np.float64)), gamma), rtol=2e-5
    )


def test_min_snr_weights_an_error_in_x_alike_in_every_prediction() -> None:
    x = 0.5
    wrong_x = 0.75
    eps = -1.25
    alpha, sigma = (rate.ravel() for rate in rates(LOGSNR))
    z = alpha * x + sigma * eps
    wrong_eps = (z - alpha * wrong_x) / sigma
    error = {
        "x0": wrong_x - x,
        "eps": wrong_eps - eps,
        "v": alpha * (wrong_eps - eps) - sigma * (wrong_x - x),
    }
    for prediction in PREDICTIONS:
        config = DiffusionConfig(prediction=prediction, min_snr=5.0)
        factor = loss_weight(config, Tensor(LOGSNR)).asnumpy()
        np.testing.assert_allclose(
            factor * error[prediction] ** 2, np.minimum(np.exp(LOGSNR), 5) / 16, rtol=2e-5
        )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("gamma", [None, 5.0])
class TestLoss:
    def test_equals_its_definition(
        self, prediction: Prediction, kind: str, gamma: float | None
    ) -> None:
        config = DiffusionConfig(prediction=prediction, loss=kind, min_snr=gamma)
        output = diffusion_loss(config, *map(Tensor, (OUTPUT, X, EPS, LOGSNR))).asnumpy()
        assert output.shape == LOGSNR.shape
        assert output.dtype == np.float32
        np.testing.assert_allclose(output, reference(config, OUTPUT, X, EPS, LOGSNR), rtol=2e-5)

    def test_is_zero_at_the_target_alone(
        self, prediction: Prediction, kind: str, gamma: float | None
    ) -> None:
        config = DiffusionConfig(prediction=prediction, loss=kind, min_snr=gamma)
        x, eps, logsnr_B = map(Tensor, (X, EPS, LOGSNR))
        target = prediction_target(prediction, x, eps, logsnr_B)
        assert (diffusion_loss(config, target, x, eps, logsnr_B).asnumpy() == 0).all()
        assert (diffusion_loss(config, target + 0.1, x, eps, logsnr_B).asnumpy() > 0).all()

    def test_images_are_independent(
        self, prediction: Prediction, kind: str, gamma: float | None
    ) -> None:
        config = DiffusionConfig(prediction=prediction, loss=kind, min_snr=gamma)
        arrays = (OUTPUT, X, EPS, LOGSNR)
        others = [
            np.concatenate((factor * array[:1], array[1:]))
            for factor, array in enumerate(arrays, 2)
        ]
        changed = (
            diffusion_loss(config, *map(Tensor, arrays)).asnumpy()
            != diffusion_loss(config, *map(Tensor, others)).asnumpy()
        )
        assert changed.tolist() == [True] + [False] * (len(LOGSNR) - 1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", LOSSES)
def test_compiled_loss_and_gradient(prediction: Prediction, kind: str) -> None:
    """Of a network that scales z, for the loss and its x, against finite differences."""
    config = DiffusionConfig(prediction=prediction, loss=kind, min_snr=5.0)
    logsnr = np.linspace(-2, 3, len(X)).astype(np.float32)
    scale = np.array([0.5, -1.0, 1.5], np.float32).reshape(3, 1, 1)

    def score(scale: Tensor, x: Tensor, eps: Tensor, logsnr_B: Tensor) -> Tensor:
        z = add_noise(x, eps, logsnr_B)
        predicted = x_from_prediction(prediction, scale * z, z, logsnr_B)
        loss_B = diffusion_loss(config, scale * z, x, eps, logsnr_B)
        return loss_B.mean() + (predicted * predicted).mean()

    @ms.jit
    def step(*tensors: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return ms.value_and_grad(score, (0, 1))(*tensors)

    def definition(scale: np.ndarray, x: np.ndarray) -> float:
        alpha, sigma = rates(logsnr)
        z = alpha * x + sigma * EPS
        output = scale * z
        predicted = {
            "eps": (z - sigma * output) / alpha,
            "x0": output,
            "v": alpha * z - sigma * output,
        }[prediction]
        return reference(config, output, x, EPS, logsnr).mean() + (predicted**2).mean()

    def slope(
        function: Callable[[np.ndarray], float], at: np.ndarray, direction: np.ndarray
    ) -> float:
        h = 1e-5
        return (function(at + h * direction) - function(at - h * direction)) / (2 * h)

    value, (by_scale, by_x) = step(*map(Tensor, (scale, X, EPS, logsnr)))
    np.testing.assert_allclose(value.asnumpy(), definition(scale, X), rtol=1e-5)
    for along in np.eye(3).reshape(3, 3, 1, 1):
        expected = slope(lambda at: definition(at, X), scale.astype(np.float64), along)
        np.testing.assert_allclose(
            (by_scale.asnumpy() * along).sum(), expected, rtol=1e-3, atol=1e-5
        )
    along = np.random.default_rng(1).standard_normal(X.shape)
    expected = slope(lambda at: definition(scale, at), X.astype(np.float64), along)
    np.testing.assert_allclose((by_x.asnumpy() * along).sum(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("gamma", [0, -5.0])
def test_min_snr_is_positive(gamma: float) -> None:
    with pytest.raises(ConfigError, match=f"^min_snr: {gamma} is not positive"):
        DiffusionConfig(min_snr=gamma)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_p2_weights_an_error_in_eps_by_one_over_one_plus_snr(prediction: Prediction) -> None:
    """(1 + snr)^-gamma for eps; the same error expressed in x0 or v has the same weight."""
    snr = np.exp(LOGSNR.astype(np.float64))
    per_eps = {"eps": 1.0, "x0": snr, "v": snr / (snr + 1)}[prediction]
    output = loss_weight(DiffusionConfig(prediction=prediction, p2=0.5), Tensor(LOGSNR)).asnumpy()
    np.testing.assert_allclose(output, per_eps * (1 + snr) ** -0.5, rtol=2e-5)


def test_two_weightings_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"p2: 1\.0, but min_snr: 5\.0 weights the noise levels too"
    ):
        DiffusionConfig(p2=1.0, min_snr=5.0)


@pytest.mark.parametrize("kind", LOSSES)
def test_a_masked_loss_is_the_mean_of_the_hole(kind: str) -> None:
    mask = (np.random.default_rng(1).random((len(LOGSNR), 1, 4, 4)) < 0.4).astype(np.float32)
    mask[:, :, 0, 0] = 1
    config = DiffusionConfig(loss=kind)
    output = diffusion_loss(config, *map(Tensor, (OUTPUT, X, EPS, LOGSNR, mask))).asnumpy()
    losses = LOSSES[kind](OUTPUT.astype(np.float64) - EPS)
    expected = [np.mean(image[:, hole[0] == 1]) for image, hole in zip(losses, mask, strict=True)]
    np.testing.assert_allclose(output, expected, rtol=2e-5)
