"""Seconds of a training step beside the PyTorch twin, imagen-pytorch's `Unet` and diffusers' U-Net
of DeepFloyd IF.

A step is loss, gradient, max_grad_norm, AdamW and EMA, in float32, from a batch that is in memory. The twin
(tools/twin.py) has the same networks and arithmetic in PyTorch's own operators: what it takes is
the limit that the machine shows. The other two have about our number of parameters, by their width,
and attend to the text at the same sizes. Also told: seconds to the first step, peak memory,
multiplications and additions as PyTorch counts them, and which share of the machine's matrix
products they are. Each measurement is a process of its own, the sides in turns.

PyTorch and the other libraries are installed apart, once, in the user's cache; a peer that does not
run is told so.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.terminal import positive
from tools.bench import peers, turns

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
SIDES = ("ours", "twin", "imagen_pytorch", "if")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=positive, default=5, metavar="N", help="of each process (%(default)s)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=3, metavar="N", help="of all sides (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    return measure(arguments.steps, arguments.rounds)


def measure(
    steps: int,
    rounds: int,
    cases: dict[str, dict[str, Any]] = CASES,
    sides: tuple[str, ...] = SIDES,
) -> dict[str, Any]:
    """`rows`: what each side of each case answered, by round; `failed`: why a peer did not."""
    from tqdm import tqdm

    rows: turns.Rows = {f"train_{case}/{side}": [] for case in cases for side in sides}
    failed: dict[str, str] = {}
    with TemporaryDirectory() as folder, tqdm(total=rounds * len(rows), unit="process") as bar:
        for name, case in cases.items():
            Path(folder, f"train_{name}").write_text(json.dumps({**TEXT, **case, "steps": steps}))
        for _ in range(rounds):
            for row, found in rows.items():
                bar.set_description(row)
                case_name, side = row.split("/")
                file = Path(folder, case_name)
                if side == "ours":
                    found.append(turns.ours("tools.bench.train_side", side, file))
                elif answer := peers.ask(failed, row, side, "train_side.py", side, file):
                    found.append(answer)
                bar.update()
    return {**turns.report(rows, speed, failed, "mindspore"), "steps": steps}


def speed(rounds: list[dict[str, Any]]) -> float:
    """Median seconds of a step."""
    return median(seconds for answer in rounds for seconds in answer["seconds"])


def table(report: dict[str, Any]) -> str:
    """The medians as Markdown; our operations are the twin's."""
    rows = report["rows"]
    headings = (
        "",
        "parameters",
        "s a step",
        "lowest to highest",
        "ours takes",
        "10^9 operations",
        "of matrix products",
        "first after",
        "peak",
    )
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    peak = max(
        (answer["matmul"] for rounds in rows.values() for answer in rounds if "matmul" in answer),
        default=0,
    )
    for row, rounds in rows.items():
        counted = rows.get(row.replace("/ours", "/twin"), [{}])[0].get("flops")
        seconds = [each for answer in rounds for each in answer["seconds"]]
        cells = (
            row,
            f"{rounds[0]['parameters'] / 1e6:.1f}M",
            f"{speed(rounds):.2f}",
            f"{min(seconds):.2f} to {max(seconds):.2f}",
            f"{report['ratios'].get(row, 1):.2f} x",
            f"{counted / 1e9:.0f}" if counted else "not counted",
            f"{counted / speed(rounds) / peak:.0%}" if counted else "not counted",
            f"{median(answer['first'] for answer in rounds):.0f} s",
            f"{median(answer['peak'] for answer in rounds) / 2**30:.2f} GiB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    measured = (
        f"Medians of {max(map(len, rows.values()))} rounds of {report['steps']} steps after the first; matrix products "
        f"of {peak / 1e9:.0f} x 10^9 operations a second"
    )
    return "\n".join(
        [*lines, *turns.missing(report, len(headings)), "", turns.footer(report, measured)]
    )
