"""What needs no network: the restored pictures that a model has to beat.

    colorization             the grey picture, with the mean colour of the training pictures if that is given
    inpainting, uncropping   the colours of the border, carried into the hole as smoothly as can be
    jpeg_restoration         a blur, which takes the edges of the blocks with the finest detail

Measured at 64 px on 60 squares of two photographs held out by tools/photographs.py, peak signal-to-noise ratio in dB
(structural similarity):

    the hole: nearest known pixel   inpainting 31.2 (0.900)   uncropping 25.2 (0.798)
              the border, carried              32.6 (0.914)              25.7 (0.810)
    JPEG:     as it came            28.4 (0.798)   blurred by 0.5, 0.6, 0.8 pixels   28.6, 28.7 (0.814), 28.6
    grey:     as it came            20.6 (0.911)   mean colour of the six others     20.0 (0.834)

A blur helps soft pictures, as close squares are: on four whole photographs shrunk to 64 px it gains nothing.
"""

from collections.abc import Iterable

import numpy as np
from scipy import ndimage

from pipeline.data.image import to_uint8
from pipeline.data.restore import filled
from pipeline.data.tasks import Given, grey

BLUR = 0.6  # sigma in pixels


def baseline(task: str, given: Given, chroma: np.ndarray | None = None) -> np.ndarray:
    """uint8 (H, W, 3); known pixels are as they were. `chroma` (3,), for colorization, as `mean_chroma` gives it."""
    picture, mask = to_uint8(given.source), given.mask[0] == 1
    if task == "colorization":
        restored = picture + (0 if chroma is None else chroma)
    elif task == "jpeg_restoration":
        restored = ndimage.gaussian_filter(picture.astype(np.float64), (BLUR, BLUR, 0))
    else:
        restored = filled(picture, mask)
    return np.where(mask[..., None], np.rint(np.clip(restored, 0, 255)).astype(np.uint8), picture)


def mean_chroma(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """float64 (3,): what uint8 (H, W, 3) have, on average over all pixels of each, beyond their grey."""
    return np.mean([(picture - grey(picture).astype(np.float64)).mean((0, 1)) for picture in pictures], 0)
