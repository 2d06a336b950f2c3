"""How often generated images show what their captions say, for the scenes of tools/shapes.py.

    python -m tools.agreement runs/demo/images

A substitute for CLIP score and FID that needs no network. It reads the pixels in four steps:

    background   the named grey nearest to the border's median
    object       the pixels whose distance from the border's median is more than half the largest
    colour       the named colour nearest to the object's median, in CIELAB, which is perceptual
    shape        the one whose outline overlaps most once both are stretched to the same box

A model that ignores its captions agrees by chance, 1/6 for colour, 1/4 for shape and 1/3 for
background, so each share is reported beside its chance.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipeline.errors import UserError
from pipeline.terminal import Parser, run
from tools.shapes import BACKGROUNDS, COLOURS, SHAPES, Scene, draw, parse

SIDE = 64  # pixels: every image is judged at this size
BORDER = 2  # pixels of SIDE that count as background
MIN_CONTRAST = 48  # least RGB distance (channels 0 to 255) between an object and its background
MIN_SIDE = 6  # pixels of SIDE: least width and height of an object that has a shape
MAX_ASPECT = 2  # a longer object is a streak
MIN_OVERLAP = 0.5  # intersection over union with the best shape, below which it is none of them
BOX = 32  # side of the box in which outlines are compared

# The smallest shape, a small cross, covers 3.5 % of the image; this quantile lies within it.
CONTRAST_PERCENTILE = 98.5


class Reading(NamedTuple):
    """Attributes of the scene that an image shows; None for a colour or shape not recognized."""

    colour: str | None
    shape: str | None
    background: str


CHANCES = {
    "colour": 1 / len(COLOURS),
    "shape": 1 / len(SHAPES),
    "background": 1 / len(BACKGROUNDS),
}


def read_scene(image: np.ndarray) -> Reading:
    """The scene in a uint8 (H, W, 3) image."""
    # At one size, as the constants in pixels and the smoothing are of SIDE.
    resized = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = _smooth(np.asarray(resized, np.float64))

    inner = np.zeros((SIDE, SIDE), bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    ground = np.median(pixels[~inner], axis=0)
    background = _nearest(ground, BACKGROUNDS)

    distance = np.linalg.norm(pixels - ground, axis=-1)
    contrast = float(np.percentile(distance, CONTRAST_PERCENTILE))
    if contrast < MIN_CONTRAST:
        return Reading(None, None, background)

    # Without specks: most of a pixel's neighbours belong to the object too.
    mask = distance > contrast / 2
    mask &= _smooth(mask[..., None].astype(float))[..., 0] > 0.4
    if not mask.any():
        return Reading(None, None, background)

    # The colour is read away from the edge, where it mixes with the background.
    core = mask & (distance > 0.8 * contrast)
    colour = _nearest(np.median(pixels[core if core.any() else mask], axis=0), COLOURS)
    return Reading(colour, _shape(mask), background)


def _shape(mask: np.ndarray) -> str | None:
    cropped = _crop(mask)
    shorter, longer = sorted(cropped.shape)
    # Of so few pixels, or so long, stretched to the box anything resembles some shape.
    if shorter < MIN_SIDE or longer > MAX_ASPECT * shorter:
        return None

    outline = _stretch(cropped)
    overlaps = {
        shape: float((outline & other).sum() / (outline | other).sum())
        for shape, other in _outlines().items()
    }
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= MIN_OVERLAP else None


def _crop(mask: np.ndarray) -> np.ndarray:
    """A mask's bounding box."""
    rows = np.flatnonzero(mask.any(1))
    columns = np.flatnonzero(mask.any(0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _stretch(mask: np.ndarray) -> np.ndarray:
    """A mask resized to (BOX, BOX)."""
    grey = Image.fromarray(mask).convert("L")
    return np.asarray(grey.resize((BOX, BOX), Image.Resampling.BILINEAR)) > 127


@cache
def _outlines() -> dict[str, np.ndarray]:
    """The four shapes as bool (BOX, BOX)."""
    scenes = {
        name: Scene(size="large", colour="red", shape=name, background="black") for name in SHAPES
    }
    # On black, a red shape is where the red channel is high.
    red = 110  # half of the colour's red channel
    return {
        name: _stretch(_crop(np.asarray(draw(scene, 4 * SIDE))[..., 0] > red))
        for name, scene in scenes.items()
    }


def _smooth(pixels: np.ndarray) -> np.ndarray:
    """The mean of each pixel's 3 x 3 neighbourhood, for (H, W, C).

    Noise falls to a third, and edges stay within a pixel.
    """
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    neighbours = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.mean(neighbours, axis=0)


def _nearest(rgb: np.ndarray, names: Mapping[str, tuple[int, int, int]]) -> str:
    lab = _lab(rgb)
    return min(names, key=lambda name: float(np.linalg.norm(lab - _lab(np.array(names[name])))))


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (3,) in 0 to 255 as CIELAB (CIE 15, white D65)."""
    s = np.asarray(rgb) / 255
    # sRGB to linear light (IEC 61966-2-1).
    linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)

    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    # Relative to white, whose X, Y and Z are the sums of the rows.
    xyz = to_xyz @ linear / to_xyz.sum(1)
    # A cube root, continued as a line near black, where its slope would be infinite.
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def agreement(pairs: Iterable[tuple[str, np.ndarray]]) -> dict[str, object]:
    """Shares of (caption, uint8 image) pairs whose image shows the caption's colour, shape and
    background.

    {"images": n, "colour": {"share": s, "chance": 1/6}, "shape": ..., "background": ...}.

    Raises:
        UserError: a caption is not in the grammar, or there are no pairs.
    """
    matches = []
    for prompt, image in pairs:
        # Size and position are not judged.
        scene = parse(prompt)
        expected = Reading(scene.colour, scene.shape, scene.background)
        matches.append([a == b for a, b in zip(read_scene(image), expected, strict=True)])

    if not matches:
        raise UserError("agreement: no images to judge")

    shares = dict(zip(Reading._fields, np.mean(matches, axis=0).tolist(), strict=True))
    scores = {name: {"share": shares[name], "chance": chance} for name, chance in CHANCES.items()}
    return {"images": len(matches), **scores}


def read_manifest(folder: Path, manifest: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The (caption, uint8 image) pairs that `manifest` lists, its files relative to `folder`.

    A line is a JSON object with `prompt` and `file`, or, in a manifest called .tsv, the two
    separated by a tab.
    """
    try:
        lines = manifest.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{manifest}: cannot be read ({error}); name another with --manifest"
        ) from error

    for line_number, line in enumerate(lines, 1):
        try:
            prompt, file = _parse_line(line, tabs=manifest.suffix == ".tsv")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{manifest}:{line_number}: no prompt and file in {line[:80]!r}"
            ) from error

        try:
            with Image.open(folder / file) as image:
                yield prompt, np.asarray(image.convert("RGB"))
        except OSError as error:
            raise UserError(
                f"{manifest}:{line_number}: {folder / file} cannot be read as an image ({error})"
            ) from error


