"""Measurements in processes of their own: in one, MindSpore and PyTorch compete for threads."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline import runtime
from pipeline.errors import JobError

TIMEOUT = 900  # seconds


def run_json(python: str | Path, *arguments: object) -> dict[str, Any]:
    """The JSON object that `PYTHON ARGUMENTS` prints on its last line.

    Its environment is the one with which this process started: variables that are set for MindSpore
    would affect PyTorch too, and our own workers set them again.

    Raises:
        JobError: no answer within TIMEOUT.
        RuntimeError: it failed; with its stderr.
    """
    argv = [str(python), *map(str, arguments)]
    command = " ".join(argv)
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
            env=runtime.initial_environment(),
        )
    except subprocess.TimeoutExpired:
        raise JobError(f"{command}: no answer in {TIMEOUT} s; ask for less") from None

    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr}")
    # Libraries print too: the answer is the last line.
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_worker(name: str, *arguments: object) -> dict[str, Any]:
    """The answer of `workers/NAME.py` under this interpreter."""
    return run_json(sys.executable, "-m", f"tools.bench.workers.{name}", *arguments)
