"""From configuration to the command that a job runs: pure, so that it can be shown before and compared in tests."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How the processes of a job are started: so far, one process on this machine."""

    launcher: Literal["none"] = "none"
    workers: Literal[1] = 1
    nodes: Literal[1] = 1
    node_rank: Literal[0] = 0
    restarts: Literal[0] = 0


def command(config: LaunchConfig, path: str, overrides: Sequence[str]) -> list[str]:
    """The argv of the job that trains the stage in `path`."""
    return [sys.executable, "-m", "launch", "train", path, *overrides]
