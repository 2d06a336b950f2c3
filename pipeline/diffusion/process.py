"""The forward process and the three things a network may predict, as functions of tensors.

z = alpha x + sigma eps, with alpha^2 = sigmoid(logsnr) and sigma^2 = sigmoid(-logsnr). Of x, eps
and v = alpha eps - sigma x (Salimans & Ho, arXiv 2202.00512) any one gives the others once z is
known:

    x = (z - sigma eps) / alpha = alpha z - sigma v         eps = (z - alpha x) / sigma = alpha v + sigma z

Images are float32 (B, C, H, W); logsnr is (B,).
"""

from typing import Literal

from mindspore import Tensor, ops

Prediction = Literal["eps", "x0", "v"]


def expand_dims(level_B: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to go with images."""
    return level_B.reshape((-1, 1, 1, 1))


def alpha_sigma(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """Signal and noise rates, of logsnr's shape."""
    return ops.sqrt(ops.sigmoid(logsnr)), ops.sqrt(ops.sigmoid(-logsnr))


def add_noise(x: Tensor, eps: Tensor, logsnr_B: Tensor) -> Tensor:
    """z = alpha x + sigma eps."""
    alpha, sigma = alpha_sigma(expand_dims(logsnr_B))
    return alpha * x + sigma * eps


def x_from_eps(z: Tensor, eps: Tensor, logsnr_B: Tensor) -> Tensor:
    """x = (z - sigma eps) / alpha."""
    alpha, sigma = alpha_sigma(expand_dims(logsnr_B))
    return (z - sigma * eps) / alpha


def eps_from_x(z: Tensor, x: Tensor, logsnr_B: Tensor) -> Tensor:
    """eps = (z - alpha x) / sigma."""
    alpha, sigma = alpha_sigma(expand_dims(logsnr_B))
    return (z - alpha * x) / sigma


def v_target(x: Tensor, eps: Tensor, logsnr_B: Tensor) -> Tensor:
    """v = alpha eps - sigma x."""
    alpha, sigma = alpha_sigma(expand_dims(logsnr_B))
    return alpha * eps - sigma * x


def x_from_v(z: Tensor, v: Tensor, logsnr_B: Tensor) -> Tensor:
    """x = alpha z - sigma v."""
    alpha, sigma = alpha_sigma(expand_dims(logsnr_B))
    return alpha * z - sigma * v


def gaussian_posterior(
    prior_mean: Tensor, residual_std_B: Tensor, z: Tensor, logsnr_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean and deviation, given z, of images that differ from `prior_mean` by N(0, residual_std^2):

        mean = (sigma^2 prior_mean + residual_std^2 alpha z) / d,  deviation = residual_std sigma / sqrt(d)

    with d = sigma^2 + residual_std^2 alpha^2: with little noise z is copied, with much the prior_mean stays. A
    network that answers in deviations from the mean is asked for numbers of one size at all levels:
    the preconditioning of Karras et al. (arXiv 2206.00364, eq. 7), whose images are guessed to be
    0. Shapes (B, C, H, W) and (B, 1, 1, 1).
    """
    (alpha, sigma), residual_std = alpha_sigma(expand_dims(logsnr_B)), expand_dims(residual_std_B)
    d = sigma * sigma + residual_std * residual_std * alpha * alpha
    return prior_mean + residual_std * residual_std * alpha / d * (
        z - alpha * prior_mean
    ), residual_std * sigma / ops.sqrt(d)


def target(prediction: Prediction, x: Tensor, eps: Tensor, logsnr_B: Tensor) -> Tensor:
    """What a network that predicts `prediction` should answer."""
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x
    return v_target(x, eps, logsnr_B)


def x_from(prediction: Prediction, output: Tensor, z: Tensor, logsnr_B: Tensor) -> Tensor:
    """The image that the answer `output` of a network that predicts `prediction` stands for."""
    if prediction == "eps":
        return x_from_eps(z, output, logsnr_B)
    if prediction == "x0":
        return output
    return x_from_v(z, output, logsnr_B)
