"""A folder of generated images that can be continued: `00003.png`, `STAGE/00003.png` of earlier
stages, a manifest.

Each image is written whole and then gets its line in `manifest.jsonl`: number, stage, file and the
recipe (prompt, seed, steps, guidance, augmentation level, ...), which is also in the PNG. The same
command again generates only what is missing, and refuses to mix images of two recipes under one
name.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from pipeline.diffusion.solvers import SamplerConfig
from pipeline.errors import UserError
from pipeline.files import lock, write_atomically
from pipeline.generate.cascade import Cascade, SamplingOptions, advance, stages_between
from pipeline.generate.edit import EditFiles
from pipeline.generate.engine import num_calls
from pipeline.stage.request import Edit

# Images taken through all stages together: bounds memory, and what an interruption costs.
CHUNK = 64


class OutputFolder:
    """What is in `folder`: file -> the manifest's entry."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "manifest.jsonl"
        self.entries: dict[str, dict[str, Any]] = {}

        text = self.path.read_text() if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a line that a kill cut short; its image is generated again
            write_atomically(self.path, whole.encode())

        for line in whole.splitlines():
            entry = json.loads(line)
            self.entries[entry["file"]] = entry

    def has(self, file: str, recipe: Mapping[str, Any]) -> bool:
        """Whether the image is there.

        Raises:
            UserError: it is there by another recipe.
        """
        entry = self.entries.get(file)
        if entry is None or not (self.folder / file).exists():
            return False

        # Only the recipe is compared: an entry also names files, on which no pixel depends.
        for key, value in recipe.items():
            if entry.get(key) != value:
                raise UserError(
                    f"{self.folder / file}: was generated with {key} {entry.get(key)!r} and this "
                    f"command has {value!r}; choose another output folder"
                )
        return True

    def add(self, file: str, image: np.ndarray, fields: Mapping[str, Any]) -> None:
        """Writes uint8 (H, W, 3) with `fields`: its recipe and what else is to be known of it."""
        entry = {**fields, "file": file}
        info = PngInfo()
        for key, value in entry.items():
            # iTXt is UTF-8; a plain tEXt chunk holds Latin-1 only.
            info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))

        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", pnginfo=info)

        path = self.folder / file
        path.parent.mkdir(exist_ok=True)
        # Before its line: an image that a kill leaves without one is generated again.
        write_atomically(path, buffer.getvalue())
        with self.path.open("a") as manifest:
            manifest.write(json.dumps(entry) + "\n")
        self.entries[file] = entry

    def read(self, file: str, stage: str) -> Image.Image:
        """The image that `stage` generated.

        Raises:
            UserError: it is missing or damaged.
        """
        path = self.folder / file
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}); generate it first, with {stage} as the last "
                "stage"
            ) from None


