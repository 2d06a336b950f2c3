"""What needs no network: the restored pictures that a model has to beat.

    colorization             the grey picture with the mean colour of the training pictures, if that is given
    inpainting, uncropping   each pixel of the hole as the nearest known one
    jpeg_restoration         a blur, which takes the edges of the blocks with the finest detail

A fourth, the smooth fill of a hole, is the guess that a stage with spreads starts from: see
pipeline/imaging/degradations.py.
"""

from collections.abc import Iterable

import numpy as np
from scipy import ndimage

from pipeline.data.image import to_uint8
from pipeline.imaging.degradations import Degraded, to_grayscale

BLUR = 0.6  # sigma in pixels: of 0.5, 0.6 and 0.8 the best on photographs of 64 px, by 0.1 dB


def baseline(task: str, given: Degraded, chroma: np.ndarray | None = None) -> np.ndarray:
    """uint8 (H, W, 3); known pixels are as they were. `chroma` (3,), for colorization, as
    `mean_chroma` gives it.
    """
    picture, mask = to_uint8(given.source), given.mask[0] == 1
    if task == "jpeg_restoration":
        return np.rint(ndimage.gaussian_filter(picture.astype(np.float64), (BLUR, BLUR, 0))).astype(
            np.uint8
        )
    if task == "colorization":
        return np.rint(np.clip(picture + (0 if chroma is None else chroma), 0, 255)).astype(
            np.uint8
        )
    nearest = ndimage.distance_transform_edt(mask, return_distances=False, return_indices=True)
    return picture[tuple(nearest)]


def mean_chroma(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """float64 (3,): what uint8 (H, W, 3) have, on average over all pixels of each, beyond their
    grey.
    """
    return np.mean(
        [(picture - to_grayscale(picture).astype(np.float64)).mean((0, 1)) for picture in pictures],
        0,
    )
