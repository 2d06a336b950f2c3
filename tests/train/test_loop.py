"""A run from its first step to its stage folder: what it writes, what it refuses, and that a
resumed run equals an uninterrupted one.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from mindspore import Tensor, nn, ops
from PIL import Image
from safetensors.numpy import load_file

from launch.cli.main import dispatch
from pipeline import device
from pipeline.config import build
from pipeline.data.config import DataConfig
from pipeline.data.shards import Shards
from pipeline.errors import JobError, UserError
from pipeline.files import lock
from pipeline.rng import Draws
from pipeline.stage.inputs import Arrays
from pipeline.stage.registry import stage_class
from pipeline.stage.stage import Network
from pipeline.train import checkpoint
from pipeline.train.checkpoint import CheckpointError
from pipeline.train.compile_cache import GRAPHS_FOLDER
from pipeline.train.heartbeat import Heartbeat, Phase
from pipeline.train.loop import check_ranks_agree, positions_of_rank, train, train_in_group
from pipeline.train.process_group import ProcessGroup
from pipeline.train.resume import finished, forbidden_changes, prepare_run_dir, resume
from pipeline.train.step import never
from stages.base import Base, BaseConfig
from tests.conftest import stage_yaml
from tests.helpers.groups import EchoGroup
from tests.helpers.jobs import WAIT, leaving_nothing, until
from tests.helpers.tars import jpeg, sample, tar

pytestmark = pytest.mark.slow

GRAPH_LOADED = "Use the compilation cache"  # MindSpore's log message


def metrics(run: Path) -> list[dict[str, Any]]:
    """The reports of training steps."""
    return [row for row in rows(run) if "loss" in row]


def validations(run: Path) -> list[dict[str, Any]]:
    return [row for row in rows(run) if "validation_loss" in row]


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def reported_numbers(run: Path) -> list[tuple[float, ...]]:
    """All that does not depend on the time of day."""
    return [(m["step"], m["loss"], m["lr"], m["grad_norm"]) for m in metrics(run)]


def raw_config(run: Path, shards: Path, t5: Path, **train_options: Any) -> dict[str, Any]:
    raw = stage_yaml("base", run, shards, t5)
    raw["train"] |= train_options
    return raw


def base_config(run: Path, shards: Path, t5: Path, **train_options: Any) -> Any:
    return build(BaseConfig, raw_config(run, shards, t5, **train_options))


# A stage that compiles in a second, for tests of the loop itself.


class TwoConvolutions(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, has_bias=True)
        self.conv2 = nn.Conv2d(8, 3, 3, has_bias=True)

    def construct(self, x: Tensor) -> Tensor:
        return self.conv2(ops.sigmoid(self.conv1(x)))


class SmallStage(Base):
    """An unconditional base of 8 px whose network ignores the noise level."""

    def __init__(self, config: BaseConfig) -> None:
        super().__init__(config)
        self.network = TwoConvolutions()

    def predict(
        self, network: Network, z: Tensor, logsnr_B: Tensor, inputs: dict[str, Tensor]
    ) -> Tensor:
        return network(z)


def small_stage(run: Path, shards: Path, **train_options: Any) -> SmallStage:
    raw = stage_yaml("base", run, shards, Path("no encoder"))
    del raw["text"]
    raw |= {"size": 8, "conditioning": "none"}
    raw["unet"] |= {"attention": ["none", "none"], "patch": 1}
    raw["sample"]["guidance"] = 1.0
    raw["train"] |= {"sample_every": 0, **train_options}
    return SmallStage(build(BaseConfig, raw))


def spoil(stage: Any, bad_steps: range) -> None:
    """Puts a NaN into the images of `bad_steps`, from 0."""
    training_inputs = stage.training_inputs

    def spoiled(images: np.ndarray, prompt: Arrays, draws: Draws) -> Arrays:
        arrays = training_inputs(images, prompt, draws)
        if draws.step in bad_steps:
            arrays["x"][0] = np.nan
        return arrays

    stage.training_inputs = spoiled


@pytest.fixture(scope="module")
def small_run(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the small stage. Read only."""
    run = tmp_path_factory.mktemp("small") / "run"
    assert train(small_stage(run, shards_folder))
    return run


# What a finished run leaves.


