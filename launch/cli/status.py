"""`cascade status`: where runs are, read from their folders without MindSpore."""

import argparse
import json
from pathlib import Path

from launch.cli.options import Subparsers, add_json


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "status",
        help="where runs are: step, loss, speed, time left, checkpoint, restarts",
        description="Reports the state of runs from their folders, while they run or afterwards.",
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run folder")
    add_json(parser, "print one JSON object a line instead of text")


def run(arguments: argparse.Namespace) -> int:
    from launch.jobs.status import as_text, status

    reports = [status(run_dir) for run_dir in arguments.runs]
    if arguments.json:
        print("\n".join(json.dumps(report) for report in reports))
    else:
        print("\n\n".join(as_text(report) for report in reports))

    return 0
