"""Samplers: from noise to an image along a falling sequence of noise levels.

Given the network's x at z, every sampler here takes a step that is linear in what is known,

    z' = c_z z + c_x x + c_last x_last + c_noise noise,

so a sampler is no more than four numbers, computed in float64 from three levels: the last one, this
one and the next. The final step goes to logsnr = infinity, where z' = x for each of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Literal, NamedTuple

import numpy as np
from mindspore import Tensor

from pipeline.config import ConfigError
from pipeline.diffusion.guidance import Threshold
from pipeline.diffusion.schedule import ScheduleConfig

SamplerName = Literal["ddpm", "ddim", "dpm_solver++"]


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How a stage is sampled unless the call says otherwise."""

    sampler: SamplerName = "dpm_solver++"  # shows what 250 ancestral steps show, see docs/speed.md
    steps: int = 25
    batch_size: int = 8  # pictures a call of the network; fewer are filled up, so that there is one graph to compile
    guidance: float = 1.0  # weight of classifier-free guidance; 1 is none
    threshold: Threshold = "dynamic"
    quantile: float = 0.995  # of dynamic thresholding
    aug_level: float = 0.0  # level of noise on the low resolution, in super-resolution; Imagen looks best at 0.1 to 0.3
    schedule: ScheduleConfig | None = (
        None  # the noise levels, where they are not those of training (Palette's are not)
    )
    extra_steps: int = (
        0  # more calls between the last level and the picture, where its detail is made
    )
    repaint_steps: int = 1  # times that each step of inpainting is made, for what is painted to meet what is known (RePaint)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size: {self.batch_size} is not positive; give 1 or more")
        if self.steps < 1:
            raise ConfigError(
                f"steps: {self.steps} is not positive; DPM-Solver++ needs 20 to 25, ancestral about 250"
            )
        if self.extra_steps < 0:
            raise ConfigError(f"extra_steps: {self.extra_steps} is negative; give 0 or more")
        if self.repaint_steps < 1:
            raise ConfigError(
                f"repaint_steps: {self.repaint_steps} is not positive; 1 is once, imagen-pytorch has 5"
            )
        if not 0 < self.quantile <= 1:
            raise ConfigError(f"quantile: {self.quantile} is not in (0, 1]; Imagen has 0.995")

    def calls(self, strength: float = 1.0, masked: bool = False) -> int:
        """How often the network is called for a batch, if it starts at the time `strength`: see
        `logsnr_steps`, `sample`.
        """
        return 1 + (steps_from(strength, self.steps) - 1 + self.extra_steps) * (
            self.repaint_steps if masked else 1
        )


class Step(NamedTuple):
    """The coefficients of one step. Python's floats: NumPy's, multiplied with a tensor, would give
    a NumPy array.
    """

    z: float
    x: float
    x_last: float = 0.0
    noise: float = 0.0


def _alpha_sigma(logsnr: float) -> tuple[float, float]:
    return 1 / math.sqrt(1 + math.exp(-logsnr)), 1 / math.sqrt(1 + math.exp(logsnr))


def ddpm(last: float | None, now: float, following: float) -> Step:
    """Ancestral: a draw from q(z' | z, x) (Ho et al., arXiv 2006.11239, eq. 7; in continuous time
    2107.00630, eq. 16).

    With r = snr(z) / snr(z') < 1: mean r (alpha' / alpha) z + (1 - r) alpha' x, variance (1 - r)
    sigma'^2.
    """
    (alpha, _), (alpha_next, sigma_next) = _alpha_sigma(now), _alpha_sigma(following)
    ratio = math.exp(now - following)
    return Step(
        z=ratio * alpha_next / alpha,
        x=(1 - ratio) * alpha_next,
        noise=math.sqrt(1 - ratio) * sigma_next,
    )


def ddim(last: float | None, now: float, following: float) -> Step:
    """Deterministic: keep eps, change its share (Song et al., arXiv 2010.02502, eq. 12 with sigma =
    0).
    """
    (alpha, sigma), (alpha_next, sigma_next) = _alpha_sigma(now), _alpha_sigma(following)
    return Step(z=sigma_next / sigma, x=alpha_next - alpha * sigma_next / sigma)


