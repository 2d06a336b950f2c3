"""`cascade explore`: contact sheets of a stage's samples and of how they come about."""

import argparse
from pathlib import Path

from launch.cli.options import Subparsers, add_seed, check_seed
from pipeline.errors import UserError
from pipeline.terminal import positive


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "explore",
        help="five contact sheets of a stage's samples and of the sampling process",
        description="Writes five contact sheets: samples, a sampling path, numbers of steps, an "
        "interpolation, and the forward process.",
    )
    parser.add_argument(
        "path",
        metavar="STAGE|CASCADE",
        help="the folder of a stage without text, or a cascade folder, whose first stage is taken",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        required=True,
        help="output folder: grid.png, path.png, steps.png, interpolation.png, noising.png",
    )
    add_seed(parser)
    parser.add_argument(
        "--num",
        metavar="N",
        type=positive,
        default=16,
        help="images in grid.png (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        nargs="+",
        default=[],
        help="prompts or class names, used in turn; the interpolation is between the first two",
    )
    parser.add_argument(
        "--image",
        metavar="FILE",
        type=Path,
        help="the image that noising.png shows (default: the first of grid.png)",
    )


def run(arguments: argparse.Namespace) -> int:
    check_seed(arguments.seed)
    if not all(prompt.strip() for prompt in arguments.prompt):
        raise UserError("--prompt: one of them is blank; give words, or leave it out")

    from pipeline.generate.cascade import Cascade, check_prompts
    from pipeline.generate.cascade_folder import read_cascade
    from pipeline.generate.inspect import inspect, read_square
    from pipeline.log import setup_logging

    setup_logging()
    # Manifests and the user's image before any weight is loaded.
    manifests, _ = read_cascade(Path(arguments.path))
    name, first = next(iter(manifests.items()))
    if first.size_in is not None or first.tasks:
        raise UserError(
            f"{arguments.path}: {name} starts from an image; give the folder of a stage that needs "
            "none"
        )

    # Only the first stage samples, so its conditioning alone decides what a prompt is.
    prompts = check_prompts(
        {name: first}, arguments.prompt, None if arguments.prompt else arguments.num
    )
    image = read_square(arguments.image, first.size_out) if arguments.image else None

    cascade = Cascade.load(arguments.path)

    sheets = inspect(
        cascade,
        prompts,
        arguments.out,
        seed=arguments.seed,
        num_images=arguments.num,
        image=image,
    )

    print(f"{arguments.out}: {', '.join(sheets)}")
    return 0
