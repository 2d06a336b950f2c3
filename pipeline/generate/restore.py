"""A folder of restored images: any size, several samples of each, their standard deviation, and the
seam to what is known.

The network takes sides that are multiples of its stride: others are padded by reflection and
cropped back. Images of one size share the network's calls. `pipeline.imaging.compositing` has the
standard deviation, the blend and the seam.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipeline.diffusion.solvers import SamplerConfig
from pipeline.errors import UserError
from pipeline.files import lock
from pipeline.generate.cascade import Cascade, advance
from pipeline.generate.engine import OnStep, num_calls, sample
from pipeline.generate.output_folder import OutputFolder, sampling_recipe
from pipeline.imaging.compositing import (
    blend,
    composite,
    heatmap,
    most_uncertain,
    pad_to_multiple,
    sample_std,
    seam,
)
from pipeline.imaging.degradations import (
    HOLE_TASKS,
    Degraded,
    to_grayscale,
    with_hole,
    without_hole,
)
from pipeline.imaging.user_images import list_images, mask_from_image, mask_path, read_image
from pipeline.rng import generator
from pipeline.stage.inputs import Arrays
from pipeline.stage.manifest import Manifest
from pipeline.stage.request import Edit, SampleRequest
from pipeline.stage.stage import Stage

CHUNK = 64  # samples in memory
Extend = tuple[int, int, int, int]  # pixels to add at the left, top, right and bottom


@dataclass(frozen=True, kw_only=True)
class ImageToRestore:
    """An image to restore."""

    name: str
    image: np.ndarray  # uint8 (H, W, 3)
    mask: np.ndarray  # bool (H, W), True where it is to be sampled


@dataclass(frozen=True, kw_only=True)
class RestoreOptions:
    """How an image is restored.

    Args:
        task: one that the stage was trained for.
        seed: of the noise.
        samples: how many.
        weights: of the samples, whose mean is then the result; without, it is the first one.
        repaint_share: share of the hole, where the samples differ most, that is sampled once more,
            conditioned on all the rest.
    """

    task: str
    seed: int = 0
    samples: int = 1
    weights: tuple[float, ...] | None = None
    repaint_share: float = 0.0

    def __post_init__(self) -> None:
        if self.weights is not None and len(self.weights) != self.samples:
            raise UserError(
                f"weights: {len(self.weights)} for {self.samples} samples; give each sample one"
            )

        if not 0 <= self.repaint_share <= 1:
            raise UserError(
                f"repaint_share: {self.repaint_share} is not in [0, 1]; 0.25 is the quarter of the "
                "hole where samples differ most"
            )
        if self.weights is not None and (min(self.weights) < 0 or not any(self.weights)):
            raise UserError(
                f"weights: {list(self.weights)}; give numbers of at least 0, and not all 0"
            )
        if self.repaint_share and self.samples < 2:
            raise UserError(
                f"repaint_share: {self.samples} sample does not show where samples differ; take 4 "
                "samples"
            )


# Input.


def read_images(
    task: str, images: Path, masks: Path | None, extend: Extend | None
) -> list[ImageToRestore]:
    """The images to restore.

    Raises:
        UserError: a file is missing, does not fit, or does not belong to the task.
    """
    if task not in HOLE_TASKS and (masks or extend):
        name = "mask" if masks else "extend"
        raise UserError(f"{name}: {task} samples every pixel; leave it out")

    if task in HOLE_TASKS and (masks is None) == (extend is None):
        raise UserError(f"{task}: give the hole, either by a mask or by pixels to extend")

    damaged = []
    for path in list_images(images):
        image = read_image(path)
        # Without a hole every pixel is sampled.
        mask = np.ones(image.shape[:2], bool)
        if extend:
            image, mask = extend_image(image, extend)
        elif masks:
            source = mask_path(path, masks)
            mask = mask_from_image(read_image(source), image.shape, source, path)
        damaged.append(ImageToRestore(name=path.stem, image=image, mask=mask))
    return damaged


def extend_image(image: np.ndarray, extend: Extend) -> tuple[np.ndarray, np.ndarray]:
    """The image with so many pixels more on each side, and the mask of them."""
    if min(extend) < 0 or not any(extend):
        raise UserError(
            f"extend: {' '.join(map(str, extend))}; give pixels of at least 0, some above"
        )

    left, top, right, bottom = extend
    sides = ((top, bottom), (left, right))
    mask = np.pad(np.zeros(image.shape[:2], bool), sides, constant_values=True)

    # The values have no influence: the network's input has noise there.
    return np.pad(image, (*sides, (0, 0)), "edge"), mask


def stage_tasks(manifests: Mapping[str, Manifest]) -> tuple[str, ...]:
    """The tasks of the one stage that this is; UserError if it has none."""
    tasks = tuple(task for manifest in manifests.values() for task in manifest.tasks)
    if not tasks:
        raise UserError(
            f"{', '.join(manifests)}: not an image-to-image stage; `cascade sample` generates from "
            "it"
        )
    return tasks


def check_task(manifests: Mapping[str, Manifest], task: str) -> None:
    """UserError unless this is one stage that was trained for the task."""
    tasks = stage_tasks(manifests)
    if task not in tasks:
        raise UserError(
            f"task: {task} is none that this stage was trained for; it has {', '.join(tasks)}"
        )


def check_size(damaged: ImageToRestore, stride: int) -> None:
    """UserError for an image smaller than the network's stride."""
    height, width = damaged.mask.shape
    if min(height, width) < stride:
        raise UserError(
            f"{damaged.name}: {width} x {height} pixels; this stage takes sides from {stride} on"
        )


