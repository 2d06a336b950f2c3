"""Encodes the captions of a stage's shards ahead of training.

The same command again goes on where it stopped. Run it any number of times at once, on any machines
that see the same folders, by a launcher or by hand: each shard is encoded by one of them.
"""

from collections.abc import Sequence
from functools import partial

from pipeline.terminal import Parser, run


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m tools.cache_text", description=__doc__)
    parser.add_argument("config", help="a stage's YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="instead of the file's"
    )
    arguments = parser.parse_args(argv)

    from pipeline.data.shards import Shards
    from pipeline.errors import JobError, UserError
    from pipeline.log import setup_logging
    from pipeline.stage.registry import read_stage_config
    from pipeline.text.caption_embeddings import load_encoder, recipe
    from pipeline.text.store import TextStore

    setup_logging()
    config, _ = read_stage_config(arguments.config, arguments.overrides)
    if not config.text:
        raise UserError(
            f"{arguments.config}: condition is {config.conditioning}, so that no caption is read"
        )
    shards = Shards.open(config.data)
    store = TextStore(shards, recipe(config.text))
    written = store.build(partial(load_encoder, config.text))
    for path, *_, reason in store.faults():
        raise JobError(
            f"{path} {reason}, after all were written; look at the disk and run the same command again"
        )
    files = len(shards.indexes) * len(store.fields)
    print(
        f"{len(shards):,} samples in {len(shards.indexes):,} shards: {files:,} files checked, {written:,} of them "
        f"written now; text encoder {store.recipe.encoder[:12]}"
    )


if __name__ == "__main__":
    run(main)
