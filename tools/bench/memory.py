"""Peak memory of a training against the prediction of `cascade check`, and seconds per step.

Each row is a stage trained as `cascade train` does it, on scenes that are drawn for it: once to
fill the compile cache, and again in a process that loads from it, which is the one that is
measured. Nothing is sampled meanwhile.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tools.bench.options import add_count
from tools.bench.process import run_worker
from tools.bench.report import Answer, Rows, environment, footer, gibibytes, markdown, millions
from tools.bench.train import CASES

CONFIGS = Path(__file__).parents[2] / "configs" / "tiny"
TEXT: dict[str, Any] = {"width": 64, "length": 16}  # as in the demo


@dataclass(frozen=True, kw_only=True)
class Training:
    """A row of the table."""

    network: str  # of `bench train`, as `base64`, or a stage of the demo, as `tiny/base64`
    changes: Mapping[str, Any] = field(default_factory=dict)


ADAFACTOR = {"optimizer.kind": "adafactor"}
FLOAT16 = {"train.precision": "float16"}
RECOMPUTE = {"unet.recompute": True}
TRAININGS: dict[str, Training] = {
    "base64": Training(network="base64"),
    "base64, batch 4": Training(network="base64", changes={"data.global_batch": 4}),
    "base64, grad_accum_steps 4": Training(network="base64", changes={"train.grad_accum_steps": 4}),
    "base64, recompute": Training(network="base64", changes=RECOMPUTE),
    "base64, grad_accum_steps 8 and recompute": Training(
        network="base64", changes={"train.grad_accum_steps": 8, **RECOMPUTE}
    ),
    "base64, float16": Training(network="base64", changes=FLOAT16),
    "base64, Adafactor": Training(network="base64", changes=ADAFACTOR),
    "base64, batch 1, Adafactor": Training(
        network="base64", changes={**ADAFACTOR, "data.global_batch": 1}
    ),
    "sr256": Training(network="sr256"),
    "sr256, float16": Training(network="sr256", changes=FLOAT16),
    "sr256, recompute": Training(network="sr256", changes=RECOMPUTE),
    "the demo's base": Training(network="tiny/base64"),
    "the demo's sr256": Training(network="tiny/sr256"),
    "the demo's sr1024": Training(network="tiny/sr1024"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_count(parser, "--steps", 5, "steps of each process")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=TRAININGS,
        default=list(TRAININGS),
        metavar="ROW",
        help="only these rows of the table (default: all)",
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    return measure(arguments.steps, {name: TRAININGS[name] for name in arguments.rows})


def measure(steps: int, trainings: Mapping[str, Training] = TRAININGS) -> dict[str, Any]:
    """`rows`: the measured process of each training, under memory/NAME."""
    from tqdm import tqdm

    rows: Rows = {}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_data(folder)

        for name, training in (bar := tqdm(trainings.items(), unit="training")):
            bar.set_description(name)
            rows[f"memory/{name}"] = [measure_training(folder, training, steps)]

    return {**environment("mindspore"), "rows": rows, "steps": steps}


def measure_training(folder: Path, training: Training, steps: int) -> Answer:
    """The second of two runs in one run folder, of which the first leaves its compile cache."""
    config = folder / "stage.yaml"
    config.write_text(json.dumps(stage_config(training.network)))  # JSON is YAML
    run_dir = folder / "run"
    words = overrides(folder, run_dir, steps=steps, changes=training.changes)

    # The compile cache stays; the rest of the first run would be resumed from.
    run_worker("memory", config, *words)
    for path in (run_dir / "checkpoints", run_dir / "stage"):
        shutil.rmtree(path)
    (run_dir / "metrics.jsonl").unlink()

    answer = run_worker("memory", config, *words)
    shutil.rmtree(run_dir)
    return answer


def stage_config(network: str) -> dict[str, Any]:
    """The configuration of a stage around a network of `bench train`, or of the demo's stage."""
    from pipeline.config import read_yaml

    if network.startswith("tiny/"):
        return read_yaml(CONFIGS / f"{network.removeprefix('tiny/')}.yaml")

    case = CASES[network]
    base: dict[str, Any] = {"kind": "base"}
    # Four times in each stage, as 64 to 256 to 1024.
    super_resolution = {"kind": "super_resolution", "low_res": {"size": case["size"] // 4}}
    return {
        **(base if case["num_levels"] == 1 else super_resolution),
        # What is empty here `overrides` fills in.
        "run": "",
        "size": case["size"],
        "text": {"encoder": "", **TEXT},
        "unet": case["unet"],
        "data": {"shards": "", "global_batch": case["batch"]},
        "train": {},
    }


def overrides(folder: Path, run_dir: Path, *, steps: int, changes: Mapping[str, Any]) -> list[str]:
    """`key=value` words of a training on the data of `folder`."""
    settings = {
        "run": run_dir,
        "data.shards": folder / "shards" / "*.tar",
        "text.encoder": folder / "t5",
        "train.steps": steps,
        # Within the steps that are measured, as a checkpoint copies all weights.
        "train.checkpoint_every": 3,
        "train.report_every": 1,
        "train.sample_every": 0,
        **changes,
    }
    return [
        f"{key}={json.dumps(value) if isinstance(value, bool) else value}"
        for key, value in settings.items()
    ]


def write_data(folder: Path) -> None:
    """Scenes, and the embeddings of their captions, so that no encoder is part of a training."""
    from pipeline.data.config import DataConfig
    from pipeline.data.shards import Shards
    from pipeline.text.caption_embeddings import load_encoder, recipe
    from pipeline.text.encoder import TextConfig
    from pipeline.text.store import TextStore
    from tools import shapes, tiny_t5

    # Once, at the largest size: the loader reduces them for the other stages.
    shapes.write(folder / "shards", num=32, size=1024, seed=0, shard_size=32, workers=1)
    tars = sorted((folder / "shards").glob("*.tar"))
    tiny_t5.make(folder / "t5", tars, width=TEXT["width"], layers=1, heads=2, vocab=64, seed=0)

    text = TextConfig(encoder=str(folder / "t5"), **TEXT)
    shards = Shards.open(DataConfig(shards=f"{folder}/shards/*.tar"), progress=False)
    TextStore(shards, recipe(text)).build(partial(load_encoder, text), progress=False)


def table(report: dict[str, Any]) -> str:
    """Predicted and measured peaks, and seconds."""
    headings = ("", "parameters", "predicted", "measured", "predicted / measured", "s per step")
    rows = [
        [
            row.removeprefix("memory/"),
            millions(answer["parameters"]),
            gibibytes(answer["predicted"]),
            gibibytes(answer["peak"]),
            f"{answer['predicted'] / answer['peak']:.2f}",
            f"{answer['seconds']:.2f}",
        ]
        for row, (answer,) in report["rows"].items()
    ]
    measured = (
        "Peaks of processes that load their graphs, "
        f"medians of the steps after the second of {report['steps']}"
    )
    return "\n".join([*markdown(headings, rows), "", footer(report, measured)])
