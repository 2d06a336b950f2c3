"""The orchestrator: stages trained apart, chained into text-to-image generation.

cascade = Cascade.load("runs/demo/cascade")
result = cascade(["a small red circle on white"], seed=7)
result.images[0].save("circle.png")
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, Self

import numpy as np
from mindspore import nn
from PIL import Image
from tqdm import tqdm

from pipeline.diffusion.solvers import SamplerConfig
from pipeline.errors import UserError
from pipeline.generate.cascade_folder import read_cascade
from pipeline.generate.edit import Edit, Images, edits_of, shrunk
from pipeline.nn.parameters import assign
from pipeline.stage.manifest import Manifest, read_weights, text_of
from pipeline.stage.registry import stage_class
from pipeline.text.captions import clean
from pipeline.text.encoder import TextEncoder
from pipeline.text.fingerprint import fingerprint
from pipeline.text.prompts import Arrays, number_of, one_hot


class SamplingConfig(Protocol):
    @property
    def sample(self) -> SamplerConfig: ...


class Sampler(Protocol):
    """What the orchestrator asks of a stage."""

    network: nn.Cell

    @property
    def config(self) -> SamplingConfig: ...
    def sample(
        self,
        config: SamplerConfig,
        prompt: Arrays,
        seed: int,
        numbers: Sequence[int],
        given: np.ndarray | None,
        edit: Edit | None,
        progress: Callable[[], object],
    ) -> np.ndarray: ...


Options = Mapping[
    str, Mapping[str, Any]
]  # by stage: fields of its SamplerConfig that are to be others


@dataclass(frozen=True)
class Result:
    """`images` are those of the last stage that ran; `stages` has every stage's, by name."""

    images: list[Image.Image]
    stages: dict[str, list[Image.Image]]


