"""A look at a stage: five pictures of what its network has learned and of how it is sampled.

    grid.png           what it makes
    path.png           how: z and the x that the network sees in it, at eight of the sampler's steps
    steps.png          what more steps are worth: the same noise in 2, 4, 8, 16, 32 steps, and in
        all of discrete time
    interpolation.png  what lies between two noises, and between two prompts
    noising.png        what training sees: a picture under each noise schedule and under the stage's
        own

Between two noises the way is along the sphere, because unit noise in many dimensions has one length
and a straight line would be short of it in the middle (White, arXiv 1609.04468):

    slerp(w) = sin((1 - w) angle) / sin(angle) one + sin(w angle) / sin(angle) other.

What is between is sampled by DDIM, which draws nothing more: so neighbours differ by their noise's
difference alone.

Shapes: B pictures a row, C channels, S side.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor
from tqdm import tqdm

from pipeline.data.decode import Picture
from pipeline.data.image import crop_resize
from pipeline.diffusion.process import add_noise
from pipeline.diffusion.schedule import SCHEDULES, ScheduleConfig
from pipeline.diffusion.solvers import SamplerConfig, logsnr_steps
from pipeline.errors import UserError
from pipeline.files import write_atomically
from pipeline.generate.cascade import Cascade
from pipeline.imaging.contact_sheet import Row, sheet
from pipeline.imaging.user_images import read
from pipeline.rng import sampling_noise
from pipeline.text.prompts import Arrays

COLUMNS = 8  # pictures a row and a call of the network
STEPS = (2, 4, 8, 16, 32)
PATHS, PAIRS = 3, 4  # rows of path.png and of interpolation.png


def slerp(one: np.ndarray, other: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """float32 (N, ...): what lies on the sphere at `shares` in [0, 1] of the way from one to other."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    angle = np.arccos((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))
    return np.stack(
        [
            (np.sin((1 - w) * angle) * one + np.sin(w * angle) * other) / np.sin(angle)
            for w in shares
        ]
    ).astype(np.float32)


def between(one: Arrays, other: Arrays, shares: Sequence[float]) -> Arrays:
    """Prompts of N rows from two of one row each, evenly mixed; of text, the tokens of either are
    looked at.
    """
    w = np.array(shares, np.float32)
    mixed = tuple(
        (1 - w.reshape(-1, *(1,) * (a.ndim - 1))) * a + w.reshape(-1, *(1,) * (a.ndim - 1)) * b
        for a, b in zip(one, other, strict=True)
    )
    return (mixed[0], (mixed[1] > 0).astype(np.float32)) if len(mixed) == 2 else mixed


