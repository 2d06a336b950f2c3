"""The orchestrator: stages trained apart, chained into text-to-image generation.

    cascade = Cascade.load("runs/demo/cascade")
    result = cascade(["a small red circle on white"], seed=7)
    result.images[0].save("circle.png")

The same images come from `cascade sample` with the same prompts and seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from PIL import Image
from tqdm import tqdm

from pipeline.diffusion.solvers import SamplerConfig
from pipeline.errors import UserError
from pipeline.generate.cascade_folder import ENCODER_FOLDER, TOKENIZER_FOLDER, read_cascade
from pipeline.generate.edit import Images, composite_edit, edits_of, scale_edit, shrink
from pipeline.generate.engine import OnStep, SampleStep, ignore, num_calls, sample
from pipeline.nn.parameters import assign
from pipeline.stage.inputs import Arrays
from pipeline.stage.manifest import Manifest, read_weights, text_encoder_of
from pipeline.stage.registry import stage_class
from pipeline.stage.request import Edit, SampleRequest
from pipeline.stage.stage import Stage
from pipeline.text.caption_embeddings import encode_text
from pipeline.text.captions import clean
from pipeline.text.encoder import TextEncoder
from pipeline.text.fingerprint import fingerprint
from pipeline.text.prompts import class_id, one_hot

# By stage: fields of its SamplerConfig that differ from its own.
SamplingOptions = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """`images` are those of the last stage that ran; `stages` has every stage's, by name."""

    images: list[Image.Image]
    stages: dict[str, list[Image.Image]]


