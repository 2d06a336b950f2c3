"""Compiled graphs that stay with a run: in real processes, as MindSpore takes one folder for each."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from pipeline.train import compile_cache
from pipeline.train.compile_cache import KEPT, CompileCache
from tests.conftest import stage_yaml
from tests.helpers.jobs import ROOT, WAIT

LOADED = "Use the compilation cache"  # as MindSpore says it


def trained(folder, *overrides):
    """Trains in a process of its own; what it said."""
    argv = [sys.executable, "-m", "launch", "train", str(folder / "base.yaml"), *overrides]
    environment = {**os.environ, "GLOG_v": "2"}
    done = subprocess.run(
        argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=WAIT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def reports(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_second_process_compiles_nothing_and_trains_the_same(tmp_path, shards_folder, t5_folder):
    run = tmp_path / "run"
    raw = stage_yaml("base", run, shards_folder, t5_folder)
    raw["train"] |= {"sample_every": 0}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(raw))

    said = trained(tmp_path)
    assert "compiling the training step" in said
    assert LOADED not in said
    (kept,) = (run / KEPT).iterdir()
    cold = [(report["loss"], report["grad_norm"]) for report in reports(run)]
    weights = (run / "stage" / "unet.safetensors").read_bytes()
    for path in run.iterdir():
        if path.is_dir() and path.name != KEPT:
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()

    said = trained(tmp_path)
    assert "loading the training step" in said
    assert said.count(LOADED) == 2  # the gradient, and the step along it
    assert [(report["loss"], report["grad_norm"]) for report in reports(run)] == cold
    assert (run / "stage" / "unet.safetensors").read_bytes() == weights

    said = trained(
        tmp_path, "train.steps=6"
    )  # another schedule of the learning rate, which is part of the graph
    assert LOADED not in said
    (other,) = (run / KEPT).iterdir()
    assert other != kept


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes CompileCache as a process's first; `graphs.version` can be another."""

    def make(shaped_by="a", rank=0):
        monkeypatch.setattr(CompileCache, "taken", False)
        return CompileCache(tmp_path, rank, CompileCache(), shaped_by)

    return make


def test_what_shapes_a_graph_names_its_folder(made, monkeypatch):
    one = made().target
    assert one == made().target
    assert len({one, made("b").target, made(rank=1).target}) == 3
    monkeypatch.setattr(compile_cache, "version", lambda package: "9")
    assert made().target != one


def test_only_whole_ones_stay_and_others_go(made, tmp_path):
    left, stale = made().folder, tmp_path / KEPT / "0123456789abcdef-0"
    for folder in (left, stale, tmp_path / KEPT / "0123456789abcdef-1"):
        (folder / "rank_0").mkdir(parents=True)
    first = made()  # the process before did not come to keep them
    assert not first.warm
    assert not left.exists()
    assert [path.name for path in (tmp_path / KEPT).iterdir()] == [
        "0123456789abcdef-1"
    ]  # of another rank
    first.keep()  # MindSpore has stored nothing
    assert not made().warm
    first = made()
    first.folder.mkdir()
    first.keep()
    assert made().warm


def test_a_process_has_one_folder(made, tmp_path):
    first = made()
    assert first.folder is not None
    assert CompileCache(tmp_path / "other", 0, first, "a").folder is None
