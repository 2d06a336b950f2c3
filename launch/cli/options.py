"""Arguments that several commands take, and the checks of their values."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from pipeline.errors import UserError
from pipeline.terminal import positive

if TYPE_CHECKING:
    from pipeline.stage.manifest import Manifest

T = TypeVar("T")
Subparsers: TypeAlias = "argparse._SubParsersAction[Any]"


def add_overrides(parser: argparse.ArgumentParser, help: str) -> None:
    """`key=value ...`, dotted keys of a configuration."""
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=help)


def add_json(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument("--json", action="store_true", help=help)


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="seed of the noise, 0 to 2**63 - 1 (default: %(default)s)",
    )


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed: {seed} is not in [0, 2**63)")


# Sampling.


def add_sampling(
    parser: argparse.ArgumentParser, *, start_help: str, num_help: str | None = None
) -> None:
    """The arguments that `sample` and `edit` share.

    With `num_help` there is also --num, in place of prompts.
    """
    parser.add_argument(
        "path",
        metavar="CASCADE|STAGE",
        help="a cascade folder, or the folder of a stage without text",
    )

    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt",
        metavar="TEXT",
        nargs="+",
        default=[],
        help="one image each; class names for a stage that is trained on classes",
    )
    prompts.add_argument(
        "--prompts",
        metavar="FILE",
        type=Path,
        help="a file of one prompt a line; blank lines are skipped",
    )

    if num_help is not None:
        prompts.add_argument("--num", metavar="N", type=positive, help=num_help)
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        required=True,
        help="output folder: 00000.png, STAGE/00000.png, manifest.jsonl",
    )

    add_seed(parser)
    parser.add_argument(
        "--steps",
        metavar="S",
        type=int,
        nargs="+",
        default=[],
        help="sampling steps, one number for each stage that runs or one for all "
        "(default: the stage's own)",
    )
    parser.add_argument(
        "--guidance",
        metavar="G",
        type=float,
        nargs="+",
        default=[],
        help="weight of classifier-free guidance, one for each stage that runs or one for all; "
        "1 is no guidance (default: the stage's own)",
    )
    parser.add_argument(
        "--aug-level",
        metavar="A",
        type=float,
        nargs="+",
        default=[],
        help="noise augmentation of the low-resolution input, one for each super-resolution stage "
        "that runs or one for all (default: the stage's own)",
    )
    # `arguments.from` would be a syntax error.
    parser.add_argument("--from", dest="start", metavar="STAGE", help=start_help)
    parser.add_argument(
        "--to", dest="stop", metavar="STAGE", help="last stage to run (default: the last of all)"
    )


def read_prompts(arguments: argparse.Namespace, *, required: bool = True) -> list[str]:
    """The prompts of --prompt, or of the file --prompts without its blank lines.

    UserError if there is none although `required`, or if the file cannot be read.
    """
    prompts: list[str] = arguments.prompt
    if arguments.prompts:
        try:
            lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{arguments.prompts}: cannot be read ({error}); give a UTF-8 text file"
            ) from None
        prompts = [line.strip() for line in lines if line.strip()]

    # A blank line of a file is layout, a blank --prompt a mistake.
    if required and not (prompts and all(prompt.strip() for prompt in prompts)):
        fix = "give --prompt TEXT, or --prompts FILE with one per line"
        if "num" in vars(arguments):
            fix += ", or --num N for a stage without text"
        raise UserError(f"no prompt; {fix}")
    return prompts


def sampling_options(
    arguments: argparse.Namespace, manifests: Mapping[str, "Manifest"]
) -> dict[str, dict[str, Any]]:
    """The values of --steps, --guidance and --aug-level, by stage that runs and by option."""
    from pipeline.generate.cascade import check_options, stages_between

    if any(steps < 1 for steps in arguments.steps):
        raise UserError(f"--steps: {arguments.steps} holds a number below 1; give positive numbers")

    # Values are counted over the stages that run, not over all of the cascade.
    names = stages_between(list(manifests), arguments.start, arguments.stop)
    # Only these have a low-resolution input to augment.
    super_resolution = [name for name in names if manifests[name].size_in is not None]

    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    for option, flag, stages in (
        ("steps", "--steps", names),
        ("guidance", "--guidance", names),
        ("aug_level", "--aug-level", super_resolution),
    ):
        for name, value in by_stage(flag, getattr(arguments, option), stages).items():
            options[name][option] = value

    check_options(manifests, options)
    return options


def by_stage(flag: str, values: Sequence[T], stages: Sequence[str]) -> dict[str, T]:
    """The values of an option by stage: one for all stages or one for each; empty if none is given.

    UserError, which names `flag`, for another number of values.
    """
    if not values:
        return {}

    if len(values) == 1:
        values = list(values) * len(stages)
    if len(values) != len(stages):
        raise UserError(
            f"{flag}: {len(values)} values for {len(stages)} stages ({', '.join(stages)}); give "
            "one for each or one for all"
        )
    return dict(zip(stages, values, strict=True))
