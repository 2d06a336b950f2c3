"""The three classic small models of configs/classic: each trains and samples by the commands of
docs/classic.md, with few steps and pictures.
"""

import json
from pathlib import Path

import pytest
from PIL import Image

from launch.cli import main as cli
from tests.helpers.jobs import ROOT
from tools import glyphs, shapes

pytestmark = pytest.mark.slow

FEW = (
    "train.steps=2",
    "train.checkpoint_every=2",
    "train.sample_every=0",
    "data.global_batch=4",
    "unet.channels=16",
)
QUICK = ("unet.head_channels=16", "sample.steps=3", "sample.batch_size=4")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classic")
    glyphs.write(folder / "glyphs", num=16, seed=0, shard_size=16, workers=1)
    shapes.write(folder / "shapes", num=16, size=64, seed=0, shard_size=16, workers=1)
    return folder


def cascade(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize("name", ["glyphs28", "shapes64", "classes64"])
def test_it_trains_and_samples(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = data / ("glyphs" if name == "glyphs28" else "shapes")
    config, run, out = ROOT / f"configs/classic/{name}.yaml", tmp_path / "run", tmp_path / "out"
    assert (
        cascade("train", str(config), f"run={run}", f"data.shards={shards}/*.tar", *FEW, *QUICK)
        == 0
    )
    assert cascade("sample", f"{run}/stage", "--out", str(out), "--num", "3") == 0
    told = " for 3 prompts" if name == "classes64" else ""
    assert capsys.readouterr().out == f"{out}: 3 images written{told}, listed in manifest.jsonl\n"
    entries = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    classes = json.loads((run / "stage/stage.json").read_text()).get("classes") or ["", "", ""]
    assert [entry["prompt"] for entry in entries] == classes[:3]
    for entry in entries:
        with Image.open(out / entry["file"]) as image:
            assert image.size == (int(name[-2:]),) * 2
