"""How well image-to-image stages restore pictures that they have not seen, beside the degraded ones
and what needs no network, a simple baseline (tools/baselines.py) and the guess that a stage with
spreads starts from: peak signal-to-noise ratio and structural similarity of each task, as Markdown.

    python -m tools.restoration RUN/stage [...] --shards 'held_out/*.tar' --out DIR

DIR gets a folder of restored pictures for each line of it, as `cascade restore` makes it and goes
on with it, and `overview.png`: input, samples, their spread and the truth, of another picture in
each row.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pipeline.errors import UserError
from pipeline.imaging.contact_sheet import Row, contact_sheet
from pipeline.rng import generator
from pipeline.terminal import Parser, positive, run

SHOWN = 3  # samples in the overview
COLOURS = 1024  # pictures of training whose colour is averaged


class Case(NamedTuple):
    """A picture of a task: uint8 (S, S, 3), what is given of it (see
    pipeline/imaging/degradations.py), and its file's name.
    """

    name: str
    truth: np.ndarray
    given: Any


def main(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="python -m tools.restoration", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument(
        "stages", metavar="STAGE", nargs="+", help="stage folders, which know different tasks"
    )
    parser.add_argument(
        "--shards", metavar="TAR", nargs="+", required=True, help="pictures that they have not seen"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="folder for the restored pictures"
    )
    parser.add_argument(
        "--num", metavar="N", type=positive, default=64, help="pictures of each task (default 64)"
    )
    parser.add_argument(
        "--samples", metavar="N", type=positive, default=4, help="of each picture (default 4)"
    )
    parser.add_argument(
        "--steps", metavar="S", type=positive, help="network calls (default: as the stage says)"
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of damage and noise (default 0)"
    )
    parser.add_argument(
        "--train", metavar="TAR", nargs="+", help="their mean colour is a baseline (default: grey)"
    )
    arguments = parser.parse_args(argv)

    from pipeline.generate.cascade import Cascade

    check(arguments.stages)
    lines = [
        "| | degraded | baseline | guess | a sample | mean of samples |",
        "|---|---|---|---|---|---|",
    ]
    rows: list[Row] = []
    for folder in arguments.stages:
        cascade = Cascade.load(folder)
        (manifest,) = cascade.manifests.values()
        pictures = read(tuple(arguments.shards), manifest.size_out, arguments.num)
        chroma = colour(arguments.train, manifest.size_out)
        for task in manifest.tasks:
            for title, cases in damages(task, pictures, arguments.seed).items():
                lines.append(measured(cascade, task, title, cases, chroma, arguments))
                rows.append(
                    row(arguments.out, title, cases[len(rows) % len(cases)], arguments.samples)
                )
    contact_sheet(rows).save(arguments.out / "overview.png")
    print("\n".join(lines))
    print(
        f"PSNR in dB (SSIM), means of {len(pictures)} pictures; {arguments.samples} samples of each; "
        f"pictures in {arguments.out}"
    )


def check(stages: Sequence[str]) -> None:
    """UserError for a stage that restores nothing, and for a task that two of them know."""
    from pipeline.generate.cascade_folder import read_cascade
    from pipeline.generate.restore import check_restores

    first: dict[str, str] = {}
    for folder in stages:
        for task in check_restores(read_cascade(Path(folder))[0]):
            if task in first:
                raise UserError(
                    f"{folder}: knows {task}, and {first[task]} does too; measure one after the other"
                )
            first[task] = folder


@cache  # stages are mostly of one size
def read(shards: tuple[str, ...], size: int, num: int) -> list[tuple[str, np.ndarray]]:
    """The first `num` pictures, brought to `size`, and their names."""
    from pipeline.data.decode import decode
    from pipeline.data.image import crop_resize
    from pipeline.data.shards import DataConfig, Shards

    found = Shards.open(DataConfig(shards=shards, captions={}))
    numbers = range(min(num, len(found)))
    return [
        (f"{n:05d}", crop_resize(decode(found.image(n), size), size, 0.5, 0.5)) for n in numbers
    ]


def colour(shards: Sequence[str] | None, size: int) -> np.ndarray | None:
    """The mean colour of the first pictures, (3,); None: grey."""
    from tools.baselines import mean_chroma

    return (
        mean_chroma(picture for _, picture in read(tuple(shards), size, COLOURS))
        if shards
        else None
    )


def damages(
    task: str, pictures: Sequence[tuple[str, np.ndarray]], seed: int
) -> dict[str, list[Case]]:
    """The pictures degraded as in training and, as Palette is measured, inpainting's with a hole in
    the centre too.
    """
    from pipeline.imaging.degradations import center_mask, with_hole

    found = {task: [damage(task, name, truth, seed, n) for n, (name, truth) in enumerate(pictures)]}
    if task == "inpainting":
        found["inpainting_centre"] = [
            Case(
                name,
                truth,
                with_hole(truth, center_mask(len(truth)), generator(seed, "damage", 0, n)),
            )
            for n, (name, truth) in enumerate(pictures)
        ]
    return found


def damage(task: str, name: str, truth: np.ndarray, seed: int, number: int) -> Case:
    from pipeline.imaging.degradations import degrade

    return Case(name, truth, degrade(task, truth, generator(seed, "damage", 0, number)))


def measured(
    cascade: Any,
    task: str,
    title: str,
    cases: Sequence[Case],
    chroma: np.ndarray | None,
    arguments: Any,
) -> str:
    """Restores them into a folder of this title; a line of the table."""
    from pipeline.data.image import to_uint8
    from pipeline.generate.restore import Damage, RestoreOptions, restore
    from pipeline.imaging.degradations import prior_mean
    from tools.baselines import baseline

    given = [
        Damage(case.name, to_uint8(case.given.source), case.given.mask[0] == 1) for case in cases
    ]
    how = RestoreOptions(task=task, seed=arguments.seed, samples=arguments.samples)
    folder = arguments.out / title
    restore(cascade, given, how, folder, steps=arguments.steps)
    scores = []
    for case in cases:
        samples = np.stack(samples_of(folder, case, arguments.samples))
        mean = np.rint(samples.mean(0)).astype(np.uint8)
        guessed = to_uint8(prior_mean(task, case.given))
        shown = (before(case), baseline(task, case.given, chroma), guessed, samples[0], mean)
        scores.append([score(picture, case.truth) for picture in shown])
    cells = (f"{psnr:.1f} ({ssim:.3f})" for psnr, ssim in np.mean(scores, 0))
    return f"| {title} | {' | '.join(cells)} |"


def before(case: Case) -> np.ndarray:
    """The degraded picture, its hole in grey."""
    from pipeline.data.image import to_uint8

    source, mask = to_uint8(case.given.source), case.given.mask[0] == 1
    return source if mask.all() else np.where(mask[..., None], np.uint8(128), source)


def score(picture: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """PSNR in dB, at most 60 (no difference at all would be infinite), and SSIM (Wang et al.,
    2004).
    """
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    same = (picture == truth).all()
    psnr = (
        60.0 if same else min(float(peak_signal_noise_ratio(truth, picture, data_range=255)), 60.0)
    )
    return psnr, float(structural_similarity(truth, picture, channel_axis=-1, data_range=255))


def samples_of(folder: Path, case: Case, num: int) -> list[np.ndarray]:
    names = [f"{case.name}.sample_{n}.png" for n in range(num)] if num > 1 else [f"{case.name}.png"]
    return [pixels(folder / name) for name in names]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def row(folder: Path, title: str, case: Case, num: int) -> Row:
    samples = samples_of(folder / title, case, num)[:SHOWN]
    spread = [pixels(folder / title / f"{case.name}.spread.png")] if num > 1 else []
    captions = [
        "degrade",
        *(f"sample {n}" for n in range(len(samples))),
        *["spread"] * len(spread),
        "truth",
    ]
    return Row(title, captions, np.stack([before(case), *samples, *spread, case.truth]))


if __name__ == "__main__":
    run(main)
