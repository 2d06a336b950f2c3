"""Pictures a second of the demo's stages and of larger ones, beside the network's calls that they
take.

Each stage makes a batch by the orchestrator, to the picture's bytes, the first from the prompt, the
others from its text, already encoded, with the sampler, the steps, the guidance and the batch of
its file. Then it calls its network as often and does nothing else: what is over is the
orchestrator's. The larger ones have the networks of `tools.bench train`, in 8 steps without
guidance. The weights are those that a training starts from, as speed does not depend on values.
Also told: seconds to the end of the first batch, in which the graph is compiled, and peak memory up
to that stage.
"""

import argparse
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.terminal import positive
from tools.bench import train, turns

FOLDER = Path(__file__).parent.parent.parent / "configs" / "tiny"
CONFIGS = tuple(FOLDER / f"{name}.yaml" for name in ("base64", "sr256", "sr1024"))
WHOLE = "sample_cascade"
LARGER = {"base64": {"steps": 8, "batch": 8}, "sr256": {"steps": 8, "batch": 2}}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rounds", type=positive, default=3, metavar="N", help="processes (%(default)s)"
    )
    parser.add_argument(
        "--batches", type=positive, default=3, metavar="N", help="of each stage (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    return measure(arguments.rounds, arguments.batches)


def measure(rounds: int, batches: int, configs: tuple[Path, ...] = CONFIGS) -> dict[str, Any]:
    """`rows`: what each stage and side took, by round; `sample_cascade` is one picture through all
    stages.
    """
    from tqdm import tqdm

    from pipeline.config import read_yaml
    from tools import tiny_t5

    rows: turns.Rows = {}
    with TemporaryDirectory() as folder:
        apart: list[tuple[Path, ...]] = (
            [(path,) for path in larger(Path(folder))] if configs == CONFIGS else []
        )
        words, encoder = Path(folder, "captions.txt"), Path(folder, "t5")
        words.write_text("a small red circle on white\na large blue square on grey\n")
        tiny_t5.make(encoder, [words], width=read_yaml(configs[0])["text"]["width"])
        for chain in tqdm([configs] * rounds + apart * rounds, unit="process"):
            found = turns.ours("tools.bench.sample_side", batches, encoder, *chain)
            for name, answer in found.items():
                rows.setdefault(f"sample_{name}", []).append(answer)
            for side in ("ours", "network") if chain == configs else ():
                stages = [answer for name, answer in found.items() if name.endswith(f"/{side}")]
                rows.setdefault(f"{WHOLE}/{side}", []).append(through(stages))
    return {**turns.report(rows, speed, {}, "mindspore"), "batches": batches}


def larger(folder: Path) -> list[Path]:
    """Files of the demo's stages with the networks of `tools.bench train`."""
    import yaml

    from pipeline.config import read_yaml

    paths = []
    for name, sample in LARGER.items():
        raw = read_yaml(FOLDER / f"{name}.yaml")
        paths.append(folder / f"{name}-{train.CASES[name]['unet']['channels']}.yaml")
        paths[-1].write_text(
            yaml.safe_dump({**raw, "unet": train.CASES[name]["unet"], "sample": sample})
        )
    return paths


def through(stages: list[dict[str, Any]]) -> dict[str, Any]:
    """What a picture takes through all stages."""
    each = zip(
        *([taken / stage["batch"] for taken in stage["seconds"]] for stage in stages), strict=True
    )
    return {
        "seconds": [sum(taken) for taken in each],
        "batch": 1,
        **{name: sum(stage[name] for stage in stages) for name in ("first", "steps", "parameters")},
        "peak": max(stage["peak"] for stage in stages),
    }


def speed(rounds: list[dict[str, Any]]) -> float:
    """Median seconds of a picture."""
    return median(seconds / answer["batch"] for answer in rounds for seconds in answer["seconds"])


def table(report: dict[str, Any]) -> str:
    """The medians as Markdown."""
    headings = (
        "",
        "parameters",
        "steps",
        "batch",
        "pictures/s",
        "of them network",
        "over its calls",
        "first",
        "peak",
    )
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    rows = report["rows"]
    for row in (row for row in rows if row.endswith("/ours")):
        name, one = row.removesuffix("/ours"), rows[row][0]
        over = report["ratios"][f"{name}/network"]
        cells = (
            *(
                name.removeprefix("sample_"),
                f"{one['parameters'] / 1e6:.2f}M",
                str(one["steps"]),
                str(one["batch"]),
            ),
            *(f"{1 / speed(rows[row]):.2f}", f"{1 / over:.0%}", f"{over - 1:+.1%}"),
            f"{median(answer['first'] for answer in rows[row]):.0f} s",
            f"{median(answer['peak'] for answer in rows[row]) / 2**30:.2f} GiB",
        )
        lines.append(f"| {' | '.join(cells)} |")
    measured = f"Medians of {len(next(iter(rows.values())))} processes with {report['batches']} batches of each stage"
    return "\n".join([*lines, "", turns.footer(report, measured)])
