"""`python -m tools.bench NAME`: each name is a module here, its docstring the help.

A module has `add_arguments(parser)`, which imports nothing heavy so that help is there at once;
`run(arguments)`, which measures and returns a report (see `report.py`); and `table(report)`, that
report as Markdown.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.terminal import Parser, run
from tools.bench import compile, data, memory, sample, scaling, steps, text, tiling, train

MODULES = (compile, data, memory, sample, scaling, steps, text, tiling, train)
BENCHES = {module.__name__.rpartition(".")[2]: module for module in MODULES}

# What `all` runs; the others need a trained cascade or much time.
ALL = ("train", "sample", "text", "data")
ALL_HELP = f"{', '.join(ALL)}, one after the other with their defaults"

MERGED = ("versions", "rows", "ratios", "failed")  # sections of a report that `all` joins


def parser() -> Parser:
    root = Parser(
        prog="python -m tools.bench", description="Benchmarks beside others, on this machine."
    )
    names = root.add_subparsers(required=True, metavar="|".join(("all", *BENCHES)), dest="bench")

    benches = {"all": names.add_parser("all", help=ALL_HELP, description=f"Run {ALL_HELP}.")}
    for name, module in BENCHES.items():
        summary = str(module.__doc__).partition("\n\n")[0]
        benches[name] = names.add_parser(name, help=" ".join(summary.split()), description=summary)
        module.add_arguments(benches[name])

    for bench in benches.values():
        bench.add_argument(
            "--json", action="store_true", help="print one object with all figures, not tables"
        )
    return root


def main(argv: Sequence[str]) -> None:
    arguments = parser().parse_args(argv)

    if arguments.bench == "all":
        # Parsed from its name alone, a bench gets its defaults.
        reports = {name: BENCHES[name].run(parser().parse_args([name])) for name in ALL}
        tables = [f"## {name}\n{BENCHES[name].table(report)}\n" for name, report in reports.items()]
        report = merge(reports)
    else:
        bench = BENCHES[arguments.bench]
        report = bench.run(arguments)
        tables = [bench.table(report)]

    print(json.dumps(report, indent=2) if arguments.json else "\n".join(tables))


def merge(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One report of several: the sections of MERGED joined, all else under its bench's name."""
    machine = next(iter(reports.values()))["machine"]
    merged: dict[str, Any] = {"machine": machine, **{section: {} for section in MERGED}}

    for name, report in reports.items():
        for section in MERGED:
            merged[section].update(report.get(section, {}))
        merged[name] = {key: value for key, value in report.items() if key not in merged}
    return merged


if __name__ == "__main__":
    run(main)
