"""Memory and seconds of one sampling step of the paper's SR1024 at 1024 px, tiled and untiled.

One step of one image, with and without guidance, each in a process of its own: the first step with
its compilation, then another one. The weights are those with which a training starts, as neither
memory nor speed depends on values. Untiled needs 12 GiB, and the whole takes some 20 minutes.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from tools.bench.options import add_count
from tools.bench.process import run_worker
from tools.bench.report import Answer, Rows, footer, gibibytes, markdown, millions, summarize

CONFIG = Path(__file__).parents[2] / "configs" / "sr1024.yaml"
IMPLEMENTATIONS = ("untiled", "ours")
GUIDANCE = {"unguided": 1.0, "guided": 8.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_count(parser, "--rounds", 1, "rounds of all measurements")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    return measure(arguments.rounds)


def measure(
    rounds: int, config: Path = CONFIG, guidance: Mapping[str, float] = GUIDANCE
) -> dict[str, Any]:
    """`rows`: seconds and peak memory, by guidance and implementation."""
    from tqdm import tqdm

    plan = [(name, side) for name in guidance for side in IMPLEMENTATIONS]
    rows: Rows = {}
    for name, side in tqdm(plan * rounds, unit="process"):
        # A process each, as the peak memory is that of a process.
        answer = run_worker("tiling", side, config, guidance[name])
        rows.setdefault(f"tiling_{name}/{side}", []).append(answer)

    return {**summarize(rows, median_seconds, packages=["mindspore"]), "rounds": rounds}


def median_seconds(rounds: Sequence[Answer]) -> float:
    """Of a step after the first."""
    return median(seconds for answer in rounds for seconds in answer["seconds"])


def table(report: dict[str, Any]) -> str:
    """A row per guidance and implementation."""
    headings = ("", "parameters", "peak", "seconds", "first")
    rows = [
        [
            name.removeprefix("tiling_"),
            millions(answers[0]["parameters"]),
            gibibytes(median(answer["peak"] for answer in answers)),
            f"{median_seconds(answers):.0f} s",
            f"{median(answer['first'] for answer in answers):.0f} s",
        ]
        for name, answers in report["rows"].items()
    ]
    measured = f"Medians of {report['rounds']} rounds"
    return "\n".join([*markdown(headings, rows), "", footer(report, measured)])
