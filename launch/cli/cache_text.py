"""`cascade cache-text`: the text embeddings of a stage's captions, computed before training."""

import argparse

from launch.cli.options import Subparsers, add_overrides


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "cache-text",
        help="encode the captions of a stage's shards before training",
        description="Encodes the captions of a stage's shards before training and stores the "
        "embeddings. Several of these commands may run at once, on all machines that see the same "
        "folders: each shard is encoded by one of them. The same command again resumes.",
    )
    parser.add_argument("config", metavar="CONFIG", help="a stage's YAML file, see configs/")
    add_overrides(parser, "replaces a value of the file, for example data.shards=DIR/*.tar")


def run(arguments: argparse.Namespace) -> int:
    from functools import partial

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
            f"{arguments.config}: conditioning is {config.conditioning}, which reads no captions; "
            "give the file of a stage with conditioning text"
        )

    training = Shards.open(config.data)
    # A fraction that is held out lies in the same shards.
    validation = None if config.data.held_out else training.open_validation()
    made_by = recipe(config.text)

    for shards in filter(None, (training, validation)):
        store = TextStore(shards, made_by)
        # Given as a function: the encoder is loaded only if a shard has to be encoded.
        num_written = store.build(partial(load_encoder, config.text))

        # What cannot be read back right after it was written is a fault of the disk.
        for fault in store.faults():
            raise JobError(
                f"{fault.path} {fault.reason}, after all were written; check the disk and run the "
                "same command again"
            )

        num_samples = sum(len(shards.passing_rows(shard)) for shard in range(len(shards.indexes)))
        num_files = len(shards.indexes) * len(store.fields)
        print(
            f"{num_samples:,} samples in {len(shards.indexes):,} shards: {num_files:,} files "
            f"checked, {num_written:,} of them written now; text encoder "
            f"{store.recipe.encoder[:12]}"
        )
    return 0
