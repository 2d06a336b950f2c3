"""Solvers: the steps from noise to an image along a rising sequence of logsnr.

Given the network's x at z, every solver here takes a step that is linear in what is at hand,

    z' = c_z z + c_x x + c_prev x_prev + c_noise noise,

so that a solver is a function from three levels (the previous one, this one, the next) to four
coefficients, computed in float64. The final step goes to logsnr = infinity, where z' = x for each
of them. The loop over the steps is in `pipeline.generate.engine`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from mindspore import Tensor

from pipeline.config import ConfigError
from pipeline.diffusion.guidance import Threshold
from pipeline.diffusion.schedule import ScheduleConfig

SolverName = Literal["ddpm", "ddim", "dpm_solver++"]


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How a stage is sampled unless the call says otherwise."""

    # DPM-Solver++ in 25 steps matches 250 ancestral steps, see docs/speed.md.
    sampler: SolverName = "dpm_solver++"
    steps: int = 25  # calls of the network
    # Images per call of the network; fewer are padded, so that there is one graph to compile.
    batch_size: int = 8
    guidance: float = 1.0  # weight of classifier-free guidance; 1 is none
    # static: x clipped to [-1, 1]; dynamic: to its quantile, and rescaled (Imagen)
    threshold: Threshold = "dynamic"
    quantile: float = 0.995  # of dynamic thresholding
    # Noise on the low resolution, as a diffusion time; Imagen looks best at 0.1 to 0.3.
    aug_level: float = 0.0
    # Noise levels of sampling; None: those of training (Palette samples along another schedule).
    schedule: ScheduleConfig | None = None
    # Further network calls between the last level and the image, where its detail is decided.
    extra_steps: int = 0
    # Times that each step of inpainting is taken, so that hole and surroundings agree (RePaint).
    repaint_steps: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size: {self.batch_size} is not positive; give 1 or more")

        if self.steps < 1:
            raise ConfigError(
                f"steps: {self.steps} is not positive; DPM-Solver++ needs 20 to 25, ancestral "
                "sampling about 250"
            )

        if self.extra_steps < 0:
            raise ConfigError(f"extra_steps: {self.extra_steps} is negative; give 0 or more")

        if self.repaint_steps < 1:
            raise ConfigError(
                f"repaint_steps: {self.repaint_steps} is not positive; 1 is once, imagen-pytorch "
                "has 5"
            )

        if not 0 < self.quantile <= 1:
            raise ConfigError(f"quantile: {self.quantile} is not in (0, 1]; Imagen has 0.995")


class Coefficients(NamedTuple):
    """Of one step. Python's floats: NumPy's, multiplied with a tensor, would give an array."""

    z: float
    x: float
    x_prev: float = 0.0
    noise: float = 0.0


def _alpha_sigma(logsnr: float) -> tuple[float, float]:
    return 1 / math.sqrt(1 + math.exp(-logsnr)), 1 / math.sqrt(1 + math.exp(logsnr))


def ddpm(logsnr_prev: float | None, logsnr: float, logsnr_next: float) -> Coefficients:
    """Ancestral: a draw from q(z' | z, x) (Ho et al., arXiv 2006.11239, eq. 7; in continuous time
    2107.00630, eq. 16).

    With r = snr(z) / snr(z') < 1: mean r (alpha' / alpha) z + (1 - r) alpha' x, variance
    (1 - r) sigma'^2.
    """
    alpha, _ = _alpha_sigma(logsnr)
    alpha_next, sigma_next = _alpha_sigma(logsnr_next)
    # 0 in the final step, where `logsnr_next` is infinite: then z' = x.
    ratio = math.exp(logsnr - logsnr_next)
    return Coefficients(
        z=ratio * alpha_next / alpha,
        x=(1 - ratio) * alpha_next,
        noise=math.sqrt(1 - ratio) * sigma_next,
    )


def ddim(logsnr_prev: float | None, logsnr: float, logsnr_next: float) -> Coefficients:
    """Deterministic: keep eps, change its share (Song et al., arXiv 2010.02502, eq. 12 with
    sigma = 0).
    """
    alpha, sigma = _alpha_sigma(logsnr)
    alpha_next, sigma_next = _alpha_sigma(logsnr_next)
    # z' = alpha' x + sigma' eps with eps = (z - alpha x) / sigma.
    return Coefficients(z=sigma_next / sigma, x=alpha_next - alpha * sigma_next / sigma)


