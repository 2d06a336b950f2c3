"""`cascade edit`: inpainting in a mask, and image-to-image with a strength, guided by a prompt."""

import argparse
from pathlib import Path

from launch.cli.options import (
    Subparsers,
    add_sampling,
    by_stage,
    check_seed,
    read_prompts,
    sampling_options,
)
from pipeline.errors import UserError
from pipeline.terminal import positive


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "edit",
        help="inpaint or vary an image by a prompt; the same command again writes what is missing",
        description="Generates the masked part of an image anew, or the whole of it from a noised "
        "copy, as the prompt says. The same command again writes only what is missing in --out.",
    )
    add_sampling(
        parser,
        start_help="first stage to run, on the image itself (default: the first of all)",
    )
    parser.add_argument(
        "--image",
        metavar="PATH",
        type=Path,
        required=True,
        help="an image, or a folder of images",
    )
    parser.add_argument(
        "--mask",
        metavar="PATH",
        type=Path,
        help="an image that is white where to generate, or a folder of NAME.png",
    )
    parser.add_argument(
        "--strength",
        metavar="S",
        type=float,
        nargs="+",
        default=[],
        help="share of the noise schedule that is sampled anew, above 0 to 1, one for each stage "
        "that runs or one for all (default: 1 with a mask, else 0.8)",
    )
    parser.add_argument(
        "--repaint-steps",
        metavar="N",
        type=positive,
        help="times that each step inside the mask is repeated, as RePaint does (default: 1)",
    )


def run(arguments: argparse.Namespace) -> int:
    prompts = read_prompts(arguments)
    check_seed(arguments.seed)
    has_mask = arguments.mask is not None
    if arguments.repaint_steps and not has_mask:
        raise UserError(
            "--repaint-steps: repeats the steps inside a mask; give --mask, or leave it out"
        )

    from pipeline.generate.cascade import Cascade
    from pipeline.generate.cascade_folder import read_cascade
    from pipeline.generate.edit import open_edit_files, strengths
    from pipeline.generate.output_folder import generate
    from pipeline.imaging.user_images import list_images
    from pipeline.log import setup_logging

    setup_logging()
    images = list_images(arguments.image)
    # One image may have several prompts, and one prompt several images.
    num = max(len(images), len(prompts))
    if not {len(images), len(prompts)} <= {1, num}:
        raise UserError(
            f"--image: {len(images)} images for {len(prompts)} prompts; give one of either, or as "
            "many"
        )

    manifests, _ = read_cascade(Path(arguments.path))
    options = sampling_options(arguments, manifests)
    if arguments.repaint_steps:
        for stage_options in options.values():
            stage_options["repaint_steps"] = arguments.repaint_steps

    # The stages that run, in order; only for these are strengths expected.
    names = list(options)
    strength = strengths(by_stage("--strength", arguments.strength, names), has_mask, names)
    # Images have the size with which the cascade ends, even if --to names an earlier stage.
    size = list(manifests.values())[-1].size_out
    edit_files = open_edit_files(
        images * (num // len(images)), arguments.mask, size=size, strengths=strength
    )

    cascade = Cascade.load(arguments.path)
    num_written = generate(
        cascade,
        prompts * (num // len(prompts)),
        arguments.out,
        arguments.seed,
        options=options,
        start=arguments.start,
        stop=arguments.stop,
        edit_files=edit_files,
    )

    print(
        f"{arguments.out}: {num_written} images written for {num} edits, listed in manifest.jsonl"
    )
    return 0
