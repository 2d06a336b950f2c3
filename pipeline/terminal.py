"""What every command shares: how a mistake is reported, and the exit code.

0 done, 1 the job could not go on (one line on stderr), 2 the user's input (one line), 130
interrupted; anything else that is raised is a fault, with its traceback and code 1.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from pipeline.errors import JobError, UserError


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line like all others, rather than the usage and then a
    line.
    """

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def positive_number(text: str) -> float:
    """An argparse type: a finite number above 0."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> NoReturn:
    """`main` with `argv` or else this process's arguments, and its answer (None is 0) as the exit
    code.
    """
    try:
        code = main(sys.argv[1:] if argv is None else argv) or 0
        sys.stdout.flush()
    except (JobError, UserError) as error:
        print(error, file=sys.stderr)
        code = 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # Python flushes once more when it ends
        code = 0
    sys.exit(code)
