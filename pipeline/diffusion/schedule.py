"""Noise schedules: from diffusion time t in [0, 1] to logsnr, from which all else is derived.

A variance-preserving diffusion mixes an image x with unit noise eps: z = alpha x + sigma eps,
alpha^2 + sigma^2 = 1. One number fixes both: logsnr = log(alpha^2 / sigma^2), so that alpha^2 =
sigmoid(logsnr) and sigma^2 = sigmoid(-logsnr) (Kingma et al., "Variational Diffusion Models", arXiv
2107.00630). A schedule is a function of t along which logsnr falls from t = 0 (the image) to t = 1
(noise). Times are drawn on the host, so the schedules are computed there, in float64.

Time is continuous, or discrete as in DDPM: T steps k = 1 to T, at the times k / T. The cosine
schedules are sampled at these times; the linear schedule is defined by its steps, and the
continuous one is their limit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.config import ConfigError

ScheduleName = Literal["cosine", "linear", "offset_cosine"]

DDPM_BETAS = (1e-4, 0.02)
LOGSNR_MAX = 20.0  # of the least noisy level of `cosine`; the noisiest is its negative


def _cosine_between(t: np.ndarray, first: float, last: float) -> np.ndarray:
    """alpha = cos(angle), sigma = sin(angle), with an angle linear in t from `first` to `last`."""
    # logsnr = 2 log(alpha / sigma) = -2 log tan(angle).
    return -2.0 * np.log(np.tan(first + (last - first) * np.asarray(t, np.float64)))


def cosine(t: np.ndarray) -> np.ndarray:
    """alpha = cos(pi t / 2) (Nichol & Dhariwal, arXiv 2102.09672), with |logsnr| <= 20.

    The ends are cut by rescaling t linearly; there the smaller of alpha and sigma is 4.5e-5.
    """
    # The angle at which -2 log tan(angle) is LOGSNR_MAX.
    first = np.arctan(np.exp(-LOGSNR_MAX / 2))
    return _cosine_between(t, first, np.pi / 2 - first)


def offset_cosine(t: np.ndarray) -> np.ndarray:
    """The cosine between the signal rates alpha = 0.95 and 0.02 (Keras' DDIM example)."""
    return _cosine_between(t, np.arccos(0.95), np.arccos(0.02))


def linear(t: np.ndarray, betas: tuple[float, float] = DDPM_BETAS) -> np.ndarray:
    """DDPM's betas, those of 1000 steps, in continuous time (Ho et al., arXiv 2006.11239).

    alpha^2 = exp(-B(t)) with B(t) = 1000 (b_1 t + (b_T - b_1) t^2 / 2), hence logsnr = -log(exp(B)
    - 1).
    """
    t = np.asarray(t, np.float64)
    first, last = betas
    total = 1000 * (first * t + (last - first) * t**2 / 2)
    # At t = 0 logsnr would be infinite. expm1(b) is b for a small b, so the bound is LOGSNR_MAX.
    return -np.log(np.expm1(np.maximum(total, np.exp(-LOGSNR_MAX))))


def linear_steps(num_steps: int, betas: tuple[float, float] = DDPM_BETAS) -> np.ndarray:
    """The logsnr of DDPM's steps 1 to `num_steps`, (num_steps,), with betas linear in the step.

    alpha_k^2 = (1 - b_1) ... (1 - b_k) (Ho et al., arXiv 2006.11239).
    """
    # log alpha^2. log1p and expm1 keep the digits of small betas.
    log_signal = np.cumsum(np.log1p(-np.linspace(*betas, num_steps)))
    return log_signal - np.log(-np.expm1(log_signal))


SCHEDULES: dict[ScheduleName, Callable[[np.ndarray], np.ndarray]] = {
    "cosine": cosine,
    "linear": linear,
    "offset_cosine": offset_cosine,
}


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """A noise schedule and its time."""

    schedule: ScheduleName = "cosine"  # logsnr as a function of time
    # T, the number of discrete steps; None: continuous time.
    timesteps: int | None = None
    # Of `linear`: the first and the last of the T steps, or of 1000 in continuous time.
    betas: tuple[float, float] = DDPM_BETAS
    # Added to logsnr; below 0 is more noise at every time, for large images (arXiv 2301.11093).
    logsnr_shift: float = 0.0

    def __post_init__(self) -> None:
        if self.timesteps is not None and self.timesteps < 2:
            raise ConfigError(
                f"timesteps: {self.timesteps} is less than 2; DDPM has 1000, leave it out for "
                "continuous time"
            )

        if not 0 < self.betas[0] <= self.betas[1] < 1:
            raise ConfigError(
                f"betas: {list(self.betas)} do not rise within (0, 1); DDPM has [1.0e-4, 0.02]"
            )

        if self.schedule != "linear" and self.betas != DDPM_BETAS:
            raise ConfigError(
                f"betas: {list(self.betas)} belong to the linear schedule, and schedule is "
                f"{self.schedule}; leave them out"
            )

    def logsnr(self, t: np.ndarray) -> np.ndarray:
        """The logsnr at times in [0, 1], float64 of t's shape.

        In discrete time that of step ceil(t T), so that uniform times make each step equally
        likely; t = 0 is step 1.
        """
        return self._unshifted(np.asarray(t, np.float64)) + self.logsnr_shift

    def _unshifted(self, t: np.ndarray) -> np.ndarray:
        if self.timesteps is None:
            return (
                linear(t, self.betas) if self.schedule == "linear" else SCHEDULES[self.schedule](t)
            )

        # A time that rounding put just above a step belongs to that step.
        step = np.clip(np.ceil(t * self.timesteps - 1e-9), 1, self.timesteps).astype(int)
        if self.schedule == "linear":
            return linear_steps(self.timesteps, self.betas)[step - 1]
        return SCHEDULES[self.schedule](step / self.timesteps)
