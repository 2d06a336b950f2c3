"""A folder of generated pictures that can be continued: `00003.png`, `STAGE/00003.png` of earlier
stages, a manifest.

Each picture is written whole and then gets its line in `manifest.jsonl`: number, stage, file and
the recipe (prompt, seed, steps, guidance, augmentation), which also stands in the PNG. The same
command again makes only what is missing, and refuses to mix pictures of two recipes under one name.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from pipeline.errors import UserError
from pipeline.files import lock, write_atomically
from pipeline.generate.cascade import Cascade, Options, span
from pipeline.generate.edit import Editing

CHUNK = (
    64  # pictures taken through all stages together: bounds memory, and what an interruption costs
)


class OutputFolder:
    """What is in `folder`: file -> the manifest's entry."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "manifest.jsonl"
        self.entries: dict[str, dict[str, Any]] = {}
        text = self.path.read_text() if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a line that a kill cut short; its picture is made again
            write_atomically(self.path, whole.encode())
        for line in whole.splitlines():
            entry = json.loads(line)
            self.entries[entry["file"]] = entry

    def has(self, file: str, recipe: Mapping[str, Any]) -> bool:
        """Whether the picture is there; UserError if it is there by another recipe."""
        entry = self.entries.get(file)
        if entry is None or not (self.folder / file).exists():
            return False
        for key, value in recipe.items():
            if entry.get(key) != value:
                raise UserError(
                    f"{self.folder / file}: was made with {key} {entry.get(key)!r} and this command has {value!r}; "
                    "choose another --out"
                )
        return True

    def add(self, file: str, picture: np.ndarray, facts: Mapping[str, Any]) -> None:
        """Writes uint8 (H, W, 3) with `facts`, its recipe and what else is to be known of it."""
        entry = {**facts, "file": file}
        chunks, buffer = PngInfo(), io.BytesIO()
        for key, value in entry.items():
            chunks.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
        Image.fromarray(picture).save(buffer, "PNG", pnginfo=chunks)
        path = self.folder / file
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, buffer.getvalue())
        with self.path.open("a") as manifest:
            manifest.write(json.dumps(entry) + "\n")
        self.entries[file] = entry

    def read(self, file: str, stage: str) -> Image.Image:
        """The picture that `stage` made."""
        path = self.folder / file
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError) as error:
            raise UserError(
                f"{path}: cannot be read ({error}); make it with --to {stage} first"
            ) from None


def generate(
    cascade: Cascade,
    prompts: Sequence[str],
    folder: Path,
    seed: int,
    options: Options,
    start: str | None = None,
    stop: str | None = None,
    editing: Editing | None = None,
) -> int:
    """Makes the pictures of `prompts` that `folder` lacks, picture i of prompt i; answers how many
    files it wrote.

    With `editing`, picture i is its picture i, edited; the first stage that runs enlarges that
    itself.
    """
    order = list(cascade.stages)
    names = span(order, start, stop)
    cascade.check_makes(names[0])
    written = 0
    with lock(folder):
        gallery = OutputFolder(folder)
        recipes = {}

        def file(stage: str, number: int) -> str:
            """The last stage's lie in the folder itself, the others' in folders of their names."""
            return f"{number:05d}.png" if stage == order[-1] else f"{stage}/{number:05d}.png"

        for name in order[: order.index(names[-1]) + 1]:
            sampling = asdict(cascade.sampling(name, options))
            del sampling["batch_size"]  # no picture depends on it
            recipes[name] = {"seed": seed, **sampling}

        def recipe(stage: str, number: int) -> dict[str, Any]:
            edited = editing.recipe(stage, number) if editing else {}
            return {"prompt": prompts[number], **recipes[stage], **edited}

        missing = {
            name: [
                i
                for i in range(len(prompts))
                if not gallery.has(
                    file(name, i), {"image_sha256": None, **recipe(name, i)}
                )  # or it is an edited one
            ]
            for name in names
        }
        total = sum(
            cascade.calls(name, len(numbers), options, *(editing.how(name) if editing else ()))
            for name, numbers in missing.items()
        )
        with tqdm(total=total, unit="step") as bar:
            for begin in range(0, len(prompts), CHUNK):
                for name in names:
                    numbers = [i for i in missing[name] if begin <= i < begin + CHUNK]
                    if not numbers:
                        continue
                    bar.set_description(name)
                    edit = editing.edit(name, numbers) if editing else None
                    if edit and name == names[0]:
                        low = cascade.first(name, len(numbers), None, edit)
                    elif cascade.manifests[name].size_in is None:
                        low = None
                    else:
                        before = order[order.index(name) - 1]
                        low = np.stack(
                            [
                                cascade.check_low(name, gallery.read(file(before, i), before))
                                for i in numbers
                            ]
                        )
                    told = cascade.prompt(name, [prompts[i] for i in numbers])
                    pictures = cascade.run(
                        name, told, seed, numbers, low, options, edit, bar.update
                    )
                    for number, picture in zip(numbers, pictures, strict=True):
                        facts = {"number": number, "stage": name, **recipe(name, number)}
                        facts |= editing.names(number) if editing else {}
                        gallery.add(file(name, number), picture, facts)
                        written += 1
    return written
