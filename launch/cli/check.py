"""`cascade check`: what a configuration or a cascade amounts to, before anything runs."""

import argparse
import json
import shlex
from typing import Any

from launch.cli.options import Subparsers, add_json, add_overrides
from pipeline.terminal import positive_number

GIB = 2**30


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "check",
        help="what a configuration or a cascade amounts to, before anything runs",
        description="Prints the resolved configuration, the number of parameters, the memory and "
        "the data of a stage, and the commands that a training starts; or the manifests of a "
        "cascade folder, or the reports on all stages of a cascade's file.",
    )
    parser.add_argument(
        "path", metavar="CONFIG|CASCADE", help="a YAML file, see configs/, or a cascade folder"
    )
    add_overrides(parser, "replaces a value of the file, for example data.global_batch=8")
    parser.add_argument(
        "--memory",
        metavar="GIB",
        type=positive_number,
        help="memory of a device: says whether a training fits, else what to change "
        "(default: not checked)",
    )
    add_json(parser, "print one JSON object instead of text")


def run(arguments: argparse.Namespace) -> int:
    from launch.cli.check_report import check

    report = check(arguments.path, arguments.overrides, arguments.memory)
    print(json.dumps(report) if arguments.json else as_text(report))
    return 0


def as_text(report: dict[str, Any]) -> str:
    """A report of `check_report.check` for reading."""
    from pipeline.config import dump

    if "parameters" not in report:  # of a cascade
        parts = []
        for name, stage in report["stages"].items():
            # The stages of a cascade's file have reports, those of a cascade folder manifests.
            text = as_text(stage) if "parameters" in stage else dump(stage).rstrip()
            parts.append(f"== {name}\n{text}")
        return "\n".join(parts)

    memory = ", ".join(f"{name} {size / GIB:.2f}" for name, size in report["memory"].items())
    data = ", ".join(f"{name} {value or 'none'}" for name, value in report["data"].items())
    lines = [
        dump(report["config"]).rstrip(),
        f"parameters  {report['parameters']:,}",
        f"memory      GiB per process: {memory}",
    ]
    if "fit" in report:
        lines += [f"fits        {line}" for line in fit_as_lines(report["fit"])]
    lines += [
        f"data        {data}",
        f"runs        {' '.join(report['argv'])}",
    ]

    # Only a job with a launcher has nodes.
    for node, processes in enumerate(report.get("nodes", ())):
        for process in processes:
            variables = " ".join(
                f"{name}={value}" for name, value in process["environment"].items()
            )
            lines.append(f"node {node:<6} {variables} {shlex.join(process['argv'])}")

    return "\n".join(lines)


def fit_as_lines(fit: dict[str, Any]) -> list[str]:
    """A report of `check_report.fit` for reading."""
    device = fit["device"]
    if fit["fits"]:
        return [f"yes, {device / GIB:.2f} GiB are enough"]

    ending = "; with" if fit["instead"] else ", and no change of a setting helps"
    lines = [f"no, {device / GIB:.2f} GiB are not enough{ending}"]
    for proposal in fit["instead"]:
        # As on the command line; ranks are no key but launch.workers times launch.nodes.
        settings = " ".join(
            f"{value} ranks" if key == "ranks" else f"{key}={str(value).lower()}"
            for key, value in proposal["set"].items()
        )
        enough = "enough" if proposal["total"] <= device else "not enough"
        lines.append(f"{settings}: {proposal['total'] / GIB:.2f} GiB, {enough}")

    return lines
