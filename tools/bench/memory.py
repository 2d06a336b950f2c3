"""Peak memory of a training against its prediction by `cascade check` and against its time, by what
saves memory.

Each row is a stage trained as `cascade train` does it, on scenes that are drawn for it: once, so
that its graphs are compiled and kept, and again in a process of its own, which is the one that is
told. No pictures are sampled meanwhile.
"""

import argparse
import json
import shutil
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.terminal import positive
from tools.bench import turns
from tools.bench.train import CASES

FOLDER = Path(__file__).parent.parent.parent / "configs" / "tiny"
TEXT: dict[str, Any] = {"width": 64, "length": 16}  # as in the demo
# By name: a network of `bench train` or a stage of the demo, and what is changed.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "base64": ("base64", {}),
    "base64, batch 4": ("base64", {"data.global_batch": 4}),
    "base64, grad_accum_steps 4": ("base64", {"train.grad_accum_steps": 4}),
    "base64, recompute": ("base64", {"unet.recompute": True}),
    "base64, grad_accum_steps 8 and recompute": (
        "base64",
        {"train.grad_accum_steps": 8, "unet.recompute": True},
    ),
    "base64, float16": ("base64", {"train.precision": "float16"}),
    "base64, Adafactor": ("base64", {"optimizer.kind": "adafactor"}),
    "base64, batch 1, Adafactor": (
        "base64",
        {"optimizer.kind": "adafactor", "data.global_batch": 1},
    ),
    "sr256": ("sr256", {}),
    "sr256, float16": ("sr256", {"train.precision": "float16"}),
    "sr256, recompute": ("sr256", {"unet.recompute": True}),
    "the demo's base": ("tiny/base64", {}),
    "the demo's sr256": ("tiny/sr256", {}),
    "the demo's sr1024": ("tiny/sr1024", {}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=positive, default=5, metavar="N", help="of each process (%(default)s)"
    )
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="these alone"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    return measure(arguments.steps, {name: ROWS[name] for name in arguments.rows})


def measure(steps: int, rows: dict[str, tuple[str, dict[str, Any]]] = ROWS) -> dict[str, Any]:
    """`rows`: what each training took, under memory/NAME."""
    from tqdm import tqdm

    found: turns.Rows = {}
    with TemporaryDirectory() as name, tqdm(total=2 * len(rows), unit="process") as bar:
        folder = Path(name)
        write_data(folder)
        for row, (case, changes) in rows.items():
            bar.set_description(row)
            config, overrides = folder / "stage.yaml", as_overrides(folder, steps, changes)
            config.write_text(json.dumps(stage(case)))  # which is YAML too
            for _ in range(2):
                for kept in ("checkpoints", "stage", "metrics.jsonl"):
                    path = folder / "run" / kept
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                answer = turns.ours("tools.bench.memory_side", config, *overrides)
                bar.update()
            found[f"memory/{row}"] = [answer]
            shutil.rmtree(folder / "run")
    return {**turns.about("mindspore"), "rows": found, "steps": steps}


def stage(case: str) -> dict[str, Any]:
    """A stage's configuration around a network of `bench train`, or one of the demo's."""
    from pipeline.config import read_yaml

    if case.startswith("tiny/"):
        return read_yaml(FOLDER / f"{case.removeprefix('tiny/')}.yaml")
    known = CASES[case]
    low = {"kind": "super_resolution", "low_res": {"size": known["size"] // 4}}
    return {
        **({"kind": "base"} if known["num_levels"] == 1 else low),
        "run": "",
        "size": known["size"],
        "text": {"encoder": "", **TEXT},
        "unet": known["unet"],
        "data": {"shards": "", "global_batch": known["batch"]},
        "train": {},
    }


def as_overrides(folder: Path, steps: int, changes: dict[str, Any]) -> list[str]:
    every = {
        "run": folder / "run",
        "data.shards": folder / "shards" / "*.tar",
        "text.encoder": folder / "t5",
        "train.steps": steps,
        "train.checkpoint_every": 3,
        "train.report_every": 1,
        "train.sample_every": 0,
    }
    return [
        f"{key}={json.dumps(value) if isinstance(value, bool) else value}"
        for key, value in {**every, **changes}.items()
    ]


def write_data(folder: Path) -> None:
    """Scenes, and their captions' embeddings, so that no encoder is part of a training."""
    from pipeline.data.shards import DataConfig, Shards
    from pipeline.text.caption_embeddings import load_encoder, recipe
    from pipeline.text.encoder import TextConfig
    from pipeline.text.store import TextStore
    from tools import shapes, tiny_t5

    shapes.write(folder / "shards", num=32, size=1024, seed=0, shard_size=32, workers=1)
    tars = sorted((folder / "shards").glob("*.tar"))
    tiny_t5.make(folder / "t5", tars, width=TEXT["width"], layers=1, heads=2, vocab=64, seed=0)
    text = TextConfig(encoder=str(folder / "t5"), **TEXT)
    shards = Shards.open(DataConfig(shards=f"{folder}/shards/*.tar"), progress=False)
    TextStore(shards, recipe(text)).build(partial(load_encoder, text), progress=False)


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "| | parameters | predicted | measured | predicted / measured | s a step |",
        "|---" * 6 + "|",
    ]
    for row, (answer,) in report["rows"].items():
        predicted, peak = answer["predicted"], answer["peak"]
        cells = (
            *(row.removeprefix("memory/"), f"{answer['parameters'] / 1e6:.1f}M"),
            *(f"{predicted / 2**30:.2f} GiB", f"{peak / 2**30:.2f} GiB"),
            *(f"{predicted / peak:.2f}", f"{answer['seconds']:.2f}"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    measured = f"Peaks of processes that load their graphs, medians of the steps after the second of {report['steps']}"
    return "\n".join([*lines, "", turns.footer(report, measured)])
