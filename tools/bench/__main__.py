"""`python -m tools.bench NAME`: each name is a module here, its docstring the help.

A module has `add_arguments(parser)`, which may import nothing heavy, so that help is there at once;
`run(arguments)`, which measures and answers a report (see `turns.report`); and `table(report)`,
that report as Markdown.
"""

import json
from collections.abc import Sequence
from typing import Any

from pipeline.terminal import Parser, run
from tools.bench import compile, data, memory, sample, scaling, steps, text, train, whole

MODULES = (compile, data, memory, sample, scaling, steps, text, train, whole)
BENCHES = {module.__name__.rpartition(".")[2]: module for module in MODULES}
ALL = ("train", "sample", "text", "data")  # what `all` runs
MERGED = ("versions", "rows", "ratios", "failed")


def parser() -> Parser:
    whole = Parser(
        prog="python -m tools.bench", description="Measure beside others, on this machine."
    )
    names = whole.add_subparsers(required=True, metavar="|".join(("all", *BENCHES)), dest="bench")
    everything = f"{', '.join(ALL)}, one after the other as they are by default; the others want a trained cascade, or long."
    added = {"all": names.add_parser("all", help=everything, description=f"Run {everything}")}
    for name, module in BENCHES.items():
        doc = str(module.__doc__)
        added[name] = names.add_parser(
            name, help=doc.splitlines()[0], description=doc.partition("\n\n")[0]
        )
        module.add_arguments(added[name])
    for bench in added.values():
        bench.add_argument(
            "--json", action="store_true", help="print one object with all figures, not tables"
        )
    return whole


def main(argv: Sequence[str]) -> None:
    arguments = parser().parse_args(argv)
    if arguments.bench == "all":
        reports = {name: BENCHES[name].run(parser().parse_args([name])) for name in ALL}
        tables = [f"## {name}\n{BENCHES[name].table(report)}\n" for name, report in reports.items()]
        report = merged(reports)
    else:
        report = BENCHES[arguments.bench].run(arguments)
        tables = [BENCHES[arguments.bench].table(report)]
    print(json.dumps(report, indent=2) if arguments.json else "\n".join(tables))


def merged(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One report of many: their rows and ratios together, what only one of them has under its name."""
    one: dict[str, Any] = {
        "machine": next(iter(reports.values()))["machine"],
        **{key: {} for key in MERGED},
    }
    for name, report in reports.items():
        for key in MERGED:
            one[key].update(report.get(key, {}))
        one[name] = {key: value for key, value in report.items() if key not in one}
    return one


if __name__ == "__main__":
    run(main)
