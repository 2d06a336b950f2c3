"""`cascade restore`: inpainting, uncropping, colorization and the other tasks of an image-to-image
stage.
"""

import argparse
from pathlib import Path

from launch.cli.options import Subparsers, add_seed, check_seed
from pipeline.terminal import positive


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "restore",
        help="restore images by an image-to-image stage; again: writes what is missing",
        description="Restores images by a stage that was trained for the task. The same command "
        "again writes only what is missing in --out.",
    )
    parser.add_argument(
        "path",
        metavar="STAGE",
        help="a stage folder, or a cascade folder of that stage and its text encoder",
    )

    parser.add_argument(
        "--task",
        metavar="TASK",
        required=True,
        help="a task that the stage was trained for, for example inpainting",
    )
    parser.add_argument(
        "--image",
        metavar="PATH",
        type=Path,
        required=True,
        help="an image, or a folder of images",
    )
    # Either says where to generate: within the image, or around it.
    region = parser.add_mutually_exclusive_group()
    region.add_argument(
        "--mask",
        metavar="PATH",
        type=Path,
        help="an image that is white where to generate, or a folder of NAME.png",
    )
    region.add_argument(
        "--extend",
        metavar="N",
        type=int,
        nargs=4,
        help="pixels to add at the left, top, right and bottom",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        required=True,
        help="output folder: NAME.png, its samples and their standard deviation, manifest.jsonl",
    )

    add_seed(parser)
    parser.add_argument(
        "--steps", metavar="S", type=positive, help="sampling steps (default: the stage's own)"
    )
    parser.add_argument(
        "--samples",
        metavar="N",
        type=positive,
        default=1,
        help="samples of each image; several give their standard deviation too "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--weights",
        metavar="W",
        type=float,
        nargs="+",
        help="weights of a mean of the samples, one for each (default: the first sample alone)",
    )
    parser.add_argument(
        "--repaint-share",
        metavar="SHARE",
        type=float,
        default=0.0,
        help="share of the unknown pixels, the least certain ones, that is generated once more, "
        "0 to 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        default="",
        help="prompt of all images, for a stage with text (default: none)",
    )


def run(arguments: argparse.Namespace) -> int:
    check_seed(arguments.seed)

    from pipeline.generate.cascade import Cascade
    from pipeline.generate.cascade_folder import read_cascade
    from pipeline.generate.restore import RestoreOptions, check_task, read_images, restore
    from pipeline.log import setup_logging

    setup_logging()
    folder = Path(arguments.path)

    options = RestoreOptions(
        task=arguments.task,
        seed=arguments.seed,
        samples=arguments.samples,
        weights=tuple(arguments.weights) if arguments.weights else None,
        repaint_share=arguments.repaint_share,
    )
    # From the manifest, before images are read and weights are loaded.
    check_task(read_cascade(folder)[0], options.task)
    images = read_images(
        options.task,
        arguments.image,
        arguments.mask,
        tuple(arguments.extend) if arguments.extend else None,
    )

    num_restored = restore(
        Cascade.load(folder),
        images,
        options,
        arguments.out,
        prompt=arguments.prompt,
        steps=arguments.steps,
    )

    print(
        f"{arguments.out}: {num_restored} of {len(images)} images restored now, listed in "
        "manifest.jsonl"
    )
    return 0