def dpm_solver_pp(last: float | None, now: float, following: float) -> Step:
    """DPM-Solver++(2M): DDIM with x extrapolated in lambda = logsnr / 2 (Lu et al., arXiv
    2211.01095, algorithm 2).

    The first step has no x_last and the final one no finite length: both are DDIM's, which is the
    first-order solver.
    """
    step = ddim(last, now, following)
    if last is None or math.isinf(following):
        return step
    half_r = (
        (following - now) / (now - last) / 2
    )  # 1 / (2 r), r the ratio of the last step's length to this one's
    return Step(z=step.z, x=step.x * (1 + half_r), x_last=-step.x * half_r)


SAMPLERS: dict[SamplerName, Callable[[float | None, float, float], Step]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm_solver++": dpm_solver_pp,
}


def steps_from(strength: float, steps: int) -> int:
    """How many of `steps` from t = 1 are left at the time `strength`."""
    return math.ceil(steps * strength - 1e-9)


def logsnr_steps(
    schedule: ScheduleConfig, steps: int, extra: int = 0, strength: float = 1.0
) -> np.ndarray:
    """The logsnr of each network call, evenly spaced in time from t = 1, and infinity: (calls +
    1,), rising.

    Args:
        schedule: in discrete time `steps` are respaced evenly over its T, and cannot be more.
        extra: further calls after the last, evenly between it and t = 0; in discrete time as many
            as there are steps.
        strength: start at this time, with so much fewer calls (SDEdit, arXiv 2108.01073).
    """
    if schedule.timesteps is not None and steps > schedule.timesteps:
        raise ConfigError(
            f"steps: {steps} are more than the {schedule.timesteps} of this stage's discrete time"
        )
    times = np.linspace(strength, 0, steps_from(strength, steps) + 1)
    times = np.append(times[:-1], np.linspace(times[-2], 0, extra + 2)[1:-1])
    return np.append(np.unique(schedule.logsnr(times)), np.inf)


# Which of z' = ... + c_last x_last + c_noise noise a sampler's steps have.
TERMS: dict[SamplerName, tuple[str, ...]] = {
    "ddpm": ("noise",),
    "ddim": (),
    "dpm_solver++": ("x_last",),
}

Advance = Callable[..., tuple[Tensor, Tensor]]


def linear_step(numbers: Sequence[float] | Tensor, z: Tensor, x: Tensor, *terms: Tensor) -> Tensor:
    """z', of the numbers of z, of x and of each of `terms`."""
    z = numbers[0] * z + numbers[1] * x
    for i, term in enumerate(terms):
        z = z + numbers[2 + i] * term
    return z


def sample(
    advance: Advance,
    noise: Callable[[int], Tensor],
    sampler: SamplerName,
    logsnrs: np.ndarray,
    repaint_steps: int = 1,
) -> Tensor:
    """The image at the end of `logsnrs`.

    Args:
        advance: (logsnr, numbers, z, *terms) -> z', x: the network at z, then `linear_step`. There is a
            term for each of the sampler's `TERMS`; where a step has none, its number is 0.
        noise: number of a draw -> unit noise of z's shape, but `noise(0)` is where sampling starts;
            only a sampler that adds noise, or resampling, asks for more, in order.
        logsnrs: rising logsnr_steps, one more than there are steps.
        repaint_steps: how often each step but the last is made, each time from where the last one ended
            with new noise back at the step's own level (RePaint, arXiv 2201.09865, algorithm 1).
    """
    draws = count()
    z, last, x_last = noise(next(draws)), None, None
    for now, following in pairwise(logsnrs.tolist()):
        step = SAMPLERS[sampler](last, now, following)
        for again in reversed(range(1 if math.isinf(following) else repaint_steps)):
            known = {"x_last": z if x_last is None else x_last}
            if "noise" in TERMS[sampler]:
                known["noise"] = noise(next(draws)) if step.noise else z
            numbers = (step.z, step.x, *(getattr(step, term) for term in TERMS[sampler]))
            z, x = advance(now, numbers, z, *(known[term] for term in TERMS[sampler]))
            if again:
                z = renoise(z, noise(next(draws)), now, following)
        last, x_last = now, x
    return z


def renoise(z: Tensor, noise: Tensor, to: float, at: float) -> Tensor:
    """z at level `at`, brought back to the noisier level `to`: r z + sqrt(sigma_to^2 - r^2
    sigma_at^2) noise, r the ratio of their alphas.
    """
    (alpha, sigma), (alpha_at, sigma_at) = _alpha_sigma(to), _alpha_sigma(at)
    ratio = alpha / alpha_at
    return ratio * z + math.sqrt(max(sigma**2 - (ratio * sigma_at) ** 2, 0.0)) * noise
