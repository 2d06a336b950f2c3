"""A run from its first step to its stage folder: what it leaves, what it refuses, and that resuming
changes nothing.
"""

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file

from launch.cli.main import dispatch
from pipeline.config import build
from pipeline.data.shards import DataConfig, Shards
from pipeline.errors import JobError, UserError
from pipeline.files import lock
from pipeline.stage.registry import stage_class
from pipeline.train import checkpoint
from pipeline.train.checkpoint import CheckpointError
from pipeline.train.heartbeat import Heartbeat
from pipeline.train.loop import check_ranks_agree, share, train
from pipeline.train.process_group import ProcessGroup
from pipeline.train.resume import finished, prepare_run_dir, resume
from pipeline.train.state import TrainState
from tests.conftest import stage_yaml
from tests.helpers.jobs import WAIT, leaving_nothing, until
from tests.helpers.tars import jpeg, sample, tar


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def config_of(run: Path, shards: Path, t5: Path, **train_options: Any) -> Any:
    raw = stage_yaml("base", run, shards, t5)
    raw["train"] |= train_options
    cls = stage_class("base")
    return cls, build(cls.Config, raw)


# What a finished run leaves.


def test_a_run_leaves_what_the_design_lists(trained):
    run = trained / "base"
    found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.jsonl", "samples/step_0000004.png", "stage/stage.json"} <= found
    assert "stage/unet.safetensors" in found
    files = {
        "model.safetensors",
        "ema.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
        "COMPLETE",
    }
    for step in (2, 4):
        assert {path.name for path in (run / f"checkpoints/step_{step:07d}").iterdir()} == files
    assert any(name.startswith("tensorboard/") for name in found)


def test_each_step_is_reported_once(trained):
    reports = metrics(trained / "base")
    assert [report["step"] for report in reports] == [1, 2, 3, 4]
    keys = {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "images_per_second",
        "seconds",
        "quarantined",
        "skipped",
    }
    assert all(report.keys() == keys for report in reports)
    assert [report["lr"] for report in reports] == pytest.approx([0.0, 5e-4, 1e-3, 5e-4])


@pytest.mark.parametrize(
    ("name", "columns", "side"), [("base", 2, 16), ("sr32", 3, 32), ("sr64", 3, 32)]
)
def test_samples_are_a_sheet_of_two_rows(trained, name, columns, side):
    with Image.open(trained / name / "samples" / "step_0000004.png") as sheet:
        assert sheet.size == (columns * side, 2 * side)


def test_the_stage_has_the_average_weights(trained):
    stage = load_file(trained / "base" / "stage" / "unet.safetensors")
    ema = load_file(trained / "base" / "checkpoints" / "step_0000004" / "ema.safetensors")
    assert stage.keys() == ema.keys()
    assert all((stage[name] == ema[name]).all() for name in ema)


def test_a_finished_run_is_left_as_it_is(trained, shards_folder, t5_folder, tmp_path):
    run = tmp_path / "base"
    shutil.copytree(trained / "base", run)
    before = (run / "metrics.jsonl").read_bytes()
    cls, config = config_of(run, shards_folder, t5_folder)
    assert train(cls(config))
    assert (run / "metrics.jsonl").read_bytes() == before


# Resuming. Real processes, as a user starts them.


@pytest.fixture(scope="module")
def interrupted(
    trained, shards_folder, t5_folder, tmp_path_factory
) -> tuple[Path, Path, list[int]]:
    """An uninterrupted run of 12 steps; one that was killed, stopped and continued; the exit codes
    of its attempts.

    The second has copies of the shards with no embeddings beside them, and encodes its captions as
    it goes.
    """
    folder = tmp_path_factory.mktemp("resume")
    runs = {}
    copied = shutil.copytree(
        shards_folder, folder / "shards", ignore=shutil.ignore_patterns("*.safetensors")
    )
    for name in ("whole", "pieces"):
        raw = stage_yaml(
            "base", folder / name, shards_folder if name == "whole" else copied, t5_folder
        )
        raw["train"] |= {
            "steps": 12,
            "checkpoint_every": 3,
            "sample_every": 4,
            "keep_checkpoints": 9,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(raw))
        runs[name] = folder / name
    command, reports = [sys.executable, "-m", "launch", "train"], runs["pieces"] / "metrics.jsonl"
    with leaving_nothing(folder) as start:
        whole = start([*command, str(folder / "whole.yaml")])

        def pieces(number: int = 0, steps: int = 0) -> int:
            """The exit code of a process that gets the signal, if any, once so many steps are
            reported.
            """
            process = start([*command, str(folder / "pieces.yaml")])

            def far_enough() -> bool:
                reported = len(reports.read_bytes().splitlines()) if reports.exists() else 0
                return process.poll() is not None or reported >= steps

            until(far_enough, f"step {steps}")
            process.send_signal(number)
            return process.wait(WAIT)

        codes = [pieces(signal.SIGKILL, 4), pieces(signal.SIGTERM, 8), pieces()]
        assert whole.wait(WAIT) == 0, whole.communicate()[1]
    return runs["whole"], runs["pieces"], codes


