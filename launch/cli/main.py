"""The `cascade` command: assembles the parser from one module a command, and dispatches.

Exit codes: 0 done; 1 the job failed; 2 the user's input is wrong (one line on stderr); 75 stopped
by a signal after saving, and the same command resumes; 130 interrupted. A command's module imports
MindSpore only in `run`, once the command line has been parsed.
"""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from launch.cli import (
    cache_text,
    check,
    edit,
    explore,
    export,
    index,
    restore,
    sample,
    status,
    train,
    train_all,
)
from pipeline.errors import UserError
from pipeline.terminal import Parser, run

# In the order of --help: training, sampling, preparing data and folders.
COMMANDS = {
    "check": check,
    "train": train,
    "train-all": train_all,
    "status": status,
    "sample": sample,
    "edit": edit,
    "restore": restore,
    "explore": explore,
    "index": index,
    "cache-text": cache_text,
    "export": export,
}

POSITIONAL = ("command", "path", "overrides", "runs", "shards")  # which are no options


def build_parser() -> Parser:
    """The whole command line."""
    parser = Parser(
        prog="cascade",
        description="Train the stages of an Imagen-style cascade and generate images with them.",
        epilog="`cascade COMMAND --help` lists the arguments of a command.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    for module in COMMANDS.values():
        module.add_parser(commands)

    return parser


def dispatch(argv: Sequence[str]) -> int:
    """Runs the command that `argv` names; its exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        exit_code: int = COMMANDS[arguments.command].run(arguments)
    except UserError as error:
        # The library names its argument; who typed the command knows the flag.
        raise UserError(with_flag(str(error), arguments)) from error
    return exit_code


def with_flag(message: str, arguments: argparse.Namespace) -> str:
    """The library's `repaint_share: 2 is not ...` as `--repaint-share: 2 is not ...`, if that is
    an option of the command.
    """
    name, colon, rest = message.partition(":")
    # The library knows prompts in a list; on the command line they come with --prompt.
    name = "prompt" if name == "prompts" else name
    if not colon or name not in vars(arguments) or name in POSITIONAL:
        return message
    return f"--{name.replace('_', '-')}:{rest}"


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """The entry point of the installed command: `dispatch` with one-line errors and exit codes."""
    run(dispatch, argv)
