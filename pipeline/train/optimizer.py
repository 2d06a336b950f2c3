"""The optimizer and its learning-rate schedule, of MindFormers and MindSpore, chosen by config."""

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
    """The defaults are those of Imagen (Saharia et al., arXiv 2205.11487) for super-resolution:
    Adam at 1e-4 after a linear warm-up of 10,000 steps; its base is trained with Adafactor.
    """

    # adamw for super-resolution, adafactor for the base, in Imagen
    kind: Literal["adamw", "adafactor"] = "adamw"
    lr: float = 1e-4  # at the end of the warm-up
    warmup_steps: int = 10_000  # of linear warm-up
    decay: Literal["cosine", "constant"] = "cosine"  # after the warm-up; cosine ends at 0
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's; Adafactor keeps no first moment
    eps: float = 1e-8  # AdamW's
    weight_decay: float = 0.0  # decoupled, as in AdamW
    max_grad_norm: float = 1.0  # the norm of the whole gradient to which a longer one is clipped

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
    """MindFormers' AdamW, and its schedules by the values of `decay`.

    Its import is slow and warns of packages that are not used here.
    """
    # Messages of the import only; logging is afterwards as it was.
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mindformers.core.lr import ConstantWarmUpLR, CosineWithWarmUpLR
            from mindformers.core.optim import AdamW
    finally:
        logging.disable(disabled)

    return AdamW, {"cosine": CosineWithWarmUpLR, "constant": ConstantWarmUpLR}


def learning_rate(config: OptimizerConfig, steps: int) -> nn.Cell:
    """The schedule, a cell from step (from 0) to learning rate: linear warm-up, then cosine decay
    to 0 at `steps`, or a constant.
    """
    _, schedules = mindformers()
    return schedules[config.decay](
        learning_rate=config.lr, warmup_steps=config.warmup_steps, total_steps=steps
    )


def optimizer(
    config: OptimizerConfig, parameters: list[Parameter], schedule: nn.Cell
) -> nn.Optimizer:
    """AdamW with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101), or Adafactor
    (Shazeer & Stern, arXiv 1804.04235) without a first moment.
    """
    if config.kind == "adafactor":
        # The schedule alone sets the rate: Adafactor scales it neither by step nor by parameter.
        adafactor = nn.AdaFactor(
            parameters,
            learning_rate=schedule,
            scale_parameter=False,
            relative_step=False,
            beta1=0.0,
            weight_decay=config.weight_decay,
        )
        # One placeholder stands for all first moments. Its own name differs from process to
        # process, and would not be found in a checkpoint.
        adafactor.exp_avg[0].name = "no_first_moment"
        return adafactor

    adamw_class, _ = mindformers()
    adamw = adamw_class(
        parameters,
        learning_rate=schedule,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    return adamw if device.on_ascend() else SequentialAdamW(adamw)


class SequentialAdamW(nn.Cell):
    """The step of MindFormers' AdamW for a CPU: the same formula, one parameter after another, and
    without a division.

    A division on a CPU keeps a list of indices, 16 bytes per element, as long as its graph lives,
    and that step has two. And MindFormers leaves the parameters unordered, so that all are begun at
    once and the temporaries of all are in memory together.
    """

    def __init__(self, adamw: nn.Optimizer) -> None:
        # Without a prefix, so that moments have the names that `TrainState.entries` takes apart.
        super().__init__(auto_prefix=False)
        self.adamw = adamw

    def construct(self, gradients: tuple[Tensor, ...]) -> Tensor:
        adamw = self.adamw
        # The rate first: the schedule counts steps from 0 and the bias correction from 1.
        rate = adamw.get_lr()
        weight_decay = adamw.get_weight_decay()
        adamw.assignadd(adamw.global_step, adamw.global_step_increase_tensor)

        beta1 = adamw.beta1
        beta2 = adamw.beta2
        step = adamw.global_step.astype(mstype.float32)
        # The bias corrections of m and v are scalars: no vector is divided by them.
        step_size = rate / (1.0 - ops.pow(beta1, step))
        correction = 1.0 / (1.0 - ops.pow(beta2, step))
        # Decoupled: the decay acts on the weight and does not pass through the moments.
        decay = 1.0 - rate * weight_decay

        # `depend` orders the parameters: each waits for the assignment of the one before it.
        done = rate
        for weight, gradient, first, second in zip(  # noqa: B905
            adamw.parameters, gradients, adamw.exp_avg, adamw.exp_avg_sq
        ):
            g = ops.depend(gradient, done)
            m = ops.depend(first, done) * beta1 + g * (1.0 - beta1)
            v = ops.depend(second, done) * beta2 + g * g * (1.0 - beta2)
            # rate m^ / (sqrt(v^) + eps), where m^ and v^ are m and v after bias correction.
            update = m * step_size * ops.reciprocal(ops.sqrt(v * correction) + adamw.eps)

            new = ops.depend(weight, done) * decay - update
            ops.assign(first, m)
            ops.assign(second, v)
            done = ops.assign(weight, new)
        return done