def test_the_attempts_end_as_their_signals_say(interrupted):
    assert interrupted[2] == [-signal.SIGKILL, 75, 0]


def test_losses_are_those_of_an_uninterrupted_run_bit_for_bit(interrupted):
    whole, pieces, _ = interrupted
    exact = [
        [(m["step"], m["loss"], m["lr"], m["grad_norm"]) for m in metrics(run)]
        for run in (whole, pieces)
    ]
    assert exact[0] == exact[1]
    assert [step for step, *_ in exact[0]] == list(range(1, 13))


@pytest.mark.parametrize("file", ["model", "ema", "optimizer"])
def test_so_are_the_weights(interrupted, file):
    whole, pieces, _ = interrupted
    a, b = (
        load_file(run / "checkpoints" / "step_0000012" / f"{file}.safetensors")
        for run in (whole, pieces)
    )
    assert a.keys() == b.keys()
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_so_are_the_stage_and_its_pictures(interrupted):
    whole, pieces, _ = interrupted
    for name in ("stage/unet.safetensors", "samples/step_0000004.png", "samples/step_0000012.png"):
        assert (whole / name).read_bytes() == (pieces / name).read_bytes(), name


# What is refused.


def test_a_folder_in_use_is_refused(shards_folder, t5_folder, tmp_path):
    cls, config = config_of(tmp_path / "run", shards_folder, t5_folder)
    with lock(tmp_path / "run"), pytest.raises(UserError) as error:
        train(cls(config))
    assert str(error.value) == (
        f"{tmp_path}/run: in use by another run (pid {os.getpid()}); stop it or choose another folder"
    )


def test_a_changed_configuration_is_refused_by_name(trained, shards_folder, t5_folder, tmp_path):
    run = tmp_path / "base"
    shutil.copytree(trained / "base", run)
    before = (run / "config.yaml").read_bytes()
    _, config = config_of(run, shards_folder, t5_folder)
    raw = stage_yaml("base", run, shards_folder, t5_folder)
    raw["unet"]["channels"] = 32
    changed = build(type(config), raw)
    with pytest.raises(UserError) as error:
        prepare_run_dir(run, changed)
    assert str(error.value) == (
        f"unet.channels: was 16 when {run} was trained to step_0000004 and is 32 now; take the old value, or another "
        "run folder"
    )
    assert (run / "config.yaml").read_bytes() == before


def test_a_field_that_is_younger_than_the_run_has_its_default(
    trained, shards_folder, t5_folder, tmp_path
):
    run = tmp_path / "base"
    shutil.copytree(trained / "base", run)
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["unet"].pop("dropout") == 0
    (run / "config.yaml").write_text(yaml.safe_dump(saved))
    _, config = config_of(run, shards_folder, t5_folder)
    assert finished(config)
    assert prepare_run_dir(run, config).name == "step_0000004"
    raw = stage_yaml("base", run, shards_folder, t5_folder)
    raw["unet"]["dropout"] = 0.1
    with pytest.raises(UserError, match=r"unet\.dropout: was 0\.0 when .* and is 0\.1 now"):
        prepare_run_dir(run, build(type(config), raw))


def test_a_picture_that_fails_costs_no_step(shards_folder, t5_folder, tmp_path):
    cls, config = config_of(
        tmp_path / "run", shards_folder, t5_folder, steps=2, checkpoint_every=2, sample_every=2
    )
    stage = cls(config)

    def fail(*_):
        raise RuntimeError("no picture")

    stage.picture = fail
    with pytest.raises(RuntimeError, match="no picture"):
        train(stage)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name == "step_0000002"


def test_what_is_finished_is_not_started_again(
    trained, shards_folder, t5_folder, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "base"
    shutil.copytree(trained / "base", run)
    _, config = config_of(run, shards_folder, t5_folder)
    assert finished(config)
    assert not finished(config_of(run, shards_folder, t5_folder, steps=5)[1])
    assert not finished(
        config_of(run, shards_folder, t5_folder, ema_decay=0.5)[1]
    )  # for `prepare_run_dir` to refuse
    assert not finished(config_of(tmp_path / "new", shards_folder, t5_folder)[1])
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump(stage_yaml("base", run, shards_folder, t5_folder))
    )
    monkeypatch.setattr(
        "launch.jobs.supervisor.supervise", lambda *_: pytest.fail("a job was started")
    )
    assert (
        dispatch(["train", str(tmp_path / "base.yaml"), "launch.launcher=msrun", "launch.workers=2"])
        == 0
    )
    assert capsys.readouterr().err == f"{run}: done before, the stage is in {run}/stage\n"


