"""`cascade export`: the trained stages of a cascade and their text encoder in one folder."""

import argparse
from pathlib import Path

from launch.cli.options import Subparsers


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "export",
        help="put trained stages and their text encoder into one cascade folder",
        description="Copies the stages that the runs of a cascade left, and their text encoder, "
        "into the cascade folder `folder` of the file, which can be moved to another machine. It "
        "replaces nothing but a cascade folder.",
    )
    parser.add_argument(
        "config",
        metavar="CASCADE_CONFIG",
        help="a cascade's YAML file, for example configs/cascade.yaml",
    )


def run(arguments: argparse.Namespace) -> int:
    from pipeline.config import build, read_yaml
    from pipeline.generate.cascade_folder import CascadeConfig, export
    from pipeline.stage.registry import read_stage_config

    config = build(CascadeConfig, read_yaml(arguments.config))
    stages = {entry.name: read_stage_config(entry.config)[0] for entry in config.stages}
    stage_folders = {name: Path(stage.run) / "stage" for name, stage in stages.items()}

    # All stages with text have the same encoder, which `export` checks by its fingerprint.
    encoders = [Path(stage.text.encoder) for stage in stages.values() if stage.text]
    export(stage_folders, encoders[0] if encoders else None, Path(config.folder))

    print(f"{config.folder}: {' -> '.join(stage_folders)}")
    return 0
