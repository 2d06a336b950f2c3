"""Pictures and masks that the user names: files and folders read, and one line for what is wrong
with them.

Pictures are uint8 (H, W, 3), upright; masks bool (H, W), True where the file is white: that is
painted.
"""

from pathlib import Path

import numpy as np

from pipeline.data.decode import MAX_SIDE, BadImage, decode
from pipeline.errors import UserError
from pipeline.imaging.degradations import grey

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")


def read(path: Path) -> np.ndarray:
    """A picture's file. UserError if it is none."""
    try:
        return np.ascontiguousarray(decode(path.read_bytes(), MAX_SIDE).upright())
    except (OSError, BadImage) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path}: {reason}; give a picture ({', '.join(SUFFIXES)})") from None


def pictures_in(place: Path) -> list[Path]:
    """A picture, or those of a folder by name."""
    if not place.is_dir():
        return [place]
    found = sorted(path for path in place.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise UserError(f"{place}: there is no picture in this folder ({', '.join(SUFFIXES)})")
    if len({path.stem for path in found}) < len(found):
        raise UserError(
            f"{place}: two pictures have one name but for its ending; the results would have one name, too"
        )
    return found


def mask_for(picture: Path, masks: Path) -> Path:
    """The mask's file: the one for all, or the one of the picture's name in a folder."""
    return masks / f"{picture.stem}.png" if masks.is_dir() else masks


def hole(
    white: np.ndarray, shape: tuple[int, ...], name: str | Path, picture: str | Path
) -> np.ndarray:
    """The mask that a picture `white`, called `name`, shows for another called `picture`, (H, W, 3)
    of `shape`.
    """
    mask = grey(white)[..., 0] >= 128
    if mask.shape != shape[:2]:
        raise UserError(
            f"{name}: the mask has {mask.shape[1]} x {mask.shape[0]} pixels and {picture} {shape[1]} x {shape[0]}; "
            "give one of the picture's size, white where it is to be made"
        )
    if not mask.any():
        raise UserError(f"{name}: nothing in this mask is white, which is what would be made")
    return mask
