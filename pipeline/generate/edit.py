"""An image edited through a cascade: sampled anew in a hole, or as a whole but not from pure noise.

Each stage sees the image shrunk to its own size, by the mean of the pixels that one covers, and the
mask by their maximum: a pixel is sampled if any that it covers is.

    inpainting      at each step x = image + mask (x - image), and z follows (`sample.repaint_steps`
                    repeats it: RePaint, Lugmayr et al., arXiv 2201.09865)
    image to image  sampling starts at the time s, its strength, from z = alpha_s p + sigma_s eps
                    (SDEdit, Meng et al., arXiv 2108.01073)

A base starts from p = image. Super-resolution is conditioned on what it enlarges, which the stages
before have edited. A start that contradicts it, such as the image itself, would pull the colours
back; no start at all would lose the image's detail. So its p has the colours of the one and the
detail of the other, a level of Burt and Adelson's Laplacian pyramid (1983):

    p = up(low_res) + image - up(down(image))

Where nothing was edited, that is the image. At its own size, known pixels are restored in the end,
bit for bit, and the sampled ones are blended into them (`composite`). Only there: the correction at
the border is carried into the hole, and carried in at each size it would grow to a tint of the
whole hole.

Shapes: N images, S side, s side of the low resolution.
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
from pipeline.imaging.user_images import mask_from_image, mask_path, read_image
from pipeline.stage.request import Edit

# Without a mask, unless given; diffusers' IF starts its super-resolution there, too.
DEFAULT_STRENGTH = 0.8


def scale_edit(edit: Edit, size: int, low_res: np.ndarray | None) -> Edit:
    """The edit for a stage that generates `size` px and, unless it is a base, enlarges `low_res`,
    uint8 (N, s, s, 3).
    """
    images = shrink(edit.images, size)
    mask = None if edit.mask is None else pool_mask(edit.mask, size)

    # From pure noise the start has no weight, and the images give only the known pixels.
    if low_res is not None and edit.strength < 1:
        start = add_detail(low_res, images)
        # Only the hole starts from the low resolution's colours: around it the image is known.
        images = start if mask is None else np.where(np.moveaxis(mask, 1, -1), start, images)

    return Edit(images=images, mask=mask, strength=edit.strength)


def composite_edit(edit: Edit, sampled: np.ndarray) -> np.ndarray:
    """A stage's samples, uint8 (N, S, S, 3), within what is known, if of the image's size."""
    # At a smaller size the correction at the border would grow from stage to stage.
    if edit.mask is None or sampled.shape != edit.images.shape:
        return sampled

    holes = edit.mask[:, 0] > 0
    return np.stack([composite(*each) for each in zip(edit.images, sampled, holes, strict=True)])


def shrink(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 (N, S, S, 3) to (N, size, size, 3), each pixel the mean of those it covers; one image
    at a time, to save memory.
    """
    return np.stack([to_uint8(downsample(to_float(image), size)) for image in images])


def pool_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """(N, 1, S, S) to bool (N, 1, size, size): whether any of the pixels that one covers is set."""
    factor = mask.shape[-1] // size
    # Any: a pixel that covers an unknown one is not known itself.
    return mask.reshape(*mask.shape[:2], size, factor, size, factor).any(axis=(-3, -1))


def add_detail(low_res: np.ndarray, images: np.ndarray) -> np.ndarray:
    """uint8 (N, S, S, 3): p above; one image at a time, to save memory."""
    size = images.shape[1]
    detailed = []
    for low, image in zip(low_res, images, strict=True):
        x = to_float(image)
        # up(low_res) + x - up(down(x)) with one enlargement, as `upsample` is linear.
        detailed.append(to_uint8(x + upsample(to_float(low) - downsample(x, low.shape[0]), size)))
    return np.stack(detailed)


def check_square(shape: tuple[int, ...], size: int, name: str | Path) -> None:
    """UserError unless an image, (H, W, 3), has the side `size`, which the cascade ends with."""
    if shape[:2] != (size, size):
        raise UserError(
            f"{name}: {shape[1]} x {shape[0]} pixels, but this cascade edits images of {size} x "
            f"{size}, which its last stage generates; crop or resize it"
        )


def strengths(
    strength: float | Mapping[str, float] | None, masked: bool, stage_names: Sequence[str]
) -> dict[str, float]:
    """The strength of each stage. Those without one sample a hole from noise, and else keep a part.

    Raises:
        UserError: a strength is not in (0, 1].
    """
    if strength is None:
        given: Mapping[str, float] = {}
    elif isinstance(strength, Mapping):
        given = strength
    else:
        given = dict.fromkeys(stage_names, strength)

    for value in given.values():
        if not 0 < value <= 1:
            raise UserError(f"strength: {value} is not in (0, 1]; 1 keeps nothing of the image")

    # A hole is sampled from noise; without a mask, 1 would keep nothing of the image.
    default = 1.0 if masked else DEFAULT_STRENGTH
    return {name: given.get(name, default) for name in stage_names}