def sampling_recipe(config: SamplerConfig) -> dict[str, Any]:
    """The settings of sampling on which an image depends: not the batch that it is in."""
    recipe = asdict(config)
    del recipe["batch_size"]
    return recipe


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Images of prompts, image i of prompt i, on their way into a folder."""

    cascade: Cascade
    prompts: Sequence[str]
    output: OutputFolder
    seed: int
    options: SamplingOptions
    edit_files: EditFiles | None

    def file(self, stage: str, image_id: int) -> str:
        """The last stage's images lie in the folder itself, others' in folders of their names."""
        name = f"{image_id:05d}.png"
        return name if stage == list(self.cascade.stages)[-1] else f"{stage}/{name}"

    def recipe(self, stage: str, image_id: int) -> dict[str, Any]:
        """What an image of a stage depends on."""
        recipe = {"prompt": self.prompts[image_id], "seed": self.seed}
        recipe |= sampling_recipe(self.cascade.sampling(stage, self.options))
        if self.edit_files:
            recipe |= self.edit_files.recipe(stage, image_id)
        return recipe

    def missing(self, stage: str) -> list[int]:
        """The images that the folder lacks."""
        not_edited = {"image_sha256": None}  # else an edited image would pass for a generated one
        return [
            i
            for i in range(len(self.prompts))
            if not self.output.has(self.file(stage, i), {**not_edited, **self.recipe(stage, i)})
        ]

    def work(self, stages: Sequence[str]) -> list[tuple[str, list[int]]]:
        """(stage, images that it lacks) in the order of the work: CHUNK images through all stages,
        then the next.
        """
        missing = {stage: self.missing(stage) for stage in stages}
        work = []
        for begin in range(0, len(self.prompts), CHUNK):
            for stage in stages:
                image_ids = [i for i in missing[stage] if begin <= i < begin + CHUNK]
                if image_ids:
                    work.append((stage, image_ids))
        return work

    def num_calls(self, stage: str, num_images: int) -> int:
        """How many calls of its network a stage needs for so many of them."""
        strength = self.edit_files.strengths[stage] if self.edit_files else 1.0
        return num_calls(
            self.cascade.stages[stage],
            self.cascade.sampling(stage, self.options),
            num_images,
            strength=strength,
            masked=bool(self.edit_files and self.edit_files.masks),
        )

    def low_res(
        self, stage: str, image_ids: Sequence[int], *, first: bool, edit: Edit | None
    ) -> np.ndarray | None:
        """What a stage enlarges: the edited images where it is the first, else the output of the
        stage before.
        """
        if first and edit is not None:
            return self.cascade.first_low_res(stage, len(image_ids), None, edit)

        if self.cascade.manifests[stage].size_in is None:
            return None

        # From the folder, as an earlier command may have generated them.
        order = list(self.cascade.stages)
        before = order[order.index(stage) - 1]
        images = [self.output.read(self.file(before, i), before) for i in image_ids]
        return np.stack([self.cascade.check_low_res(stage, image) for image in images])

    def run_stage(
        self, stage: str, image_ids: Sequence[int], *, first: bool, bar: "tqdm[Any]"
    ) -> None:
        """Generates and writes these images of a stage."""
        edit = self.edit_files.read(stage, image_ids) if self.edit_files else None
        images = self.cascade.sample_stage(
            stage,
            [self.prompts[i] for i in image_ids],
            seed=self.seed,
            image_ids=image_ids,
            options=self.options,
            low_res=self.low_res(stage, image_ids, first=first, edit=edit),
            edit=edit,
            on_step=advance(bar),
        )

        for image_id, image in zip(image_ids, images, strict=True):
            fields = {"number": image_id, "stage": stage, **self.recipe(stage, image_id)}
            if self.edit_files:
                fields |= self.edit_files.names(image_id)
            self.output.add(self.file(stage, image_id), image, fields)


def generate(
    cascade: Cascade,
    prompts: Sequence[str],
    folder: Path,
    seed: int,
    *,
    options: SamplingOptions = MappingProxyType({}),
    start: str | None = None,
    stop: str | None = None,
    edit_files: EditFiles | None = None,
) -> int:
    """Generates the images of `prompts` that `folder` lacks, image i of prompt i; returns how many
    files it wrote.

    With `edit_files`, result i is its image i, edited; the first stage that runs enlarges that.

    Raises:
        UserError: images of another recipe are there, or those of the stage before `start` are not.
    """
    names = stages_between(list(cascade.stages), start, stop)
    cascade.check_generates(names[0])

    with lock(folder):
        generation = Generation(
            cascade=cascade,
            prompts=prompts,
            output=OutputFolder(folder),
            seed=seed,
            options=options,
            edit_files=edit_files,
        )

        # Of all stages before any of them runs: images of another recipe are found at once.
        work = generation.work(names)
        total = sum(generation.num_calls(stage, len(image_ids)) for stage, image_ids in work)

        with tqdm(total=total, unit="step") as bar:
            for stage, image_ids in work:
                bar.set_description(stage)
                generation.run_stage(stage, image_ids, first=stage == names[0], bar=bar)
    return sum(len(image_ids) for _, image_ids in work)
