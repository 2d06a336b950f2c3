"""Images per second of a job of two ranks, beside two independent processes: the cost of exchange.

Each rank and each process trains the demo's base on a core of its own, with the same batch and the
same compiled step; two processes at once stand for what the machine can do. The report also has how
long a checkpoint delays the training, and the time from the command to the end of the first step.
Start it where nothing else runs.
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
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from pipeline.config import read_yaml
from pipeline.errors import JobError, UserError
from tools.bench.options import add_count
from tools.bench.report import Rows, environment, footer, markdown, value_range

CONFIG = Path(__file__).parents[2] / "configs" / "tiny" / "base64.yaml"
BATCH_PER_RANK = 16
WARM_UP = 5  # steps that do not count
TIMEOUT = 1800.0  # seconds for one measurement
TAIL = 500  # characters of a log that an error shows
BASELINE = "two_processes"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The processes of one measurement."""

    name: str
    processes: int = 1  # independent runs of `cascade train`
    launcher: str = "none"
    ranks: int = 1  # of each process's job


class Figures(NamedTuple):
    """Results of a measurement."""

    images_per_second: float
    checkpoint: float  # seconds by which a checkpoint delays the training
    first_step: float  # seconds from the command to the end of the first step


def setups() -> list[Setup]:
    """mpirun only where it is installed."""
    launchers = ["msrun", *(["mpirun"] if which("mpirun") else [])]
    return [
        Setup(name="one_process"),
        Setup(name=BASELINE, processes=2),
        *(Setup(name=launcher, launcher=launcher, ranks=2) for launcher in launchers),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_count(parser, "--steps", 60, "steps of each run")
    add_count(parser, "--rounds", 2, "rounds of all setups")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    if len(os.sched_getaffinity(0)) < 2:
        raise UserError(
            "bench scaling: this process may use one core, and two ranks need one each; "
            "start it on two"
        )
    return measure(arguments.steps, arguments.rounds)


def measure(
    steps: int, rounds: int, config: Path = CONFIG, tried: Sequence[Setup] | None = None
) -> dict[str, Any]:
    """`rows`: figures by setup; `ratios`: the time of a launcher's ranks over that of two
    processes.
    """
    from tqdm import tqdm

    tried = tried or setups()
    rows: Rows = {f"scaling/{setup.name}": [] for setup in tried}

    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, config)

        with tqdm(total=rounds * len(tried), unit="job") as bar:
            for round_index in range(rounds):
                for setup in tried:
                    bar.set_description(setup.name)
                    runs = folder / f"{setup.name}-{round_index}"
                    figures = run_setup(setup, config, data=folder, runs=runs, steps=steps)
                    rows[f"scaling/{setup.name}"].append(figures._asdict())
                    bar.update()

    return {
        **environment("mindspore"),
        "rows": rows,
        "ratios": ratios(rows, tried),
        "batch": BATCH_PER_RANK,
        "steps": steps,
    }


def ratios(rows: Rows, tried: Sequence[Setup]) -> dict[str, float]:
    """Of the launchers."""
    speeds = {
        row: median(figures["images_per_second"] for figures in rounds)
        for row, rounds in rows.items()
    }
    return {
        # A ratio of times is the inverse of that of speeds.
        f"scaling_{setup.name}/{BASELINE}": speeds[f"scaling/{BASELINE}"]
        / speeds[f"scaling/{setup.name}"]
        for setup in tried
        if setup.ranks > 1
    }


# Data.


def prepare(folder: Path, config: Path) -> None:
    """Shards, a text encoder and stored embeddings, by the commands that the demo uses."""
    # Prepared before all runs, so that none of them waits for an index or an encoder.
    shards = folder / "shards"
    run_module(folder, "tools.shapes", shards, "--num", 256, "--size", 64, "--seed", 0)

    tars = sorted(shards.glob("*.tar"))
    width = read_yaml(config)["text"]["width"]
    run_module(folder, "tools.tiny_t5", folder / "t5", "--width", width, "--captions", *tars)
    run_module(folder, "launch", "cache-text", config, *data_overrides(folder, ranks=1))


def run_module(folder: Path, module: str, *arguments: object) -> None:
    argv = [sys.executable, "-m", module, *map(str, arguments)]

    path = folder / "prepare.log"
    with path.open("ab") as log:
        code = subprocess.run(argv, stdout=log, stderr=log, timeout=TIMEOUT, check=False).returncode

    if code:
        raise JobError(f"{' '.join(argv)} ended with {code}: {path.read_text()[-TAIL:]}")


def data_overrides(folder: Path, *, ranks: int) -> list[str]:
    """`key=value` words for a run on the data of `folder`."""
    return [
        f"data.shards={folder}/shards/*.tar",
        # The same work for each core, whatever the number of ranks.
        f"data.global_batch={BATCH_PER_RANK * ranks}",
        f"text.encoder={folder}/t5",
        "data.workers=1",
    ]


# Runs.


class Started(NamedTuple):
    """A process of `cascade train`."""

    process: subprocess.Popen[bytes]
    run_dir: Path
    time: float  # when it was started, in seconds since the epoch


