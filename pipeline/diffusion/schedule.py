"""Noise schedules: diffusion time t in [0, 1] to logsnr, the one primitive from which all else is derived.

A variance-preserving diffusion mixes an image x with unit noise eps: z = alpha x + sigma eps, alpha^2 + sigma^2 = 1.
One number fixes both: logsnr = log(alpha^2 / sigma^2), so that alpha^2 = sigmoid(logsnr) and sigma^2 = sigmoid(-logsnr)
(Kingma et al., "Variational Diffusion Models", arXiv 2107.00630). A schedule says how logsnr falls from t = 0 (the
image) to t = 1 (noise). Times are drawn on the host, so the schedules run there, in float64.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

ScheduleName = Literal["cosine", "linear", "offset_cosine"]

LOGSNR_MAX = 20.0  # the cleanest and the noisiest level of Imagen's stages: sigma, alpha = 4.5e-5


def _cosine_between(t: np.ndarray, first: float, last: float) -> np.ndarray:
    """alpha = cos(angle), sigma = sin(angle), with an angle that goes evenly from `first` to `last`."""
    return -2.0 * np.log(np.tan(first + (last - first) * np.asarray(t, np.float64)))


def cosine(t: np.ndarray) -> np.ndarray:
    """alpha = cos(pi t / 2) (Nichol & Dhariwal, arXiv 2102.09672), cut evenly to |logsnr| <= 20."""
    first = np.arctan(np.exp(-LOGSNR_MAX / 2))
    return _cosine_between(t, first, np.pi / 2 - first)


def offset_cosine(t: np.ndarray) -> np.ndarray:
    """The cosine between the signal rates alpha = 0.95 and 0.02: neither end is reached (Keras' DDIM example)."""
    return _cosine_between(t, np.arccos(0.95), np.arccos(0.02))


def linear(t: np.ndarray) -> np.ndarray:
    """DDPM's betas, 1e-4 to 0.02 over T = 1000 steps, in continuous time (Ho et al., arXiv 2006.11239).

    alpha^2 = exp(-B(t)) with B(t) = T (beta_min t + (beta_max - beta_min) t^2 / 2), hence logsnr = -log(exp(B) - 1).
    """
    t = np.asarray(t, np.float64)
    total = 1000 * (1e-4 * t + (0.02 - 1e-4) * t**2 / 2)
    return -np.log(np.expm1(np.maximum(total, np.exp(-LOGSNR_MAX))))


SCHEDULES: dict[ScheduleName, Callable[[np.ndarray], np.ndarray]] = {
    "cosine": cosine,
    "linear": linear,
    "offset_cosine": offset_cosine,
}