def _parse_line(line: str, *, tabs: bool) -> tuple[str, str]:
    """Prompt and file. ValueError, KeyError or TypeError if they are not there."""
    if tabs:
        # ValueError unless there are exactly two fields.
        prompt, file = line.split("\t")
        return prompt, file

    fields = json.loads(line)
    return fields["prompt"], fields["file"]


def main(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="python -m tools.agreement",
        description="How often images show what their captions say.",
    )
    parser.add_argument(
        "images", type=Path, metavar="IMAGES_DIR", help="folder with manifest.jsonl and the images"
    )
    parser.add_argument(
        "--manifest",
        type=Path,
        help="another list: .jsonl with prompt and file, or .tsv with the two",
    )
    parser.add_argument(
        "--json", action="store_true", help="print a JSON object instead of a table"
    )
    options = parser.parse_args(argv)

    manifest = options.manifest or options.images / "manifest.jsonl"
    result = agreement(read_manifest(options.images, manifest))
    if options.json:
        print(json.dumps(result))
        return

    print(f"{'':12}{'agree':>8}{'chance':>8}   of {result['images']} images")
    for name, score in result.items():
        if isinstance(score, dict):
            print(f"{name:12}{score['share']:8.1%}{score['chance']:8.1%}")


if __name__ == "__main__":
    run(main)
