"""Captions a second of the T5 encoder, beside `transformers` with PyTorch: the same folder, captions and processor.

Both turn strings into embeddings of up to 128 tokens a caption, in float32, the tokenizer included. `transformers` pads
in both of its ways, to the longest caption of a batch of 8 and to the whole length. PyTorch and MindSpore would fight
over threads in one process, so each measurement is a process of its own, the two in turns, and medians are told beside
what was lowest and highest: where others use the machine, PyTorch loses more by it.

The encoder is a random T5 v1.1 of about T5-small's size (8 layers of width 512), as speed does not depend on values.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from launch.terminal import positive
from pipeline.errors import UserError
from tools.bench import turns

LENGTH, WIDTH, LAYERS, VOCAB = 128, 512, 8, 1000
SHORTEST, LONGEST = 5, 60  # tokens of a caption, spread evenly


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--captions", type=positive, default=512, metavar="N", help="to encode (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="of both sides (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")


def run(arguments: argparse.Namespace) -> None:
    turns.place(arguments.json)
    if find_spec("torch") is None:
        raise UserError("torch: not installed; the comparison needs the extra: pip install 'imagen-cascade[parity]'")
    report = measure(arguments.captions, arguments.rounds)
    print(table(report))
    turns.save(report, arguments.json)


def measure(num: int, rounds: int, sides: tuple[str, ...] = ("torch", "ours"), width: int = WIDTH) -> dict[str, Any]:
    """Captions a second by round, and what they were measured on."""
    from tqdm import tqdm

    from tools import tiny_t5

    seconds: dict[str, list[float]] = {}
    with TemporaryDirectory() as folder, tqdm(total=rounds * len(sides), unit="process") as bar:
        words = Path(folder, "captions.txt")
        words.write_text("\n".join(captions(num)) + "\n")
        tiny_t5.make(Path(folder, "t5"), [words], width=width, layers=LAYERS, heads=8, vocab=VOCAB)
        for _ in range(rounds):
            for side in sides:
                bar.set_description(side)
                answer = turns.ask("tools.bench.text_side", side, Path(folder, "t5"), words, LENGTH)
                for name, taken in answer["seconds"].items():
                    seconds.setdefault(name, []).append(taken)
                bar.update()
    return {
        "captions": num,
        "tokens": answer["tokens"] / num,
        "captions_per_second": {name: [num / taken for taken in found] for name, found in seconds.items()},
        **turns.about("mindspore", "transformers", "torch"),
    }


def captions(num: int) -> list[str]:
    """Words of two or three syllables, each of them a token; with the end, SHORTEST to LONGEST tokens."""
    from pipeline.rng import generator

    rng = generator(0, "init")
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(rng.choice(syllables, 2 + number % 2)) for number in range(400)]
    counts = rng.integers(SHORTEST - 1, LONGEST, num)
    return [" ".join(rng.choice(words, count)) for count in counts]


def table(report: dict[str, Any]) -> str:
    """The medians as Markdown, and how many times faster ours is."""
    found = report["captions_per_second"]
    measured = (
        f"Medians of {len(found['ours'])} rounds of {report['captions']} captions of {report['tokens']:.1f} tokens on "
        "average"
    )
    lines = turns.speeds(found, "ours", ("encoder", "captions/s", "lowest to highest", "ours is"))
    return "\n".join([*lines, "", turns.footer(report, measured)])
