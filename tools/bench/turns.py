"""What all benchmarks share: sides that are measured in turns, each time in a process of its own, and what is told."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import distributions, version
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.errors import JobError, UserError
from pipeline.files import write_atomically

LIMIT = 900  # seconds a process may take


def ask(module: str, *arguments: object) -> dict[str, Any]:
    """What `python -m MODULE ARGUMENTS` prints as JSON on its last line."""
    argv = [sys.executable, "-m", module, *map(str, arguments)]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        raise JobError(f"{' '.join(argv)}: no answer in {LIMIT} s; ask for less") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def about(*packages: str) -> dict[str, Any]:
    """The machine, and the versions of those packages that are installed."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.machine()
    installed = {distribution.name.lower() for distribution in distributions()}
    return {
        "machine": f"{name}, {len(os.sched_getaffinity(0))} threads",
        "versions": {name: version(name) for name in packages if name.lower() in installed},
    }


def footer(report: dict[str, Any], measured: str) -> str:
    """What was measured, with which versions, where."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return f"{measured}; {versions}; {report['machine']}."


def spread(found: Sequence[float]) -> str:
    return f"{min(found):.1f} to {max(found):.1f}"


def speeds(found: dict[str, Sequence[float]], ours: str, headings: Sequence[str]) -> list[str]:
    """Lines of a Markdown table: each side's median and range, and how many times faster `ours` is."""
    fastest = median(found[ours])
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for name, rounds in found.items():
        lines.append(f"| {name} | {median(rounds):.1f} | {spread(rounds)} | {fastest / median(rounds):.2f} x |")
    return lines


def place(path: Path | None) -> None:
    """UserError if there is no folder for the report: said before minutes of measuring."""
    if path and not path.parent.is_dir():
        raise UserError(f"--json {path}: {path.parent} is no folder; make it or name another file")


def save(report: dict[str, Any], path: Path | None) -> None:
    """All figures, as JSON."""
    if path:
        try:
            write_atomically(path, json.dumps(report, indent=2).encode() + b"\n")
        except OSError as error:
            raise UserError(f"--json {path}: cannot be written: {error.strerror}; name another file") from None
