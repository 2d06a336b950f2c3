"""Captions a second of the T5 encoder, beside `transformers` with PyTorch: the same folder,
captions and processor.

Both turn strings into embeddings of up to 128 tokens a caption, in float32, the tokenizer included.
`transformers` pads in both of its ways, to the longest caption of a batch of 8 and ("padded") to
the whole length. PyTorch and MindSpore would fight over threads in one process, so each measurement
is a process of its own, the two in turns, and medians are told beside what was lowest and highest:
where others use the machine, PyTorch loses more by it. `transformers` and PyTorch are installed
apart, once, in the user's cache.

The encoder is a random T5 v1.1 of about T5-small's size (8 layers of width 512), as speed does not
depend on values.
"""

import argparse
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.terminal import positive
from tools.bench import peers, turns

LENGTH, WIDTH, LAYERS, VOCAB = 128, 512, 8, 1000
SHORTEST, LONGEST = 5, 60  # tokens of a caption, spread evenly


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--captions", type=positive, default=512, metavar="N", help="to encode (%(default)s)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=3, metavar="N", help="of both sides (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    return measure(arguments.captions, arguments.rounds)


def measure(num: int, rounds: int, width: int = WIDTH) -> dict[str, Any]:
    """`rows`: seconds for all captions, by round."""
    from tqdm import tqdm

    from tools import tiny_t5

    rows: turns.Rows = {}
    failed: dict[str, str] = {}
    with TemporaryDirectory() as folder, tqdm(total=rounds * 2, unit="process") as bar:
        words, t5 = Path(folder, "captions.txt"), Path(folder, "t5")
        words.write_text("\n".join(captions(num)) + "\n")
        tiny_t5.make(t5, [words], width=width, layers=LAYERS, heads=8, vocab=VOCAB)
        for _ in range(rounds):
            for side in ("transformers", "ours"):
                bar.set_description(side)
                if side == "ours":
                    answer = turns.ours("tools.bench.text_side", side, t5, words, LENGTH)
                else:
                    answer = (
                        peers.ask(
                            failed, f"text/{side}", side, "text_side.py", side, t5, words, LENGTH
                        )
                        or {}
                    )
                for name, taken in answer.pop("seconds", {}).items():
                    rows.setdefault(f"text/{name}", []).append({**answer, "seconds": taken})
                bar.update()
    return {
        **turns.report(rows, seconds, failed, "mindspore"),
        "captions": num,
        "tokens": rows["text/ours"][0]["tokens"] / num,
    }


def seconds(rounds: list[dict[str, Any]]) -> float:
    """Median for all captions."""
    return median(answer["seconds"] for answer in rounds)


def captions(num: int) -> list[str]:
    """Words of two or three syllables, each of them a token; with the end, SHORTEST to LONGEST
    tokens.
    """
    from pipeline.rng import generator

    rng = generator(0, "init")
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(rng.choice(syllables, 2 + number % 2)) for number in range(400)]
    counts = rng.integers(SHORTEST - 1, LONGEST, num)
    return [" ".join(rng.choice(words, count)) for count in counts]


def table(report: dict[str, Any]) -> str:
    """The medians as Markdown, and how many times faster ours is."""
    num = report["captions"]
    found = {
        name: [num / answer["seconds"] for answer in rounds]
        for name, rounds in report["rows"].items()
    }
    measured = f"Medians of {len(found['text/ours'])} rounds of {num} captions of {report['tokens']:.1f} tokens on average"
    headings = ("encoder", "captions/s", "lowest to highest", "ours is")
    lines = turns.speeds(found, "text/ours", headings)
    return "\n".join(
        [*lines, *turns.missing(report, len(headings)), "", turns.footer(report, measured)]
    )
