"""How well image-to-image stages restore held-out images: PSNR and SSIM of each task, as Markdown.

    python -m tools.restoration RUN/stage [...] --shards 'held_out/*.tar' --out DIR

Each row compares the degraded image, a baseline without a network (tools/baselines.py), the prior
mean from which a stage may start, one sample, and the mean of several samples.

DIR gets a folder of restored images per row, as `cascade restore` writes it and continues it, and
`overview.png`: input, samples, their standard deviation and the ground truth of one image per row.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pipeline.errors import UserError
from pipeline.imaging.contact_sheet import Row, contact_sheet
from pipeline.rng import generator
from pipeline.terminal import Parser, positive, run

NUM_SHOWN = 3  # samples in the overview
NUM_CHROMA = 1024  # training images whose mean chroma colours the baseline
HOLE_GREY = 128  # level of a hole where a degraded image is shown or scored
MAX_PSNR = 60.0  # dB, in place of infinity for equal images
HEADINGS = ("", "degraded", "baseline", "prior mean", "a sample", "mean of samples")


class NamedImage(NamedTuple):
    """An image of the shards, uint8 (S, S, 3), and the stem of its files."""

    name: str
    pixels: np.ndarray


class Case(NamedTuple):
    """An image to restore."""

    name: str  # stem of its files
    truth: np.ndarray  # uint8 (S, S, 3)
    degraded: Any  # pipeline.imaging.degradations.Degraded


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings shared by all tasks of a stage."""

    out: Path
    seed: int  # of degradations and noise
    samples: int  # per image
    steps: int | None  # network calls; None: as the stage's configuration says
    chroma: np.ndarray | None  # (3,) for the colorization baseline; None: grey


def main(argv: Sequence[str]) -> None:
    arguments = parse_arguments(argv)

    from pipeline.generate.cascade import Cascade

    # Before anything is loaded or sampled.
    check_stages(arguments.stages)
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    rows: list[Row] = []

    for folder in arguments.stages:
        cascade = Cascade.load(folder)
        (manifest,) = cascade.manifests.values()
        images = read_images(tuple(arguments.shards), manifest.size_out, arguments.num)
        settings = Settings(
            out=arguments.out,
            seed=arguments.seed,
            samples=arguments.samples,
            steps=arguments.steps,
            chroma=read_chroma(arguments.train, manifest.size_out),
        )

        for task in manifest.tasks:
            for title, cases in cases_of(task, images, arguments.seed).items():
                restore_cases(cascade, task, title, cases, settings)
                lines.append(table_row(task, title, cases, settings))
                # Each row of the overview shows another image.
                rows.append(overview_row(title, cases[len(rows) % len(cases)], settings))

    contact_sheet(rows).save(arguments.out / "overview.png")
    print("\n".join(lines))
    print(
        f"PSNR in dB (SSIM), means of {len(images)} images; {arguments.samples} samples of each; "
        f"images in {arguments.out}"
    )


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    description = (__doc__ or "").partition("\n\n")[0]
    parser = Parser(prog="python -m tools.restoration", description=description)
    parser.add_argument(
        "stages", metavar="STAGE", nargs="+", help="stage folders, trained for different tasks"
    )
    parser.add_argument("--shards", metavar="TAR", nargs="+", required=True, help="held-out images")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="folder for the restored images"
    )
    parser.add_argument(
        "--num", metavar="N", type=positive, default=64, help="images per task (%(default)s)"
    )
    parser.add_argument(
        "--samples", metavar="N", type=positive, default=4, help="samples per image (%(default)s)"
    )
    parser.add_argument(
        "--steps", metavar="S", type=positive, help="network calls (default: the stage's own)"
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="seed of degradations and noise (%(default)s)",
    )
    parser.add_argument(
        "--train",
        metavar="TAR",
        nargs="+",
        help="training images, whose mean chroma colours the baseline (default: grey)",
    )
    return parser.parse_args(argv)


def check_stages(stages: Sequence[str]) -> None:
    """UserError for a stage that restores nothing, and for a task of two stages."""
    from pipeline.generate.cascade_folder import read_cascade
    from pipeline.generate.restore import stage_tasks

    stage_of: dict[str, str] = {}
    for folder in stages:
        for task in stage_tasks(read_cascade(Path(folder))[0]):
            # Both stages would write into the folder of the task.
            if task in stage_of:
                raise UserError(
                    f"{folder}: was trained for {task}, as {stage_of[task]} was; "
                    "measure one after the other"
                )
            stage_of[task] = folder


# Inputs.


@cache  # most stages have one size
def read_images(shards: tuple[str, ...], size: int, num: int) -> list[NamedImage]:
    """The first `num` images, cropped and resized to `size`."""
    from pipeline.data.config import DataConfig
    from pipeline.data.decode import decode
    from pipeline.data.image import crop_resize
    from pipeline.data.shards import Shards

    # Without captions: images that have none count too.
    dataset = Shards.open(DataConfig(shards=shards, captions={}))
    return [
        NamedImage(f"{i:05d}", crop_resize(decode(dataset.image(i), size), size, 0.5, 0.5))
        for i in range(min(num, len(dataset)))
    ]