def chunks(
    image_ids: Sequence[int], shape: Callable[[int], tuple[int, ...]], size: int
) -> list[list[int]]:
    """Images of one shape together, at most `size` at once."""
    # `groupby` joins neighbours only, hence the sort; it is stable, so ids stay in order.
    alike = [list(group) for _, group in groupby(sorted(image_ids, key=shape), shape)]
    return [group[begin : begin + size] for group in alike for begin in range(0, len(group), size)]


# Restoring.


def restore(
    cascade: Cascade,
    images: Sequence[ImageToRestore],
    options: RestoreOptions,
    folder: Path,
    *,
    prompt: str = "",
    steps: int | None = None,
) -> int:
    """Restores the images that `folder` lacks: NAME.png and, of several samples, NAME.std.png and
    NAME.sample_0.png and so on, listed in manifest.jsonl.

    Args:
        cascade: of one image-to-image stage.
        images: to restore.
        options: how.
        folder: for the results; the same call again goes on.
        prompt: of all images, where the stage is conditioned on text.
        steps: network calls; None: the stage's own.

    Returns:
        How many images it restored.

    Raises:
        UserError: the stage was not trained for the task, or an image is too small.
    """
    check_task(cascade.manifests, options.task)
    (name,) = cascade.manifests
    stage = cascade.stages[name]
    config = stage.config.sample if steps is None else replace(stage.config.sample, steps=steps)
    recipe = {"stage": name, "prompt": prompt, **asdict(options), **sampling_recipe(config)}
    recipe = json.loads(json.dumps(recipe))  # as the manifest returns it

    # All sizes before the first image is sampled, which may take long.
    for image in images:
        check_size(image, stage.network.stride)

    with lock(folder):
        output = OutputFolder(folder)
        missing = [i for i, each in enumerate(images) if not output.has(f"{each.name}.png", recipe)]
        # CHUNK counts samples, of which each image has several.
        size = max(1, CHUNK // options.samples)
        groups = chunks(missing, lambda i: images[i].image.shape, size)
        total = sum(total_calls(stage, config, options, len(group)) for group in groups)

        with tqdm(total=total, unit="step", disable=not missing) as bar:
            arrays = cascade.prompt(name, [prompt])
            if not prompt:  # as training drops a caption
                arrays = {key: np.zeros_like(array) for key, array in arrays.items()}

            restorer = Restorer(stage, config, options, arrays, advance(bar))
            for group in groups:
                restored = restorer({i: images[i] for i in group})
                for i, result in restored.items():
                    write_restored(output, images[i], result, recipe)
    return len(missing)


def total_calls(
    stage: Stage, config: SamplerConfig, options: RestoreOptions, num_images: int
) -> int:
    """Calls of the network for so many images of one size."""
    # `masked`, as a restoration always has an edit with a mask, which is all ones without a hole.
    calls = num_calls(stage, config, num_images * options.samples, masked=True)
    if options.repaint_share:
        calls += num_calls(stage, config, num_images, masked=True)
    return calls


@dataclass(frozen=True, kw_only=True)
class Restored:
    """An image, restored."""

    image: np.ndarray  # uint8 (H, W, 3)
    samples: np.ndarray  # uint8 (N, H, W, 3)


class Restorer:
    """Samples images of one size and composites the samples.

    Args:
        stage: image to image.
        config: of sampling.
        options: of restoring.
        prompt: named arrays of one row, for all images.
        on_step: called after each call of the network.
    """

    def __init__(
        self,
        stage: Stage,
        config: SamplerConfig,
        options: RestoreOptions,
        prompt: Arrays,
        on_step: OnStep,
    ) -> None:
        self.stage = stage
        self.config = config
        self.options = options
        self.prompt = prompt
        self.on_step = on_step

    def __call__(self, images: Mapping[int, ImageToRestore]) -> dict[int, Restored]:
        """Images by their ids, which name their noise."""
        degraded = {i: self.degraded(i, each) for i, each in images.items()}
        samples = self.sample(degraded, range(self.options.samples))

        restored = {}
        for i, each in images.items():
            composites = np.stack(
                [self.composite(each, one) for one in self.crop(each, samples[i])]
            )

            result = composites[0]
            if self.options.weights:
                result = blend(composites, self.options.weights)
            restored[i] = Restored(image=result, samples=composites)

        if self.options.repaint_share:
            return self.repaint(images, degraded, restored)
        return restored

    def repaint(
        self,
        images: Mapping[int, ImageToRestore],
        degraded: Mapping[int, Degraded],
        restored: Mapping[int, Restored],
    ) -> dict[int, Restored]:
        """The results, with the part of each hole where samples differ most sampled once more."""
        stride = self.stage.network.stride
        parts = {}
        edits = {}
        for i, each in images.items():
            std = sample_std(restored[i].samples)
            # All but this part counts as known from now on.
            parts[i] = most_uncertain(std, each.mask, self.options.repaint_share)
            edits[i] = Edit(
                images=pad_to_multiple(restored[i].image, stride)[None],
                mask=pad_to_multiple(parts[i], stride)[None, None].astype(np.float32),
            )

        # The id after the samples', so that its noise is new.
        again = self.sample(degraded, [self.options.samples], edits)
        results = {}
        for i, each in images.items():
            (repainted,) = self.crop(each, again[i])
            image = composite(restored[i].image, repainted, parts[i])
            results[i] = replace(restored[i], image=image)
        return results

    def degraded(self, image_id: int, each: ImageToRestore) -> Degraded:
        """The network's input, padded to multiples of the stride."""
        stride = self.stage.network.stride
        image = pad_to_multiple(each.image, stride)
        if self.options.task in HOLE_TASKS:
            # Named by the image, so that the others in the folder have no influence.
            noise = generator(self.options.seed, "damage", image_id)
            return with_hole(image, pad_to_multiple(each.mask, stride), noise)

        # A user's image may have colours, a source of training has none.
        return without_hole(to_grayscale(image) if self.options.task == "colorization" else image)

    def sample(
        self,
        degraded: Mapping[int, Degraded],
        sample_ids: Sequence[int],
        edits: Mapping[int, Edit] | None = None,
    ) -> dict[int, np.ndarray]:
        """uint8 (N, H, W, 3) of each image: its samples of these ids.

        `edits`: what is kept of each image, if not what is known of it.
        """
        pairs = [(i, sample_id) for i in degraded for sample_id in sample_ids]
        rows = [i for i, _ in pairs]
        request = SampleRequest(
            prompt={name: array.repeat(len(pairs), 0) for name, array in self.prompt.items()},
            seed=self.options.seed,
            # Below 2^64, as a word of the noise's counter has to be.
            image_ids=[i << 32 | sample_id for i, sample_id in pairs],
            degraded=[degraded[i] for i in rows],
            task=self.options.task,
            edit=None if edits is None else Edit.join([edits[i] for i in rows]),
        )

        images = sample(self.stage, self.config, request, self.on_step)
        split = images.reshape(len(degraded), len(sample_ids), *images.shape[1:])
        return dict(zip(degraded, split, strict=True))

    def crop(self, each: ImageToRestore, images: np.ndarray) -> np.ndarray:
        """Without the padding."""
        height, width = each.mask.shape
        return images[:, :height, :width]

    def composite(self, each: ImageToRestore, sampled: np.ndarray) -> np.ndarray:
        """A sample within what is known."""
        if self.options.task not in HOLE_TASKS:
            return sampled
        return composite(each.image, sampled, each.mask)


def write_restored(
    output: OutputFolder, each: ImageToRestore, restored: Restored, recipe: Mapping[str, object]
) -> None:
    """Writes the files of one image, the result last: it stands for all."""
    fields = dict(recipe)
    if len(restored.samples) > 1:
        std = sample_std(restored.samples)
        for i, image in enumerate(restored.samples):
            output.add(f"{each.name}.sample_{i}.png", image, {**recipe, "sample": i})
        output.add(f"{each.name}.std.png", heatmap(std), recipe)
        fields["mean_std"] = float(std[each.mask].mean())

    # Without a known pixel there is no seam.
    if not each.mask.all():
        fields["seam"] = seam(restored.image, each.mask)._asdict()
    output.add(f"{each.name}.png", restored.image, fields)