def test_a_run_leaves_what_the_design_lists(trained: Path) -> None:
    run = trained / "base"
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert files >= {
        "config.yaml",
        "metrics.jsonl",
        "samples/step_0000004.png",
        "stage/stage.json",
        "stage/unet.safetensors",
    }
    assert any(name.startswith("tensorboard/") for name in files)
    for step in (2, 4):
        saved = {path.name for path in (run / f"checkpoints/step_{step:07d}").iterdir()}
        assert saved == {
            "model.safetensors",
            "ema.safetensors",
            "optimizer.safetensors",
            "state.json",
            "manifest.json",
            "COMPLETE",
        }


def test_each_step_is_reported_once(trained: Path) -> None:
    reports = metrics(trained / "base")
    assert [report["step"] for report in reports] == [1, 2, 3, 4]
    assert [report["lr"] for report in reports] == pytest.approx([0.0, 5e-4, 1e-3, 5e-4])
    for report in reports:
        assert report.keys() == {
            "step",
            "loss",
            "lr",
            "grad_norm",
            "images_per_second",
            "seconds",
            "quarantined",
            "skipped",
        }


@pytest.mark.parametrize(
    ("name", "columns", "side"), [("base", 2, 16), ("sr32", 3, 32), ("sr64", 3, 32)]
)
def test_samples_are_a_grid_of_two_rows(trained: Path, name: str, columns: int, side: int) -> None:
    with Image.open(trained / name / "samples" / "step_0000004.png") as grid:
        assert grid.size == (columns * side, 2 * side)


def test_the_stage_has_the_ema_weights(trained: Path) -> None:
    stage = load_file(trained / "base" / "stage" / "unet.safetensors")
    ema = load_file(trained / "base" / "checkpoints" / "step_0000004" / "ema.safetensors")
    assert stage.keys() == ema.keys()
    assert all((stage[name] == ema[name]).all() for name in ema)