def test_other_data_are_refused(trained, shards_folder):
    newest = checkpoint.newest(trained / "base" / "checkpoints")
    less = {"shards": f"{shards_folder}/*.tar", "filter": {"fields": {"shape": "circle"}}}
    shards = Shards.open(build(DataConfig, less), progress=False)
    with pytest.raises(UserError) as error:
        resume(newest, None, shards)
    assert str(error.value) == (
        f"data.shards: the samples are no longer those that {newest} was trained on (there are {len(shards)} now; a "
        "shard was changed, added, lost or indexed anew): put them back, or take another run folder"
    )


def test_data_that_are_too_damaged_end_the_run(shards_folder, t5_folder, tmp_path):
    """Most pictures are broken behind their headers. Which one is too many depends on the threads'
    turns.
    """
    raw = stage_yaml("base", tmp_path / "run", tmp_path, t5_folder)
    members = [
        file
        for n in range(24)
        for file in sample(f"{n}", n, jpg=jpeg(seed=n)[: -20 if n % 4 else None])
    ]
    (tmp_path / "0.tar").write_bytes(tar(members))
    cls = stage_class("base")
    with pytest.raises(
        UserError, match=r"data\.max_damage: \d+ of about 24 samples looked at cannot be used"
    ):
        train(cls(build(cls.Config, raw)))
    assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) >= 3


def test_more_steps_are_no_other_run(trained, shards_folder, t5_folder, tmp_path):
    run = tmp_path / "base"
    shutil.copytree(trained / "base", run)
    _, config = config_of(run, shards_folder, t5_folder, steps=9, checkpoint_every=7)
    assert prepare_run_dir(run, config) == checkpoint.newest(run / "checkpoints")


def test_a_text_width_that_is_not_the_encoders_is_refused(shards_folder, t5_folder, tmp_path):
    cls, _ = config_of(tmp_path / "run", shards_folder, t5_folder)
    raw = stage_yaml("base", tmp_path / "run", shards_folder, t5_folder)
    raw["text"]["width"] = 32
    with pytest.raises(UserError) as error:
        train(cls(build(cls.Config, raw)))
    assert str(error.value) == f"text.width: 32, but the encoder in {t5_folder} has 16; set that"
    assert not (tmp_path / "run").exists()


def test_a_batch_that_cannot_be_cut_is_refused(shards_folder, t5_folder, tmp_path):
    cls, config = config_of(tmp_path / "run", shards_folder, t5_folder, grad_accum_steps=3)
    with pytest.raises(UserError) as error:
        train(cls(config))
    assert str(error.value) == (
        "data.global_batch: 4 is not a multiple of 3, the parts that 1 ranks and train.grad_accum_steps=3 cut it into; give 6"
    )


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_ranks_share_the_batch(world, shards_folder, t5_folder, tmp_path):
    _, config = config_of(tmp_path / "run", shards_folder, t5_folder)
    shares = [share(config, rank, world) for rank in range(world)]
    assert [place for places in shares for place in places] == [0, 1, 2, 3]
    assert len({len(places) for places in shares}) == 1


def test_more_ranks_than_places_are_refused(shards_folder, t5_folder, tmp_path):
    _, config = config_of(tmp_path / "run", shards_folder, t5_folder, grad_accum_steps=2)
    with pytest.raises(
        UserError,
        match=r"4 is not a multiple of 8, .* 4 ranks and train.grad_accum_steps=2 .*; give 8$",
    ):
        share(config, 0, 4)


def spoil(monkeypatch: pytest.MonkeyPatch, cls: Any, bad: range) -> None:
    """The batches of steps `bad`, from 0, have a picture that is not a number."""
    batch = cls.batch

    def spoiled(self: Any, step: int, *rest: Any) -> Any:
        arrays = batch(self, step, *rest)
        arrays[0][0] = np.nan if step in bad else arrays[0][0]
        return arrays

    monkeypatch.setattr(cls, "batch", spoiled)


def test_steps_that_are_not_finite_are_skipped_and_counted(
    shards_folder, t5_folder, tmp_path, monkeypatch, caplog
):
    run = tmp_path / "run"
    cls, config = config_of(run, shards_folder, t5_folder, steps=5, max_skipped=2)
    spoil(monkeypatch, cls, range(1, 2))
    assert train(cls(config))
    reports = metrics(run)
    assert [report["skipped"] for report in reports] == [0, 1, 1, 1, 1]
    assert [report["step"] for report in reports if report["loss"] is None] == [2]
    assert f"{run}: step 2: loss nan, gradient norm nan: the step is not taken" in caplog.messages
    rates = [report["lr"] for report in reports]
    assert (
        rates[2] > rates[0] == 0.0
    )  # the schedule goes on from the last step taken: as it does in the optimizer
    _, state = checkpoint.load(run / "checkpoints" / "step_0000004")
    assert state["skipped"] == 1


