"""The other libraries, in an environment of their own: made once in the user's cache, by pip, with
these versions.

A peer that does not install or does not run is told as such, in one line, and what is measured goes
on without it. The environment is named by its pins, so that new ones make a new one; each part's
marker comes last, so that half a part is never taken for a whole one.
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
from tools.bench import turns

LIMIT = 1800  # seconds for pip

TORCH = ("torch==2.13.0", "numpy==2.4.6")
TRANSFORMERS = (*TORCH, "transformers==4.57.1", "sentencepiece==0.2.3", "protobuf==7.36.2")
NEEDS = {
    "twin": TORCH,
    "transformers": TRANSFORMERS,
    "if": (*TRANSFORMERS, "diffusers==0.35.2"),
    "imagen_pytorch": (
        *(
            *TRANSFORMERS,
            "accelerate==1.15.0",
            "beartype==0.23.1",
            "click==8.5.1",
            "datasets==5.0.1",
            "einops==0.8.2",
        ),
        *("ema-pytorch==0.8.3", "kornia==0.9.0", "pydantic==2.14.3", "pytorch-warmup==0.2.0"),
    ),
}
# Without what it asks for: torchvision, whose wheels go with one build of PyTorch alone, and break
# `transformers` too.
ALONE = {"imagen_pytorch": "imagen-pytorch==2.1.0"}


def folder() -> Path:
    pins = json.dumps([NEEDS, ALONE, sys.version_info[:2]])
    return runtime.cache_folder() / f"peers-{hashlib.sha256(pins.encode()).hexdigest()[:12]}"


def python(peer: str) -> Path:
    """The interpreter that has this peer, installed if it is not. JobError with the reason if it
    cannot be.
    """
    place = folder()
    interpreter = place / "bin" / "python"
    with lock(place.parent, f".{place.name}"):
        if not (place / "made").exists():
            venv.create(place, clear=True, symlinks=True, with_pip=True)
            (place / "made").touch()
        if not (place / peer).exists():
            print(f"{peer}: installed once, in {place}", file=sys.stderr)
            pip(interpreter, *NEEDS[peer])
            if peer in ALONE:
                pip(interpreter, "--no-deps", ALONE[peer])
            (place / peer).touch()
    return interpreter


def pip(interpreter: Path, *arguments: str) -> None:
    words = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input")
    argv = [str(interpreter), *words, *arguments]
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
            env=runtime.initial_environment(),
        )
    except subprocess.TimeoutExpired:
        raise JobError(f"not installed: pip was not done in {LIMIT} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [
            f"pip ended with {done.returncode}"
        ]
        raise JobError(f"not installed: {said[-1]}")


def ask(
    failed: dict[str, str], name: str, peer: str, side: str, *arguments: object
) -> dict[str, Any] | None:
    """What this side of a bench, a file here, answers under the peer's interpreter; None if it did
    not run, now or in an earlier round, and then `failed[name]` is the reason.
    """
    if name in failed:
        return None
    try:
        return turns.ask(python(peer), "-I", Path(__file__).with_name(side), *arguments)
    except (
        JobError,
        OSError,
        RuntimeError,
        subprocess.CalledProcessError,
        UserError,
        ValueError,
    ) as error:
        failed[name] = (str(error).strip() or type(error).__name__).splitlines()[-1]
        return None
