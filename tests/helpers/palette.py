"""A tiny image-to-image stage, and images with a hole."""

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import build
from pipeline.stage.registry import stage_class
from stages.image_to_image import ImageToImage
from tests.conftest import stage_yaml

RNG = np.random.default_rng(0)


def make(run: Path, shards: Path, **changes: Any) -> ImageToImage:
    """16 px, inpainting and colorization, two DDIM steps."""
    raw = stage_yaml("base", run, shards, Path("unused")) | {"kind": "image_to_image"}
    del raw["text"]
    raw["unet"] |= {"patch": 2, "attention": ["none", "none"], "dropout": 0.1}
    raw["sample"] = {"sampler": "ddim", "steps": 2, "batch_size": 4, "threshold": "static"}
    raw["tasks"] = {"inpainting": {"logsnr_shift": -1.0}, "colorization": {"weight": 3.0}}
    cls = stage_class("image_to_image")
    stage = cls(build(cls.Config, raw | changes))
    assert isinstance(stage, ImageToImage)
    return stage


def random_image(height: int = 16, width: int = 16) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def hole(height: int = 16, width: int = 16) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[4:12, 3:10] = True
    return mask
