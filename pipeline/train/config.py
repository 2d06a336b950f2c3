"""What is trained, as the loop sees it: what it reads of a stage's configuration and asks of a
stage.
"""

from dataclasses import dataclass

from pipeline.config import ConfigError
from pipeline.train.precision import Precision


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, and what is kept and shown on the way. `every` counts steps; 0 is never."""

    steps: int = 2_500_000
    grad_accum_steps: int = 1  # parts into which a rank's batch is cut to save memory
    precision: Precision = "float32"  # of convolutions and matrix products
    shard_optimizer: bool = (
        False  # each rank keeps a share of AdamW's state and of the EMA (ZeRO-1)
    )
    ema_decay: float = 0.9999
    checkpoint_every: int = 5_000
    keep_checkpoints: int = 3
    report_every: int = 10
    sample_every: int = 5_000
    num_samples: int = 8  # pictures in samples/step_*.png
    max_skipped: int = (
        10  # steps in a row whose loss or gradient is not finite, at which the job ends
    )
    check_every: int = (
        1_000  # whether all ranks still have the same weights; the last step always is
    )

    def __post_init__(self) -> None:
        positive = (
            "steps",
            "grad_accum_steps",
            "checkpoint_every",
            "keep_checkpoints",
            "report_every",
            "num_samples",
        )
        for name in (*positive, "max_skipped"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not positive; give 1 or more")
        for name in ("sample_every", "check_every"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"{name}: {getattr(self, name)} is negative; give a number of steps, or 0 for never"
                )
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay: {self.ema_decay} is not in [0, 1); 0.9999 is usual")
