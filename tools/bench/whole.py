"""Memory and seconds of a step of sampling of the paper's SR1024 at 1024 px, in bands and all at
once.

A step is what `Stage.sample` does of one picture in one step, with and without guidance, each in a
process of its own: the first with its compilation, then another. The weights are those that a
training starts from, as neither memory nor speed depends on values. All at once takes 12 GiB and
the whole some 20 minutes.
"""

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.terminal import positive
from tools.bench import turns

CONFIG = Path(__file__).parent.parent.parent / "configs" / "sr1024.yaml"
SIDES = ("at_once", "ours")
GUIDANCE = {"unguided": 1.0, "guided": 8.0}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounds", type=positive, default=1, metavar="N", help="of all sides (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    return measure(arguments.rounds)


def measure(
    rounds: int, config: Path = CONFIG, guidance: dict[str, float] = GUIDANCE
) -> dict[str, Any]:
    """`rows`: seconds and peak memory by guidance, side and round."""
    from tqdm import tqdm

    rows: turns.Rows = {}
    for name, side in tqdm(
        [(name, side) for name in guidance for side in SIDES] * rounds, unit="process"
    ):
        answer = turns.ours("tools.bench.whole_side", side, config, guidance[name])
        rows.setdefault(f"whole_{name}/{side}", []).append(answer)
    return {**turns.report(rows, speed, {}, "mindspore"), "rounds": rounds}


def speed(rounds: list[dict[str, Any]]) -> float:
    """Median seconds."""
    return median(seconds for answer in rounds for seconds in answer["seconds"])


def table(report: dict[str, Any]) -> str:
    """The medians as Markdown."""
    lines = ["| | parameters | peak | seconds | first |", "|---" * 5 + "|"]
    for name, rounds in report["rows"].items():
        cells = (
            *(name.removeprefix("whole_"), f"{rounds[0]['parameters'] / 1e6:.1f}M"),
            f"{median(answer['peak'] for answer in rounds) / 2**30:.2f} GiB",
            *(f"{speed(rounds):.0f} s", f"{median(answer['first'] for answer in rounds):.0f} s"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", turns.footer(report, f"Medians of {report['rounds']} rounds")])
