"""Captions per second of the T5 encoder, beside `transformers` with PyTorch.

Both turn strings into embeddings of up to 128 tokens per caption, in float32, tokenizer included,
from the same folder. `transformers` pads in both of its ways, to the longest caption of a batch of
8 and ("padded") to the whole length. Where others use the machine, PyTorch loses more by it:
compare the ranges, too. `transformers` and PyTorch are installed apart, once, in the user's cache.

The encoder is a random T5 v1.1 of about T5-small's size (8 layers of width 512), as speed does not
depend on values.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from tools.bench.options import add_count
from tools.bench.peers import run_peer
from tools.bench.process import run_worker
from tools.bench.report import Answer, Rows, failed_rows, footer, markdown, speed_rows, summarize

LENGTH = 128  # tokens
WIDTH = 512
LAYERS = 8
HEADS = 8
VOCAB = 1000
SHORTEST = 5  # tokens of a caption, with the end token; uniform
LONGEST = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_count(parser, "--captions", 512, "captions to encode")
    add_count(parser, "--rounds", 3, "rounds of both implementations")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    return measure(arguments.captions, arguments.rounds)


def measure(num: int, rounds: int, *, width: int = WIDTH, layers: int = LAYERS) -> dict[str, Any]:
    """`rows`: seconds for all captions, by implementation and padding."""
    from tqdm import tqdm

    from tools import tiny_t5

    rows: Rows = {}
    failed: dict[str, str] = {}

    with TemporaryDirectory() as folder, tqdm(total=rounds * 2, unit="process") as bar:
        file = Path(folder, "captions.txt")
        file.write_text("\n".join(random_captions(num)) + "\n")
        t5 = Path(folder, "t5")
        tiny_t5.make(t5, [file], width=width, layers=layers, heads=HEADS, vocab=VOCAB)

        for _ in range(rounds):
            # In turn, so that a change of the machine's load meets both.
            for side in ("transformers", "ours"):
                bar.set_description(side)
                arguments = (side, t5, file, LENGTH)
                if side == "ours":
                    answer: Answer | None = run_worker("text", *arguments)
                else:
                    answer = run_peer(failed, f"text/{side}", side, "text", *arguments)

                # One answer of `transformers` holds two rows, one for each padding.
                seconds = answer.pop("seconds") if answer else {}
                for name, taken in seconds.items():
                    rows.setdefault(f"text/{name}", []).append({**(answer or {}), "seconds": taken})
                bar.update()

    return {
        **summarize(rows, median_seconds, packages=["mindspore"], failed=failed),
        "captions": num,
        "tokens": rows["text/ours"][0]["tokens"] / num,
    }


def median_seconds(rounds: Sequence[Answer]) -> float:
    return median(answer["seconds"] for answer in rounds)


def random_captions(num: int) -> list[str]:
    """Captions of SHORTEST to LONGEST tokens; each word of two or three syllables is a token."""
    from pipeline.rng import generator

    rng = generator(0, "init")
    syllables = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
    words = ["".join(rng.choice(syllables, 2 + index % 2)) for index in range(400)]

    # One less than tokens, as the end token follows.
    num_words = rng.integers(SHORTEST - 1, LONGEST, num)
    return [" ".join(rng.choice(words, count)) for count in num_words]


def table(report: dict[str, Any]) -> str:
    """A row per implementation, and how many times faster ours is."""
    num = report["captions"]
    speeds = {
        name: [num / answer["seconds"] for answer in answers]
        for name, answers in report["rows"].items()
    }
    headings = ("encoder", "captions/s", "lowest to highest", "ours is")
    rows = [*speed_rows(speeds, "text/ours"), *failed_rows(report, len(headings))]

    measured = (
        f"Medians of {len(speeds['text/ours'])} rounds of {num} captions "
        f"of {report['tokens']:.1f} tokens on average"
    )
    return "\n".join([*markdown(headings, rows), "", footer(report, measured)])
