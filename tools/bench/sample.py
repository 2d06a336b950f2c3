"""Images per second of the demo's stages and of larger ones, beside their networks' calls alone.

Each stage samples a batch by the orchestrator, up to uint8 images, the first stage from the prompt
and the others from its embeddings, with the sampler, steps, guidance and batch of its file. Then
its network is called as often and nothing else: what the orchestrator takes beyond that is its
overhead. The larger stages have the networks of `bench train`, in 8 steps without guidance. The
weights are those with which a training starts, as speed does not depend on values. The report also
has the seconds of the first batch, with its compilation, and the peak memory up to that stage.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from tools.bench import train
from tools.bench.options import add_count
from tools.bench.process import run_worker
from tools.bench.report import Answer, Rows, footer, gibibytes, markdown, millions, summarize

CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
DEMO = tuple(CONFIGS / f"{name}.yaml" for name in ("base64", "sr256", "sr1024"))
LARGER = {"base64": {"steps": 8, "batch_size": 8}, "sr256": {"steps": 8, "batch_size": 2}}
CASCADE = "sample_cascade"  # the row of one image through all stages
CAPTIONS = "a small red circle on white\na large blue square on grey\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_count(parser, "--rounds", 3, "processes")
    add_count(parser, "--batches", 3, "batches of each stage")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        larger = write_larger_stages(Path(folder))
        return measure(arguments.rounds, arguments.batches, single=larger)


def measure(
    rounds: int,
    batches: int,
    *,
    chain: Sequence[Path] = DEMO,
    single: Sequence[Path] = (),
) -> dict[str, Any]:
    """`rows`: by stage and implementation; `sample_cascade` is one image through the chain.

    Args:
        rounds: processes for the chain and for each single stage.
        batches: of each stage in a process.
        chain: configurations of a cascade's stages.
        single: configurations of stages that are measured by themselves.
    """
    from tqdm import tqdm

    chains = [tuple(chain)] * rounds + [(path,) for path in single] * rounds
    rows: Rows = {}

    with TemporaryDirectory() as folder:
        encoder = write_encoder(Path(folder), chain[0])

        for index, configs in enumerate(tqdm(chains, unit="process")):
            # A process each, as the peak memory is that of a process.
            answers = run_worker("sample", batches, encoder, *configs)
            for name, answer in answers.items():
                rows.setdefault(f"sample_{name}", []).append(answer)

            # The chain comes first; single stages are no cascade.
            if index < rounds:
                for side in ("ours", "network"):
                    stages = [answers[f"{path.stem}/{side}"] for path in chain]
                    rows.setdefault(f"{CASCADE}/{side}", []).append(through_all(stages))

    return {**summarize(rows, seconds_per_image, packages=["mindspore"]), "batches": batches}


def write_encoder(folder: Path, config: Path) -> Path:
    """A tiny T5 of the width that a stage's configuration wants."""
    from pipeline.config import read_yaml
    from tools import tiny_t5

    captions = folder / "captions.txt"
    captions.write_text(CAPTIONS)
    tiny_t5.make(folder / "t5", [captions], width=read_yaml(config)["text"]["width"])
    return folder / "t5"


def write_larger_stages(folder: Path) -> list[Path]:
    """Configurations of the demo's stages with the networks of `bench train`."""
    import yaml

    from pipeline.config import read_yaml

    paths = []
    for name, sampling in LARGER.items():
        unet = train.CASES[name]["unet"]
        config = {**read_yaml(CONFIGS / f"{name}.yaml"), "unet": unet, "sample": sampling}
        path = folder / f"{name}-{unet['channels']}.yaml"
        path.write_text(yaml.safe_dump(config))
        paths.append(path)
    return paths


def through_all(stages: Sequence[Answer]) -> Answer:
    """One image through all stages, from the answers of each."""
    seconds = [[taken / stage["batch"] for taken in stage["seconds"]] for stage in stages]
    return {
        # Batch i of every stage together, each per image.
        "seconds": [sum(batch) for batch in zip(*seconds, strict=True)],
        "batch": 1,
        **{name: sum(stage[name] for stage in stages) for name in ("first", "steps", "parameters")},
        # One process has run all stages, and its peak has risen from stage to stage.
        "peak": max(stage["peak"] for stage in stages),
    }


def seconds_per_image(rounds: Sequence[Answer]) -> float:
    """The median."""
    return median(seconds / answer["batch"] for answer in rounds for seconds in answer["seconds"])


def table(report: dict[str, Any]) -> str:
    """A row per stage."""
    headings = (
        "",
        "parameters",
        "steps",
        "batch",
        "images/s",
        "of them network",
        "overhead",
        "first",
        "peak",
    )
    rows = []
    for row, answers in report["rows"].items():
        name, _, side = row.rpartition("/")
        # The other side is in the ratio.
        if side != "ours":
            continue

        # Our time over that of the network's calls alone.
        ratio = report["ratios"][f"{name}/network"]
        rows.append(
            [
                name.removeprefix("sample_"),
                millions(answers[0]["parameters"], digits=2),
                str(answers[0]["steps"]),
                str(answers[0]["batch"]),
                f"{1 / seconds_per_image(answers):.2f}",
                f"{1 / ratio:.0%}",
                f"{ratio - 1:+.1%}",
                f"{median(answer['first'] for answer in answers):.0f} s",
                gibibytes(median(answer["peak"] for answer in answers)),
            ]
        )

    rounds = len(next(iter(report["rows"].values())))
    measured = f"Medians of {rounds} processes with {report['batches']} batches of each stage"
    return "\n".join([*markdown(headings, rows), "", footer(report, measured)])