def test_a_finished_run_is_left_as_it_is(
    trained: Path, shards_folder: Path, t5_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "base"
    shutil.copytree(trained / "base", run)
    before = (run / "metrics.jsonl").read_bytes()
    assert train(stage_class("base")(base_config(run, shards_folder, t5_folder)))
    assert (run / "metrics.jsonl").read_bytes() == before


# Resuming, with real processes, as a user starts them.


@dataclass(frozen=True, kw_only=True)
class Interrupted:
    """The same training without and with interruptions."""

    whole: Path  # the run folder of one process
    pieces: Path  # that of a process that was killed, one that was stopped, and one that finished
    codes: list[int]  # the exit codes of these three
    logs: list[str]  # what they printed
    graphs: list[list[str]]  # the folder of compiled graphs after each of them


@pytest.fixture(scope="module")
def interrupted(
    shards_folder: Path, t5_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Interrupted:
    """The interrupted run has copies of the shards without embeddings, and encodes its captions
    while it trains.
    """
    folder = tmp_path_factory.mktemp("resume")
    no_embeddings = shutil.copytree(
        shards_folder, folder / "shards", ignore=shutil.ignore_patterns("*.safetensors")
    )
    whole = folder / "whole"
    pieces = folder / "pieces"
    for run, shards in ((whole, shards_folder), (pieces, no_embeddings)):
        options = {"steps": 12, "checkpoint_every": 3, "sample_every": 9, "keep_checkpoints": 9}
        raw = raw_config(run, shards, t5_folder, **options, validate_every=5)
        raw["data"]["validation"] = 0.2
        run.with_suffix(".yaml").write_text(yaml.safe_dump(raw))

    codes: list[int] = []
    logs: list[str] = []
    graphs: list[list[str]] = []
    with leaving_nothing(folder) as start:

        def launch(run: Path, log: Path) -> Any:
            argv = [sys.executable, "-m", "launch", "train", str(run.with_suffix(".yaml"))]
            # At this level MindSpore logs that it loads a graph.
            environment = {**os.environ, "GLOG_v": "2"}
            with log.open("w") as file:
                return start(argv, env=environment, stdout=file, stderr=file)

        uninterrupted = launch(whole, folder / "whole.log")
        for number, steps in ((signal.SIGKILL, 4), (signal.SIGTERM, 8), (None, 0)):
            log = folder / f"pieces-{len(logs)}.log"
            process = launch(pieces, log)
            if number is not None:
                until_reported(pieces, steps, process.poll)
                process.send_signal(number)
            codes.append(process.wait(WAIT))
            logs.append(log.read_text())
            graphs.append(sorted(path.name for path in (pieces / GRAPHS_FOLDER).iterdir()))
        assert uninterrupted.wait(WAIT) == 0, (folder / "whole.log").read_text()

    return Interrupted(whole=whole, pieces=pieces, codes=codes, logs=logs, graphs=graphs)


def until_reported(run: Path, steps: int, ended: Callable[[], object]) -> None:
    """Waits until `run` has reported so many steps, or has ended."""
    reports = run / "metrics.jsonl"

    def is_far_enough() -> bool:
        reported = len(reports.read_bytes().splitlines()) if reports.exists() else 0
        return ended() is not None or reported >= steps

    until(is_far_enough, f"step {steps}")


def test_the_attempts_end_as_their_signals_say(interrupted: Interrupted) -> None:
    assert interrupted.codes == [-signal.SIGKILL, 75, 0]


def test_losses_are_those_of_an_uninterrupted_run_bit_for_bit(interrupted: Interrupted) -> None:
    reports = reported_numbers(interrupted.whole)
    assert reported_numbers(interrupted.pieces) == reports
    assert [step for step, *_ in reports] == list(range(1, 13))


def test_validations_are_too(interrupted: Interrupted) -> None:
    whole = validations(interrupted.whole)
    assert validations(interrupted.pieces) == whole
    assert [row["step"] for row in whole] == [5, 10]
    for row in whole:
        bins = [f"validation_loss_noise_{noise_bin}" for noise_bin in range(8)]
        assert row.keys() <= {"step", "validation_loss", "validation_loss_raw", *bins}
        assert row["validation_loss"] != row["validation_loss_raw"]


@pytest.mark.parametrize("file", ["model", "ema", "optimizer"])
def test_checkpoints_are_too(interrupted: Interrupted, file: str) -> None:
    path = Path("checkpoints", "step_0000012", f"{file}.safetensors")
    a = load_file(interrupted.whole / path)
    b = load_file(interrupted.pieces / path)
    assert a.keys() == b.keys()
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_the_stage_and_its_samples_are_too(interrupted: Interrupted) -> None:
    for name in ("stage/unet.safetensors", "samples/step_0000009.png"):
        assert (interrupted.whole / name).read_bytes() == (interrupted.pieces / name).read_bytes()


def test_a_resumed_run_loads_its_graphs(interrupted: Interrupted) -> None:
    """Two of them: the gradient and the update. What samples is not stored."""
    first, *others = interrupted.logs
    assert "compiling the training step" in first
    assert GRAPH_LOADED not in first
    for log in others:
        assert "loading the training step" in log
        assert log.count(GRAPH_LOADED) == 2
    assert interrupted.graphs == [interrupted.graphs[0]] * 3
    assert len(interrupted.graphs[0]) == 1


# What is refused.


def test_a_folder_in_use_is_refused(shards_folder: Path, tmp_path: Path) -> None:
    stage = small_stage(tmp_path / "run", shards_folder)
    with lock(tmp_path / "run"), pytest.raises(UserError) as error:
        train(stage)
    assert str(error.value) == (
        f"{tmp_path}/run: in use by another run (pid {os.getpid()}); stop it or choose another "
        "folder"
    )


@pytest.fixture
def copied_run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained base's run."""
    return Path(shutil.copytree(trained / "base", tmp_path / "base"))


def test_a_changed_configuration_is_refused_by_name(
    copied_run: Path, shards_folder: Path, t5_folder: Path
) -> None:
    before = (copied_run / "config.yaml").read_bytes()
    raw = raw_config(copied_run, shards_folder, t5_folder)
    raw["unet"]["channels"] = 32
    with pytest.raises(UserError) as error:
        prepare_run_dir(copied_run, build(BaseConfig, raw))
    assert str(error.value) == (
        f"unet.channels: was 16 when {copied_run} was trained to step_0000004 and is 32 now; take "
        "the old value, or another run folder"
    )
    assert (copied_run / "config.yaml").read_bytes() == before


def test_a_field_that_is_newer_than_the_run_has_its_default(
    copied_run: Path, shards_folder: Path, t5_folder: Path
) -> None:
    saved = yaml.safe_load((copied_run / "config.yaml").read_text())
    assert saved["unet"].pop("dropout") == 0
    (copied_run / "config.yaml").write_text(yaml.safe_dump(saved))

    config = base_config(copied_run, shards_folder, t5_folder)
    assert finished(config)
    newest = prepare_run_dir(copied_run, config)
    assert newest is not None
    assert newest.name == "step_0000004"

    raw = raw_config(copied_run, shards_folder, t5_folder)
    raw["unet"]["dropout"] = 0.1
    with pytest.raises(UserError, match=r"unet\.dropout: was 0\.0 when .* and is 0\.1 now"):
        prepare_run_dir(copied_run, build(BaseConfig, raw))


def test_a_run_of_another_version_is_refused_in_one_line(
    copied_run: Path, shards_folder: Path, t5_folder: Path
) -> None:
    saved = yaml.safe_load((copied_run / "config.yaml").read_text())
    saved["text"]["drop"] = saved["text"].pop("cond_drop_prob")
    (copied_run / "config.yaml").write_text(yaml.safe_dump(saved))

    config = base_config(copied_run, shards_folder, t5_folder)
    for refuses in (finished, lambda config: prepare_run_dir(copied_run, config)):
        with pytest.raises(UserError) as error:
            refuses(config)
        assert str(error.value) == (
            f"{copied_run}/config.yaml: was written by another version of cascade (text.drop: no "
            "such field in TextConfig); finish the run with that version, or take another run "
            "folder"
        )


def test_a_run_of_another_kind_is_refused_by_the_kind(
    trained: Path, shards_folder: Path, t5_folder: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(trained / "sr32", tmp_path / "run"))
    with pytest.raises(UserError, match=r"^kind: was super_resolution when .* and is base now"):
        prepare_run_dir(run, base_config(run, shards_folder, t5_folder))


def test_what_may_change_is_accepted(
    copied_run: Path, shards_folder: Path, t5_folder: Path
) -> None:
    config = base_config(copied_run, shards_folder, t5_folder, steps=9, checkpoint_every=7)
    assert prepare_run_dir(copied_run, config) == checkpoint.newest(copied_run / "checkpoints")


def test_tars_for_validation_may_change_and_a_fraction_may_not(
    copied_run: Path, shards_folder: Path, t5_folder: Path
) -> None:
    def changes(validation: str | float | None) -> list[str]:
        raw = raw_config(copied_run, shards_folder, t5_folder, validate_every=2)
        raw["data"]["validation"] = validation
        return [change.path for change in forbidden_changes(copied_run, build(BaseConfig, raw))]

    assert changes(None) == changes("other/*.tar") == []
    assert changes(0.25) == ["data.validation"]


def test_a_finished_run_is_not_started_again(
    copied_run: Path,
    shards_folder: Path,
    t5_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def is_finished(run: Path, **train_options: Any) -> bool:
        return finished(base_config(run, shards_folder, t5_folder, **train_options))

    assert is_finished(copied_run)
    assert not is_finished(copied_run, steps=5)
    assert not is_finished(tmp_path / "new")
    # For `prepare_run_dir` to refuse.
    assert not is_finished(copied_run, ema_decay=0.5)

    path = tmp_path / "base.yaml"
    path.write_text(yaml.safe_dump(raw_config(copied_run, shards_folder, t5_folder)))
    assert dispatch(["train", str(path)]) == 0
    message = f"{copied_run}: done before, the stage is in {copied_run}/stage\n"
    assert capsys.readouterr().err == message


def test_other_data_are_refused(trained: Path, shards_folder: Path) -> None:
    newest = checkpoint.newest(trained / "base" / "checkpoints")
    fewer = {"shards": f"{shards_folder}/*.tar", "filter": {"fields": {"shape": "circle"}}}
    shards = Shards.open(build(DataConfig, fewer), progress=False)
    train_step: Any = None  # refused before it is used
    with pytest.raises(UserError) as error:
        resume(newest, train_step, shards)
    assert str(error.value) == (
        f"data.shards: the samples are no longer those that {newest} was trained on (there are "
        f"{len(shards)} now; a shard was changed, added, lost or indexed anew): put them back, or "
        "take another run folder"
    )


def test_data_that_are_too_damaged_end_the_run(tmp_path: Path) -> None:
    """Most images are truncated. Which one is one too many depends on the order of the threads."""
    members = [
        file
        for n in range(24)
        for file in sample(f"{n}", n, jpg=jpeg(seed=n)[: -20 if n % 4 else None])
    ]
    (tmp_path / "0.tar").write_bytes(tar(members))
    with pytest.raises(
        UserError, match=r"data\.max_damage: \d+ of about 24 drawn samples are unusable"
    ):
        train(small_stage(tmp_path / "run", tmp_path))
    assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) >= 3


def test_a_text_width_that_is_not_the_encoders_is_refused(
    shards_folder: Path, t5_folder: Path, tmp_path: Path
) -> None:
    raw = raw_config(tmp_path / "run", shards_folder, t5_folder)
    raw["text"]["width"] = 32
    with pytest.raises(UserError) as error:
        train(stage_class("base")(build(BaseConfig, raw)))
    assert str(error.value) == f"text.width: 32, but the encoder in {t5_folder} has 16; set that"
    assert not (tmp_path / "run").exists()


def test_a_batch_that_cannot_be_divided_is_refused(shards_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        train(small_stage(tmp_path / "run", shards_folder, grad_accum_steps=3))
    assert str(error.value) == (
        "data.global_batch: 4 is not a multiple of 3, the number of micro-batches with 1 ranks and "
        "train.grad_accum_steps=3; give 6"
    )


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_ranks_share_the_batch(
    world: int, shards_folder: Path, t5_folder: Path, tmp_path: Path
) -> None:
    config = base_config(tmp_path / "run", shards_folder, t5_folder)
    shares = [positions_of_rank(config, rank, world) for rank in range(world)]
    assert [position for share in shares for position in share] == [0, 1, 2, 3]
    assert len({len(share) for share in shares}) == 1


def test_more_ranks_than_positions_are_refused(
    shards_folder: Path, t5_folder: Path, tmp_path: Path
) -> None:
    config = base_config(tmp_path / "run", shards_folder, t5_folder, grad_accum_steps=2)
    with pytest.raises(
        UserError,
        match=r"4 is not a multiple of 8, .* 4 ranks and train.grad_accum_steps=2; give 8$",
    ):
        positions_of_rank(config, 0, 4)


@pytest.mark.skipif("bfloat16" in device.supported_precisions(), reason="this device has bfloat16")
def test_a_precision_that_the_device_lacks_leaves_no_folder(
    shards_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"train\.precision: bfloat16"):
        train(small_stage(tmp_path / "run", shards_folder, precision="bfloat16"))
    assert not (tmp_path / "run").exists()


# What happens in the loop.


def test_a_sample_that_fails_costs_no_step(shards_folder: Path, tmp_path: Path) -> None:
    class Failing(SmallStage):
        def sample_grid(self, *inputs: Any) -> np.ndarray:
            raise RuntimeError("no image")

    small = small_stage(
        tmp_path / "run", shards_folder, steps=2, checkpoint_every=2, sample_every=2
    )
    with pytest.raises(RuntimeError, match="no image"):
        train(Failing(small.config))
    newest = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.name == "step_0000002"


def test_steps_that_are_not_finite_are_skipped_and_counted(
    shards_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    stage = small_stage(run, shards_folder, steps=5, max_skipped=2)
    spoil(stage, range(1, 2))
    assert train(stage)

    reports = metrics(run)
    assert [report["skipped"] for report in reports] == [0, 1, 1, 1, 1]
    assert [report["step"] for report in reports if report["loss"] is None] == [2]
    assert f"{run}: step 2: loss nan, gradient norm nan: step skipped" in caplog.messages

    # The schedule goes on from the last step that was applied, as it does in the optimizer.
    rates = [report["lr"] for report in reports]
    assert rates[0] == 0.0 < rates[2]
    _, state = checkpoint.load(run / "checkpoints" / "step_0000004")
    assert state["skipped"] == 1


def test_too_many_of_them_in_a_row_end_the_job(shards_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stage = small_stage(run, shards_folder, steps=9, max_skipped=3)
    spoil(stage, range(3, 9))
    with pytest.raises(JobError) as error:
        train(stage)
    assert str(error.value) == (
        f"{run}: step 6: loss nan, gradient norm nan, the last of 3 consecutive steps that were "
        "skipped (train.max_skipped); lower optimizer.lr or look at the data; the last checkpoint "
        "is good"
    )
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    assert newest.name == "step_0000004"


def test_in_16_bits_it_is_nearly_the_same_run(
    small_run: Path, shards_folder: Path, tmp_path: Path
) -> None:
    """The first step that changes a weight is the second: its learning rate is the first that is
    not 0.
    """
    run = tmp_path / "run"
    assert train(small_stage(run, shards_folder, precision="float16"))
    low, exact = metrics(run), metrics(small_run)
    for name, tolerance in (("loss", 2e-3), ("grad_norm", 2e-2)):
        expected = [report[name] for report in exact]
        assert [report[name] for report in low] == pytest.approx(expected, rel=tolerance)
        assert low[-1][name] != expected[-1]

    _, state = checkpoint.load(run / "checkpoints" / "step_0000004")
    assert (state["loss_scale"], state["good_steps"], state["skipped"]) == (2**16, 4, 0)
    weights = load_file(run / "stage" / "unet.safetensors")
    assert {array.dtype for array in weights.values()} == {np.dtype(np.float32)}


def test_a_checkpoint_that_cannot_be_written_ends_the_job(
    shards_folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"step_0000002: could not be saved: .*File exists"):
        train(small_stage(run, shards_folder, steps=9))


# Several ranks, as far as one process can have them; tests/launch/test_ranks.py has real ones.


def test_ranks_that_are_not_about_to_do_the_same_are_named(
    shards_folder: Path, t5_folder: Path, tmp_path: Path
) -> None:
    config = base_config(tmp_path / "run", shards_folder, t5_folder)
    shards = Shards.open(config.data, progress=False)
    check_ranks_agree(ProcessGroup(), config, shards)

    group = EchoGroup(0, 8)
    group.mismatching = [1, 3]
    with pytest.raises(UserError) as error:
        check_ranks_agree(group, config, shards)
    assert str(error.value) == (
        "rank 1, 3 has another configuration or other samples than the other ranks: give all 8 the "
        "same command, and the same shards in data.shards"
    )


class Recorder(Heartbeat):
    """Keeps the phases instead of writing them."""

    def __init__(self) -> None:
        super().__init__(None, 0)
        self.phases: list[str] = []

    def beat(
        self, phase: Phase, step: int | None = None, error: BaseException | None = None
    ) -> None:
        self.phases.append(phase)


def test_weights_that_diverge_end_the_job(shards_folder: Path, tmp_path: Path) -> None:
    class Diverging(EchoGroup):
        """Configurations agree; weights are first checked at step 3, and do not."""

        def mismatching_ranks(self, digest: bytes) -> list[int]:
            mismatching = self.mismatching
            self.mismatching = [1]
            return mismatching

    run = tmp_path / "run"
    stage = small_stage(run, shards_folder, steps=9, check_every=3, checkpoint_every=2)
    with pytest.raises(JobError, match="step 3: the weights of rank 1 are no longer those of"):
        train_in_group(stage, Diverging(0, 2), Heartbeat(None, 0), never)
    newest = checkpoint.newest(run / "checkpoints")
    assert newest is not None
    assert newest.name == "step_0000002"


def test_a_rank_reports_its_phases(shards_folder: Path, tmp_path: Path) -> None:
    heartbeat = Recorder()
    stage = small_stage(tmp_path / "run", shards_folder, steps=2)
    assert train_in_group(stage, ProcessGroup(), heartbeat, never)
    assert heartbeat.phases == ["compiling", "training", "training", "checkpoint"]


def test_a_rank_reports_how_it_ended(
    small_run: Path, shards_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CASCADE_ATTEMPT", str(tmp_path))  # as a launcher does

    def last() -> tuple[str, str | None]:
        record = json.loads((tmp_path / "rank_0.json").read_text())
        return record["phase"], record["error"]

    run = Path(shutil.copytree(small_run, tmp_path / "run"))
    stage = small_stage(run, shards_folder)
    with lock(run), pytest.raises(UserError) as error:
        train(stage)
    assert last() == ("failed", f"UserError: {error.value}")
    assert train(stage)
    assert last() == ("finished", None)
