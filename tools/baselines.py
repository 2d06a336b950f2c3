"""Restoration without a network: what a model has to beat.

    colorization             the grey image plus the mean chroma of the training images, if given
    inpainting, uncropping   each pixel of the hole copied from the nearest known one
    jpeg_restoration         a Gaussian blur, which removes block edges with the finest detail

The smooth fill of a hole is not among them: it is the prior mean from which a stage may start, see
pipeline/imaging/degradations.py.
"""

from collections.abc import Iterable

import numpy as np
from scipy import ndimage

from pipeline.data.image import to_uint8
from pipeline.imaging.degradations import Degraded, to_grayscale

BLUR_SIGMA = 0.6  # pixels; of 0.5, 0.6 and 0.8 the best on photographs of 64 px, by 0.1 dB


def baseline(task: str, degraded: Degraded, chroma: np.ndarray | None = None) -> np.ndarray:
    """The restored image, uint8 (H, W, 3); known pixels are unchanged.

    Args:
        task: one of the four tasks.
        degraded: the network's inputs.
        chroma: (3,) for colorization, as `mean_chroma` returns it; None leaves the image grey.
    """
    image = to_uint8(degraded.source)
    mask = degraded.mask[0] == 1

    if task == "jpeg_restoration":
        # Not across the channels.
        sigma = (BLUR_SIGMA, BLUR_SIGMA, 0)
        return np.rint(ndimage.gaussian_filter(image.astype(np.float64), sigma)).astype(np.uint8)

    if task == "colorization":
        offset = np.zeros(3) if chroma is None else chroma
        return np.rint(np.clip(image + offset, 0, 255)).astype(np.uint8)

    # A known pixel is its own nearest one, and so is not changed.
    nearest = ndimage.distance_transform_edt(mask, return_distances=False, return_indices=True)
    return image[tuple(nearest)]


def mean_chroma(images: Iterable[np.ndarray]) -> np.ndarray:
    """The mean of colour minus grey over all pixels of uint8 (H, W, 3) images, float64 (3,); each
    image has the same weight.
    """
    return np.mean(
        [(image - to_grayscale(image).astype(np.float64)).mean((0, 1)) for image in images], 0
    )
