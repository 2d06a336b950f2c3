"""Seconds to the first step: compiled, and loaded from where a run keeps its graphs; nodes and
seconds at paper size.

The networks are those of `bench train`, each in two processes with one folder of graphs: the first
compiles, the second loads; the first step is part of both. Beside them the gradient of these, of
the demo's base and of the stages at paper size is compiled for one picture and not run, of
parameters that have shapes alone: how many nodes, how long it takes.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.terminal import positive
from tools.bench import sample, turns
from tools.bench.train import CASES, TEXT

FOLDER = Path(__file__).parent.parent.parent / "configs"
STAGES: dict[str, Path | str] = {
    "tiny_base64": "tiny/base64.yaml",
    "paper_base64": "base64.yaml",
    "paper_sr256": "sr256.yaml",
    "paper_sr1024": "sr1024.yaml",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounds", type=positive, default=2, metavar="N", help="of each (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        larger = {path.stem: path for path in sample.larger(Path(folder))}
        return measure(arguments.rounds, stages={**larger, **STAGES})


def measure(
    rounds: int, cases: dict[str, dict[str, Any]] = CASES, stages: Mapping[str, Path | str] = STAGES
) -> dict[str, Any]:
    """`rows`: CASE/compiled and CASE/ours, which is loaded; of a stage, CASE/gradient."""
    from tqdm import tqdm

    rows: turns.Rows = {}
    with tqdm(total=rounds * (2 * len(cases) + len(stages)), unit="process") as bar:
        for _ in range(rounds):
            for name, case in cases.items():
                with TemporaryDirectory() as folder:
                    file = Path(folder, name)
                    file.write_text(
                        json.dumps({**TEXT, **case, "steps": 1, "graphs": f"{folder}/run"})
                    )
                    for side in ("compiled", "ours"):
                        bar.set_description(f"{name} {side}")
                        answer = turns.ours("tools.bench.train_side", "ours", file)
                        rows.setdefault(f"compile_{name}/{side}", []).append(
                            {**answer, "seconds": answer["first"]}
                        )
                        bar.update()
            for name, path in stages.items():
                bar.set_description(name)
                answer = turns.ours("tools.bench.compile_side", FOLDER / path)
                rows.setdefault(f"compile_{name}/gradient", []).append(answer)
                bar.update()
    first = {name: found for name, found in rows.items() if not name.endswith("/gradient")}
    return {**turns.report(first, speed, {}, "mindspore"), "rows": rows, "rounds": rounds}


def speed(rounds: list[dict[str, Any]]) -> float:
    """Median seconds."""
    return median(answer["seconds"] for answer in rounds)


def table(report: dict[str, Any]) -> str:
    """The medians as Markdown."""
    lines = ["| | parameters | compiled | loaded | |", "|---" * 5 + "|"]
    rows = report["rows"]
    for name, ratio in report["ratios"].items():
        case = name.removesuffix("/compiled")
        cells = (
            *(case.removeprefix("compile_"), f"{rows[name][0]['parameters'] / 1e6:.1f}M"),
            *(
                f"{speed(rows[name]):.1f} s",
                f"{speed(rows[f'{case}/ours']):.1f} s",
                f"{1 / ratio:.1f} x",
            ),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| gradient of one picture | parameters | nodes | compiled |", "|---" * 4 + "|"]
    for name in (name for name in rows if name.endswith("/gradient")):
        found = rows[name][0]
        short = name.removeprefix("compile_").removesuffix("/gradient")
        lines.append(
            f"| {short} | {found['parameters'] / 1e6:.1f}M | {found['nodes']:,} | {speed(rows[name]):.0f} s |"
        )
    return "\n".join([*lines, "", turns.footer(report, f"Medians of {report['rounds']} rounds")])
