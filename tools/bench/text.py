"""Captions a second of the T5 encoder, beside `transformers` with PyTorch: the same folder, captions and processor.

Both turn strings into embeddings of up to 128 tokens a caption, in float32, the tokenizer included. `transformers` pads
in both of its ways, to the longest caption of a batch of 32 and to the whole length. PyTorch and MindSpore would fight
over threads in one process, so each measurement is a process of its own, the two in turns, and medians are told beside
what was lowest and highest: where others use the machine, PyTorch loses more by it.

The encoder is a random T5 v1.1 of about T5-small's size (8 layers of width 512), as speed does not depend on values.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from launch.terminal import positive
from pipeline.errors import UserError
from pipeline.files import write_atomically

LENGTH, WIDTH, LAYERS, VOCAB = 128, 512, 8, 1000
SHORTEST, LONGEST = 5, 60  # tokens of a caption, spread evenly
LIMIT = 900  # seconds a process may take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--captions", type=positive, default=256, metavar="N", help="to encode (%(default)s)")
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="of both sides (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there too")


def run(arguments: argparse.Namespace) -> None:
    if arguments.json and not arguments.json.parent.is_dir():  # rather than after minutes
        raise UserError(f"--json {arguments.json}: {arguments.json.parent} is no folder; make it or name another file")
    if find_spec("torch") is None:
        raise UserError("torch: not installed; the comparison needs the extra: pip install 'imagen-cascade[parity]'")
    report = measure(arguments.captions, arguments.rounds)
    print(table(report))
    if arguments.json:
        try:
            write_atomically(arguments.json, json.dumps(report, indent=2).encode() + b"\n")
        except OSError as error:
            raise UserError(
                f"--json {arguments.json}: cannot be written: {error.strerror}; name another file"
            ) from None


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
                answer = ask(side, Path(folder, "t5"), words)
                for name, taken in answer["seconds"].items():
                    seconds.setdefault(name, []).append(taken)
                bar.update()
    return {
        "captions": num,
        "tokens": answer["tokens"] / num,
        "captions_per_second": {name: [num / taken for taken in found] for name, found in seconds.items()},
        "machine": machine(),
        "versions": {name: version(name) for name in ("mindspore", "transformers", "torch") if find_spec(name)},
    }


def ask(side: str, folder: Path, words: Path) -> dict[str, Any]:
    """What `tools.bench.text_side` answers, in a process of its own."""
    argv = [sys.executable, "-m", "tools.bench.text_side", side, str(folder), str(words), str(LENGTH)]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{side}: no answer in {LIMIT} s; give fewer --captions") from None
    if done.returncode:
        raise RuntimeError(f"{side} ended with {done.returncode}: {done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def captions(num: int) -> list[str]:
    """Words of two or three syllables, each of them a token; with the end, SHORTEST to LONGEST tokens."""
    from pipeline.rng import generator

    rng = generator(0, "init")
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(rng.choice(syllables, 2 + number % 2)) for number in range(400)]
    counts = rng.integers(SHORTEST - 1, LONGEST, num)
    return [" ".join(rng.choice(words, count)) for count in counts]


def machine() -> str:
    """The processor and how many of them this process may use."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} threads"


def table(report: dict[str, Any]) -> str:
    """The medians as Markdown, and how many times faster ours is."""
    speeds = {name: median(found) for name, found in report["captions_per_second"].items()}
    lines = ["| encoder | captions/s | lowest to highest | ours is |", "|---|---|---|---|"]
    for name, found in report["captions_per_second"].items():
        ratio = f"{speeds['ours'] / speeds[name]:.2f} x" if name != "ours" else ""
        lines.append(f"| {name} | {speeds[name]:.1f} | {min(found):.1f} to {max(found):.1f} | {ratio} |")
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"Medians of {len(report['captions_per_second']['ours'])} rounds of {report['captions']} captions of "
            f"{report['tokens']:.1f} tokens on average; {report['machine']}; {versions}.",
        ]
    )
