"""Seconds to the first step, compiled and loaded from the compile cache; graph sizes at paper size.

The networks are those of `bench train`. Each runs in two processes with one compile cache: the
first compiles, the second loads; both times include the first step. Then the gradients of these
networks, of the demo's base and of the stages at paper size are compiled for one image and not run,
with parameters that have shapes only: the number of graph nodes, and the seconds.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from tools.bench import sample
from tools.bench.options import add_count
from tools.bench.process import run_worker
from tools.bench.report import Answer, Rows, footer, markdown, millions, summarize
from tools.bench.train import CASES, TEXT

CONFIGS = Path(__file__).parents[2] / "configs"
STAGES: dict[str, Path] = {
    "tiny_base64": CONFIGS / "tiny" / "base64.yaml",
    "paper_base64": CONFIGS / "base64.yaml",
    "paper_sr256": CONFIGS / "sr256.yaml",
    "paper_sr1024": CONFIGS / "sr1024.yaml",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_count(parser, "--rounds", 2, "rounds")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        larger = {path.stem: path for path in sample.write_larger_stages(Path(folder))}
        return measure(arguments.rounds, stages={**larger, **STAGES})


def measure(
    rounds: int,
    cases: Mapping[str, Mapping[str, Any]] = CASES,
    stages: Mapping[str, Path] = STAGES,
) -> dict[str, Any]:
    """`rows`: CASE/compiled and CASE/ours, which loads; STAGE/gradient of a stage."""
    from tqdm import tqdm

    rows: Rows = {}
    with tqdm(total=rounds * (len(cases) + len(stages)), unit="network") as bar:
        for _ in range(rounds):
            for name, case in cases.items():
                bar.set_description(name)
                for side, answer in measure_first_step(case).items():
                    rows.setdefault(f"compile_{name}/{side}", []).append(answer)
                bar.update()

            for name, path in stages.items():
                bar.set_description(name)
                answer = run_worker("compile", path)
                rows.setdefault(f"compile_{name}/gradient", []).append(answer)
                bar.update()

    # Gradients have nothing to be compared with.
    compared = {name: answers for name, answers in rows.items() if not name.endswith("/gradient")}
    report = summarize(compared, median_seconds, packages=["mindspore"])
    return {**report, "rows": rows, "rounds": rounds}


def measure_first_step(case: Mapping[str, Any]) -> dict[str, Answer]:
    """`seconds` of the first step without and with the other's compile cache."""
    answers = {}
    with TemporaryDirectory() as folder:
        file = Path(folder, "case.json")
        # `graphs` makes the worker compile into a cache that the next one finds.
        file.write_text(json.dumps({**TEXT, **case, "steps": 1, "graphs": f"{folder}/run"}))

        for side in ("compiled", "ours"):
            answer = run_worker("train", "ours", file)
            answers[side] = {**answer, "seconds": answer["first"]}
    return answers


def median_seconds(rounds: Sequence[Answer]) -> float:
    return median(answer["seconds"] for answer in rounds)


def table(report: dict[str, Any]) -> str:
    """Two tables: first steps, and gradients."""
    rows = report["rows"]
    first_steps = []
    for name, ratio in report["ratios"].items():
        case = name.removesuffix("/compiled")
        first_steps.append(
            [
                case.removeprefix("compile_"),
                millions(rows[name][0]["parameters"]),
                f"{median_seconds(rows[name]):.1f} s",
                f"{median_seconds(rows[f'{case}/ours']):.1f} s",
                f"{1 / ratio:.1f} x",
            ]
        )

    gradients = [
        [
            name.removeprefix("compile_").removesuffix("/gradient"),
            millions(answers[0]["parameters"]),
            f"{answers[0]['nodes']:,}",
            f"{median_seconds(answers):.0f} s",
        ]
        for name, answers in rows.items()
        if name.endswith("/gradient")
    ]

    return "\n".join(
        [
            *markdown(("first step", "parameters", "compiled", "loaded", ""), first_steps),
            "",
            *markdown(("gradient of one image", "parameters", "nodes", "compiled"), gradients),
            "",
            footer(report, f"Medians of {report['rounds']} rounds"),
        ]
    )
