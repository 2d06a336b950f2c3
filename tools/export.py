"""Puts the trained stages of a cascade and their text encoder into one folder, for sampling
anywhere.
"""

from collections.abc import Sequence
from pathlib import Path

from pipeline.terminal import Parser, run


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m tools.export", description=__doc__)
    parser.add_argument("config", help="a cascade's YAML file, as configs/cascade.yaml")
    arguments = parser.parse_args(argv)

    from pipeline.config import build, read_yaml
    from pipeline.generate.cascade_folder import CascadeConfig, export
    from pipeline.stage.registry import read_stage_config

    config = build(CascadeConfig, read_yaml(arguments.config))
    stages = {entry.name: read_stage_config(entry.config)[0] for entry in config.stages}
    runs = {name: Path(stage.run) / "stage" for name, stage in stages.items()}
    encoders = [stage.text.encoder for stage in stages.values() if stage.text]
    export(runs, Path(encoders[0]) if encoders else None, Path(config.folder))
    print(f"{config.folder}: {' -> '.join(runs)}")


if __name__ == "__main__":
    run(main)
