"""Seconds of a training step beside the PyTorch twin: the same networks, weights, batch and optimizer.

A step is loss, gradient, clip, AdamW and EMA, in float32, from a batch that is in memory. The twin (tools/twin.py) has
the same arithmetic in PyTorch's own operators: what it takes is the limit that the machine shows. Also told: seconds to
the first step, peak memory, and which share of the machine's matrix products a step reaches, its multiplications and
additions counted by PyTorch. Each measurement is a process of its own, the two in turns.
"""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from launch.terminal import positive
from pipeline.errors import UserError
from tools.bench import turns

TEXT = {"text_width": 512, "length": 32}
CASES: dict[str, dict[str, Any]] = {
    "base64": {
        "unet": {
            "kind": "adm",
            "channels": 64,
            "channel_mults": [1, 2, 3, 4],
            "num_blocks": [1, 1, 1, 1],
            "attention": ["none", "none", "self", "self"],
            "head_channels": 32,
            "text_channels": 256,
        },
        "size": 64,
        "batch": 8,
        "channels_in": 3,
        "num_levels": 1,
    },
    "sr256": {
        "unet": {
            "kind": "efficient",
            "channels": 32,
            "channel_mults": [1, 2, 4, 8],
            "num_blocks": [1, 1, 1, 2],
            "attention": ["none", "none", "none", "self"],
            "head_channels": 32,
            "text_channels": 256,
        },
        "size": 256,
        "batch": 2,
        "channels_in": 6,
        "num_levels": 2,
    },
}
SIDES = ("ours", "twin")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=positive, default=8, metavar="N", help="of each process (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="of both sides (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")


def run(arguments: argparse.Namespace) -> None:
    turns.place(arguments.json)
    if find_spec("torch") is None:
        raise UserError("torch: not installed; the comparison needs the extra: pip install 'imagen-cascade[parity]'")
    report = measure(arguments.steps, arguments.rounds)
    print(table(report))
    turns.save(report, arguments.json)


def measure(steps: int, rounds: int, cases: dict[str, dict[str, Any]] = CASES) -> dict[str, Any]:
    """`rows`: what each side of each case answered, by round; `ratios`: ours over the twin, of median seconds."""
    from tqdm import tqdm

    rows: dict[str, list[dict[str, Any]]] = {f"{case}/{side}": [] for case in cases for side in SIDES}
    with TemporaryDirectory() as folder, tqdm(total=rounds * len(rows), unit="process") as bar:
        for name, case in cases.items():
            Path(folder, name).write_text(json.dumps({**TEXT, **case, "steps": steps}))
        for _ in range(rounds):
            for row in rows:
                bar.set_description(row)
                name, side = row.split("/")
                rows[row].append(turns.ask("tools.bench.train_side", side, Path(folder, name)))
                bar.update()
    ratios = {f"train_{name}/twin": speed(rows[f"{name}/ours"]) / speed(rows[f"{name}/twin"]) for name in cases}
    return {"rows": rows, "ratios": ratios, "steps": steps, **turns.about("mindspore", "torch")}


def speed(rounds: list[dict[str, Any]]) -> float:
    """Median seconds of a step."""
    return median(seconds for answer in rounds for seconds in answer["seconds"])


def table(report: dict[str, Any]) -> str:
    """The medians as Markdown."""
    lines = [
        "| | parameters | s a step | lowest to highest | over the twin | of matrix products | first after | peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row, rounds in report["rows"].items():
        name = row.split("/")[0]
        twin = report["rows"][f"{name}/twin"][0]
        seconds = [each for answer in rounds for each in answer["seconds"]]
        lines.append(
            f"| {row} | {rounds[0]['parameters'] / 1e6:.1f}M | {speed(rounds):.2f} | {min(seconds):.2f} to "
            f"{max(seconds):.2f} | {speed(rounds) / speed(report['rows'][f'{name}/twin']):.2f} x | "
            f"{twin['flops'] / speed(rounds) / twin['matmul']:.0%} | "
            f"{median(answer['first'] for answer in rounds):.0f} s | "
            f"{median(answer['peak'] for answer in rounds) / 2**30:.2f} GiB |"
        )
    rounds = next(iter(report["rows"].values()))
    measured = f"Medians of {len(rounds)} rounds of {report['steps']} steps after the first"
    return "\n".join([*lines, "", turns.footer(report, measured)])
