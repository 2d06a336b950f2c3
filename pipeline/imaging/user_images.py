"""Image and mask files that the user names: reading them, and one-line errors for invalid ones.

Images are uint8 (H, W, 3), upright by their EXIF orientation. Masks are bool (H, W), True where the
mask's file is white: those pixels are generated.
"""

from pathlib import Path

import numpy as np

from pipeline.data.decode import MAX_SIDE, BadImage, decode
from pipeline.errors import UserError
from pipeline.imaging.degradations import to_grayscale

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
WHITE_THRESHOLD = 128  # luma from which a pixel of a mask's file counts as white


def read_image(path: Path) -> np.ndarray:
    """The image in a file. UserError if it cannot be read or decoded."""
    try:
        # At full size: for a smaller one a JPEG would be decoded at a fraction.
        return np.ascontiguousarray(decode(path.read_bytes(), MAX_SIDE).upright())
    except (OSError, BadImage) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        formats = ", ".join(IMAGE_SUFFIXES)
        raise UserError(f"{path}: {reason}; give an image ({formats})") from None


def list_images(path: Path) -> list[Path]:
    """The image files of a folder, sorted by name; `path` itself if it is no folder.

    UserError if the folder has no images, or two of the same name with different suffixes, as their
    results would have the same name.
    """
    if not path.is_dir():
        return [path]

    images = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise UserError(f"{path}: no image in this folder ({', '.join(IMAGE_SUFFIXES)})")

    if len({image.stem for image in images}) < len(images):
        raise UserError(
            f"{path}: two images have the same name with different suffixes, and their results "
            "would too; rename one"
        )
    return images


def mask_path(image: Path, masks: Path) -> Path:
    """The mask's file for an image: `masks`, or in the folder `masks` the PNG of its name."""
    return masks / f"{image.stem}.png" if masks.is_dir() else masks


def mask_from_image(
    mask_image: np.ndarray,
    shape: tuple[int, ...],
    mask_name: str | Path,
    image_name: str | Path,
) -> np.ndarray:
    """The mask, bool (H, W), for an image of `shape` (H, W, 3), from a black and white image.

    The names are those of the mask and of the image in error messages. UserError if their sizes
    differ, or if no pixel is white.
    """
    mask = to_grayscale(mask_image)[..., 0] >= WHITE_THRESHOLD

    if mask.shape != shape[:2]:
        raise UserError(
            f"{mask_name}: the mask has {mask.shape[1]} x {mask.shape[0]} pixels and {image_name} "
            f"{shape[1]} x {shape[0]}; give a mask of the image's size, white where pixels are to "
            "be generated"
        )
    if not mask.any():
        raise UserError(f"{mask_name}: no pixel is white; make white what is to be generated")

    return mask
