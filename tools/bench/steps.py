"""How many steps each sampler needs: distance to 1,000 steps of DDIM, and agreement with captions.

Every stage of a cascade that was trained on the scenes of tools/shapes.py, such as the demo's,
samples the same images by each sampler in several numbers of steps; a super-resolution stage
enlarges the reference's images of the stage before. Distance is the root mean squared difference
from the reference, from the same noise, in percent of the range of values. The ancestral sampler
draws noise in every step and ends elsewhere: of it only the agreement counts (tools/agreement.py).
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tools.bench.options import add_count
from tools.bench.report import Answer, Rows, environment, footer, markdown

PROMPTS = Path(__file__).parents[2] / "configs" / "tiny" / "captions.txt"
ATTRIBUTES = ("colour", "shape", "background")


class Solver(NamedTuple):
    """A sampler with a number of steps."""

    sampler: str
    steps: int

    @property
    def name(self) -> str:
        return f"{self.sampler}_{self.steps}"


REFERENCE = Solver("ddim", 1000)
TRIED: dict[str, tuple[int, ...]] = {
    "dpm_solver++": (4, 6, 8, 10, 15, 20, 25, 50),
    "ddim": (8, 15, 25, 50, 100, 250),
    "ddpm": (25, 50, 100, 250),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cascade", type=Path, metavar="CASCADE", help="a cascade folder")
    add_count(parser, "--images", 32, "images of the first stage")
    add_count(parser, "--large", 4, "images of the other stages")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    return measure(arguments.cascade, arguments.images, arguments.large)


def measure(
    folder: Path,
    images: int,
    large: int,
    tried: Mapping[str, Sequence[int]] = TRIED,
    reference: Solver = REFERENCE,
) -> dict[str, Any]:
    """`rows`: by stage, sampler and steps: `distance` in percent, shares that agree, seconds per
    image.
    """
    from tqdm import tqdm

    from pipeline.generate.cascade import Cascade

    cascade = Cascade.load(folder)
    prompts = PROMPTS.read_text().splitlines()
    solvers = [Solver(sampler, steps) for sampler, counts in tried.items() for steps in counts]
    rows: Rows = {}
    low_res: Any = None

    with tqdm(total=len(cascade.stages) * (1 + len(solvers)), unit="solver") as bar:
        for name in cascade.stages:
            # A large image takes long, so that later stages have fewer.
            captions = prompts[: images if low_res is None else min(images, large)]
            reference_images: Any = None

            # The reference comes first: the others are compared with its images.
            for solver in (reference, *solvers):
                bar.set_description(f"{name} {solver.name}")
                seconds, outputs = sample_images(cascade, name, solver, captions, low_res)
                if reference_images is None:
                    reference_images = outputs

                answer = compare(outputs, reference_images, captions)
                answer["seconds"] = seconds / len(captions)
                rows[f"steps_{name}/{solver.name}"] = [answer]
                bar.update()

            # The next stage enlarges the same images, whatever the solver.
            low_res = reference_images[: min(images, large)]

    return {**environment("mindspore"), "rows": rows, "ratios": {}}


def sample_images(
    cascade: Any, name: str, solver: Solver, captions: Sequence[str], low_res: Any
) -> tuple[float, Any]:
    """Seconds, and images uint8 (N, S, S, 3) of stage `name`."""
    from tools.bench.workers.timing import timed

    return timed(
        lambda: cascade.sample_stage(
            name,
            captions,
            seed=0,
            image_ids=range(len(captions)),
            options={name: solver._asdict()},
            low_res=low_res,
        )
    )


def compare(outputs: Any, reference: Any, captions: Sequence[str]) -> Answer:
    """Distance to the reference, and agreement with the captions."""
    import numpy as np

    from tools.agreement import agreement

    # Differences of uint8 would wrap around.
    difference = (outputs.astype(np.float64) - reference) / 255
    scores: Any = agreement(zip(captions, outputs, strict=True))
    return {
        "distance": 100 * float(np.sqrt((difference**2).mean())),
        "images": len(captions),
        **{attribute: scores[attribute]["share"] for attribute in ATTRIBUTES},
    }


def table(report: dict[str, Any]) -> str:
    """A row per stage and solver."""
    headings = ("", "distance", *ATTRIBUTES, "s per image")
    rows = [
        [
            row.removeprefix("steps_"),
            f"{answer['distance']:.2f} %",
            *(f"{answer[attribute]:.0%}" for attribute in ATTRIBUTES),
            f"{answer['seconds']:.3f}",
        ]
        for row, (answer,) in report["rows"].items()
    ]
    counts = sorted({answer["images"] for (answer,) in report["rows"].values()}, reverse=True)
    measured = (
        f"{' and '.join(map(str, counts))} images; the first of a sampler includes its compilation"
    )
    return "\n".join([*markdown(headings, rows), "", footer(report, measured)])
