"""Seconds per training step, beside the PyTorch twin, imagen-pytorch and diffusers' DeepFloyd IF.

A step is loss, gradient, clipping, AdamW and EMA, in float32, from a batch in memory. The twin
(tools/twin.py) has the same networks and arithmetic in PyTorch's own operators: its time is the
limit that the machine sets. imagen-pytorch's `Unet` and diffusers' U-Net of IF have about our
number of parameters, by their width, and attend to the text at the same sizes. The report also has
the seconds of the first step, peak memory, operations as PyTorch counts them, and which share of
the machine's matrix products they reach.

PyTorch and the other libraries are installed apart, once, in the user's cache; a peer that does not
run is reported with the reason.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from tools.bench.options import add_count
from tools.bench.peers import run_peer
from tools.bench.process import run_worker
from tools.bench.report import (
    Answer,
    Rows,
    failed_rows,
    footer,
    gibibytes,
    markdown,
    millions,
    summarize,
)

TEXT = {"text_width": 512, "length": 32}

# Networks and batches; the last two keys hold the sizes of the peers' networks.
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
        "imagen_pytorch": {"dim": 64, "cond_dim": 128},
        "if": {"channels": 64},
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
        "imagen_pytorch": {"dim": 24, "attn_dim_head": 32},
        "if": {"channels": 24},
    },
}
IMPLEMENTATIONS = ("ours", "twin", "imagen_pytorch", "if")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_count(parser, "--steps", 5, "steps of each process")
    add_count(parser, "--rounds", 3, "rounds of all implementations")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    return measure(arguments.steps, arguments.rounds)


def measure(
    steps: int,
    rounds: int,
    cases: Mapping[str, Mapping[str, Any]] = CASES,
    implementations: Sequence[str] = IMPLEMENTATIONS,
) -> dict[str, Any]:
    """`rows`: by case and implementation; `failed`: why a peer did not run."""
    from tqdm import tqdm

    plan = [(name, side) for name in cases for side in implementations]
    rows: Rows = {f"train_{name}/{side}": [] for name, side in plan}
    failed: dict[str, str] = {}

    with TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name}.json") for name in cases}
        for name, case in cases.items():
            files[name].write_text(json.dumps({**TEXT, **case, "steps": steps}))

        # Round after round: a change of the machine's load meets all implementations.
        for name, side in (bar := tqdm(plan * rounds, unit="process")):
            row = f"train_{name}/{side}"
            bar.set_description(row)
            if side == "ours":
                rows[row].append(run_worker("train", side, files[name]))
            elif answer := run_peer(failed, row, side, "train", side, files[name]):
                rows[row].append(answer)

    report = summarize(rows, median_seconds, packages=["mindspore"], failed=failed)
    return {**report, "steps": steps}


def median_seconds(rounds: Sequence[Answer]) -> float:
    """Of a step."""
    return median(seconds for answer in rounds for seconds in answer["seconds"])


def table(report: dict[str, Any]) -> str:
    """A row per case and implementation; our operations are the twin's."""
    headings = (
        "",
        "parameters",
        "s per step",
        "lowest to highest",
        "ours takes",
        "10^9 operations",
        "of matrix products",
        "first after",
        "peak",
    )
    rows = report["rows"]
    # The best of all processes stands for what the machine can do.
    peak_rate = max(
        (answer["matmul"] for answers in rows.values() for answer in answers if "matmul" in answer),
        default=0,
    )

    cells = []
    for row, answers in rows.items():
        # PyTorch counts its own operators only, and the twin's arithmetic is ours.
        counted = rows.get(row.replace("/ours", "/twin"), [{}])[0].get("flops")
        operations = "not counted"
        share = "not counted"
        if counted:
            operations = f"{counted / 1e9:.0f}"
            share = f"{counted / median_seconds(answers) / peak_rate:.0%}"

        seconds = [each for answer in answers for each in answer["seconds"]]
        cells.append(
            [
                row,
                millions(answers[0]["parameters"]),
                f"{median_seconds(answers):.2f}",
                f"{min(seconds):.2f} to {max(seconds):.2f}",
                f"{report['ratios'].get(row, 1):.2f} x",
                operations,
                share,
                f"{median(answer['first'] for answer in answers):.0f} s",
                gibibytes(median(answer["peak"] for answer in answers)),
            ]
        )
    cells += failed_rows(report, len(headings))

    measured = (
        f"Medians of {max(map(len, rows.values()))} rounds of {report['steps']} steps after the "
        f"first; matrix products of {peak_rate / 1e9:.0f} x 10^9 operations per second"
    )
    return "\n".join([*markdown(headings, cells), "", footer(report, measured)])
