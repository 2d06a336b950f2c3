"""What all benchmarks share: sides that are measured in turns, each time in a process of its own,
and what is told.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import distributions, version
from pathlib import Path
from statistics import median
from typing import Any

from pipeline import runtime
from pipeline.errors import JobError

LIMIT = 900  # seconds a process may take


Rows = dict[str, list[dict[str, Any]]]  # by CASE/SIDE: what each round answered


def ask(python: str | Path, *arguments: object) -> dict[str, Any]:
    """What `PYTHON ARGUMENTS` prints as JSON on its last line.

    It starts as this process did: MindSpore's variables bind PyTorch too, and a side of ours sets
    them again.
    """
    argv, environment = [str(python), *map(str, arguments)], runtime.initial_environment()
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=LIMIT, check=False, env=environment
        )
    except subprocess.TimeoutExpired:
        raise JobError(f"{' '.join(argv)}: no answer in {LIMIT} s; ask for less") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def ours(module: str, *arguments: object) -> dict[str, Any]:
    """What this side of a bench, a module, answers here."""
    return ask(sys.executable, "-m", module, *arguments)


def ratios(rows: Rows, seconds: Callable[[list[dict[str, Any]]], float]) -> dict[str, float]:
    """Ours over each peer in time, by the peer's row: 2 where ours takes twice as long."""
    sides = [name.rpartition("/") for name in rows if not name.endswith("/ours")]
    return {
        f"{case}/{side}": seconds(rows[f"{case}/ours"]) / seconds(rows[f"{case}/{side}"])
        for case, _, side in sides
    }


def report(
    rows: Rows,
    seconds: Callable[[list[dict[str, Any]]], float],
    failed: dict[str, str],
    *packages: str,
) -> dict[str, Any]:
    """What every bench answers: `rows` and `ratios` of those that ran, `failed` with the reason of
    those that did not, the machine, and versions of these packages and of what the sides used.
    """
    ran = {name: rounds for name, rounds in rows.items() if name not in failed}
    used = {
        name: number
        for rounds in ran.values()
        for name, number in rounds[0].get("versions", {}).items()
    }
    known = about(*packages)
    versions = {**known["versions"], **used}
    return {
        **known,
        "versions": versions,
        "rows": ran,
        "ratios": ratios(ran, seconds),
        "failed": failed,
    }


def missing(report: dict[str, Any], columns: int) -> list[str]:
    """Lines of a Markdown table: peers that did not run, and why."""
    return [
        f"| {name} | did not run: {why}{' |' * (columns - 1)}"
        for name, why in report["failed"].items()
    ]


def about(*packages: str) -> dict[str, Any]:
    """The machine, and the versions of those packages that are installed."""
    names = [
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
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


def speeds(found: Mapping[str, Sequence[float]], ours: str, headings: Sequence[str]) -> list[str]:
    """Lines of a Markdown table: each side's median and range, and how many times faster `ours` is."""
    fastest = median(found[ours])
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for name, rounds in found.items():
        lines.append(
            f"| {name} | {median(rounds):.1f} | {spread(rounds)} | {fastest / median(rounds):.2f} x |"
        )
    return lines
