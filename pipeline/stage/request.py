"""What is to be sampled: the one argument of the sampling engine beside the stage and its settings.

Shapes: N images, S side, s side of the low resolution.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from pipeline.data.image import to_uint8
from pipeline.imaging.degradations import Degraded
from pipeline.stage.inputs import Arrays


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Images to start from instead of noise, and what of them may change.

    Args:
        images: uint8 (N, S, S, 3).
        mask: (N, 1, S, S), 1 where an image is sampled anew; None: everywhere.
        strength: diffusion time in (0, 1] at which sampling starts; 1 keeps nothing of the image
            (SDEdit, Meng et al., arXiv 2108.01073).
    """

    images: np.ndarray
    mask: np.ndarray | None = None
    strength: float = 1.0

    @classmethod
    def outside_of_holes(cls, degraded: Sequence[Degraded]) -> Self:
        """Keeps what is known of degraded images; their holes are sampled."""
        sources = np.stack([each.source for each in degraded])
        masks = np.stack([each.mask for each in degraded])
        # The noise in the holes is clipped, but the mask leaves none of their pixels in use.
        return cls(images=to_uint8(sources), mask=masks)

    @classmethod
    def join(cls, edits: Sequence["Edit"]) -> Self:
        """One edit of the images of several, which all have masks."""
        masks = [edit.mask for edit in edits if edit.mask is not None]
        return cls(
            images=np.concatenate([edit.images for edit in edits]), mask=np.concatenate(masks)
        )

    def take(self, rows: np.ndarray) -> "Edit":
        """Those of these images."""
        mask = None if self.mask is None else self.mask[rows]
        return Edit(images=self.images[rows], mask=mask, strength=self.strength)


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """N images to sample; each depends on the seed, its id and its own row of everything else.

    Args:
        prompt: named arrays of N rows (`pipeline.text.prompts`); {} for a stage without.
        seed: of the noise, in [0, 2**63).
        image_ids: N numbers that name the images' noise, each in [0, 2**64).
        low_res: uint8 (N, s, s, 3), what super-resolution enlarges.
        degraded: N of them, what image-to-image restores.
        task: how they were degraded.
        edit: what to start from, if not from noise; of `degraded`, what is known unless given.
        initial_noise: float32 (N, 3, S, S), instead of the noise that seed and ids name.
    """

    prompt: Arrays
    seed: int
    image_ids: Sequence[int]
    low_res: np.ndarray | None = None
    degraded: Sequence[Degraded] | None = None
    task: str | None = None
    edit: Edit | None = None
    initial_noise: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.edit is None and self.degraded is not None:
            object.__setattr__(self, "edit", Edit.outside_of_holes(self.degraded))

    @property
    def num_images(self) -> int:
        return len(self.image_ids)

    @property
    def strength(self) -> float:
        """Diffusion time at which sampling starts; 1 is pure noise."""
        return 1.0 if self.edit is None else self.edit.strength

    @property
    def masked(self) -> bool:
        """Whether only a part of each image is sampled."""
        return self.edit is not None and self.edit.mask is not None

    def take(self, rows: np.ndarray) -> "SampleRequest":
        """The request for these images alone, in this order; a row may be taken more than once."""

        def chosen(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array[rows]

        return SampleRequest(
            prompt={name: array[rows] for name, array in self.prompt.items()},
            seed=self.seed,
            image_ids=[self.image_ids[row] for row in rows],
            low_res=chosen(self.low_res),
            degraded=None if self.degraded is None else [self.degraded[row] for row in rows],
            task=self.task,
            edit=None if self.edit is None else self.edit.take(rows),
            initial_noise=chosen(self.initial_noise),
        )


def batch_rows(num_images: int, batch_size: int) -> Iterator[np.ndarray]:
    """The rows of each batch. The last one repeats its last row: one shape, one compiled graph."""
    for start in range(0, num_images, batch_size):
        yield np.arange(start, start + batch_size).clip(max=num_images - 1)
