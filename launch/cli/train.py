"""`cascade train`: one stage, in this process or under a supervisor; the same command resumes."""

import argparse
import sys
from pathlib import Path

from launch.cli.options import Subparsers, add_overrides
from pipeline.errors import UserError


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "train",
        help="train one stage; the same command again resumes",
        description="Trains one stage. Launcher, workers and nodes are keys of the configuration "
        "(launch.*). The same command again resumes from the newest checkpoint.",
    )
    parser.add_argument("path", metavar="CONFIG", help="a stage's YAML file, see configs/")
    add_overrides(parser, "replaces a value of the file, for example train.steps=1000")


def run(arguments: argparse.Namespace) -> int:
    from launch.jobs.plan import (
        NODE_LOCK,
        node_processes,
        rank_program,
        read_launch,
        remote_processes,
    )
    from pipeline.files import lock_holder
    from pipeline.stage.registry import read_stage_config
    from pipeline.train.resume import finished

    config, raw_launch = read_stage_config(arguments.path, arguments.overrides)
    launch = read_launch(raw_launch)

    # Before a rank is started or a network of billions of parameters is built in vain.
    if finished(config):
        print(f"{config.run}: done before, the stage is in {config.run}/stage", file=sys.stderr)
        return 0

    # Without a launcher and restarts the training runs in this process, where it can be debugged.
    if launch.launcher == "none" and not launch.restarts:
        from launch.jobs.worker import train

        # A supervised job keeps its node's lock between attempts, when no rank has the run's own.
        if pid := lock_holder(Path(config.run), NODE_LOCK.format(0)):
            raise UserError(
                f"{config.run}: in use by another job (pid {pid}); stop it or choose another folder"
            )
        return train(arguments.path, arguments.overrides)

    from launch.jobs.supervisor import supervise

    program = rank_program(arguments.path, arguments.overrides)
    return supervise(
        launch,
        Path(config.run),
        plan=lambda attempt, port: node_processes(launch, program, attempt=attempt, port=port),
        remotes=remote_processes(launch, arguments.path, arguments.overrides),
    )