class Cascade:
    """Stages in their order, and the text encoder that those of them were trained with that know
    text.
    """

    def __init__(
        self, manifests: dict[str, Manifest], stages: dict[str, Sampler], text: TextEncoder | None
    ) -> None:
        self.manifests, self.stages, self.text = manifests, stages, text
        self.encode = lru_cache(maxsize=1)(self.encoded)  # all stages ask for the same prompts

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The cascade in `folder`, or the one stage; UserError, before any weight is loaded, if it
        does not fit.
        """
        folder = Path(folder)
        manifests, facts = read_cascade(folder)
        text, places = None, (folder / "text_encoder", folder / "tokenizer")
        if facts:
            if (found := fingerprint(*places)) != facts.fingerprint:
                raise UserError(
                    f"{folder}: text_encoder/ and tokenizer/ have fingerprint {found[:12]} and the stages were trained "
                    f"with {facts.fingerprint[:12]}; export the cascade again with the encoder of the training"
                )
            text = TextEncoder.load(*places, facts.length)
        stages = {}
        for name, manifest in manifests.items():
            stages[name] = stage_class(manifest.kind).from_config(manifest.config)
            place = folder / name if (folder / name).exists() else folder
            assign(
                stages[name].network, read_weights(place, manifest), str(place / "unet.safetensors")
            )
        return cls(manifests, stages, text)

    def __call__(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        options: Options = MappingProxyType({}),
        start: str | None = None,
        stop: str | None = None,
        low: Sequence[Image.Image] | None = None,
        image: Images | None = None,
        mask: Images | None = None,
        strength: float | Mapping[str, float] | None = None,
        progress: bool = False,
    ) -> Result:
        """Pictures of `prompts`.

        Args:
            prompts: one a picture: text, or the name or number of a class; what a stage without
                either ignores.
            seed, numbers: name the noise; picture `numbers[i]` (i if not given) of a seed is the
                same in any company.
            options: what to change of the stages' sampling, as {"sr256": {"steps": 8, "augment":
                0.2}}.
            start, stop: the first and the last stage to run; all if not given.
            low: the pictures to enlarge where `start` is not the first stage, of the size that it
                takes; if not given, `image` shrunk.
            image: what is edited, one for all or one each, of the size that the last stage makes.
            mask: white where `image` is painted anew, likewise (inpainting); if not given, all of
                it changes in part.
            strength: by how much, in (0, 1], at all stages or by stage; see
                pipeline/generate/edit.py.
            progress: shows a bar.

        Raises:
            UserError: no prompt, an unknown stage, pictures of another size, a strength out of its
                range.
        """
        if isinstance(prompts, str) or not prompts:
            raise UserError("prompts: expected a list of at least one prompt")
        names = span(list(self.stages), start, stop)
        self.check_makes(names[0])
        numbers = range(len(prompts)) if numbers is None else numbers
        size = list(self.manifests.values())[-1].size_out
        edits = edits_of(image, mask, strength, len(prompts), size, names)
        pictures = self.first(names[0], len(prompts), low, edits.get(names[0]))
        told = {name: self.prompt(name, prompts) for name in names}
        made = {}
        with tqdm(
            total=sum(
                self.calls(name, len(prompts), options, *(edits[name].how if edits else ()))
                for name in names
            ),
            unit="step",
            disable=not progress,
        ) as bar:
            for name in names:
                bar.set_description(name)
                pictures = self.run(
                    name, told[name], seed, numbers, pictures, options, edits.get(name), bar.update
                )
                made[name] = [Image.fromarray(picture) for picture in pictures]
        return Result(made[names[-1]], made)

    def prompt(self, name: str, prompts: Sequence[str]) -> Arrays:
        """What stage `name` is told of `prompts`: their text, the classes that they name, or
        nothing.
        """
        classes = self.manifests[name].classes
        if classes is not None:
            num = classes if isinstance(classes, int) else len(classes)
            return one_hot([number_of(classes, prompt) for prompt in prompts], num)
        return self.encode(tuple(prompts)) if self.manifests[name].text else ()

    def encoded(self, prompts: tuple[str, ...]) -> Arrays:
        """The text of `prompts`, cleaned as captions were in training."""
        _, facts = text_of(self.manifests)
        assert self.text
        assert facts
        return self.text.encode([clean(prompt) for prompt in prompts] if facts.clean else prompts)

    def sampling(self, name: str, options: Options) -> SamplerConfig:
        """How stage `name` is sampled."""
        return replace(self.stages[name].config.sample, **options.get(name, {}))

    def calls(
        self, name: str, num: int, options: Options, strength: float = 1.0, masked: bool = False
    ) -> int:
        """How many calls of its network stage `name` needs for `num` pictures."""
        config = self.sampling(name, options)
        return -(-num // config.batch_size) * config.calls(strength, masked)

    def run(
        self,
        name: str,
        prompt: Arrays,
        seed: int,
        numbers: Sequence[int],
        low: np.ndarray | None,
        options: Options,
        edit: Edit | None = None,
        progress: Callable[[], object] = bool,
    ) -> np.ndarray:
        """One stage for all pictures, uint8 (N, S, S, 3), in batches of one size, the last filled
        with repetitions.
        """
        config = self.sampling(name, options)
        made = []
        for begin in range(0, len(numbers), config.batch_size):
            rows = np.arange(begin, begin + config.batch_size).clip(max=len(numbers) - 1)
            part = None if low is None else low[rows]
            chosen, told = [numbers[row] for row in rows], tuple(array[rows] for array in prompt)
            piece = edit and edit.at(rows, self.manifests[name].size_out, part)
            made.append(self.stages[name].sample(config, told, seed, chosen, part, piece, progress))
        pictures = np.concatenate(made)[: len(numbers)]
        return edit.joined(pictures) if edit else pictures

    def check_makes(self, name: str) -> None:
        """UserError if stage `name` is image to image, which starts from neither noise alone nor a
        low resolution.
        """
        if self.manifests[name].tasks:
            raise UserError(f"{name} restores pictures and makes none; use `cascade restore`")

    def first(
        self, name: str, num: int, low: Sequence[Image.Image] | None, edit: Edit | None
    ) -> np.ndarray | None:
        """What stage `name` enlarges if it is the first to run: the pictures given, or else those
        that are edited.
        """
        size = self.manifests[name].size_in
        if low is None and edit and size:
            return shrunk(edit.pictures, size)
        if (low is None) != (size is None):
            raise UserError(
                f"{name} starts from {'pictures; give low' if low is None else 'no picture'}"
            )
        if low is not None and len(low) != num:
            raise UserError(f"low: {len(low)} pictures for {num} prompts; give one each")
        return None if low is None else np.stack([self.check_low(name, image) for image in low])

    def check_low(self, name: str, image: Image.Image) -> np.ndarray:
        """The picture that stage `name` starts from, as uint8 (S, S, 3)."""
        size = self.manifests[name].size_in
        if image.size != (size, size):
            raise UserError(
                f"{name} takes pictures of {size} x {size} and got one of {image.size[0]} x {image.size[1]}"
            )
        return np.asarray(image.convert("RGB"))


def span(names: Sequence[str], start: str | None, stop: str | None) -> list[str]:
    """Those of `names` from `start` to `stop`, both included; None is the first or the last."""
    for name in (start, stop):
        if name is not None and name not in names:
            raise UserError(f"{name}: no such stage; this cascade has {', '.join(names)}")
    first = names.index(start) if start else 0
    last = names.index(stop) if stop else len(names) - 1
    if first > last:
        raise UserError(f"{start} comes after {stop}; the stages are {', '.join(names)}")
    return list(names[first : last + 1])


def prompts_of(
    manifests: Mapping[str, Manifest], said: Sequence[str], num: int | None = None
) -> list[str]:
    """One prompt a picture: what was said, or for `num` pictures the classes in turn, or "" where
    nothing is told.

    UserError if these stages are told something else.
    """
    classes = next(
        (stage.classes for stage in manifests.values() if stage.classes is not None), None
    )
    if text_of(manifests)[1] is not None:
        if num is not None:
            raise UserError(
                "no prompt: these stages are told a text; give --prompt TEXT, one a picture"
            )
        return list(said)
    if classes is not None:
        for prompt in said:
            number_of(classes, prompt)
        names = [str(number) for number in range(classes)] if isinstance(classes, int) else classes
        return list(said) if num is None else [names[i % len(names)] for i in range(num)]
    if num is None:
        raise UserError(
            f"--prompt: {said[0]!r}, but these stages are told nothing; give --num N pictures instead"
        )
    return [""] * num
