"""Losses against their definitions, and compiled with their gradients as training has them."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from pipeline.config import ConfigError
from pipeline.diffusion.objective import DiffusionConfig, loss, pointwise_loss, weight
from pipeline.diffusion.process import add_noise, target, x_from

PREDICTIONS = ("eps", "x0", "v")
LOGSNR = np.array([-20, -3, 0, 1, 1.7, 4, 20], np.float32)
RNG = np.random.default_rng(0)
X, EPS, OUTPUT = RNG.standard_normal((3, len(LOGSNR), 3, 4, 4)).astype(np.float32)

DISTANCES = {
    "l1": np.abs,
    "l2": np.square,
    "huber": lambda d: np.where(np.abs(d) <= 1, d**2 / 2, np.abs(d) - 0.5),
}
MIN_SNR = {
    "eps": lambda snr, gamma: np.where(snr < gamma, 1, gamma / snr),
    "x0": lambda snr, gamma: np.where(snr < gamma, snr, gamma),
    "v": lambda snr, gamma: np.where(snr < gamma, snr, gamma) / (snr + 1),
}


def rates(logsnr):
    angle = np.arctan(np.exp(-logsnr.astype(np.float64) / 2)).reshape(-1, 1, 1, 1)
    return np.cos(angle), np.sin(angle)


def reference(config, output, x, eps, logsnr):
    alpha, sigma = rates(logsnr)
    wanted = {"eps": eps, "x0": x, "v": alpha * eps - sigma * x}[config.prediction]
    loss_B = DISTANCES[config.loss](output - wanted).mean(axis=(1, 2, 3))
    if config.min_snr is None:
        return loss_B
    return loss_B * MIN_SNR[config.prediction]((alpha / sigma).ravel() ** 2, config.min_snr)


@pytest.mark.parametrize("kind", DISTANCES)
def test_distance(kind):
    d = np.array([-100, -1.5, -1, -0.3, 0, 1e-3, 0.5, 1, 1 + 1e-6, 7], np.float32)
    found = pointwise_loss(kind, Tensor(d + 0.25), Tensor(np.full_like(d, 0.25))).asnumpy()
    np.testing.assert_allclose(found, DISTANCES[kind](d.astype(np.float64)), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_weight(prediction, gamma):
    found = weight(DiffusionConfig(prediction=prediction, min_snr=gamma), Tensor(LOGSNR)).asnumpy()
    np.testing.assert_allclose(
        found, MIN_SNR[prediction](np.exp(LOGSNR.astype(np.float64)), gamma), rtol=2e-5
    )


def test_min_snr_weighs_an_error_in_x_alike_in_every_prediction():
    x, wrong_x, eps = 0.5, 0.75, -1.25
    alpha, sigma = (rate.ravel() for rate in rates(LOGSNR))
    z = alpha * x + sigma * eps
    wrong_eps = (z - alpha * wrong_x) / sigma
    error = {
        "x0": wrong_x - x,
        "eps": wrong_eps - eps,
        "v": alpha * (wrong_eps - eps) - sigma * (wrong_x - x),
    }
    for prediction in PREDICTIONS:
        factor = weight(
            DiffusionConfig(prediction=prediction, min_snr=5.0), Tensor(LOGSNR)
        ).asnumpy()
        np.testing.assert_allclose(
            factor * error[prediction] ** 2, np.minimum(np.exp(LOGSNR), 5) / 16, rtol=2e-5
        )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", DISTANCES)
@pytest.mark.parametrize("gamma", [None, 5.0])
class TestLoss:
    def test_is_its_definition(self, prediction, kind, gamma):
        config = DiffusionConfig(prediction=prediction, loss=kind, min_snr=gamma)
        found = loss(config, *map(Tensor, (OUTPUT, X, EPS, LOGSNR))).asnumpy()
        assert found.shape == LOGSNR.shape
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, reference(config, OUTPUT, X, EPS, LOGSNR), rtol=2e-5)

    def test_is_zero_for_the_right_answer_alone(self, prediction, kind, gamma):
        config = DiffusionConfig(prediction=prediction, loss=kind, min_snr=gamma)
        x, eps, logsnr_B = map(Tensor, (X, EPS, LOGSNR))
        right = target(prediction, x, eps, logsnr_B)
        assert (loss(config, right, x, eps, logsnr_B).asnumpy() == 0).all()
        assert (loss(config, right + 0.1, x, eps, logsnr_B).asnumpy() > 0).all()

    def test_an_image_does_not_change_another(self, prediction, kind, gamma):
        config = DiffusionConfig(prediction=prediction, loss=kind, min_snr=gamma)
        arrays = OUTPUT, X, EPS, LOGSNR
        others = [
            np.concatenate((factor * array[:1], array[1:]))
            for factor, array in enumerate(arrays, 2)
        ]
        changed = (
            loss(config, *map(Tensor, arrays)).asnumpy()
            != loss(config, *map(Tensor, others)).asnumpy()
        )
        assert changed.tolist() == [True] + [False] * (len(LOGSNR) - 1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", DISTANCES)
def test_compiled_loss_and_gradient(prediction, kind):
    """A network that scales z, scored by the loss and by the x its answer stands for, against
    finite differences.
    """
    config = DiffusionConfig(prediction=prediction, loss=kind, min_snr=5.0)
    logsnr = np.linspace(-2, 3, len(X)).astype(np.float32)
    scale = np.array([0.5, -1.0, 1.5], np.float32).reshape(3, 1, 1)

    def score(scale, x, eps, logsnr_B):
        z = add_noise(x, eps, logsnr_B)
        found = x_from(prediction, scale * z, z, logsnr_B)
        return loss(config, scale * z, x, eps, logsnr_B).mean() + (found * found).mean()

    @ms.jit
    def step(*tensors):
        return ms.value_and_grad(score, (0, 1))(*tensors)

    def expected(scale, x):
        alpha, sigma = rates(logsnr)
        z = alpha * x + sigma * EPS
        output = scale * z
        found = {
            "eps": (z - sigma * output) / alpha,
            "x0": output,
            "v": alpha * z - sigma * output,
        }[prediction]
        return reference(config, output, x, EPS, logsnr).mean() + (found**2).mean()

    def slope(function, at, direction, h=1e-5):
        return (function(at + h * direction) - function(at - h * direction)) / (2 * h)

    value, (by_scale, by_x) = step(*map(Tensor, (scale, X, EPS, logsnr)))
    np.testing.assert_allclose(value.asnumpy(), expected(scale, X), rtol=1e-5)
    for along in np.eye(3).reshape(3, 3, 1, 1):
        wanted = slope(lambda at: expected(at, X), scale.astype(np.float64), along)
        np.testing.assert_allclose((by_scale.asnumpy() * along).sum(), wanted, rtol=1e-3, atol=1e-5)
    along = np.random.default_rng(1).standard_normal(X.shape)
    wanted = slope(lambda at: expected(scale, at), X.astype(np.float64), along)
    np.testing.assert_allclose((by_x.asnumpy() * along).sum(), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("gamma", [0, -5.0])
def test_min_snr_is_positive(gamma):
    with pytest.raises(ConfigError, match=f"^min_snr: {gamma} is not positive"):
        DiffusionConfig(min_snr=gamma)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_p2_weighs_an_error_in_eps_by_one_over_one_plus_snr(prediction):
    """(1 + snr)^-gamma for eps; the same error of x, told as eps, x0 or v, counts alike."""
    snr = np.exp(LOGSNR.astype(np.float64))
    per_eps = {"eps": 1.0, "x0": snr, "v": snr / (snr + 1)}[prediction]
    found = weight(DiffusionConfig(prediction=prediction, p2=0.5), Tensor(LOGSNR)).asnumpy()
    np.testing.assert_allclose(found, per_eps * (1 + snr) ** -0.5, rtol=2e-5)


def test_one_weighting_at_a_time():
    with pytest.raises(ConfigError, match=r"p2: 1\.0 and min_snr 5\.0 both weigh the levels"):
        DiffusionConfig(p2=1.0, min_snr=5.0)


@pytest.mark.parametrize("kind", DISTANCES)
def test_a_mask_leaves_the_mean_of_the_hole(kind):
    mask = (np.random.default_rng(1).random((len(LOGSNR), 1, 4, 4)) < 0.4).astype(np.float32)
    mask[:, :, 0, 0] = 1
    config = DiffusionConfig(loss=kind)
    found = loss(config, *map(Tensor, (OUTPUT, X, EPS, LOGSNR, mask))).asnumpy()
    distances = DISTANCES[kind](OUTPUT.astype(np.float64) - EPS)
    wanted = [np.mean(image[:, hole[0] == 1]) for image, hole in zip(distances, mask, strict=True)]
    np.testing.assert_allclose(found, wanted, rtol=2e-5)
