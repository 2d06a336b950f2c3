"""The length of a training run, and what it writes."""

from dataclasses import dataclass

from pipeline.config import ConfigError
from pipeline.train.precision import Precision


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop. A field `*_every` is a number of steps; 0 is never."""

    steps: int = 2_500_000  # of the whole run

    # How a step is computed.
    grad_accum_steps: int = 1  # micro-batches that a rank's batch is split into, to save memory
    precision: Precision = "float32"  # of convolutions and matrix products
    # Each rank keeps a shard of AdamW's state and of the EMA (ZeRO-1).
    shard_optimizer: bool = False
    ema_decay: float = 0.9999  # of the exponential moving average of the weights

    # What is written.
    checkpoint_every: int = 5_000
    keep_checkpoints: int = 3  # the newest ones
    report_every: int = 10  # to metrics.jsonl, TensorBoard and the terminal
    sample_every: int = 5_000  # steps between sample grids
    num_samples: int = 8  # images in samples/step_*.png
    validate_every: int = 5_000  # steps between validations; they need data.validation
    num_validation: int = 512  # samples of a validation, at most

    # What ends the job.
    max_skipped: int = 10  # consecutive steps whose loss or gradient is not finite
    check_every: int = 1_000  # that all ranks have equal weights; also checked at the last step

    def __post_init__(self) -> None:
        positive = (
            "steps",
            "grad_accum_steps",
            "checkpoint_every",
            "keep_checkpoints",
            "report_every",
            "num_samples",
            "num_validation",
            "max_skipped",
        )

        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not positive; give 1 or more")

        for name in ("sample_every", "validate_every", "check_every"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"{name}: {getattr(self, name)} is negative; give a number of steps, or 0 for "
                    "never"
                )

        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay: {self.ema_decay} is not in [0, 1); 0.9999 is usual")
