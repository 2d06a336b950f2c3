"""Options that several benches have. Imports nothing heavy."""

import argparse

from pipeline.terminal import positive


def add_count(
    parser: argparse.ArgumentParser, option: str, default: int, text: str, *, metavar: str = "N"
) -> None:
    """A positive integer with a default."""
    parser.add_argument(
        option, type=positive, default=default, metavar=metavar, help=f"{text} (%(default)s)"
    )
