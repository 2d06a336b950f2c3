"""`cascade sample`: images of prompts, of classes, or unconditional ones."""

import argparse
from pathlib import Path

from launch.cli.options import (
    Subparsers,
    add_sampling,
    check_seed,
    read_prompts,
    sampling_options,
)


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "sample",
        help="generate images from prompts; the same command again writes what is missing",
        description="Generates one image a prompt, 0 upwards, and writes it with the outputs of "
        "all stages that run. The same command again writes only what is missing in --out.",
    )
    add_sampling(
        parser,
        start_help="first stage to run, on the images in --out (default: the first of all)",
        num_help="number of images of a stage without text, of its classes in turn",
    )


def run(arguments: argparse.Namespace) -> int:
    # What the command line alone decides, before MindSpore is imported.
    texts = read_prompts(arguments, required=arguments.num is None)
    check_seed(arguments.seed)

    from pipeline.generate.cascade import Cascade, check_prompts
    from pipeline.generate.cascade_folder import read_cascade
    from pipeline.generate.output_folder import generate
    from pipeline.log import setup_logging

    setup_logging()
    # Manifests take no time to read; weights are loaded once nothing can be wrong any more.
    manifests, _ = read_cascade(Path(arguments.path))
    prompts = check_prompts(manifests, texts, arguments.num)
    options = sampling_options(arguments, manifests)

    cascade = Cascade.load(arguments.path)
    num_written = generate(
        cascade,
        prompts,
        arguments.out,
        arguments.seed,
        options=options,
        start=arguments.start,
        stop=arguments.stop,
    )

    # An unconditional stage has empty prompts, of which only the number counts.
    suffix = f" for {len(prompts)} prompts" if any(prompts) else ""
    print(f"{arguments.out}: {num_written} images written{suffix}, listed in manifest.jsonl")
    return 0
