"""What the tools share at the command line: how a mistake is reported, and the exit code.

0 done, 2 the user's input (one line on stderr), 130 interrupted. Anything else is a fault of the tool and shows its
traceback.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from pipeline.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line like all others, rather than the usage and then a line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; see --help")


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def run(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """`main` with this process's arguments, and its end as an exit code."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
