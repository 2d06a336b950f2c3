"""A picture that is edited through a cascade: painted anew in a hole, or as a whole but not from
noise alone.

Each stage sees the picture shrunk to its own size, by the mean of the pixels that one covers, and
the mask by their maximum: a pixel is painted if any that it covers is.

    inpainting      at each step x = picture + mask (x - picture), and z follows (`sample.repaint_steps` makes it in several
                    turns: RePaint, Lugmayr et al., arXiv 2201.09865)
    image to image  sampling starts at the time s, its strength, from z = alpha_s p + sigma_s eps (SDEdit, Meng et al.,
                    arXiv 2108.01073)

A base starts from p = picture. Super-resolution is told what it enlarges, which the stages before
have edited. A start that says otherwise, such as the picture itself, would pull the colours back;
none would lose the picture's detail. So its p has the colours of the one and the detail of the
other, a level of Burt and Adelson's Laplacian pyramid (1983):

    p = up(low) + picture - up(down(picture))

Where nothing was edited, that is the picture. At its own size, what is known is the picture's again
in the end, bit for bit, and what was painted joins it (`composite` in
pipeline/imaging/compositing.py). Only there: what a painting lacks on the border is carried into
it, and carried in at each size it would grow to a tint of all of the hole.

Shapes: B pictures, S side, s side of the low resolution.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data.image import downsample, to_float, to_uint8, upsample
from pipeline.errors import UserError
from pipeline.files import sha256_file
from pipeline.imaging.compositing import composite
from pipeline.imaging.user_images import hole, mask_for, read

STRENGTH = 0.8  # without a mask, unless said otherwise; diffusers' IF starts its super-resolution there, too


@dataclass(frozen=True)
class Edit:
    """A picture to start from instead of noise, and what of it may change.

    Args:
        pictures: uint8 (B, S, S, 3).
        mask: (B, 1, S, S), 1 where it is painted anew; None: all of it.
        strength: the time in (0, 1] from which on it is painted: 1 leaves nothing of what was
            there.
    """

    pictures: np.ndarray
    mask: np.ndarray | None = None
    strength: float = 1.0

    @property
    def how(self) -> tuple[float, bool]:
        """What decides the number of the network's calls: from when on, and whether in a hole
        alone.
        """
        return self.strength, self.mask is not None

    def at(self, rows: np.ndarray, size: int, low: np.ndarray | None) -> "Edit":
        """Some of it, for a stage that makes `size` px and, unless it is a base, enlarges `low`,
        uint8 (B, s, s, 3).
        """
        pictures = shrunk(self.pictures[rows], size)
        mask = None if self.mask is None else pooled(self.mask[rows], size)
        if low is not None and self.strength < 1:
            start = detailed(low, pictures)
            pictures = (
                start if mask is None else np.where(np.moveaxis(mask, 1, -1), start, pictures)
            )
        return Edit(pictures, mask, self.strength)

    def joined(self, painted: np.ndarray) -> np.ndarray:
        """What a stage made of it, uint8 (B, S, S, 3): with what is known around it, if this is the
        picture's size.
        """
        if self.mask is None or painted.shape != self.pictures.shape:
            return painted
        return np.stack(
            [
                composite(*each)
                for each in zip(self.pictures, painted, self.mask[:, 0] > 0, strict=True)
            ]
        )


def shrunk(pictures: np.ndarray, size: int) -> np.ndarray:
    """uint8 (B, S, S, 3) to (B, size, size, 3), each pixel the mean of those it covers; one by one,
    to save memory.
    """
    return np.stack([to_uint8(downsample(to_float(picture), size)) for picture in pictures])


def pooled(mask: np.ndarray, size: int) -> np.ndarray:
    """(B, 1, S, S) to bool (B, 1, size, size): whether any of the pixels that one covers is
    painted.
    """
    factor = mask.shape[-1] // size
    return mask.reshape(*mask.shape[:2], size, factor, size, factor).any(axis=(-3, -1))


def detailed(low: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """uint8 (B, S, S, 3): p above."""
    x, size = to_float(pictures), pictures.shape[1]
    return to_uint8(x + upsample(to_float(low) - downsample(x, low.shape[1]), size))


def check_square(shape: tuple[int, ...], size: int, name: str | Path) -> None:
    """UserError unless a picture, (H, W, 3), has the side `size`, which the cascade ends with."""
    if shape[:2] != (size, size):
        raise UserError(
            f"{name}: {shape[1]} x {shape[0]} pixels, but this cascade edits pictures of {size} x {size}, which its "
            "last stage makes; crop or resize it"
        )


def strengths(
    given: float | Mapping[str, float] | None, masked: bool, names: Sequence[str]
) -> dict[str, float]:
    """The strength of each stage; those that nothing was said of paint a hole from noise, and else
    keep a part.
    """
    usual = 1.0 if masked else STRENGTH
    said = (
        given
        if isinstance(given, Mapping)
        else {}
        if given is None
        else dict.fromkeys(names, given)
    )
    for strength in said.values():
        if not 0 < strength <= 1:
            raise UserError(
                f"strength {strength}: not in (0, 1]; 1 leaves nothing of what was there"
            )
    return {name: said.get(name, usual) for name in names}


# Pictures in memory.

Images = Image.Image | Sequence[Image.Image]  # one for all or one each


def edits_of(
    image: Images | None,
    mask: Images | None,
    strength: float | Mapping[str, float] | None,
    num: int,
    size: int,
    names: Sequence[str],
) -> dict[str, Edit]:
    """What each stage of `names` edits, for `num` results of which the last stage makes `size` px;
    {} without image.
    """
    if image is None:
        if mask is not None or strength is not None:
            raise UserError(
                f"{'strength' if mask is None else 'mask'}: there is no picture to edit; give image"
            )
        return {}
    pictures, masks = (_each(*given, num) for given in (("image", image), ("mask", mask)))
    for i, picture in enumerate(pictures):
        check_square(picture.shape, size, f"image {i}")
    holes = [hole(white, (size, size), f"mask {i}", f"image {i}") for i, white in enumerate(masks)]
    chosen = strengths(strength, bool(masks), names)
    stacked = np.stack(pictures), np.stack(holes)[:, None] if masks else None
    return {name: Edit(*stacked, chosen[name]) for name in names}


def _each(name: str, given: Images | None, num: int) -> list[np.ndarray]:
    """uint8 (H, W, 3) for each; none of nothing."""
    images = [given] * num if isinstance(given, Image.Image) else given or []
    if given is not None and len(images) != num:
        raise UserError(f"{name}: {len(images)} for {num} prompts; give one each or one for all")
    return [np.asarray(image.convert("RGB")) for image in images]


# Pictures in files.


@dataclass(frozen=True, kw_only=True)
class Editing:
    """Files to edit: picture i of `images` and of `masks`, of which there may be none.

    Args:
        strengths: of each stage that runs, in order; the first one sees nothing but the picture.
        digests: the SHA-256 of each file.
    """

    images: Sequence[Path]
    masks: Sequence[Path]
    strengths: Mapping[str, float]
    digests: Mapping[Path, str]

    def how(self, stage: str) -> tuple[float, bool]:
        """That of `edit`."""
        return self.strengths[stage], bool(self.masks)

    def files(self, number: int) -> dict[str, Path]:
        return {"image": self.images[number]} | ({"mask": self.masks[number]} if self.masks else {})

    def names(self, number: int) -> dict[str, str]:
        """What the files are called, which no picture depends on."""
        return {key: path.name for key, path in self.files(number).items()}

    def recipe(self, stage: str, number: int) -> dict[str, Any]:
        """What a picture depends on that it would not without editing."""
        digests = {f"{key}_sha256": self.digests[path] for key, path in self.files(number).items()}
        return digests | {
            "strength": self.strengths[stage],
            "edited_from": next(iter(self.strengths)),
        }

    def edit(self, stage: str, numbers: Sequence[int]) -> Edit:
        pictures = np.stack([read(self.images[number]) for number in numbers])
        masks = [
            hole(
                read(self.masks[number]),
                pictures.shape[1:],
                self.masks[number],
                self.images[number],
            )
            for number in numbers
            if self.masks
        ]
        return Edit(pictures, np.stack(masks)[:, None] if masks else None, self.strengths[stage])


def open_editing(
    images: Sequence[Path], masks: Path | None, size: int, strengths: Mapping[str, float]
) -> Editing:
    """`images`, each of which may stand there many times, and their masks. UserError for what
    cannot be edited.
    """
    found = {image: None if masks is None else mask_for(image, masks) for image in images}
    for image, mask in found.items():
        picture = read(image)
        check_square(picture.shape, size, image)
        if mask:
            hole(read(mask), picture.shape, mask, image)
    chosen = [mask for image in images if (mask := found[image])]
    digests = {path: sha256_file(path) for path in {*images, *chosen}}
    return Editing(images=images, masks=chosen, strengths=strengths, digests=digests)
