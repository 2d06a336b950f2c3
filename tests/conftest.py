"""Fixtures that several test files share."""

# isort: off
import sys

if sys.argv[0] == "-c":  # a worker of xdist; the cache of graphs wants to know the program
    sys.argv[0] = __file__
import pipeline  # noqa: F401  (first: it prepares the environment for MindSpore)

# isort: on
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline import kernels
from pipeline.data.config import DataConfig
from pipeline.data.shards import Shards
from pipeline.text.caption_embeddings import load_encoder, recipe
from pipeline.text.encoder import TextConfig
from pipeline.text.store import TextStore
from tests.helpers.jobs import QUICK, Running, leaving_nothing
from tools import shapes, tiny_t5

if TYPE_CHECKING:
    from pipeline import Cascade

LENGTH = 12  # tokens per caption


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n`, a file's tests run in one worker, as they share what they compile; so do all files
    that use the stages of `trained`.
    """
    uses_trained = {item.path for item in items if "trained" in getattr(item, "fixturenames", ())}
    for item in items:
        group = "trained" if item.path in uses_trained else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(params=["kernels", "operators"])
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The cells with our kernels, and with MindSpore's operators."""
    if request.param == "operators":
        monkeypatch.setattr(kernels, "library", lambda: None)
    elif kernels.library() is None:
        pytest.skip("the kernels are not built here: no C++ compiler")
    cached = (kernels.convolution, kernels.normalization, kernels.softmax, kernels.quantile)
    for kernel in cached:
        kernel.cache_clear()
    yield
    for kernel in cached:
        kernel.cache_clear()


@pytest.fixture(scope="session")
def shards_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 captioned scenes of 96 px in two tars, 00000.tar and 00001.tar. Read only: all tests share
    it.
    """
    folder = tmp_path_factory.mktemp("data") / "shards"
    shapes.write(folder, num=24, size=96, seed=1, shard_size=12, workers=1)
    return folder


@pytest.fixture(scope="session")
def t5_folder(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of width 16 whose tokenizer knows the captions of `shards_folder`; their embeddings lie
    beside them.
    """
    folder = tmp_path_factory.mktemp("models") / "t5"
    tiny_t5.make(
        folder, sorted(shards_folder.glob("*.tar")), width=16, layers=1, heads=2, vocab=64, seed=0
    )
    shards = Shards.open(DataConfig(shards=f"{shards_folder}/*.tar"), progress=False)
    text = TextConfig(encoder=str(folder), width=16, length=LENGTH)
    TextStore(shards, recipe(text)).build(partial(load_encoder, text), progress=False)
    return folder


def stage_yaml(kind: str, run: Path, shards: Path, t5: Path) -> dict[str, Any]:
    """The smallest stage that has all parts: `base` 16 px, `sr32` 16 to 32 px, `sr64` 32 to 64 px
    on windows.
    """
    size = {"base": 16, "sr32": 32, "sr64": 64}[kind]
    raw: dict[str, Any] = {
        "kind": "base" if kind == "base" else "super_resolution",
        "run": str(run),
        "size": size,
        "text": {"encoder": str(t5), "width": 16, "length": LENGTH},
        "diffusion": {"prediction": "v"},
        "unet": {
            "kind": "adm" if kind == "base" else "efficient",
            "channels": 16,
            "channel_mults": [1, 2],
            "num_blocks": [1, 1],
            "attention": ["none", "cross" if kind == "sr64" else "self"],
            "head_channels": 16,
            "text_channels": 16,
            "patch": size // 16 if kind != "sr64" else 2,
        },
        "data": {"shards": f"{shards}/*.tar", "global_batch": 4},
        "optimizer": {"lr": 1.0e-3, "warmup_steps": 2},
        "train": {
            "steps": 4,
            "checkpoint_every": 2,
            "report_every": 1,
            "sample_every": 4,
            "num_samples": 2,
        },
        "sample": {"sampler": "dpm_solver++", "steps": 3, "guidance": 2.0, "batch_size": 4},
    }
    if kind != "base":
        raw["low_res"] = {"size": size // 2} | ({"window": 32} if kind == "sr64" else {})
    return raw


@pytest.fixture(scope="session")
def trained(shards_folder: Path, t5_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run folders base, sr32 and sr64 of three stages trained for 4 steps, and
    cascade/ of them.

    Read only: all tests share it.
    """
    from pipeline.config import build
    from pipeline.generate.cascade_folder import export
    from pipeline.stage.registry import stage_class
    from pipeline.train.loop import train

    folder = tmp_path_factory.mktemp("trained")
    for name in ("base", "sr32", "sr64"):
        raw = stage_yaml(name, folder / name, shards_folder, t5_folder)
        cls = stage_class(raw["kind"])
        assert train(cls(build(cls.Config, raw)))
    export(
        {name: folder / name / "stage" for name in ("base", "sr32", "sr64")},
        t5_folder,
        folder / "cascade",
    )
    return folder


@pytest.fixture(scope="session")
def cascade(trained: Path) -> "Cascade":
    """The cascade of `trained`, whose graphs all tests share. Read only."""
    from pipeline import Cascade

    return Cascade.load(trained / "cascade")


@pytest.fixture(params=["msrun", "mpirun"])
def launcher(request: pytest.FixtureRequest) -> str:
    """Each of the two that is here."""
    if request.param == "mpirun" and not shutil.which("mpirun"):
        pytest.skip("there is no mpirun here; install openmpi-bin")
    return request.param


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts supervisors on one run folder; at the end nothing may be left of them."""
    run = tmp_path / "run"
    with leaving_nothing(run) as start:

        def started(*faults: str, **options: object) -> Running:
            argv = [
                sys.executable,
                "-m",
                "tests.helpers.supervised",
                str(run),
                json.dumps(QUICK | options),
                *faults,
            ]
            return Running(run, start(argv))

        yield started
