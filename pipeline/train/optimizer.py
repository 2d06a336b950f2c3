"""The optimizer and its learning rate: MindFormers' and MindSpore's own, chosen by config."""

import logging
import warnings
from dataclasses import dataclass
from typing import Literal

from mindspore import Parameter, nn

from pipeline.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Imagen's: Adam at 1e-4 after a linear warm-up of 10,000 steps, cosine decay to 0; Adafactor for the base."""

    kind: Literal["adamw", "adafactor"] = "adamw"
    lr: float = 1e-4
    warmup_steps: int = 10_000
    decay: Literal["cosine", "constant"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.999)  # Adafactor keeps no first moment
    eps: float = 1e-8  # AdamW's
    weight_decay: float = 0.0
    clip: float = 1.0  # largest norm of the whole gradient

    def __post_init__(self) -> None:
        for name in ("lr", "clip", "eps"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}: {getattr(self, name)} is not positive; give a positive number")
        for name in ("weight_decay", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: {getattr(self, name)} is negative; give 0 or more")
        if not all(0 < beta < 1 for beta in self.betas):
            raise ConfigError(f"betas: {list(self.betas)} are not between 0 and 1; usual are [0.9, 0.999]")


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
    """Linear warm-up, then cosine decay to 0 at `steps`, or none: a cell from step (from 0) to rate."""
    _, schedules = mindformers()
    return schedules[config.decay](learning_rate=config.lr, warmup_steps=config.warmup_steps, total_steps=steps)


def optimizer(config: OptimizerConfig, parameters: list[Parameter], rate: nn.Cell) -> nn.Optimizer:
    """Decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101), or factored moments (arXiv 1804.04235)."""
    if config.kind == "adafactor":
        adafactor = nn.AdaFactor(
            parameters,
            learning_rate=rate,
            scale_parameter=False,
            relative_step=False,
            beta1=0.0,
            weight_decay=config.weight_decay,
        )
        adafactor.exp_avg[0].name = "no_first_moment"  # one placeholder for all; its own name is another each time
        return adafactor
    adamw, _ = mindformers()
    return adamw(parameters, learning_rate=rate, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay)