@dataclass(frozen=True)
class Explorer:
    """A stage, sampled in rows of eight.

    Args:
        stage: as `pipeline.stage.registry` gives it; one that takes no picture.
        names, prompt: what it is told, and this as arrays, a row each; "" and no array where it is
            told nothing.
        seed: names the noises.
        progress: called after each step of sampling.
    """

    stage: Any
    names: Sequence[str]
    prompt: Arrays
    seed: int
    progress: Callable[[], object]

    @property
    def config(self) -> SamplerConfig:
        return replace(self.stage.config.sample, batch=COLUMNS)

    @property
    def schedule(self) -> ScheduleConfig:
        """The noise levels of sampling."""
        return self.config.schedule or self.stage.config.diffusion

    @property
    def steps(self) -> list[int]:
        """Numbers of steps to compare: in discrete time no more than there are, and all of them."""
        most = self.schedule.timesteps
        return (
            list(STEPS) if most is None else [number for number in STEPS if number < most] + [most]
        )

    def calls(self, num: int) -> int:
        """Calls of the network that all sheets take together."""
        own = len(self.logsnrs) - 1
        between_prompts = bool(self.prompt) and len(self.names) > 1
        compared = sum(number + self.config.extra_steps for number in self.steps)
        return own * (-(-num // COLUMNS) + 1 + PAIRS + between_prompts) + compared

    @property
    def logsnrs(self) -> np.ndarray:
        return logsnr_steps(self.schedule, self.config.steps, self.config.extra_steps)

    def told(self, numbers: Sequence[int]) -> Arrays:
        """Picture i is told prompt i, in turn."""
        return tuple(array[np.mod(numbers, len(self.names))] for array in self.prompt)

    def sample(
        self, config: SamplerConfig, prompt: Arrays, numbers: Sequence[int], **hooks: Any
    ) -> np.ndarray:
        made: np.ndarray = self.stage.sample(
            config, prompt, self.seed, numbers, progress=self.progress, **hooks
        )
        return made

    def grid(self, num: int) -> list[Row]:
        """Pictures 0 to `num` - 1, as `cascade sample` makes them."""
        rows = []
        for begin in range(0, num, COLUMNS):
            numbers = range(begin, begin + COLUMNS)
            made = self.sample(self.config, self.told(numbers), numbers)[: num - begin]
            rows.append(
                Row(
                    "",
                    [self.names[i % len(self.names)] for i in numbers] if self.prompt else (),
                    made,
                )
            )
        return rows

    def path(self) -> list[Row]:
        """For some pictures a row of z and one of x."""
        logsnrs = self.logsnrs[:-1]
        shown = logsnrs[
            np.unique(np.linspace(0, len(logsnrs) - 1, COLUMNS).round().astype(int))
        ].tolist()
        seen: list[list[np.ndarray]] = [[], []]

        def watch(logsnr: float, *tensors: Tensor) -> None:
            if logsnr in shown:
                for kept, tensor in zip(seen, tensors, strict=True):
                    kept.append(self.stage.to_pictures(tensor.asnumpy()))

        numbers = range(COLUMNS)
        self.sample(self.config, self.told(numbers), numbers, watch=watch)
        captions = [f"logsnr {logsnr:.1f}" for logsnr in shown]
        return [
            Row(
                name,
                captions if i == 0 and name == "z" else (),
                np.stack([step[i] for step in kept]),
            )
            for i in range(PATHS)
            for name, kept in zip("zx", seen, strict=True)
        ]

    def by_steps(self) -> list[Row]:
        """The same pictures, a row a number of steps."""
        numbers = range(COLUMNS)
        return [
            Row(
                f"{steps} steps",
                (),
                self.sample(replace(self.config, steps=steps), self.told(numbers), numbers),
            )
            for steps in self.steps
        ]

    def interpolation(self) -> list[Row]:
        """From noise to noise under the first prompt, and from the first prompt to the second under
        one noise.
        """
        config, shares = replace(self.config, sampler="ddim"), np.linspace(0, 1, COLUMNS).tolist()
        size, numbers = self.stage.config.size, range(COLUMNS)
        noises = sampling_noise(self.seed, range(2 * PAIRS), (3, size, size), 0)
        one, other = (tuple(array[i : i + 1] for array in self.prompt) for i in range(2))
        rows = []
        for i in range(PAIRS):
            start = slerp(noises[2 * i], noises[2 * i + 1], shares)
            made = self.sample(config, between(one, one, shares), numbers, start=start)
            rows.append(Row(f"noise {2 * i} to {2 * i + 1}", (), made))
        if self.prompt and len(self.names) > 1:
            start = np.repeat(noises[:1], COLUMNS, axis=0)
            made = self.sample(config, between(one, other, shares), numbers, start=start)
            rows.append(Row(f"{self.names[0]} to {self.names[1]}", (), made))
        return rows

    def noising(self, picture: np.ndarray) -> list[Row]:
        """A picture uint8 (S, S, 3) at eight times, evenly from 0 to 1, a row a schedule; always
        the same noise.
        """
        schedules: dict[str, ScheduleConfig] = {
            name: ScheduleConfig(schedule=name) for name in SCHEDULES
        }
        schedules["the stage's own"] = self.stage.config.diffusion
        x = np.repeat(self.stage.from_pictures(picture[None]), COLUMNS, axis=0)
        eps = np.repeat(sampling_noise(self.seed, [0], x.shape[1:], 0), COLUMNS, axis=0)
        rows = []
        for name, schedule in schedules.items():
            logsnr = schedule.logsnr(np.linspace(0, 1, COLUMNS))
            z = add_noise(Tensor(x), Tensor(eps), Tensor(logsnr.astype(np.float32))).asnumpy()
            rows.append(
                Row(name, [f"logsnr {number:.1f}" for number in logsnr], self.stage.to_pictures(z))
            )
        return rows


def read_picture(path: Path, size: int) -> np.ndarray:
    """A picture's file as uint8 (size, size, 3), its middle."""
    pixels = read(path)
    return crop_resize(Picture(pixels, *pixels.shape[:2]), size, 0.5, 0.5)


def explore(
    cascade: Cascade,
    prompts: Sequence[str],
    folder: Path,
    seed: int,
    num: int,
    picture: np.ndarray | None = None,
) -> list[str]:
    """Draws the sheets of a cascade's first stage into `folder`; their names.

    Args:
        prompts: what pictures are told, in turn; between the first two lies a row of interpolation.
        num: pictures in grid.png.
        picture: uint8 (S, S, 3), to be noised; None: the first that the stage makes.
    """
    name, stage = next(iter(cascade.stages.items()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made ({error.strerror}); choose another --out"
        ) from None
    with tqdm(unit="step") as bar:
        explorer = Explorer(stage, prompts, cascade.prompt(name, prompts), seed, bar.update)
        bar.total = explorer.calls(num)
        grid = explorer.grid(num)
        first = grid[0].pictures[0] if picture is None else picture
        sheets = {
            "grid": lambda: grid,
            "path": explorer.path,
            "steps": explorer.by_steps,
            "interpolation": explorer.interpolation,
            "noising": lambda: explorer.noising(first),
        }
        for title, rows in sheets.items():
            bar.set_description(title)
            buffer = io.BytesIO()
            sheet(rows()).save(buffer, "PNG", optimize=True)
            write_atomically(folder / f"{title}.png", buffer.getvalue())
    return [f"{title}.png" for title in sheets]
