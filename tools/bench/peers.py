"""The other libraries, in an environment of their own: made once in the user's cache, by pip.

A peer that cannot be installed or does not run is reported in one line, and the bench goes on
without it. The environment's name is a digest of the pinned versions, so that other pins make
another one. A peer's marker file is written last, so that a half-installed one is installed again.
"""

import hashlib
import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

from pipeline import runtime
from pipeline.errors import JobError, UserError
from pipeline.files import lock
from tools.bench.process import run_json

ROOT = Path(__file__).parents[2]
PIP_TIMEOUT = 1800  # seconds

TORCH = ("torch==2.13.0", "numpy==2.4.6")
TRANSFORMERS = (*TORCH, "transformers==4.57.1", "sentencepiece==0.2.3", "protobuf==7.36.2")
REQUIREMENTS = {
    "twin": TORCH,
    "transformers": TRANSFORMERS,
    "if": (*TRANSFORMERS, "diffusers==0.35.2"),
    "imagen_pytorch": (
        *TRANSFORMERS,
        "accelerate==1.15.0",
        "beartype==0.23.1",
        "click==8.5.1",
        "datasets==5.0.1",
        "einops==0.8.2",
        "ema-pytorch==0.8.3",
        "kornia==0.9.0",
        "pydantic==2.14.3",
        "pytorch-warmup==0.2.0",
    ),
}

# Installed without dependencies: its torchvision fits one build of PyTorch only, and breaks
# `transformers` too.
WITHOUT_DEPENDENCIES = {"imagen_pytorch": "imagen-pytorch==2.1.0"}

# Runs a worker where this project is not installed: its root comes last on the path, so that the
# environment's own packages win.
RUN_WORKER = f"""
import runpy, sys
sys.path.append({str(ROOT)!r})
runpy.run_module("tools.bench.workers." + sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def environment_folder() -> Path:
    pins = json.dumps([REQUIREMENTS, WITHOUT_DEPENDENCIES, sys.version_info[:2]])
    return runtime.cache_folder() / f"peers-{hashlib.sha256(pins.encode()).hexdigest()[:12]}"


def interpreter(peer: str) -> Path:
    """The Python that has this peer, which is installed if it is not there.

    Raises:
        JobError: it cannot be installed; with the reason.
    """
    folder = environment_folder()
    python = folder / "bin" / "python"

    # Two benches must not install into one folder at once.
    with lock(folder.parent, f".{folder.name}"):
        created = folder / "created"
        if not created.exists():
            # Cleared, as without the marker it may be half made.
            venv.create(folder, clear=True, symlinks=True, with_pip=True)
            created.touch()

        installed = folder / peer
        if not installed.exists():
            print(f"{peer}: installed once, in {folder}", file=sys.stderr)
            pip_install(python, *REQUIREMENTS[peer])
            if peer in WITHOUT_DEPENDENCIES:
                pip_install(python, "--no-deps", WITHOUT_DEPENDENCIES[peer])
            installed.touch()

    return python


def pip_install(python: Path, *arguments: str) -> None:
    options = ("--quiet", "--disable-pip-version-check", "--no-input")
    argv = [str(python), "-m", "pip", "install", *options, *arguments]
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=PIP_TIMEOUT,
            check=False,
            env=runtime.initial_environment(),
        )
    except subprocess.TimeoutExpired:
        raise JobError(f"not installed: pip was not done in {PIP_TIMEOUT} s") from None

    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else f"pip ended with {done.returncode}"
        raise JobError(f"not installed: {reason}")


def run_peer(
    failed: dict[str, str], row: str, peer: str, worker: str, *arguments: object
) -> dict[str, Any] | None:
    """The answer of `workers/WORKER.py` under the peer's interpreter.

    None if it failed, now or in an earlier round; then `failed[row]` is the reason.
    """
    if row in failed:
        return None
    try:
        # -I: neither PYTHONPATH nor the user's own packages may reach the peer.
        return run_json(interpreter(peer), "-I", "-c", RUN_WORKER, worker, *arguments)
    except (
        JobError,
        OSError,
        RuntimeError,
        subprocess.CalledProcessError,
        UserError,
        ValueError,
    ) as error:
        # The last line of a traceback, which names the error.
        failed[row] = (str(error).strip() or type(error).__name__).splitlines()[-1]
        return None
