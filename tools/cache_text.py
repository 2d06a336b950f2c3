"""Encodes the captions of a stage's shards ahead of training; the same command again goes on where it stopped."""

from collections.abc import Sequence

from launch.terminal import Parser, run


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m tools.cache_text", description=__doc__)
    parser.add_argument("config", help="a stage's YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="instead of the file's")
    arguments = parser.parse_args(argv)

    from pipeline.data.loader import open_text
    from pipeline.data.shards import Shards
    from pipeline.kinds import read_stage_config
    from pipeline.log import setup_logging

    setup_logging()
    config, _ = read_stage_config(arguments.config, arguments.overrides)
    shards = Shards.open(config.data.patterns)
    store = open_text(config.text, shards)
    print(f"{len(shards)} captions in {len(shards.shards)} shards, text encoder {store.fingerprint[:12]}")


if __name__ == "__main__":
    run(main)
