"""`python -m tools.bench NAME`: each name is a module here with `add_arguments(parser)` and `run(arguments)`.

Its docstring is the help. `add_arguments` may import nothing heavy, so that help is there at once.
"""

from collections.abc import Sequence

from launch.terminal import Parser, run
from tools.bench import data, scaling, text, train

BENCHES = {"data": data, "scaling": scaling, "text": text, "train": train}


def parser() -> Parser:
    whole = Parser(prog="python -m tools.bench", description="Measure beside others, on this machine.")
    names = whole.add_subparsers(required=True, metavar="|".join(BENCHES))
    for name, module in BENCHES.items():
        doc = str(module.__doc__)
        bench = names.add_parser(name, help=doc.splitlines()[0], description=doc.partition("\n\n")[0])
        module.add_arguments(bench)
        bench.set_defaults(run=module.run)
    return whole


def main(argv: Sequence[str]) -> None:
    arguments = parser().parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    run(main)
