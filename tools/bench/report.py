"""Reports of all benches: rows of answers, ratios, versions and the machine; and Markdown tables.

A row is named CASE/IMPLEMENTATION, such as `train_base64/twin`, and holds one answer per round.
"""

import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import distributions, version
from pathlib import Path
from statistics import median
from typing import Any

Answer = dict[str, Any]  # the JSON object of a worker
Rows = dict[str, list[Answer]]
Seconds = Callable[[Sequence[Answer]], float]  # the seconds of a row that are compared


def summarize(
    rows: Rows,
    seconds: Seconds,
    *,
    packages: Sequence[str] = (),
    failed: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The report of a bench.

    Args:
        rows: all answers.
        seconds: of a row, for the ratios.
        packages: whose versions are reported, beside those that the answers name.
        failed: the rows that did not run, with the reasons; they are left out of `rows`.
    """
    failed = dict(failed or {})
    measured = {name: answers for name, answers in rows.items() if name not in failed}

    report = environment(*packages)

    for answers in measured.values():
        # Those of a peer are known in its own environment only.
        report["versions"].update(answers[0].get("versions", {}))

    return {
        **report,
        "rows": measured,
        "ratios": ratios(measured, seconds),
        "failed": failed,
    }


def ratios(rows: Rows, seconds: Seconds) -> dict[str, float]:
    """Our time over that of each peer, by the peer's row: 2 where ours takes twice as long."""
    peers = [name for name in rows if not name.endswith("/ours")]
    return {
        name: seconds(rows[f"{name.rpartition('/')[0]}/ours"]) / seconds(rows[name])
        for name in peers
    }


def environment(*packages: str) -> dict[str, Any]:
    """The machine, and the versions of those packages that are installed."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    # On ARM /proc/cpuinfo has no such line.
    name = models[0] if models else platform.machine()

    # Of a package that is not installed there is no version to ask for.
    installed = {distribution.name.lower() for distribution in distributions()}
    return {
        "machine": f"{name}, {len(os.sched_getaffinity(0))} threads",
        "versions": {package: version(package) for package in packages if package in installed},
    }


# Markdown.


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [
        f"| {' | '.join(headings)} |",
        "|---" * len(headings) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def failed_rows(report: Mapping[str, Any], num_columns: int) -> list[list[str]]:
    """Rows of a table for the implementations that did not run, with the reasons."""
    return [
        [name, f"did not run: {reason}", *[""] * (num_columns - 2)]
        for name, reason in report["failed"].items()
    ]


def speed_rows(speeds: Mapping[str, Sequence[float]], ours: str) -> list[list[str]]:
    """Rows of a table: name, median, range, and how many times faster `ours` is."""
    our_speed = median(speeds[ours])
    return [
        [
            name,
            f"{median(rounds):.1f}",
            value_range(rounds),
            f"{our_speed / median(rounds):.2f} x",
        ]
        for name, rounds in speeds.items()
    ]


def value_range(values: Sequence[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}"


def gibibytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def millions(num: float, digits: int = 1) -> str:
    return f"{num / 1e6:.{digits}f}M"


def footer(report: Mapping[str, Any], measured: str) -> str:
    """The line below a table: measurement, versions, machine."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return f"{measured}; {versions}; {report['machine']}."
