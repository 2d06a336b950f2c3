"""`cascade index`: what is in each tar, where, and what is wrong with it.

    cascade index '/data/laion/{00000..09999}.tar' '/data/art/*.tar' --weights 3 1

Training builds the indexes that are missing. This command builds them before, in several processes,
checks those that exist, and rebuilds those that do not fit their shard any more.
"""

import argparse
import json
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from launch.cli.options import Subparsers, add_json
from pipeline.errors import UserError
from pipeline.terminal import positive

if TYPE_CHECKING:
    from pipeline.data.shards import Shards

# Edges of the histogram of image sizes: pixels of the shorter side.
EDGES = (0, 64, 128, 256, 512, 1024, 2048, 4096, 2**32)
BAR_WIDTH = 40  # characters of the histogram's longest bar
MAX_FAULTS_SHOWN = 20  # in the text; --json lists all


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "index",
        help="index shards ahead of training; reports sizes, captions and faults",
        description="Builds the indexes of shards, checks those that exist and rebuilds those that "
        "no longer fit their shard; prints sizes, captions and every fault. The same command again "
        "resumes.",
    )
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
        help="share of each SHARDS in a training step, as a data set of its own "
        "(default: one data set)",
    )
    parser.add_argument(
        "--cache", metavar="DIR", help="folder of the indexes (default: beside the shards)"
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=positive,
        default=2,
        help="processes that read shards (default: %(default)s)",
    )
    add_json(parser, "print one JSON object instead of text")


def run(arguments: argparse.Namespace) -> int:
    patterns, weights = arguments.shards, arguments.weights
    if weights and (len(weights) != len(patterns) or min(weights) <= 0):
        raise UserError(
            f"--weights: {weights} for {len(patterns)} SHARDS; give one above 0 for each"
        )

    from pipeline.data.config import DataConfig
    from pipeline.data.shards import Shards, open_indexes
    from pipeline.log import setup_logging

    setup_logging()

    config = DataConfig(
        # With weights each pattern is a data set of its own; without, all are one.
        shards=dict(zip(patterns, weights, strict=True)) if weights else tuple(patterns),
        cache=arguments.cache,
        workers=arguments.workers,
        max_damage=1.0,  # damage is reported here, never refused
    )
    sources = config.sources()
    report = describe(Shards(config, sources, open_indexes(config, sources, rebuild_outdated=True)))

    print(json.dumps(report) if arguments.json else as_text(report))
    return 0


def describe(shards: "Shards") -> dict[str, Any]:
    """The report: shards, bytes, samples, image sizes, caption lengths, and every fault."""
    import numpy as np

    sides: Counter[int] = Counter()
    caption_lengths = []
    for index in shards.indexes:
        shorter_side = index.column("pixels").min(axis=1)
        # side="right" counts a side that equals an edge in the bin that begins there, from 1 on.
        sides.update(np.searchsorted(EDGES, shorter_side, side="right").tolist())
        caption_lengths.append(index.column("caption_length"))
    # Of all shards at once, as quantiles cannot be computed from those of parts.
    lengths = np.concatenate(caption_lengths)

    total_weight = sum(shards.weights)
    sets = [
        {
            "patterns": list(patterns),
            "shards": len(sizes),
            "samples": sum(sizes),
            "share": weight / total_weight,
        }
        for patterns, sizes, weight in zip(
            shards.config.sets, shards.sizes, shards.weights, strict=True
        )
    ]
    histogram = {
        f"{low}-{high - 1}" if high < EDGES[-1] else f"{low}-": sides[bin]
        for bin, (low, high) in enumerate(pairwise(EDGES), 1)
    }
    # An empty array has none.
    quantiles = {"min": 0.0, "median": 0.5, "max": 1.0} if len(lengths) else {}

    return {
        "shards": len(shards.indexes),
        "bytes": sum(index.stat.size for index in shards.indexes),
        "samples": len(lengths),
        "sets": sets,
        "shorter_side": histogram,
        "caption_length": {name: int(np.quantile(lengths, q)) for name, q in quantiles.items()},
        "without_caption": int((lengths == 0).sum()),
        "faults": [{"shard": shard, **fault._asdict()} for shard, fault in shards.faults],
    }


def as_text(report: dict[str, Any]) -> str:
    """The report for reading."""
    lines = [
        f"{report['samples']:,} samples in {report['shards']:,} shards, "
        f"{report['bytes'] / 2**30:.2f} GiB"
    ]
    if len(report["sets"]) > 1:
        lines += [
            f"  {' '.join(each['patterns'])}: {each['samples']:,} samples, "
            f"{each['share']:.1%} of each step"
            for each in report["sets"]
        ]

    lines.append("shorter side, px")
    most = max(report["shorter_side"].values(), default=0)
    for name, count in report["shorter_side"].items():
        # Rounded up, so that a single image shows.
        bar = "#" * -(-BAR_WIDTH * count // most) if count else ""
        lines.append(f"  {name:>10} {count:>12,} {bar}")

    if report["caption_length"]:
        lengths = ", ".join(f"{name} {value:,}" for name, value in report["caption_length"].items())
        lines.append(
            f"KEY.txt, characters: {lengths}; {report['without_caption']:,} samples have none"
        )

    faults = report["faults"]
    lines.append(f"wrong: {len(faults):,}" if faults else "nothing is wrong")
    lines += [
        f"  {each['shard']}:{each['key']}: {each['reason']}" for each in faults[:MAX_FAULTS_SHOWN]
    ]
    if len(faults) > MAX_FAULTS_SHOWN:
        lines.append(f"  and {len(faults) - MAX_FAULTS_SHOWN:,} more; --json lists them all")
    return "\n".join(lines)
