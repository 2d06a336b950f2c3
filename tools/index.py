"""Index shards: what is in each tar, where, and all that is wrong with it.

    python -m tools.index '/data/laion/{00000..09999}.tar' '/data/art/*.tar' --weights 3 1

Training needs the indexes and makes those that are missing; this makes them ahead, in many
processes, looks at those that are there again and makes anew what no longer fits its shard. The
same command again goes on where it stopped.
"""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UserError
from pipeline.terminal import Parser, positive, run

if TYPE_CHECKING:
    from pipeline.data.shards import Shards

EDGES = (
    0,
    64,
    128,
    256,
    512,
    1024,
    2048,
    4096,
    2**32,
)  # of the histogram of sizes, pixels of the shorter side
SHOWN = 20  # faults that are listed; --json has them all


def report(shards: "Shards") -> dict[str, Any]:
    """What the indexes say: all in numbers, and every fault."""
    sides: Counter[int] = Counter()
    lengths = []
    for index in shards.indexes:
        short = index.column("pixels").min(axis=1)
        sides.update(np.searchsorted(EDGES, short, side="right").tolist())
        lengths.append(index.column("caption_length"))
    captions = np.concatenate(lengths)
    total = sum(shards.weights)
    return {
        "shards": len(shards.indexes),
        "bytes": sum(index.stat.size for index in shards.indexes),
        "samples": len(captions),
        "sets": [
            {
                "patterns": list(patterns),
                "shards": len(sizes),
                "samples": sum(sizes),
                "share": weight / total,
            }
            for patterns, sizes, weight in zip(
                shards.config.sets, shards.sizes, shards.weights, strict=True
            )
        ],
        "shorter_side": {
            f"{low}-{high - 1}" if high < EDGES[-1] else f"{low}-": sides[number]
            for number, (low, high) in enumerate(pairwise(EDGES), 1)
        },
        "caption_length": {
            name: int(np.quantile(captions, share))
            for name, share in (("min", 0), ("median", 0.5), ("max", 1))
        }
        if len(captions)
        else {},
        "without_caption": int((captions == 0).sum()),
        "faults": [{"shard": shard, **fault._asdict()} for shard, fault in shards.faults],
    }


def as_text(found: dict[str, Any]) -> str:
    """The report for reading."""
    lines = [
        f"{found['samples']:,} samples in {found['shards']:,} shards, {found['bytes'] / 2**30:.2f} GiB"
    ]
    if len(found["sets"]) > 1:
        lines += [
            f"  {' '.join(each['patterns'])}: {each['samples']:,} samples, {each['share']:.1%} of each step"
            for each in found["sets"]
        ]
    most = max(found["shorter_side"].values(), default=0)
    lines.append("shorter side, px")
    for name, number in found["shorter_side"].items():
        lines.append(
            f"  {name:>10} {number:>12,} {'#' * -(-40 * number // most) if number else ''}"
        )
    if found["caption_length"]:
        lengths = ", ".join(f"{name} {value:,}" for name, value in found["caption_length"].items())
        lines.append(
            f"KEY.txt, characters: {lengths}; {found['without_caption']:,} samples have none"
        )
    faults = found["faults"]
    lines.append(f"wrong: {len(faults):,}" if faults else "nothing is wrong")
    lines += [f"  {each['shard']}:{each['key']}: {each['reason']}" for each in faults[:SHOWN]]
    if len(faults) > SHOWN:
        lines.append(f"  and {len(faults) - SHOWN:,} more; --json lists them all")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    parser = Parser(prog="python -m tools.index", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="SHARDS",
        help="tars, with {00000..00127} and *; file: and http(s): URLs too",
    )
    parser.add_argument(
        "--weights",
        type=float,
        nargs="+",
        metavar="W",
        help="each SHARDS is a data set with this share of a step",
    )
    parser.add_argument(
        "--cache", metavar="DIR", help="folder for the indexes (default: beside the shards)"
    )
    parser.add_argument("--workers", type=positive, default=2, help="processes (%(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    arguments = parser.parse_args(argv)

    from pipeline.data.shards import DataConfig, Shards, open_indexes
    from pipeline.log import setup_logging

    setup_logging()
    patterns = arguments.shards
    if arguments.weights and (
        len(arguments.weights) != len(patterns) or min(arguments.weights) <= 0
    ):
        raise UserError(
            f"--weights: {arguments.weights} for {len(patterns)} SHARDS; give one above 0 for each"
        )
    config = DataConfig(
        shards=dict(zip(patterns, arguments.weights, strict=True))
        if arguments.weights
        else tuple(patterns),
        cache=arguments.cache,
        workers=arguments.workers,
        max_damage=1.0,
    )
    sources = config.sources()
    found = report(Shards(config, sources, open_indexes(config, sources, rebuild_outdated=True)))
    print(json.dumps(found) if arguments.json else as_text(found))


if __name__ == "__main__":
    run(main)
