"""A folder of restored pictures: any size, several samples of each, how sure they are, and what
joins the known pixels.

The network wants sides that are multiples of its stride: others are filled up by reflection and cut
back. Pictures of one size share the network's calls. See `pipeline/imaging/compositing.py` for
spread, blend and seam.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from pipeline.diffusion.solvers import SamplerConfig
from pipeline.errors import UserError
from pipeline.files import lock
from pipeline.generate.cascade import Cascade
from pipeline.generate.output_folder import OutputFolder
from pipeline.imaging.compositing import blend, composite, heat, least_certain, padded, seam, spread
from pipeline.imaging.degradations import WITH_HOLE, Degraded, grey, whole, with_hole
from pipeline.imaging.user_images import hole, mask_for, pictures_in, read
from pipeline.rng import generator
from pipeline.stage.manifest import Manifest
from pipeline.text.prompts import Arrays

CHUNK = 64  # pictures in memory with all their samples
Extend = tuple[int, int, int, int]  # pixels to add at the left, top, right and bottom


class Damage(NamedTuple):
    """A picture to restore; bool mask (H, W), True where it is to be made."""

    name: str
    picture: np.ndarray  # uint8 (H, W, 3)
    mask: np.ndarray


@dataclass(frozen=True, kw_only=True)
class RestoreOptions:
    """What is done with a picture's samples.

    Args:
        samples: how many.
        weights: of the samples, whose mean is then the result; without, it is the first one.
        repaint_share: the least certain share of what is made that is made once more, told all the rest.
    """

    task: str
    seed: int = 0
    samples: int = 1
    weights: tuple[float, ...] | None = None
    repaint_share: float = 0.0

    def __post_init__(self) -> None:
        if self.weights is not None and len(self.weights) != self.samples:
            raise UserError(
                f"--weights: {len(self.weights)} for {self.samples} samples; give each sample one"
            )
        if not 0 <= self.repaint_share <= 1:
            raise UserError(
                f"--repaint-share: {self.repaint_share} is not in [0, 1]; 0.25 is the least certain quarter"
            )
        if self.repaint_share and self.samples < 2:
            raise UserError(
                f"--repaint-share: {self.samples} sample says nothing of what is certain; give --samples 4"
            )


# Input.


def damages(task: str, images: Path, masks: Path | None, extend: Extend | None) -> list[Damage]:
    """The pictures to restore. UserError for what is missing, does not fit, or does not belong to
    the task.
    """
    if task not in WITH_HOLE and (masks or extend):
        raise UserError(
            f"--{'mask' if masks else 'extend'}: {task} makes every pixel anew; leave it out"
        )
    if task in WITH_HOLE and (masks is None) == (extend is None):
        raise UserError(
            f"{task}: say what is to be made, by --mask PATH or by --extend LEFT TOP RIGHT BOTTOM"
        )
    found = []
    for path in pictures_in(images):
        picture = read(path)
        mask = np.ones(picture.shape[:2], bool)
        if extend:
            picture, mask = extended(picture, extend)
        elif masks:
            source = mask_for(path, masks)
            mask = hole(read(source), picture.shape, source, path)
        found.append(Damage(path.stem, picture, mask))
    return found


def extended(picture: np.ndarray, extend: Extend) -> tuple[np.ndarray, np.ndarray]:
    """The picture with these many pixels more on each side, and the mask that has them made."""
    if min(extend) < 0 or not any(extend):
        raise UserError(
            f"--extend: {' '.join(map(str, extend))}; give pixels of at least 0, some above"
        )
    left, top, right, bottom = extend
    sides = ((top, bottom), (left, right))
    mask = np.pad(np.zeros(picture.shape[:2], bool), sides, constant_values=True)
    return np.pad(picture, (*sides, (0, 0)), "edge"), mask


# Work.


def restore(
    cascade: Cascade,
    pictures: Sequence[Damage],
    how: RestoreOptions,
    out: Path,
    prompt: str = "",
    steps: int | None = None,
) -> int:
    """Restores the pictures that `out` lacks: NAME.png and, of several samples, NAME.spread.png and
    NAME.sample_0.png and so on, listed in manifest.jsonl. How many it restored. UserError for a
    task that the stage does not know.
    """
    check_task(cascade.manifests, how.task)
    (name,) = cascade.manifests
    stage: Any = cascade.stages[name]
    config = stage.config.sample if steps is None else replace(stage.config.sample, steps=steps)
    recipe = json.loads(
        json.dumps({"stage": name, "prompt": prompt, **asdict(how), **asdict(config)})
    )
    del recipe["batch_size"]  # no picture depends on it
    for each in pictures:
        check_size(each, stage.network.stride)
    with lock(out):
        gallery = OutputFolder(out)
        left = [
            number
            for number, each in enumerate(pictures)
            if not gallery.has(f"{each.name}.png", recipe)
        ]
        groups = chunks(left, lambda number: pictures[number].picture.shape)
        rows = [
            count
            for group in groups
            for count in (len(group) * how.samples, len(group) * (how.repaint_share > 0))
        ]
        total = sum(-(-count // config.batch_size) for count in rows) * config.calls(masked=True)
        with tqdm(total=total, unit="step", disable=not left) as bar:
            told = cascade.prompt(name, [prompt])
            told = (
                told if prompt else tuple(map(np.zeros_like, told))
            )  # as training drops a caption
            painter = Restorer(stage, config, how, told, bar.update)
            for group in groups:
                for number, done in painter({number: pictures[number] for number in group}).items():
                    keep(gallery, pictures[number], done, recipe)
    return len(left)


def check_restores(manifests: Mapping[str, Manifest]) -> tuple[str, ...]:
    """The tasks of the one stage that this is; UserError if it has none."""
    known = tuple(name for manifest in manifests.values() for name in manifest.tasks)
    if not known:
        raise UserError(
            f"{', '.join(manifests)}: not an image-to-image stage; what it makes is for `cascade sample`"
        )
    return known


def check_task(manifests: Mapping[str, Manifest], task: str) -> None:
    """UserError unless this is one stage, which was trained for the task."""
    known = check_restores(manifests)
    if task not in known:
        raise UserError(
            f"--task: {task} is nothing that this stage was trained for; it knows {', '.join(known)}"
        )


def check_size(damage: Damage, stride: int) -> None:
    height, width = damage.mask.shape
    if min(height, width) < stride:
        raise UserError(
            f"{damage.name}: {width} x {height} pixels; this stage takes sides from {stride} on"
        )


def chunks(numbers: Sequence[int], shape: Callable[[int], tuple[int, ...]]) -> list[list[int]]:
    """Those of one shape together, not too many at once."""
    alike = [list(group) for _, group in groupby(sorted(numbers, key=shape), shape)]
    return [
        group[begin : begin + CHUNK] for group in alike for begin in range(0, len(group), CHUNK)
    ]


class Restored(NamedTuple):
    result: np.ndarray  # uint8 (H, W, 3)
    samples: np.ndarray  # uint8 (N, H, W, 3)


class Restorer:
    """What makes the samples of pictures of one size and joins them."""

    def __init__(
        self,
        stage: Any,
        config: SamplerConfig,
        how: RestoreOptions,
        prompt: Arrays,
        progress: Callable[[], object],
    ) -> None:
        self.stage, self.config, self.how, self.prompt, self.progress = (
            stage,
            config,
            how,
            prompt,
            progress,
        )
        self.stride: int = stage.network.stride

    def __call__(self, damages: Mapping[int, Damage]) -> dict[int, Restored]:
        """`damages` by their numbers, which name their noise."""
        how = self.how
        given = {number: self.given(number, damage) for number, damage in damages.items()}
        samples = self.paint(given, range(how.samples))
        done = {}
        for number, damage in damages.items():
            joined = np.stack(
                [self.joined(damage, sample) for sample in self.cut(damage, samples[number])]
            )
            done[number] = Restored(
                blend(joined, how.weights) if how.weights else joined[0], joined
            )
        if not how.repaint_share:
            return done
        parts = {
            n: least_certain(spread(done[n].samples), each.mask, how.repaint_share)
            for n, each in damages.items()
        }
        known = {
            n: (padded(done[n].result, self.stride), padded(part, self.stride))
            for n, part in parts.items()
        }
        again = self.paint(given, [how.samples], known)
        for number, damage in damages.items():
            (painted,) = self.cut(damage, again[number])
            done[number] = done[number]._replace(
                result=composite(done[number].result, painted, parts[number])
            )
        return done

    def given(self, number: int, damage: Damage) -> Degraded:
        """What the network is given of a picture, filled up to multiples of the stride."""
        picture = padded(damage.picture, self.stride)
        if self.how.task in WITH_HOLE:
            return with_hole(
                picture,
                padded(damage.mask, self.stride),
                generator(self.how.seed, "damage", number),
            )
        return whole(grey(picture) if self.how.task == "colorization" else picture)

    def paint(
        self,
        given: Mapping[int, Degraded],
        samples: Sequence[int],
        known: Mapping[int, tuple[np.ndarray, np.ndarray]] = MappingProxyType({}),
    ) -> dict[int, np.ndarray]:
        """uint8 (N, H, W, 3) of each; `known`: pictures and what is to be made of them, instead of
        what is given.
        """
        size = self.config.batch_size
        places = [(number, sample) for number in given for sample in samples]
        made: dict[int, list[np.ndarray]] = {number: [] for number in given}
        for begin in range(0, len(places), size):
            part = places[begin : begin + size]
            filled = [*part, *[part[-1]] * (size - len(part))]  # one graph for few and many
            kept = None
            if known:
                pictures, masks = zip(*(known[number] for number, _ in filled), strict=True)
                kept = np.stack(pictures), np.stack(masks)[:, None].astype(np.float32)
            found = self.stage.restore(
                self.config,
                self.how.task,
                [given[number] for number, _ in filled],
                tuple(array.repeat(size, 0) for array in self.prompt),
                self.how.seed,
                [number << 32 | sample for number, sample in filled],
                kept,
                self.progress,
            )
            for (number, _), picture in zip(part, found, strict=False):
                made[number].append(picture)
        return {number: np.stack(pictures) for number, pictures in made.items()}

    def cut(self, damage: Damage, pictures: np.ndarray) -> np.ndarray:
        """Without what filled up the size."""
        height, width = damage.mask.shape
        return pictures[:, :height, :width]

    def joined(self, damage: Damage, painted: np.ndarray) -> np.ndarray:
        return (
            composite(damage.picture, painted, damage.mask)
            if self.how.task in WITH_HOLE
            else painted
        )


def keep(gallery: OutputFolder, damage: Damage, done: Restored, recipe: Mapping[str, Any]) -> None:
    """Writes what there is of one picture, the result last: it stands for all."""
    facts = dict(recipe)
    if len(done.samples) > 1:
        certainty = spread(done.samples)
        for number, sample in enumerate(done.samples):
            gallery.add(f"{damage.name}.sample_{number}.png", sample, {**recipe, "sample": number})
        gallery.add(f"{damage.name}.spread.png", heat(certainty), recipe)
        facts["mean_spread"] = float(certainty[damage.mask].mean())
    if not damage.mask.all():
        facts["seam"] = seam(done.result, damage.mask)._asdict()
    gallery.add(f"{damage.name}.png", done.result, facts)
