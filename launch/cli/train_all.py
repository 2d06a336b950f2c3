"""`cascade train-all`: all stages of a cascade, each as a job of its own."""

import argparse

from launch.cli.options import Subparsers, add_overrides
from pipeline.terminal import positive


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "train-all",
        help="train all stages of a cascade, each as a job of its own",
        description="Runs `cascade train` for every stage of a cascade. A stage that fails does "
        "not stop the others; the same command again resumes what is not finished.",
    )
    parser.add_argument(
        "path", metavar="CASCADE", help="a cascade's YAML file, for example configs/cascade.yaml"
    )

    add_overrides(parser, "replaces a value of every stage's file")
    parser.add_argument(
        "--at-once",
        metavar="N",
        type=positive,
        default=1,
        help="jobs that run at the same time (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    from launch.jobs.train_all import plan_jobs, train_all

    return train_all(plan_jobs(arguments.path, arguments.overrides), arguments.at_once)
