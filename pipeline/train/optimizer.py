"""The optimizer and its learning rate: MindFormers' and MindSpore's own, chosen by config."""

import logging
import warnings
from dataclasses import dataclass
from typing import Literal

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from pipeline import device
from pipeline.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Imagen's: Adam at 1e-4 after a linear warm-up of 10,000 steps, cosine decay to 0; Adafactor
    for the base.
    """

    kind: Literal["adamw", "adafactor"] = "adamw"
    lr: float = 1e-4
    warmup_steps: int = 10_000
    decay: Literal["cosine", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.999)  # Adafactor keeps no first moment
    eps: float = 1e-8  # AdamW's
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # largest norm of the whole gradient

    def __post_init__(self) -> None:
        for name in ("lr", "max_grad_norm", "eps"):
            if getattr(self, name) <= 0:
                raise ConfigError(
                    f"{name}: {getattr(self, name)} is not positive; give a positive number"
                )
        for name in ("weight_decay", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: {getattr(self, name)} is negative; give 0 or more")
        if not all(0 < beta < 1 for beta in self.betas):
            raise ConfigError(
                f"betas: {list(self.betas)} are not between 0 and 1; usual are [0.9, 0.999]"
            )


def mindformers() -> tuple[type, dict[str, type]]:
    """MindFormers' AdamW and schedules. Its import is slow and warns of packages we do not use."""
    quiet = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mindformers.core.lr import ConstantWarmUpLR, CosineWithWarmUpLR
            from mindformers.core.optim import AdamW
    finally:
        logging.disable(quiet)
    return AdamW, {"cosine": CosineWithWarmUpLR, "constant": ConstantWarmUpLR}


def learning_rate(config: OptimizerConfig, steps: int) -> nn.Cell:
    """Linear warm-up, then cosine decay to 0 at `steps`, or none: a cell from step (from 0) to
    rate.
    """
    _, schedules = mindformers()
    return schedules[config.decay](
        learning_rate=config.lr, warmup_steps=config.warmup_steps, total_steps=steps
    )


def optimizer(config: OptimizerConfig, parameters: list[Parameter], rate: nn.Cell) -> nn.Optimizer:
    """Decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101), or factored moments (arXiv
    1804.04235).
    """
    if config.kind == "adafactor":
        adafactor = nn.AdaFactor(
            parameters,
            learning_rate=rate,
            scale_parameter=False,
            relative_step=False,
            beta1=0.0,
            weight_decay=config.weight_decay,
        )
        adafactor.exp_avg[
            0
        ].name = "no_first_moment"  # one placeholder for all; its own name is another each time
        return adafactor
    cls, _ = mindformers()
    adamw = cls(
        parameters,
        learning_rate=rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    return adamw if device.on_ascend() else SequentialAdamW(adamw)


class SequentialAdamW(nn.Cell):
    """The step of MindFormers' AdamW on a CPU: the same formula, one parameter after another, and
    no division.

    MindSpore's division on a CPU keeps a list of where each number comes from, 16 bytes a number
    for as long as the graph lives, twice in that step; and what MindFormers leaves unordered is
    begun for all parameters at once, so that the intermediate results of all are there together.
    """

    def __init__(self, adamw: nn.Optimizer) -> None:
        super().__init__(auto_prefix=False)
        self.adamw = adamw

    def construct(self, gradients: tuple[Tensor, ...]) -> Tensor:
        adamw = self.adamw
        rate, weight_decay = adamw.get_lr(), adamw.get_weight_decay()
        adamw.assignadd(adamw.global_step, adamw.global_step_increase_tensor)
        beta1, beta2, step = adamw.beta1, adamw.beta2, adamw.global_step.astype(mstype.float32)
        length, correction = rate / (1.0 - ops.pow(beta1, step)), 1.0 / (1.0 - ops.pow(beta2, step))
        kept, done = 1.0 - rate * weight_decay, rate
        for weight, gradient, first, second in zip(
            adamw.parameters, gradients, adamw.exp_avg, adamw.exp_avg_sq
        ):  # noqa: B905
            g = ops.depend(gradient, done)
            m = ops.depend(first, done) * beta1 + g * (1.0 - beta1)
            v = ops.depend(second, done) * beta2 + g * g * (1.0 - beta2)
            towards = m * length * ops.reciprocal(ops.sqrt(v * correction) + adamw.eps)
            new = ops.depend(weight, done) * kept - towards
            ops.assign(first, m)
            ops.assign(second, v)
            done = ops.assign(weight, new)
        return done