def run_setup(setup: Setup, config: Path, *, data: Path, runs: Path, steps: int) -> Figures:
    """One measurement.

    Args:
        setup: what to start.
        config: the stage's configuration.
        data: the folder that `prepare` filled.
        runs: prefix of the run folders and logs.
        steps: of each run; a checkpoint is written after half of them.
    """
    half = steps // 2
    words = [
        *data_overrides(data, ranks=setup.ranks),
        f"train.steps={steps}",
        f"train.checkpoint_every={half}",
        "train.sample_every=0",
        # `read_metrics` needs the seconds of each step.
        "train.report_every=1",
        f"launch.launcher={setup.launcher}",
        f"launch.workers={setup.ranks}",
    ]

    # Each independent process has a core of its own, and the ranks of one job share the cores.
    cores = sorted(os.sched_getaffinity(0))[:2]
    started: list[Started] = []
    try:
        for index in range(setup.processes):
            process_cores = cores if setup.ranks > 1 else [cores[index]]
            run_dir = runs.with_name(f"{runs.name}-{index}")
            started.append(start_training(config, words, run_dir, process_cores))
        wait(setup, started)
    finally:
        for each in started:
            each.process.send_signal(signal.SIGTERM)  # a supervisor then ends its ranks
            each.process.wait()

    figures = [read_metrics(each.run_dir, half=half, started=each.time) for each in started]
    return Figures(
        images_per_second=sum(each.images_per_second for each in figures),
        checkpoint=median(each.checkpoint for each in figures),
        first_step=median(each.first_step for each in figures),
    )


def start_training(
    config: Path, words: Sequence[str], run_dir: Path, cores: Sequence[int]
) -> Started:
    """`cascade train` on these cores alone; its output goes to RUN.log."""
    argv = [sys.executable, "-m", "launch", "train", str(config), *words, f"run={run_dir}"]
    # A child inherits the cores that its parent may use when it is started.
    with restricted_to(cores), log_path(run_dir).open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log)
    return Started(process, run_dir, time.time())


def wait(setup: Setup, started: Sequence[Started]) -> None:
    """JobError if a process fails or takes too long."""
    logs = [log_path(each.run_dir) for each in started]
    try:
        for each in started:
            if each.process.wait(TIMEOUT):
                code = each.process.returncode
                raise JobError(f"{setup.name}: ended with {code}: {tail(logs)}")
    except subprocess.TimeoutExpired:
        raise JobError(
            f"{setup.name}: not done in {TIMEOUT:g} s; ask for fewer steps: {tail(logs)}"
        ) from None


def log_path(run_dir: Path) -> Path:
    return run_dir.with_suffix(".log")


def tail(logs: Sequence[Path]) -> str:
    return "".join(log.read_text(errors="replace")[-TAIL:] for log in logs)


@contextmanager
def restricted_to(cores: Sequence[int]) -> Iterator[None]:
    """Processes that are started inside may use these cores alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def read_metrics(run_dir: Path, *, half: int, started: float) -> Figures:
    """Figures from the metrics of a run.

    Args:
        run_dir: its folder.
        half: the step after which the checkpoint is written, in the background: the delay is that
            of the step after it, in which the writer shares the core.
        started: when the command was started, in seconds since the epoch.
    """
    path = run_dir / "metrics.jsonl"
    metrics = [json.loads(line) for line in path.read_text().splitlines()]
    seconds = {each["step"]: each["seconds"] for each in metrics}

    # The first steps are slow, and the step after the checkpoint is the one that is delayed.
    usual = median(taken for step, taken in seconds.items() if step > WARM_UP and step != half + 1)
    # The global batch, which the metrics do not name.
    batch = metrics[0]["images_per_second"] * metrics[0]["seconds"]
    after_first = sum(taken for step, taken in seconds.items() if step > 1)

    return Figures(
        images_per_second=batch / usual,
        checkpoint=seconds[half + 1] - usual,
        # The file was last written at the end of the last step.
        first_step=path.stat().st_mtime - after_first - started,
    )


def table(report: dict[str, Any]) -> str:
    """A row per setup; efficiency is against two processes at once."""
    headings = (
        "",
        "images/s",
        "lowest to highest",
        "of two processes",
        "delay by a checkpoint",
        "first step done after",
    )
    speeds = {
        row: [figures["images_per_second"] for figures in rounds]
        for row, rounds in report["rows"].items()
    }
    # What two cores do without any exchange.
    most = median(speeds[f"scaling/{BASELINE}"])

    rows = [
        [
            row,
            f"{median(speeds[row]):.1f}",
            value_range(speeds[row]),
            f"{median(speeds[row]) / most:.0%}",
            f"{1000 * median(figures['checkpoint'] for figures in rounds):.0f} ms",
            f"{median(figures['first_step'] for figures in rounds):.0f} s",
        ]
        for row, rounds in report["rows"].items()
    ]
    measured = (
        f"Medians of {len(speeds['scaling/msrun'])} rounds of {report['steps']} steps, "
        f"{report['batch']} images a core"
    )
    return "\n".join([*markdown(headings, rows), "", footer(report, measured)])
