"""The forward process and the three quantities that a network may predict, as functions of tensors.

z = alpha x + sigma eps, with alpha^2 = sigmoid(logsnr) and sigma^2 = sigmoid(-logsnr). With z, any
one of x, eps and v = alpha eps - sigma x (Salimans & Ho, arXiv 2202.00512) gives the other two:

    x   = (z - sigma eps) / alpha = alpha z - sigma v
    eps = (z - alpha x) / sigma   = alpha v + sigma z

Shapes: images float32 (B, C, H, W); logsnr (B,).
"""

from typing import Literal

from mindspore import Tensor, ops

Prediction = Literal["eps", "x0", "v"]


def expand_dims(value_B: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1), to broadcast over images."""
    return value_B.reshape((-1, 1, 1, 1))


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
    """Mean and standard deviation of x given z, for a prior x ~ N(prior_mean, residual_std^2):

        mean      = (sigma^2 prior_mean + residual_std^2 alpha z) / d
        deviation = residual_std sigma / sqrt(d)

    with d = sigma^2 + residual_std^2 alpha^2. With little noise the mean is z, with much noise it
    is `prior_mean`. A network whose output is x in deviations from the mean has outputs of one
    size at all levels: the preconditioning of Karras et al. (arXiv 2206.00364, eq. 7), where the
    prior mean is 0.

    Returns (B, C, H, W) and (B, 1, 1, 1).
    """
    alpha, sigma = alpha_sigma(expand_dims(logsnr_B))
    residual_std = expand_dims(residual_std_B)
    d = sigma * sigma + residual_std * residual_std * alpha * alpha

    # The same mean as a correction: the gain times what z differs by from its expectation.
    gain = residual_std * residual_std * alpha / d
    mean = prior_mean + gain * (z - alpha * prior_mean)
    deviation = residual_std * sigma / ops.sqrt(d)
    return mean, deviation


def prediction_target(prediction: Prediction, x: Tensor, eps: Tensor, logsnr_B: Tensor) -> Tensor:
    """The training target of a network that predicts `prediction`."""
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x
    return v_target(x, eps, logsnr_B)


def x_from_prediction(
    prediction: Prediction, output: Tensor, z: Tensor, logsnr_B: Tensor
) -> Tensor:
    """The image x that corresponds to the output of a network that predicts `prediction`."""
    if prediction == "eps":
        return x_from_eps(z, output, logsnr_B)
    if prediction == "x0":
        return output
    return x_from_v(z, output, logsnr_B)