class Cascade:
    """Stages in their order, and the text encoder of those that are conditioned on text."""

    def __init__(
        self,
        manifests: dict[str, Manifest],
        stages: dict[str, Stage],
        text_encoder: TextEncoder | None,
    ) -> None:
        self.manifests = manifests
        self.stages = stages
        self.text_encoder = text_encoder
        self.encode = lru_cache(maxsize=1)(self.encode_prompts)  # all stages have the same prompts

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The cascade in `folder`, or the one stage.

        Raises:
            UserError: it does not fit together; before any weight is loaded.
        """
        folder = Path(folder)
        manifests, expected = read_cascade(folder)

        text_encoder = None
        if expected:
            encoder_folder, tokenizer_folder = folder / ENCODER_FOLDER, folder / TOKENIZER_FOLDER
            # Embeddings of another encoder have the same shape: nothing else would show the
            # mistake.
            found = fingerprint(encoder_folder, tokenizer_folder)
            if found != expected.fingerprint:
                raise UserError(
                    f"{folder}: text_encoder/ and tokenizer/ have fingerprint {found[:12]} and the "
                    f"stages were trained with {expected.fingerprint[:12]}; export the cascade "
                    "again with the encoder of the training"
                )

            text_encoder = TextEncoder.load(encoder_folder, tokenizer_folder, expected.length)

        stages: dict[str, Stage] = {}
        for name, manifest in manifests.items():
            stage = stage_class(manifest.kind).from_config(manifest.config)
            # The folder of a single stage is a cascade without subfolders.
            place = folder / name if (folder / name).exists() else folder
            weights = read_weights(place, manifest)
            assign(stage.network, weights, str(place / "unet.safetensors"))
            stages[name] = stage
        return cls(manifests, stages, text_encoder)

    def __call__(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        *,
        image_ids: Sequence[int] | None = None,
        options: SamplingOptions = MappingProxyType({}),
        start: str | None = None,
        stop: str | None = None,
        low_res: Sequence[Image.Image] | None = None,
        image: Images | None = None,
        mask: Images | None = None,
        strength: float | Mapping[str, float] | None = None,
        progress: bool = False,
    ) -> Result:
        """Images of `prompts`.

        Args:
            prompts: one per image: text, or the name or id of a class; ignored by stages without.
            seed: of the noise.
            image_ids: name the images' noise; image i of a seed is the same in any batch. 0, 1, ...
                if not given.
            options: what to change of the stages' sampling, as {"sr256": {"steps": 8}}.
            start, stop: the first and the last stage to run; all if not given.
            low_res: the images to enlarge where `start` is not the first stage, of the size that it
                takes; if not given, `image` shrunk.
            image: what is edited, one for all or one each, of the size that the last stage
                generates.
            mask: white where `image` is sampled anew, likewise (inpainting); if not given, all of
                it changes in part.
            strength: how much changes, in (0, 1], at all stages or by stage; see
                pipeline/generate/edit.py.
            progress: shows a bar.

        Raises:
            UserError: no prompt, an unknown stage, images of another size, a strength out of range.
        """
        if isinstance(prompts, str) or not prompts:
            raise UserError("prompts: expected a list of at least one prompt")
        check_options(self.manifests, options)
        names = stages_between(list(self.stages), start, stop)
        self.check_generates(names[0])

        num_images = len(prompts)
        ids = range(num_images) if image_ids is None else image_ids
        # An edit has the size of the whole cascade's output, even where `stop` comes before its
        # end.
        size = list(self.manifests.values())[-1].size_out
        edits = edits_of(image, mask, strength, num_images=num_images, size=size, stage_names=names)
        images = self.first_low_res(names[0], num_images, low_res, edits.get(names[0]))

        total = sum(self.num_calls(name, num_images, options, edits.get(name)) for name in names)
        results = {}
        with tqdm(total=total, unit="step", disable=not progress) as bar:
            for name in names:
                bar.set_description(name)
                # uint8 between stages, as if read from a file: `generate` gives the same images.
                images = self.sample_stage(
                    name,
                    prompts,
                    seed=seed,
                    image_ids=ids,
                    options=options,
                    low_res=images,
                    edit=edits.get(name),
                    on_step=advance(bar),
                )
                results[name] = [Image.fromarray(each) for each in images]
        return Result(images=results[names[-1]], stages=results)

    def sample_stage(
        self,
        name: str,
        prompts: Sequence[str],
        *,
        seed: int,
        image_ids: Sequence[int],
        options: SamplingOptions,
        low_res: np.ndarray | None = None,
        edit: Edit | None = None,
        on_step: OnStep = ignore,
    ) -> np.ndarray:
        """One stage for all images, uint8 (N, S, S, 3).

        Args:
            low_res: uint8 (N, s, s, 3), what it enlarges.
            edit: of the images at the size of the cascade's last stage.
            on_step: called after each call of the network.
        """
        size = self.manifests[name].size_out
        request = SampleRequest(
            prompt=self.prompt(name, prompts),
            seed=seed,
            image_ids=image_ids,
            low_res=low_res,
            edit=None if edit is None else scale_edit(edit, size, low_res),
        )

        images = sample(self.stages[name], self.sampling(name, options), request, on_step)
        return images if edit is None else composite_edit(edit, images)

    def prompt(self, name: str, prompts: Sequence[str]) -> Arrays:
        """What stage `name` is conditioned on: text, the classes that the prompts name, or {}."""
        classes = self.manifests[name].classes
        if classes is not None:
            num_classes = classes if isinstance(classes, int) else len(classes)
            class_ids = [class_id(classes, prompt) for prompt in prompts]
            return {"label": one_hot(class_ids, num_classes)}

        # A tuple, which the cache can hash.
        return self.encode(tuple(prompts)) if self.manifests[name].text else {}

    def encode_prompts(self, prompts: tuple[str, ...]) -> Arrays:
        """The text of `prompts`, cleaned as captions were in training."""
        _, info = text_encoder_of(self.manifests)
        # Only stages with text need this, and for them `load` has the encoder.
        assert self.text_encoder
        assert info

        captions = [clean(prompt) for prompt in prompts] if info.clean else prompts
        return encode_text(self.text_encoder, captions)

    def sampling(self, name: str, options: SamplingOptions) -> SamplerConfig:
        """How stage `name` is sampled."""
        return replace(self.stages[name].config.sample, **options.get(name, {}))

    def num_calls(
        self, name: str, num_images: int, options: SamplingOptions, edit: Edit | None = None
    ) -> int:
        """How many calls of its network stage `name` needs for `num_images`."""
        strength = 1.0 if edit is None else edit.strength
        masked = edit is not None and edit.mask is not None
        config = self.sampling(name, options)
        stage = self.stages[name]
        return num_calls(stage, config, num_images, strength=strength, masked=masked)

    def check_generates(self, name: str) -> None:
        """UserError if stage `name` is image to image, which starts from neither noise alone nor a
        low resolution.
        """
        if self.manifests[name].tasks:
            raise UserError(f"{name} restores images and generates none; use `cascade restore`")

    def first_low_res(
        self,
        name: str,
        num_images: int,
        low_res: Sequence[Image.Image] | None,
        edit: Edit | None,
    ) -> np.ndarray | None:
        """What stage `name` enlarges if it is the first to run, uint8 (N, s, s, 3): the images
        given, or else those that are edited.
        """
        size = self.manifests[name].size_in
        if low_res is None and edit and size:
            return shrink(edit.images, size)

        if low_res is None and size is not None:
            raise UserError(f"low_res: missing; {name} starts from images of {size} x {size}")
        if low_res is None:
            return None
        if size is None:
            raise UserError(f"low_res: {name} starts from noise and takes no image; leave it out")

        if len(low_res) != num_images:
            raise UserError(
                f"low_res: {len(low_res)} images for {num_images} prompts; give one each"
            )

        return np.stack([self.check_low_res(name, image) for image in low_res])

    def check_low_res(self, name: str, image: Image.Image) -> np.ndarray:
        """The image that stage `name` enlarges, as uint8 (s, s, 3)."""
        size = self.manifests[name].size_in
        if image.size != (size, size):
            width, height = image.size
            raise UserError(
                f"low_res: {name} takes images of {size} x {size} and one is {width} x {height}"
            )

        return np.asarray(image.convert("RGB"))


def advance(bar: "tqdm[Any]") -> OnStep:
    """Moves a progress bar by one at each call of the network."""

    def on_step(step: SampleStep) -> None:
        bar.update()

    return on_step


def stages_between(names: Sequence[str], start: str | None, stop: str | None) -> list[str]:
    """Those of `names` from `start` to `stop`, both included; None is the first or the last."""
    for name in (start, stop):
        if name is not None and name not in names:
            raise UserError(f"{name}: no such stage; this cascade has {', '.join(names)}")

    first = names.index(start) if start else 0
    last = names.index(stop) if stop else len(names) - 1
    if first > last:
        raise UserError(f"{start} comes after {stop}; the stages are {', '.join(names)}")
    return list(names[first : last + 1])


def check_options(manifests: Mapping[str, Manifest], options: SamplingOptions) -> None:
    """UserError for a stage or a field that does not exist, and for a value out of its range."""
    known = [field.name for field in fields(SamplerConfig)]
    for name, changes in options.items():
        if name not in manifests:
            raise UserError(
                f"options.{name}: no such stage; this cascade has {', '.join(manifests)}"
            )
        for field in changes:
            if field not in known:
                raise UserError(f"options.{name}.{field}: no such field; {', '.join(known)}")

        low, high = manifests[name].aug_range or (0.0, 0.0)
        aug_level = changes.get("aug_level", low)
        if not low <= aug_level <= high:
            raise UserError(
                f"aug_level: {aug_level} is not in [{low}, {high}], which {name} was trained with"
            )


def check_prompts(
    manifests: Mapping[str, Manifest], prompts: Sequence[str], num_images: int | None = None
) -> list[str]:
    """One prompt an image: those given or, for `num_images`, the classes in turn, or "" for an
    unconditional stage.

    Raises:
        UserError: these stages are conditioned on something else.
    """
    _, text_encoder = text_encoder_of(manifests)
    classes = next((m.classes for m in manifests.values() if m.classes is not None), None)

    if text_encoder is not None:
        if num_images is not None:
            raise UserError(
                "prompts: missing; these stages are conditioned on text; give one prompt per image"
            )
        return list(prompts)

    if classes is not None:
        for prompt in prompts:
            # Raises for a name that is no class, before anything is sampled.
            class_id(classes, prompt)

        if num_images is None:
            return list(prompts)
        names = [str(i) for i in range(classes)] if isinstance(classes, int) else classes
        return [names[i % len(names)] for i in range(num_images)]

    if num_images is None:
        raise UserError(
            f"prompts: {prompts[0]!r}, but these stages are unconditional; give a number of images"
        )
    return [""] * num_images
