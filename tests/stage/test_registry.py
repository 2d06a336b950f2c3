"""From a YAML file to a stage's configuration, by the kind that it names."""

from pathlib import Path

import pytest

from pipeline.config import ConfigError
from pipeline.errors import UserError
from pipeline.stage.registry import read_stage_config, stage_class
from stages.base import Base, BaseConfig
from stages.super_resolution import SuperResolution, SuperResolutionConfig

TINY = Path(__file__).parents[2] / "configs" / "tiny"


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        read_stage_config(path, overrides)
    return str(error.value)


def test_kinds_are_found_by_name() -> None:
    assert stage_class("base") is Base
    assert stage_class("super_resolution") is SuperResolution


@pytest.mark.parametrize("kind", ["bass", "", None, ["base"]])
def test_an_unknown_kind(kind: object) -> None:
    with pytest.raises(UserError) as error:
        stage_class(kind)  # type: ignore[arg-type]
    assert (
        str(error.value)
        == f"kind: {kind!r} is no kind of stage; there are base, image_to_image, super_resolution"
    )


@pytest.mark.parametrize(
    ("name", "cls"),
    [("base64", BaseConfig), ("sr256", SuperResolutionConfig), ("sr1024", SuperResolutionConfig)],
)
def test_the_kind_decides_the_configuration(name: str, cls: type) -> None:
    config, launch = read_stage_config(TINY / f"{name}.yaml")
    assert type(config) is cls
    assert launch == {}


def test_overrides_and_the_launchers_section() -> None:
    config, launch = read_stage_config(
        TINY / "base64.yaml", ["train.steps=7", "launch.workers=2", "unet.patch=8"]
    )
    assert (config.train.steps, config.unet.patch) == (7, 8)
    assert launch == {"workers": 2}


def test_a_file_without_a_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("run: runs/a\n")
    assert message(path) == f"{path}: kind: missing; name a kind of stage, as base"


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        (
            "kind=bass",
            "kind: 'bass' is no kind of stage; there are base, image_to_image, super_resolution",
        ),
        ("train.stesp=7", "train.stesp: no such field in TrainConfig; did you mean 'steps'?"),
        ("low_res.size=16", "low_res: no such field in BaseConfig; its fields are "),
        ("seed=-1", "seed: -1 is not in [0, 2**63)"),
        ("text.cond_drop_prob=1.0", "text.cond_drop_prob: 1.0 is not in [0, 1); Imagen has 0.1"),
        ("data.workers=0", "data.workers: 0 is not positive; give 1 or more"),
        ("train.ema_decay=1.0", "train.ema_decay: 1.0 is not in [0, 1); 0.9999 is usual"),
        (
            "optimizer.max_grad_norm=0.0",
            "optimizer.max_grad_norm: 0.0 is not positive; give a positive number",
        ),
    ],
)
def test_a_fault_is_told_with_its_file(override: str, fault: str) -> None:
    assert message(TINY / "base64.yaml", override).startswith(f"{TINY}/base64.yaml: {fault}")


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("low_res.size=100", "low_res.size: 100 does not divide 1024, the stage's size"),
        ("low_res.size=1024", "low_res.size: 1024 does not divide 1024, the stage's size"),
        (
            "low_res.window=250",
            "low_res.window: 250 is no multiple of 4 (the enlargement) and of {stride} (by which "
            "this U-Net divides an image's sides) up to the size 1024",
        ),
        (
            "sample.aug_level=2.0",
            "sample.aug_level: 2.0 is not in [0, low_res.max_aug_level = 1.0]",
        ),
        (
            "low_res.max_aug_level=1.5",
            "low_res.max_aug_level: 1.5 is not a diffusion time in [0, 1]; Imagen has 1.0",
        ),
    ],
)
def test_faults_of_super_resolution(override: str, fault: str) -> None:
    fault = fault.replace("{stride}", str(read_stage_config(TINY / "sr1024.yaml")[0].unet.stride))
    fault = fault.replace("{stride}", str(read_stage_config(TINY / "sr1024.yaml")[0].unet.stride))
    assert message(TINY / "sr1024.yaml", override) == f"{TINY}/sr1024.yaml: {fault}"
