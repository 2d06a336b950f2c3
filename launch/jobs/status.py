"""The report of `cascade status`: what a run's folder tells, without MindSpore and while it runs.

The locks tell whether the run is alive (the supervisor's also between two attempts), metrics.jsonl
how far and how fast it is, the checkpoints from where it would resume, the log folders how often it
was started, and the heartbeats what each rank does.
"""

import json
import re
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from launch.jobs.heartbeats import read_heartbeat
from launch.jobs.nodes import attempts
from launch.jobs.plan import NODE_LOCK
from pipeline.config import read_yaml
from pipeline.errors import UserError
from pipeline.files import lock_holder
from pipeline.train import checkpoint

RECENT = 20  # reports over whose median the speed is computed
TAIL_BYTES = 2**16  # of metrics.jsonl, more than these reports take


def status(run_dir: Path) -> dict[str, Any]:
    """The state of a run. UserError if `run_dir` is not a run folder."""
    if not (run_dir / "config.yaml").is_file():
        raise UserError(
            f"{run_dir}: no config.yaml; give a run folder, the `run` of a stage's configuration"
        )

    config = read_yaml(run_dir / "config.yaml")
    total_steps = config["train"]["steps"]
    rows = last_rows(run_dir / "metrics.jsonl")
    reports = [row for row in rows if "loss" in row]
    newest = reports[-1] if reports else {}
    step = newest.get("step", 0)
    # A median, as steps in which a checkpoint is written or images are sampled take longer.
    seconds = median(report["seconds"] for report in reports[-RECENT:]) if reports else None

    checkpoints = checkpoint.steps(run_dir / "checkpoints")
    checkpoint_age = None
    if checkpoints:
        checkpoint_age = age(run_dir / "checkpoints" / f"step_{checkpoints[-1]:07d}")

    attempt_folders = list(attempts(run_dir).values())
    # A job under a supervisor has this lock between two attempts too.
    pid = lock_holder(run_dir, NODE_LOCK.format(0)) or lock_holder(run_dir)
    if pid:
        state = "running"
    # The stage may be of an earlier end: a run goes on when train.steps is raised.
    elif (run_dir / "stage" / "stage.json").exists() and step >= total_steps:
        state = "finished"
    else:
        state = "stopped" if checkpoints or reports else "not begun"

    return {
        "run": str(run_dir),
        "state": state,
        "pid": pid,
        "step": step,
        "steps": total_steps,
        "loss": newest.get("loss"),
        "validation": validation_state(run_dir / "metrics.jsonl"),
        "images_per_second": config["data"]["global_batch"] / seconds if seconds else None,
        "seconds_left": (total_steps - step) * seconds if seconds else None,
        "reported": age(run_dir / "metrics.jsonl"),
        "checkpoint": checkpoints[-1] if checkpoints else None,
        "saved": checkpoint_age,
        # Those by the user too: each start under a supervisor opens an attempt.
        "restarts": max(0, len(attempt_folders) - 1),
        "quarantined": sum(1 for _ in lines(run_dir / "quarantine.jsonl")),
        "ranks": rank_states(attempt_folders[-1]) if attempt_folders else [],
    }


def last_rows(path: Path) -> list[dict[str, Any]]:
    """The last rows of metrics.jsonl; a line that is being written is left out."""
    if not path.exists():
        return []

    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        # What follows the last newline is empty, or a line that is being written.
        whole_lines = file.read().split(b"\n")[:-1]

    rows = []
    for line in whole_lines:
        try:
            rows.append(json.loads(line))
        except ValueError:  # the first one, cut by the seek
            continue
    return rows


def validation_state(path: Path) -> dict[str, Any] | None:
    """The newest validation and the one with the lowest loss of the EMA weights."""
    rows = []
    for line in lines(path):
        # Most lines are reports, which need not be parsed; the last one may be incomplete.
        if '"validation_loss": ' in line and line.endswith("\n"):
            rows.append(json.loads(line))
    if not rows:
        return None

    # A loss that is not finite is null.
    finite = [row for row in rows if row["validation_loss"] is not None]
    best = min(finite, key=lambda row: row["validation_loss"], default=rows[-1])
    return {
        "step": rows[-1]["step"],
        "loss": rows[-1]["validation_loss"],
        "best_step": best["step"],
        "best_loss": best["validation_loss"],
    }


