"""Images a second of a job of two ranks, beside two processes that know nothing of each other: what
the exchange costs.

Each rank and each process trains the demo's base on a core of its own, with the same batch and the
same compiled step; two processes that run at once stand for what the machine can do. Also told: how
long a checkpoint stops the training, and how long it is from the command to the end of the first
step. Start it where nothing else runs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import which
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.config import read_yaml
from pipeline.errors import JobError, UserError
from pipeline.terminal import positive
from tools.bench import turns

CONFIG = Path(__file__).parent.parent.parent / "configs" / "tiny" / "base64.yaml"
BATCH = 16  # of a rank
WARM = 5  # steps that do not count
LIMIT = 1800.0  # seconds for one measurement


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=positive, default=60, metavar="N", help="of each run (%(default)s)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=2, metavar="N", help="of all sides (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if len(os.sched_getaffinity(0)) < 2:
        raise UserError(
            "bench scaling: this process may use one core, and two ranks want one each; start it on two"
        )
    return measure(arguments.steps, arguments.rounds)


def measure(steps: int, rounds: int, config: Path = CONFIG) -> dict[str, Any]:
    """`rows`: figures by side and round; `ratios`: the time of a launcher's ranks over that of two
    processes.
    """
    from tqdm import tqdm

    launchers = ["msrun", *(["mpirun"] if which("mpirun") else [])]
    rows: turns.Rows = {
        f"scaling/{side}": [] for side in ("one_process", "two_processes", *launchers)
    }
    with TemporaryDirectory() as folder, tqdm(total=rounds * len(rows), unit="job") as bar:
        prepare(Path(folder), config)
        for number in range(rounds):
            for row, found in rows.items():
                bar.set_description(row)
                found.append(job(Path(folder), config, row.partition("/")[2], number, steps))
                bar.update()
    speeds = {
        side: median(each["images_per_second"] for each in found) for side, found in rows.items()
    }
    most = speeds["scaling/two_processes"]
    ratios = {
        f"scaling_{launcher}/two_processes": most / speeds[f"scaling/{launcher}"]
        for launcher in launchers
    }
    return {
        **turns.about("mindspore"),
        "rows": rows,
        "ratios": ratios,
        "batch": BATCH,
        "steps": steps,
    }


def prepare(folder: Path, config: Path) -> None:
    """Shards, a text encoder and stored embeddings, by the tools that the demo uses."""
    tool(folder, "tools.shapes", folder / "shards", "--num", 256, "--size", 64, "--seed", 0)
    captions, width = sorted((folder / "shards").glob("*.tar")), read_yaml(config)["text"]["width"]
    tool(folder, "tools.tiny_t5", folder / "t5", "--width", width, "--captions", *captions)
    tool(folder, "launch", "cache-text", config, *common(folder, 1))


def tool(folder: Path, module: str, *arguments: object) -> None:
    argv = [sys.executable, "-m", module, *map(str, arguments)]
    with (folder / "prepare.log").open("ab") as log:
        code = subprocess.run(argv, stdout=log, stderr=log, timeout=LIMIT, check=False).returncode
    if code:
        raise JobError(
            f"{' '.join(argv)} ended with {code}: {(folder / 'prepare.log').read_text()[-500:]}"
        )


def common(folder: Path, ranks: int) -> list[str]:
    """Overrides of every run."""
    return [
        f"data.shards={folder}/shards/*.tar",
        f"data.global_batch={BATCH * ranks}",
        f"text.encoder={folder}/t5",
        "data.workers=1",
    ]


def job(folder: Path, config: Path, side: str, number: int, steps: int) -> dict[str, float]:
    """One measurement: images a second of all that runs, seconds that a checkpoint costs, seconds
    to the first step.
    """
    ranks = 1 if "process" in side else 2
    half = steps // 2
    more = [
        f"train.steps={steps}",
        f"train.checkpoint_every={half}",
        "train.sample_every=0",
        "train.report_every=1",
    ]
    if ranks == 2:
        more += [f"launch.launcher={side}", "launch.workers=2"]
    cores = sorted(os.sched_getaffinity(0))[:2]
    runs, started = [], []
    try:
        for core in cores if side == "two_processes" else cores[:1]:
            runs.append(folder / f"{side}-{number}-{core}")
            words = [*common(folder, ranks), *more, f"run={runs[-1]}"]
            with (
                confined([core] if ranks == 1 else cores),
                runs[-1].with_suffix(".log").open("wb") as log,
            ):
                argv = [sys.executable, "-m", "launch", "train", str(config), *words]
                started.append((subprocess.Popen(argv, stdout=log, stderr=log), time.time()))
        for process, _ in started:
            if process.wait(LIMIT):
                raise JobError(f"{side}: ended with {process.returncode}: {log_of(runs)}")
    except subprocess.TimeoutExpired:
        raise JobError(
            f"{side}: not done in {LIMIT:g} s; ask for fewer steps: {log_of(runs)}"
        ) from None
    finally:
        for process, _ in started:
            process.send_signal(signal.SIGTERM)  # a supervisor ends its ranks
            process.wait()
    figures = [read(run, half, begun) for run, (_, begun) in zip(runs, started, strict=True)]
    return {
        "images_per_second": sum(figure["images_per_second"] for figure in figures),
        **{
            name: median(figure[name] for figure in figures)
            for name in ("checkpoint", "first_step")
        },
    }


def log_of(runs: Sequence[Path]) -> str:
    return "".join(run.with_suffix(".log").read_text(errors="replace")[-500:] for run in runs)


@contextmanager
def confined(cores: Sequence[int]) -> Iterator[None]:
    """What is started inside may use these cores alone."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


def read(run: Path, half: int, begun: float) -> dict[str, float]:
    """What a run's own reports say of it."""
    reports = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = {report["step"]: report["seconds"] for report in reports}
    usual = median(taken for step, taken in seconds.items() if step > WARM and step != half + 1)
    batch = reports[0]["images_per_second"] * reports[0]["seconds"]
    after_first = sum(taken for step, taken in seconds.items() if step > 1)
    end = (run / "metrics.jsonl").stat().st_mtime
    return {
        "images_per_second": batch / usual,
        "checkpoint": seconds[half + 1] - usual,
        "first_step": end - after_first - begun,
    }


def table(report: dict[str, Any]) -> str:
    """The medians as Markdown; efficiency is against two processes at once."""
    found = {
        side: {name: [figures[name] for figures in rounds] for name in rounds[0]}
        for side, rounds in report["rows"].items()
    }
    most = median(found["scaling/two_processes"]["images_per_second"])
    lines = [
        "| | images/s | lowest to highest | of two processes | a checkpoint stops training | first step done after |",
        "|---|---|---|---|---|---|",
    ]
    for side, figures in found.items():
        speed = median(figures["images_per_second"])
        lines.append(
            f"| {side} | {speed:.1f} | {turns.spread(figures['images_per_second'])} | {speed / most:.0%} | "
            f"{1000 * median(figures['checkpoint']):.0f} ms | {median(figures['first_step']):.0f} s |"
        )
    rounds = len(report["rows"]["scaling/msrun"])
    measured = (
        f"Medians of {rounds} rounds of {report['steps']} steps, {report['batch']} images a core"
    )
    return "\n".join([*lines, "", turns.footer(report, measured)])