def dpm_solver_pp(logsnr_prev: float | None, logsnr: float, logsnr_next: float) -> Coefficients:
    """DPM-Solver++(2M): DDIM with x extrapolated in lambda = logsnr / 2 (Lu et al., arXiv
    2211.01095, algorithm 2).

    The first step has no x_prev and the final one no finite length: both are DDIM's, which is the
    first-order solver.
    """
    first_order = ddim(logsnr_prev, logsnr, logsnr_next)
    if logsnr_prev is None or math.isinf(logsnr_next):
        return first_order

    # 1 / (2 r), where r is the ratio of the previous step's length to this one's
    half_r = (logsnr_next - logsnr) / (logsnr - logsnr_prev) / 2

    # DDIM with x + half_r (x - x_prev) in place of x.
    return Coefficients(
        z=first_order.z,
        x=first_order.x * (1 + half_r),
        x_prev=-first_order.x * half_r,
    )


@dataclass(frozen=True, kw_only=True)
class Solver:
    """A way to take steps.

    Args:
        coefficients: (previous, this, next logsnr) -> of this step; None for the first one's
            previous.
        terms: what its steps use beside z and x, by the names in `Coefficients`.
    """

    coefficients: Callable[[float | None, float, float], Coefficients]
    terms: tuple[str, ...] = ()


SOLVERS: dict[SolverName, Solver] = {
    "ddpm": Solver(coefficients=ddpm, terms=("noise",)),
    "ddim": Solver(coefficients=ddim),
    "dpm_solver++": Solver(coefficients=dpm_solver_pp, terms=("x_prev",)),
}


def logsnr_steps(
    schedule: ScheduleConfig, steps: int, extra: int = 0, strength: float = 1.0
) -> np.ndarray:
    """The logsnr of each network call, evenly spaced in time from t = 1, and infinity: float64
    (calls + 1,), rising.

    Args:
        schedule: in discrete time `steps` are respaced evenly over its T, and cannot be more.
        extra: further calls after the last, evenly between it and t = 0; in discrete time as many
            as there are steps.
        strength: start at this time, with proportionally fewer calls (SDEdit, arXiv 2108.01073).

    Raises:
        ConfigError: more steps than the schedule has.
    """
    if schedule.timesteps is not None and steps > schedule.timesteps:
        raise ConfigError(
            f"steps: {steps} are more than the {schedule.timesteps} of this stage's discrete time"
        )

    # Less a little, as rounding may put a whole product just above its value.
    steps_left = math.ceil(steps * strength - 1e-9)
    times = np.linspace(strength, 0, steps_left + 1)
    # Without t = 0, which is the image. The extra levels lie between it and the last one.
    times = np.append(times[:-1], np.linspace(times[-2], 0, extra + 2)[1:-1])
    # Sorted by logsnr, and once where discrete time rounds two times to one step.
    return np.append(np.unique(schedule.logsnr(times)), np.inf)


def linear_step(
    coefficients: Sequence[float] | Tensor, z: Tensor, x: Tensor, *terms: Tensor
) -> Tensor:
    """z', given the coefficients of z, of x and of each of `terms`."""
    z = coefficients[0] * z + coefficients[1] * x
    for i, term in enumerate(terms):
        z = z + coefficients[2 + i] * term
    return z


def renoise(z: Tensor, noise: Tensor, logsnr_to: float, logsnr_from: float) -> Tensor:
    """z at `logsnr_from`, brought back to the noisier `logsnr_to`: r z + sqrt(sigma_to^2 - r^2
    sigma_from^2) noise, r the ratio of their alphas (RePaint, Lugmayr et al., arXiv 2201.09865,
    algorithm 1).
    """
    alpha, sigma = _alpha_sigma(logsnr_to)
    alpha_from, sigma_from = _alpha_sigma(logsnr_from)
    ratio = alpha / alpha_from
    # Rounding may put the variance just below 0 where both levels are nearly equal.
    return ratio * z + math.sqrt(max(sigma**2 - (ratio * sigma_from) ** 2, 0.0)) * noise
