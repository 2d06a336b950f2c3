"""A look at a stage: five images of what its network has learned and of how it is sampled.

    grid.png           samples
    path.png           z and the x that the network predicts from it, at eight of the steps
    steps.png          the same noise in 2, 4, 8, 16, 32 steps, and in all of discrete time
    interpolation.png  between two noises, and between two prompts
    noising.png        an image under each noise schedule and under the stage's own

Between two noises the way is along the sphere, because unit noise in many dimensions has one length
and a straight line would be short of it in the middle (White, arXiv 1609.04468):

    slerp(w) = sin((1 - w) angle) / sin(angle) one + sin(w angle) / sin(angle) other.

What is between is sampled by DDIM, which draws no further noise: so neighbours differ by their
initial noise alone.

Shapes: B images per row, C channels, S side.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from mindspore import Tensor
from tqdm import tqdm

from pipeline.data.decode import DecodedImage
from pipeline.data.image import crop_resize
from pipeline.diffusion.process import add_noise
from pipeline.diffusion.schedule import SCHEDULES, ScheduleConfig
from pipeline.diffusion.solvers import SamplerConfig, logsnr_steps
from pipeline.errors import UserError
from pipeline.files import write_atomically
from pipeline.generate.cascade import Cascade, advance
from pipeline.generate.engine import OnStep, SampleStep, num_calls, sample
from pipeline.imaging.contact_sheet import Row, contact_sheet
from pipeline.imaging.user_images import read_image
from pipeline.rng import sampling_noise
from pipeline.stage.inputs import Arrays
from pipeline.stage.request import SampleRequest
from pipeline.stage.stage import Stage

COLUMNS = 8  # images per row and per call of the network
STEPS = (2, 4, 8, 16, 32)
NUM_PATHS = 3  # images in path.png
NUM_PAIRS = 4  # of noises in interpolation.png


def slerp(one: np.ndarray, other: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """float32 (N, ...): points on the sphere at `shares` in [0, 1] of the way from one to other."""
    one = one.astype(np.float64)
    other = other.astype(np.float64)
    angle = np.arccos((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other))
    points = [
        (np.sin((1 - w) * angle) * one + np.sin(w * angle) * other) / np.sin(angle) for w in shares
    ]
    return np.stack(points).astype(np.float32)


def mix_prompts(one: Arrays, other: Arrays, shares: Sequence[float]) -> Arrays:
    """Prompts of N rows from two of one row each, linearly mixed; the tokens of either text are
    attended to.
    """
    mixed = {}
    for name, array in one.items():
        w = np.array(shares, np.float32).reshape((-1,) + (1,) * (array.ndim - 1))
        mixed[name] = (1 - w) * array + w * other[name]
    # A mask has no values in between: a token of either text is attended to at every share.
    if "text_mask" in mixed:
        mixed["text_mask"] = (mixed["text_mask"] > 0).astype(np.float32)
    return mixed


@dataclass(frozen=True, kw_only=True)
class Inspector:
    """A stage, sampled in rows of eight.

    Args:
        stage: one that starts from noise alone.
        prompts: what its images are conditioned on, in turn; "" for an unconditional stage.
        arrays: the same as named arrays, a row each; {} for an unconditional stage.
        seed: of the noise.
        on_step: called after each call of the network.
    """

    stage: Stage
    prompts: Sequence[str]
    arrays: Arrays
    seed: int
    on_step: OnStep

    @property
    def config(self) -> SamplerConfig:
        return replace(self.stage.config.sample, batch_size=COLUMNS)

    @property
    def schedule(self) -> ScheduleConfig:
        """The noise levels of sampling."""
        return self.config.schedule or self.stage.config.diffusion

    @property
    def steps(self) -> list[int]:
        """Numbers of steps to compare: in discrete time no more than there are, and all of them."""
        most = self.schedule.timesteps
        if most is None:
            return list(STEPS)
        return [steps for steps in STEPS if steps < most] + [most]

    @property
    def mixes_prompts(self) -> bool:
        return bool(self.arrays) and len(self.prompts) > 1

    def total_calls(self, num_images: int) -> int:
        """Calls of the network for all contact sheets together."""
        # Rows of samples: those of grid.png, one for path.png, and those of interpolation.png.
        rows = -(-num_images // COLUMNS) + 1 + NUM_PAIRS + self.mixes_prompts
        own = num_calls(self.stage, self.config, COLUMNS)
        compared = [
            num_calls(self.stage, replace(self.config, steps=steps), COLUMNS)
            for steps in self.steps
        ]
        return own * rows + sum(compared)

    def prompt(self, image_ids: Sequence[int]) -> Arrays:
        """Image i has prompt i, in turn."""
        rows = np.mod(image_ids, len(self.prompts))
        return {name: array[rows] for name, array in self.arrays.items()}

    def row(
        self,
        config: SamplerConfig,
        prompt: Arrays,
        image_ids: Sequence[int],
        *,
        initial_noise: np.ndarray | None = None,
        on_step: OnStep | None = None,
    ) -> np.ndarray:
        """One row of samples, uint8 (B, S, S, 3)."""
        request = SampleRequest(
            prompt=prompt, seed=self.seed, image_ids=image_ids, initial_noise=initial_noise
        )
        return sample(self.stage, config, request, on_step or self.on_step)

    def grid(self, num_images: int) -> list[Row]:
        """Images 0 to `num_images` - 1, as `cascade sample` generates them."""
        rows = []
        for begin in range(0, num_images, COLUMNS):
            image_ids = range(begin, begin + COLUMNS)
            images = self.row(self.config, self.prompt(image_ids), image_ids)
            captions = [self.prompts[i % len(self.prompts)] for i in image_ids]
            rows.append(Row("", captions if self.arrays else (), images[: num_images - begin]))
        return rows

    def path(self) -> list[Row]:
        """For some images: a row of z and one of x."""
        # Without infinity at the end, where the network is not called.
        logsnrs = logsnr_steps(self.schedule, self.config.steps, self.config.extra_steps)[:-1]
        places = np.unique(np.linspace(0, len(logsnrs) - 1, COLUMNS).round().astype(int))
        shown = logsnrs[places].tolist()
        images: dict[str, list[np.ndarray]] = {"z": [], "x": []}

        def on_step(step: SampleStep) -> None:
            self.on_step(step)
            # Equal to the bit: the engine takes its levels from the same function.
            if step.logsnr in shown:
                images["z"].append(self.stage.to_images(step.z.asnumpy()))
                images["x"].append(self.stage.to_images(step.x.asnumpy()))

        image_ids = range(COLUMNS)
        self.row(self.config, self.prompt(image_ids), image_ids, on_step=on_step)

        rows = []
        for i in range(NUM_PATHS):
            for name, steps in images.items():
                first = i == 0 and name == "z"
                captions = [f"logsnr {logsnr:.1f}" for logsnr in shown] if first else ()
                rows.append(Row(name, captions, np.stack([step[i] for step in steps])))
        return rows

    def by_steps(self) -> list[Row]:
        """The same images, a row a number of steps."""
        image_ids = range(COLUMNS)
        rows = []
        for steps in self.steps:
            config = replace(self.config, steps=steps)
            images = self.row(config, self.prompt(image_ids), image_ids)
            rows.append(Row(f"{steps} steps", (), images))
        return rows

    def interpolation(self) -> list[Row]:
        """From noise to noise under the first prompt, and from the first prompt to the second under
        one noise.
        """
        # Ancestral sampling would draw further noise, another for each image.
        config = replace(self.config, sampler="ddim")
        shares = np.linspace(0, 1, COLUMNS).tolist()
        image_ids = range(COLUMNS)
        size = self.stage.config.size
        noises = sampling_noise(self.seed, range(2 * NUM_PAIRS), (3, size, size), 0)
        # Of a single prompt the second part is empty, and not used.
        one, other = (
            {name: array[i : i + 1] for name, array in self.arrays.items()} for i in range(2)
        )

        rows = []
        same_prompt = mix_prompts(one, one, shares)
        for i in range(0, 2 * NUM_PAIRS, 2):
            noise = slerp(noises[i], noises[i + 1], shares)
            images = self.row(config, same_prompt, image_ids, initial_noise=noise)
            rows.append(Row(f"noise {i} to {i + 1}", (), images))

        if self.mixes_prompts:
            noise = np.repeat(noises[:1], COLUMNS, axis=0)
            prompt = mix_prompts(one, other, shares)
            images = self.row(config, prompt, image_ids, initial_noise=noise)
            rows.append(Row(f"{self.prompts[0]} to {self.prompts[1]}", (), images))
        return rows

    def noising(self, image: np.ndarray) -> list[Row]:
        """uint8 (S, S, 3) at eight times, evenly from 0 to 1, a row a schedule; always the same
        noise.
        """
        schedules: dict[str, ScheduleConfig] = {
            name: ScheduleConfig(schedule=name) for name in SCHEDULES
        }
        schedules["the stage's own"] = self.stage.config.diffusion

        x = np.repeat(self.stage.from_images(image[None]), COLUMNS, axis=0)
        eps = np.repeat(sampling_noise(self.seed, [0], x.shape[1:], 0), COLUMNS, axis=0)

        rows = []
        for name, schedule in schedules.items():
            logsnr_B = schedule.logsnr(np.linspace(0, 1, COLUMNS))
            z = add_noise(Tensor(x), Tensor(eps), Tensor(logsnr_B.astype(np.float32)))
            captions = [f"logsnr {logsnr:.1f}" for logsnr in logsnr_B]
            rows.append(Row(name, captions, self.stage.to_images(z.asnumpy())))
        return rows


def read_square(path: Path, size: int) -> np.ndarray:
    """An image file as uint8 (size, size, 3), its middle."""
    pixels = read_image(path)
    height, width = pixels.shape[:2]
    return crop_resize(DecodedImage(pixels, height, width), size, 0.5, 0.5)


def inspect(
    cascade: Cascade,
    prompts: Sequence[str],
    folder: Path,
    *,
    seed: int = 0,
    num_images: int = 16,
    image: np.ndarray | None = None,
) -> list[str]:
    """Draws the contact sheets of a cascade's first stage into `folder`; returns their names.

    Args:
        prompts: of the images, in turn; between the first two lies a row of interpolation.
        num_images: in grid.png.
        image: uint8 (S, S, 3), for noising.png; None: the first that the stage generates.

    Raises:
        UserError: the folder cannot be created.
    """
    name, stage = next(iter(cascade.stages.items()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be created ({error.strerror}); choose another folder"
        ) from None

    with tqdm(unit="step") as bar:
        inspector = Inspector(
            stage=stage,
            prompts=prompts,
            arrays=cascade.prompt(name, prompts),
            seed=seed,
            on_step=advance(bar),
        )
        bar.total = inspector.total_calls(num_images)

        # First, as without an image noising.png shows one of its samples.
        grid = inspector.grid(num_images)
        first = grid[0].images[0] if image is None else image

        sheets = {
            "grid": lambda: grid,
            "path": inspector.path,
            "steps": inspector.by_steps,
            "interpolation": inspector.interpolation,
            "noising": lambda: inspector.noising(first),
        }

        for title, rows in sheets.items():
            bar.set_description(title)
            buffer = io.BytesIO()
            contact_sheet(rows()).save(buffer, "PNG", optimize=True)
            write_atomically(folder / f"{title}.png", buffer.getvalue())
    return [f"{title}.png" for title in sheets]
