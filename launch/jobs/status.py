"""What `cascade status` says of a run: everything that its folder tells, without MindSpore and
while it runs.

The locks tell whether the run is alive (its supervisor's between two attempts too), metrics.jsonl
how far and how fast it is, the checkpoints from where it would go on, the log folders how often it
was started, and its heartbeats what each rank does.
"""

import json
import re
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from launch.jobs.heartbeats import read_beat
from launch.jobs.nodes import attempts
from launch.jobs.plan import NODE_LOCK
from pipeline.config import read_yaml
from pipeline.errors import UserError
from pipeline.files import lock_holder
from pipeline.train import checkpoint

RECENT = 20  # reports of which the speed is the median
TAIL = 2**16  # bytes of metrics.jsonl that hold them


def status(run: Path) -> dict[str, Any]:
    """UserError if `run` is no run folder."""
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{run}: no config.yaml; give a run folder, the `run` of a stage's configuration"
        )
    config = read_yaml(run / "config.yaml")
    reports = tail(run / "metrics.jsonl")
    last = reports[-1] if reports else {}
    steps, total = last.get("step", 0), config["train"]["steps"]
    seconds = median(report["seconds"] for report in reports[-RECENT:]) if reports else None
    saved = checkpoint.steps(run / "checkpoints")
    folders = list(attempts(run).values())
    pid = lock_holder(run, NODE_LOCK.format(0)) or lock_holder(run)
    finished = (run / "stage" / "stage.json").exists() and steps >= total
    return {
        "run": str(run),
        "state": "running"
        if pid
        else "finished"
        if finished
        else "stopped"
        if saved or reports
        else "not begun",
        "pid": pid,
        "step": steps,
        "steps": total,
        "loss": last.get("loss"),
        "images_per_second": config["data"]["global_batch"] / seconds if seconds else None,
        "seconds_left": (total - steps) * seconds if seconds else None,
        "reported": age(run / "metrics.jsonl"),
        "checkpoint": saved[-1] if saved else None,
        "saved": age(run / "checkpoints" / f"step_{saved[-1]:07d}") if saved else None,
        "restarts": max(0, len(folders) - 1),
        "quarantined": sum(1 for _ in lines(run / "quarantine.jsonl")),
        "ranks": ranks(folders[-1]) if folders else [],
    }


def tail(path: Path) -> list[dict[str, Any]]:
    """The last whole reports."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        found = []
        for line in file.read().split(b"\n")[:-1]:
            try:
                found.append(json.loads(line))
            except ValueError:  # the first may have lost its beginning
                continue
    return found


def lines(path: Path) -> Iterator[str]:
    if path.exists():
        with path.open() as file:
            yield from file


def ranks(attempt: Path) -> list[dict[str, Any]]:
    """The last heartbeat of each rank, with its age in seconds."""
    names = (re.fullmatch(r"rank_(\d+)\.json", path.name) for path in attempt.iterdir())
    found = []
    for number in sorted(int(name[1]) for name in names if name):
        if beat := read_beat(attempt, number):
            said = {name: getattr(beat, name) for name in ("rank", "host", "phase", "step")}
            found.append(said | {"age": age(attempt / f"rank_{number}.json")})
    return found


def age(path: Path) -> float | None:
    """Seconds since `path` was written."""
    return max(0.0, time.time() - path.stat().st_mtime) if path.exists() else None


def as_text(found: dict[str, Any]) -> str:
    """A status for reading."""
    state = f"{found['state']} (pid {found['pid']})" if found["pid"] else found["state"]
    parts = [
        ("run", found["run"]),
        ("state", state),
        ("step", f"{found['step']:,} of {found['steps']:,}"),
    ]
    if found["loss"] is not None:
        parts.append(("loss", f"{found['loss']:.4g}, reported {ago(found['reported'])}"))
    if found["images_per_second"]:
        parts.append(
            (
                "speed",
                f"{found['images_per_second']:.1f} images/s, {duration(found['seconds_left'])} left",
            )
        )
    if found["checkpoint"] is not None:
        parts.append(("checkpoint", f"step {found['checkpoint']:,}, written {ago(found['saved'])}"))
    parts += [("restarts", found["restarts"]), ("quarantined", f"{found['quarantined']:,}")]
    near = enumerate(found["ranks"])  # neighbours on one host that do the same are one line
    for (host, phase, _), together in groupby(
        near, lambda e: (e[1]["host"], e[1]["phase"], e[1]["rank"] - e[0])
    ):
        beats = [beat for _, beat in together]
        numbers, steps = (
            span([beat["rank"] for beat in beats]),
            span([beat["step"] for beat in beats]),
        )
        oldest = max(beat["age"] for beat in beats)
        parts.append((f"rank {numbers}", f"{phase}, step {steps}, {host}, {ago(oldest)}"))
    return "\n".join(f"{name:<14}{value}" for name, value in parts)


def span(numbers: Sequence[int]) -> str:
    """The lowest and the highest."""
    return "-".join(map(str, sorted({min(numbers), max(numbers)})))


def duration(seconds: float) -> str:
    """The two largest units: 3 d 4 h, 12 min 5 s, 8 s."""
    left = round(seconds)
    words: list[str] = []
    for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        number, left = divmod(left, size)
        if number or (name == "s" and not words):
            words.append(f"{number} {name}")
    return " ".join(words[:2])


def ago(seconds: float) -> str:
    return f"{duration(seconds)} ago"