def read_chroma(shards: Sequence[str] | None, size: int) -> np.ndarray | None:
    """The mean chroma of the first images, (3,); None without shards."""
    from tools.baselines import mean_chroma

    if not shards:
        return None
    return mean_chroma(image.pixels for image in read_images(tuple(shards), size, NUM_CHROMA))


def cases_of(task: str, images: Sequence[NamedImage], seed: int) -> dict[str, list[Case]]:
    """The images degraded as in training, by the title of their row.

    Inpainting has a second row with a hole in the centre, as Palette is measured.
    """
    from pipeline.imaging.degradations import center_mask, degrade, with_hole

    # Of an image's number alone: with another --num the same images are degraded alike.
    def rng(i: int) -> np.random.Generator:
        return generator(seed, "damage", 0, i)

    cases = {
        task: [
            Case(name, truth, degrade(task, truth, rng(i)))
            for i, (name, truth) in enumerate(images)
        ]
    }
    if task == "inpainting":
        cases["inpainting_centre"] = [
            Case(name, truth, with_hole(truth, center_mask(len(truth)), rng(i)))
            for i, (name, truth) in enumerate(images)
        ]
    return cases


# Measurement.


def restore_cases(
    cascade: Any, task: str, title: str, cases: Sequence[Case], settings: Settings
) -> None:
    """Restores the images into the folder of this title; those that are there already stay."""
    from pipeline.data.image import to_uint8
    from pipeline.generate.restore import ImageToRestore, RestoreOptions, restore

    inputs = [
        ImageToRestore(
            name=case.name,
            # In 8 bits, as a user's file would hold it.
            image=to_uint8(case.degraded.source),
            mask=case.degraded.mask[0] == 1,
        )
        for case in cases
    ]
    options = RestoreOptions(task=task, seed=settings.seed, samples=settings.samples)
    restore(cascade, inputs, options, settings.out / title, steps=settings.steps)


def table_row(task: str, title: str, cases: Sequence[Case], settings: Settings) -> str:
    """A row of the Markdown table: mean scores of the restored images, as HEADINGS says."""
    from pipeline.data.image import to_uint8
    from pipeline.imaging.degradations import prior_mean
    from tools.baselines import baseline

    scores = []
    for case in cases:
        # From the files: what is scored is what a user gets.
        samples = np.stack(read_samples(settings.out / title, case, settings.samples))
        images = (
            shown(case),
            baseline(task, case.degraded, settings.chroma),
            to_uint8(prior_mean(task, case.degraded)),
            samples[0],
            np.rint(samples.mean(0)).astype(np.uint8),
        )
        scores.append([score(image, case.truth) for image in images])

    cells = (f"{psnr:.1f} ({ssim:.3f})" for psnr, ssim in np.mean(scores, 0))
    return f"| {title} | {' | '.join(cells)} |"


def shown(case: Case) -> np.ndarray:
    """The degraded image, its hole in grey, uint8 (S, S, 3)."""
    from pipeline.data.image import to_uint8

    source = to_uint8(case.degraded.source)
    mask = case.degraded.mask[0] == 1
    # A mask that is all ones is no hole: the task generates every pixel.
    return source if mask.all() else np.where(mask[..., None], np.uint8(HOLE_GREY), source)


def score(image: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """PSNR in dB, at most MAX_PSNR, and SSIM (Wang et al., 2004) of uint8 (H, W, 3)."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    psnr = MAX_PSNR
    # Of equal images it is infinite, and so would be the mean over images.
    if (image != truth).any():
        psnr = min(float(peak_signal_noise_ratio(truth, image, data_range=255)), MAX_PSNR)

    ssim = structural_similarity(truth, image, channel_axis=-1, data_range=255)
    return psnr, float(ssim)


# Outputs.


def read_samples(folder: Path, case: Case, num: int) -> list[np.ndarray]:
    """The samples of an image, as `cascade restore` names them."""
    # A single sample is the result itself.
    if num == 1:
        return [read_pixels(folder / f"{case.name}.png")]
    return [read_pixels(folder / f"{case.name}.sample_{i}.png") for i in range(num)]


def read_pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def overview_row(title: str, case: Case, settings: Settings) -> Row:
    """Input, samples, their standard deviation and the ground truth of an image."""
    folder = settings.out / title
    samples = read_samples(folder, case, settings.samples)[:NUM_SHOWN]
    # `restore` writes it only for several samples.
    std = [read_pixels(folder / f"{case.name}.std.png")] if settings.samples > 1 else []

    captions = [
        "degraded",
        *(f"sample {i}" for i in range(len(samples))),
        *["std"] * len(std),
        "truth",
    ]
    return Row(title, captions, np.stack([shown(case), *samples, *std, case.truth]))


if __name__ == "__main__":
    run(main)
