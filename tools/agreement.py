"""How often generated pictures show what their captions say, for the scenes of tools/shapes.py.

    python -m tools.agreement runs/demo/images

A stand-in for CLIP score and FID that needs no network: it looks at the pixels alone, in four steps
anyone can check. The background is the named grey nearest to the border's median. The object is
what differs from the border by more than half of what the most different pixels do. Its colour is
the named colour nearest to its median, in CIELAB, where distances follow the eye. Its shape is that
of the four whose outline overlaps most with it once both fill the same box.

A model that ignores its captions agrees by chance, 1/6 for colour, 1/4 for shape and 1/3 for
background, so each share is shown beside its chance.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.errors import UserError
from pipeline.terminal import Parser, run
from tools.shapes import BACKGROUNDS, COLOURS, SHAPES, Scene, draw, parse

SIDE = 64  # pictures are judged at this size, whatever their own
BORDER = 2  # pixels of SIDE that are taken for background
CONTRAST = 48  # an object differs from its background by this much at least: distance in RGB, each 0 to 255
SMALLEST = 6  # pixels of SIDE that an object is wide and high, to have a shape
OVERLAP = 0.5  # intersection over union with the best shape, below which it is none of them
BOX = 32  # side of the box in which outlines are compared

Seen = tuple[str | None, str | None, str]  # colour, shape, background


def read_scene(image: np.ndarray) -> Seen:
    """(colour, shape, background) that the uint8 (H, W, 3) picture shows; None for a colour or
    shape it cannot see.
    """
    pixels = _smooth(
        np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)
    )
    inner = np.zeros((SIDE, SIDE), bool)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    ground = np.median(pixels[~inner], axis=0)
    background = _nearest(ground, BACKGROUNDS)
    distance = np.linalg.norm(pixels - ground, axis=-1)
    contrast = float(
        np.percentile(distance, 98.5)
    )  # the smallest shape, a small cross, fills 3.5 % of the picture
    if contrast < CONTRAST:
        return None, None, background
    mask = distance > contrast / 2
    mask &= (
        _smooth(mask[..., None].astype(float))[..., 0] > 0.4
    )  # no specks: most of the neighbours belong to it too
    if not mask.any():
        return None, None, background
    core = mask & (distance > 0.8 * contrast)  # without the edge, where colours mix
    return (
        _nearest(np.median(pixels[core if core.any() else mask], axis=0), COLOURS),
        _shape(mask),
        background,
    )


def _shape(mask: np.ndarray) -> str | None:
    thing = _cut(mask)
    if min(thing.shape) < SMALLEST or max(thing.shape) > 2 * min(thing.shape):
        return None
    outline = _boxed(thing)
    overlaps = {
        shape: float((outline & other).sum() / (outline | other).sum())
        for shape, other in _outlines().items()
    }
    best = max(overlaps, key=overlaps.__getitem__)
    return best if overlaps[best] >= OVERLAP else None


def _cut(mask: np.ndarray) -> np.ndarray:
    """A mask without the empty rows and columns around what is set."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _boxed(mask: np.ndarray) -> np.ndarray:
    """A mask stretched to (BOX, BOX)."""
    return (
        np.asarray(Image.fromarray(mask).convert("L").resize((BOX, BOX), Image.Resampling.BILINEAR))
        > 127
    )


@cache
def _outlines() -> dict[str, np.ndarray]:
    scenes = {
        name: Scene(size="large", colour="red", shape=name, background="black") for name in SHAPES
    }
    return {
        name: _boxed(_cut(np.asarray(draw(scene, 4 * SIDE))[..., 0] > 110))
        for name, scene in scenes.items()
    }


def _smooth(pixels: np.ndarray) -> np.ndarray:
    """The mean of each pixel's 3 x 3 neighbourhood: noise falls to a third, edges stay within a
    pixel.
    """
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((1, 1), (1, 1), (0, 0)), mode="edge")
    neighbours = [padded[y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return np.mean(neighbours, axis=0)


def _nearest(rgb: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    return min(
        names, key=lambda name: float(np.linalg.norm(_lab(rgb) - _lab(np.array(names[name]))))
    )


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB (0 to 255) in CIELAB (CIE 15, white D65)."""
    s = np.asarray(rgb) / 255
    linear = np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = to_xyz @ linear / to_xyz.sum(1)
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def agreement(pairs: Iterable[tuple[str, np.ndarray]]) -> dict[str, object]:
    """Shares of (caption, uint8 picture) pairs whose picture shows the caption's colour, shape and
    background.

    {"images": n, "colour": {"share": s, "chance": 1/6}, "shape": ..., "background": ...}. Raises
    UserError for a caption outside the grammar and if there are no pairs.
    """
    hits = []
    for prompt, image in pairs:
        said = parse(prompt)
        hits.append(
            [
                a == b
                for a, b in zip(
                    read_scene(image), (said.colour, said.shape, said.background), strict=True
                )
            ]
        )
    if not hits:
        raise UserError("agreement: no images to judge")
    chances = {
        "colour": 1 / len(COLOURS),
        "shape": 1 / len(SHAPES),
        "background": 1 / len(BACKGROUNDS),
    }
    shares = np.mean(hits, axis=0).tolist()
    found = {
        name: {"share": share, "chance": chances[name]}
        for name, share in zip(chances, shares, strict=True)
    }
    return {"images": len(hits), **found}


def read_manifest(folder: Path, manifest: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The (caption, picture) pairs that `manifest` lists, its files relative to `folder`.

    A line is a JSON object with `prompt` and `file`, or, if the manifest is called .tsv, the two
    with a tab between.
    """
    try:
        lines = manifest.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{manifest}: cannot be read ({error}); name another with --manifest"
        ) from error
    for number, line in enumerate(lines, 1):
        try:
            if manifest.suffix == ".tsv":
                prompt, file = line.split("\t")
            else:
                fields = json.loads(line)
                prompt, file = fields["prompt"], fields["file"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{manifest}:{number}: no prompt and file in {line[:80]!r}") from error
        try:
            with Image.open(folder / file) as image:
                yield prompt, np.asarray(image.convert("RGB"))
        except OSError as error:
            raise UserError(
                f"{manifest}:{number}: {folder / file} cannot be read as an image ({error})"
            ) from error


def main(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="python -m tools.agreement",
        description="How often pictures show what their captions say.",
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
    result = agreement(
        read_manifest(options.images, options.manifest or options.images / "manifest.jsonl")
    )
    if options.json:
        print(json.dumps(result))
        return
    print(f"{'':12}{'agree':>8}{'chance':>8}   of {result['images']} images")
    for name, found in result.items():
        if isinstance(found, dict):
            print(f"{name:12}{found['share']:8.1%}{found['chance']:8.1%}")


if __name__ == "__main__":
    run(main)