def lines(path: Path) -> Iterator[str]:
    if path.exists():
        with path.open() as file:
            yield from file


def rank_states(attempt: Path) -> list[dict[str, Any]]:
    """The last heartbeat of each rank, and its age in seconds."""
    matches = [re.fullmatch(r"rank_(\d+)\.json", path.name) for path in attempt.iterdir()]
    states = []
    for rank in sorted(int(match[1]) for match in matches if match):
        if beat := read_heartbeat(attempt, rank):
            state = {name: getattr(beat, name) for name in ("rank", "host", "phase", "step")}
            states.append(state | {"age": age(attempt / f"rank_{rank}.json")})
    return states


def age(path: Path) -> float | None:
    """Seconds since `path` was written."""
    # A file server's clock may be ahead of this one.
    return max(0.0, time.time() - path.stat().st_mtime) if path.exists() else None


# For reading.


def as_text(report: dict[str, Any]) -> str:
    """A status for reading, one line a fact."""
    state = f"{report['state']} (pid {report['pid']})" if report["pid"] else report["state"]
    rows = [
        ("run", report["run"]),
        ("state", state),
        ("step", f"{report['step']:,} of {report['steps']:,}"),
    ]

    if report["loss"] is not None:
        rows.append(("loss", f"{report['loss']:.4g}, reported {ago(report['reported'])}"))
    if report["validation"] is not None:
        rows.append(("validation", validation_text(report["validation"])))
    if report["images_per_second"]:
        left = duration(report["seconds_left"])
        rows.append(("speed", f"{report['images_per_second']:.1f} images/s, {left} left"))
    if report["checkpoint"] is not None:
        saved = ago(report["saved"])
        rows.append(("checkpoint", f"step {report['checkpoint']:,}, written {saved}"))

    rows.append(("restarts", report["restarts"]))
    rows.append(("quarantined", f"{report['quarantined']:,}"))
    rows += rank_rows(report["ranks"])
    return "\n".join(f"{name:<14}{value}" for name, value in rows)


def validation_text(validation: dict[str, Any]) -> str:
    """The loss of the EMA weights, now and at its best."""
    text = f"loss {loss_text(validation['loss'])} at step {validation['step']:,}"
    if validation["best_step"] == validation["step"]:
        return f"{text}, the best"
    best = loss_text(validation["best_loss"])
    return f"{text}; the best {best} at step {validation['best_step']:,}"


def loss_text(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4g}"


def rank_rows(ranks: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Name and text of the ranks; consecutive ranks on a host in the same phase are one row."""

    def group(item: tuple[int, dict[str, Any]]) -> tuple[str, str, int]:
        place, state = item
        # Rank minus place is constant as long as the ranks are consecutive.
        return state["host"], state["phase"], state["rank"] - place

    rows = []
    for (host, phase, _), items in groupby(enumerate(ranks), group):
        states = [state for _, state in items]
        numbers = span([state["rank"] for state in states])
        steps = span([state["step"] for state in states])
        oldest = max(state["age"] for state in states)
        rows.append((f"rank {numbers}", f"{phase}, step {steps}, {host}, {ago(oldest)}"))
    return rows


def span(numbers: Sequence[int]) -> str:
    """The lowest and the highest number: 3-7, or 3 if they are equal."""
    return "-".join(map(str, sorted({min(numbers), max(numbers)})))


def duration(seconds: float) -> str:
    """In its two largest units: 3 d 4 h, 12 min 5 s, 8 s."""
    remaining = round(seconds)
    parts: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, remaining = divmod(remaining, size)
        # A duration of 0 is `0 s`, not an empty text.
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def ago(seconds: float) -> str:
    return f"{duration(seconds)} ago"
