"""How many steps each sampler wants: distance to 1,000 steps of DDIM from the same noise, and what
the pictures show.

Every stage of a cascade that was trained on the scenes of tools/shapes.py, such as the demo's,
samples the same pictures by each sampler in several numbers of steps; a super-resolution stage
enlarges what the reference made of the stage before. Distance is the root of the mean squared
difference, in percent of the range of values. The ancestral sampler draws noise on its way and ends
elsewhere: its distance says nothing, its agreement (tools/agreement.py) does.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from pipeline.terminal import positive
from tools.bench import turns

REFERENCE = ("ddim", 1000)
TRIED = {
    "dpm_solver++": (4, 6, 8, 10, 15, 20, 25, 50),
    "ddim": (8, 15, 25, 50, 100, 250),
    "ddpm": (25, 50, 100, 250),
}
PROMPTS = Path(__file__).parent.parent.parent / "configs" / "tiny" / "captions.txt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "cascade", type=Path, metavar="CASCADE", help="folder made by `cascade export`"
    )
    parser.add_argument(
        "--images", type=positive, default=32, metavar="N", help="of the first stage (%(default)s)"
    )
    parser.add_argument(
        "--large", type=positive, default=4, metavar="N", help="of the others (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    return measure(arguments.cascade, arguments.images, arguments.large)


def measure(
    folder: Path,
    images: int,
    large: int,
    tried: dict[str, tuple[int, ...]] = TRIED,
    best: tuple[str, int] = REFERENCE,
) -> dict[str, Any]:
    """`rows`: by stage, sampler and steps, `distance` in percent, the shares that agree and seconds
    a picture.
    """
    import numpy as np
    from tqdm import tqdm

    from pipeline.generate.cascade import Cascade
    from tools.agreement import agreement

    cascade = Cascade.load(folder)
    prompts = PROMPTS.read_text().splitlines()
    ways = [best, *((sampler, steps) for sampler, numbers in tried.items() for steps in numbers)]
    rows: turns.Rows = {}
    low: Any = None
    with tqdm(total=len(cascade.stages) * len(ways), unit="way") as bar:
        for name in cascade.stages:
            said = prompts[: images if low is None else min(images, large)]
            exact: Any = None
            for sampler, steps in ways:
                bar.set_description(f"{name} {sampler} {steps}")
                options = {name: {"sampler": sampler, "steps": steps}}
                start = time.perf_counter()
                made = cascade.run(
                    name, cascade.prompt(name, said), 0, range(len(said)), low, options
                )
                taken = time.perf_counter() - start
                exact = made if exact is None else exact
                shown: Any = agreement(zip(said, made, strict=True))
                difference = (made.astype(np.float64) - exact) / 255
                rows[f"steps_{name}/{sampler}_{steps}"] = [
                    {
                        "distance": 100 * float(np.sqrt((difference**2).mean())),
                        "seconds": taken / len(said),
                        "images": len(said),
                        **{
                            what: shown[what]["share"] for what in ("colour", "shape", "background")
                        },
                    }
                ]
                bar.update()
            low = exact[: min(images, large)]
    return {**turns.about("mindspore"), "rows": rows, "ratios": {}}


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| | distance | colour | shape | background | s a picture |", "|---" * 6 + "|"]
    for row, (found,) in report["rows"].items():
        cells = (
            *(row.removeprefix("steps_"), f"{found['distance']:.2f} %"),
            *(f"{found[what]:.0%}" for what in ("colour", "shape", "background")),
            f"{found['seconds']:.3f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    counts = sorted({found["images"] for (found,) in report["rows"].values()}, reverse=True)
    measured = f"{' and '.join(map(str, counts))} pictures; the first of a sampler includes its compilation"
    return "\n".join([*lines, "", turns.footer(report, measured)])