# Images in memory.

Images = Image.Image | Sequence[Image.Image]  # one for all or one each


def edits_of(
    image: Images | None,
    mask: Images | None,
    strength: float | Mapping[str, float] | None,
    *,
    num_images: int,
    size: int,
    stage_names: Sequence[str],
) -> dict[str, Edit]:
    """What each stage edits, for `num_images` results of which the last stage generates `size` px;
    {} without an image.
    """
    if image is None:
        if mask is not None or strength is not None:
            name = "strength" if mask is None else "mask"
            raise UserError(f"{name}: there is no image to edit; give image")
        return {}

    images = _one_each("image", image, num_images)
    masks = [] if mask is None else _one_each("mask", mask, num_images)
    for i, pixels in enumerate(images):
        check_square(pixels.shape, size, f"image {i}")

    holes = [
        mask_from_image(pixels, (size, size), f"mask {i}", f"image {i}")
        for i, pixels in enumerate(masks)
    ]

    by_stage = strengths(strength, bool(masks), stage_names)
    stacked = np.stack(images)
    stacked_mask = np.stack(holes)[:, None] if holes else None
    return {
        name: Edit(images=stacked, mask=stacked_mask, strength=by_stage[name])
        for name in stage_names
    }


def _one_each(name: str, given: Images, num_images: int) -> list[np.ndarray]:
    """uint8 (H, W, 3) for each result."""
    images = [given] * num_images if isinstance(given, Image.Image) else given
    if len(images) != num_images:
        raise UserError(
            f"{name}: {len(images)} images for {num_images} prompts; give one each or one for all"
        )
    return [np.asarray(image.convert("RGB")) for image in images]


# Images in files.


@dataclass(frozen=True, kw_only=True)
class EditFiles:
    """Files to edit: result i is of image i and of mask i, if there are masks.

    Args:
        images, masks: paths, one per result.
        strengths: of each stage that runs, in order; the first one starts from the image alone.
        digests: the SHA-256 of each file.
    """

    images: Sequence[Path]
    masks: Sequence[Path]
    strengths: Mapping[str, float]
    digests: Mapping[Path, str]

    def paths(self, image_id: int) -> dict[str, Path]:
        paths = {"image": self.images[image_id]}
        if self.masks:
            paths["mask"] = self.masks[image_id]
        return paths

    def names(self, image_id: int) -> dict[str, str]:
        """What the files are called, on which no pixel depends."""
        return {key: path.name for key, path in self.paths(image_id).items()}

    def recipe(self, stage: str, image_id: int) -> dict[str, Any]:
        """What an edited image depends on beside what a generated one does."""
        paths = self.paths(image_id)
        digests = {f"{key}_sha256": self.digests[path] for key, path in paths.items()}
        # The stages before the first one have not run, which changes the result.
        first_stage = next(iter(self.strengths))
        return {**digests, "strength": self.strengths[stage], "edited_from": first_stage}

    def read(self, stage: str, image_ids: Sequence[int]) -> Edit:
        images = np.stack([read_image(self.images[i]) for i in image_ids])
        mask = None
        if self.masks:
            shape = images.shape[1:]
            holes = [
                mask_from_image(read_image(self.masks[i]), shape, self.masks[i], self.images[i])
                for i in image_ids
            ]
            mask = np.stack(holes)[:, None]
        return Edit(images=images, mask=mask, strength=self.strengths[stage])


def open_edit_files(
    images: Sequence[Path], masks: Path | None, *, size: int, strengths: Mapping[str, float]
) -> EditFiles:
    """The files, checked; an image may be listed many times.

    Args:
        images: one per result.
        masks: one for all, or a folder of NAME.png.
        size: of the images, in pixels: what the cascade ends with.
        strengths: of each stage that runs.

    Raises:
        UserError: a file cannot be read or has another size.
    """
    mask_paths = {image: mask_path(image, masks) for image in images} if masks else {}

    # Each file once, however often it is listed. Its pixels are not kept: those of a whole folder
    # may exceed the memory.
    for image in dict.fromkeys(images):
        pixels = read_image(image)
        check_square(pixels.shape, size, image)
        if masks:
            path = mask_paths[image]
            mask_from_image(read_image(path), pixels.shape, path, image)

    chosen = [mask_paths[image] for image in images] if masks else []
    digests = {path: sha256_file(path) for path in {*images, *chosen}}
    return EditFiles(images=images, masks=chosen, strengths=strengths, digests=digests)
