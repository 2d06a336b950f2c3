"""What all commands share: argument types, one-line error messages, and exit codes.

Exit codes: 0 done; 1 the job failed (`JobError`, one line on stderr); 2 the user's input is wrong
(`UserError`, one line on stderr); 130 interrupted. Any other exception is a bug: Python prints its
traceback and exits with code 1.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from pipeline.errors import JobError, UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, one line, instead of printing usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    # argparse itself reports a ValueError, as an invalid value.
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
    """Calls `main` and exits with the code that it returns; None counts as 0.

    `argv` defaults to the arguments of this process.
    """
    try:
        code = main(sys.argv[1:] if argv is None else argv) or 0
        # Here, and not at exit, a closed pipe can still be handled.
        sys.stdout.flush()
    except (JobError, UserError) as error:
        print(error, file=sys.stderr)
        code = 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        # The reader of our output, `head` for example, has closed it. Python flushes stdout once
        # more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0

    sys.exit(code)