def test_too_many_in_a_row_end_the_job(shards_folder, t5_folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    cls, config = config_of(run, shards_folder, t5_folder, steps=9, max_skipped=3)
    spoil(monkeypatch, cls, range(3, 9))
    with pytest.raises(JobError) as error:
        train(cls(config))
    assert str(error.value) == (
        f"{run}: step 6: loss nan, gradient norm nan, and so for 3 steps in a row (train.max_skipped), none of which "
        "was taken; lower optimizer.lr or look at the data; the last checkpoint is good"
    )
    assert checkpoint.newest(run / "checkpoints").name == "step_0000004"


def test_a_precision_that_the_device_lacks_leaves_no_folder(
    shards_folder, t5_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("pipeline.device.precisions", lambda: ("float32",))
    cls, config = config_of(tmp_path / "run", shards_folder, t5_folder, precision="bfloat16")
    with pytest.raises(UserError, match=r"train\.precision: bfloat16"):
        train(cls(config))
    assert not (tmp_path / "run").exists()


def test_in_sixteen_bits_it_is_nearly_the_same_run(trained, shards_folder, t5_folder, tmp_path):
    """The first step that moves a weight is the second: its learning rate is the first that is not
    0.
    """
    run = tmp_path / "run"
    cls, config = config_of(run, shards_folder, t5_folder, precision="float16")
    assert train(cls(config))
    ours, theirs = metrics(run), metrics(trained / "base")
    for name, near in (("loss", 2e-3), ("grad_norm", 2e-2)):
        assert [report[name] for report in ours] == pytest.approx(
            [report[name] for report in theirs], rel=near
        )
        assert ours[-1][name] != theirs[-1][name]
    state = json.loads((run / "checkpoints" / "step_0000004" / "state.json").read_text())
    assert (state["loss_scale"], state["good_steps"], state["skipped"]) == (2**16, 4, 0)
    assert {array.dtype for array in load_file(run / "stage" / "unet.safetensors").values()} == {
        np.dtype(np.float32)
    }


# Several ranks, as far as one process can have them; test_ranks.py has real ones.


def test_ranks_that_are_not_about_to_do_the_same_are_named(
    trained, shards_folder, t5_folder, tmp_path, monkeypatch
):
    _, config = config_of(tmp_path / "run", shards_folder, t5_folder)
    shards = Shards.open(config.data, progress=False)
    check_ranks_agree(ProcessGroup(), config, shards)
    monkeypatch.setattr(ProcessGroup, "mismatching_ranks", lambda self, digest: [1, 3])
    with pytest.raises(UserError) as error:
        check_ranks_agree(ProcessGroup(0, 8), config, shards)
    assert str(error.value) == (
        "rank 1, 3 has another configuration or other samples than the other ranks: give all 8 the same command, and "
        "the same shards in data.shards"
    )


def test_weights_that_drift_apart_end_the_job(shards_folder, t5_folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    cls, config = config_of(
        run, shards_folder, t5_folder, steps=9, check_every=3, checkpoint_every=2
    )

    def drift(self: TrainState, step: int) -> None:
        raise JobError(f"step {step}: drifted")

    monkeypatch.setattr(TrainState, "check_alike", drift)
    with pytest.raises(JobError, match="step 3: drifted"):
        train(cls(config))
    assert checkpoint.newest(run / "checkpoints").name == "step_0000002"


def test_a_disk_that_fills_up_ends_the_job(shards_folder, t5_folder, tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cls, config = config_of(tmp_path / "run", shards_folder, t5_folder, steps=9, checkpoint_every=2)
    monkeypatch.setattr("pipeline.train.checkpoint.write_tensors", full)
    with pytest.raises(
        CheckpointError, match=r"step_0000002: could not be saved: .*No space left on device"
    ):
        train(cls(config))


def test_a_rank_tells_its_launcher_what_it_does(shards_folder, t5_folder, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(
        Heartbeat, "beat", lambda self, phase, *_, **error: said.append((phase, *error.values()))
    )
    cls, config = config_of(tmp_path / "run", shards_folder, t5_folder, steps=2)
    assert train(cls(config))
    each = ["training", "training", "checkpoint"]
    assert [phase for phase, *_ in said] == ["starting", "compiling", *each, "finished"]
    with lock(tmp_path / "run"), pytest.raises(UserError) as error:
        train(cls(config))
    assert said[-2:] == [("starting",), ("failed", error.value)]
