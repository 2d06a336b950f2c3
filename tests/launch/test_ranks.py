"""A job of two real ranks, under msrun: equal to one process, and a fault of one rank has the same
effect on both.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file

from launch.jobs.plan import LaunchConfig, find_port, node_processes
from launch.jobs.status import status
from pipeline.config import build
from pipeline.runtime import child_environment
from pipeline.stage.registry import stage_class
from pipeline.train.compile_cache import GRAPHS_FOLDER
from pipeline.train.loop import train
from tests.conftest import stage_yaml
from tests.helpers.jobs import leaving_nothing, until

pytestmark = pytest.mark.launchers

# Seconds for a job of seven runs, each of which compiles: nine minutes on a busy machine.
TIMEOUT = 1500
STEPS, STOP, BAD = 50, 5, 3


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def msrun(folder: Path, runs: list[dict[str, Any]]) -> None:
    """Runs them one after the other in one job of two ranks, whose logs are then in `folder`."""
    folder.mkdir()
    (folder / "job.json").write_text(
        json.dumps([{"stop": None, "nan": None, **run} for run in runs])
    )
    config = LaunchConfig(launcher="msrun", workers=2)
    program = ["-m", "tests.helpers.ranks", str(folder / "job.json")]
    (job,) = node_processes(config, program, attempt=folder, port=find_port(config))
    with (folder / "msrun.log").open("wb") as log, leaving_nothing(folder) as start:
        process = start(job.argv, env=child_environment(job.environment), stdout=log, stderr=log)
        # After a crash msrun would wait on.
        until(
            lambda: process.poll() is not None or list(folder.glob("crash.*")),
            "the end of the job",
            TIMEOUT,
        )
        logs = "".join(
            f"\n== {log.name}\n{log.read_text()[-4000:]}" for log in sorted(folder.glob("*.log"))
        )
        assert process.poll() == 0, logs


@pytest.fixture(scope="module")
def raw(shards_folder: Path, t5_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(name, **train) -> the configuration of a run of that name."""
    folder = tmp_path_factory.mktemp("runs")

    def configuration(name: str, **options: Any) -> dict[str, Any]:
        raw = stage_yaml("base", folder / name, shards_folder, t5_folder)
        raw["train"] |= {
            "steps": STEPS,
            "checkpoint_every": 5,
            "sample_every": 25,
            "check_every": 10,
            **options,
        }
        return raw

    return configuration


@pytest.fixture(scope="module")
def alone(raw: Any) -> Path:
    """One process, all steps."""
    cls, config = stage_class("base"), raw("alone")
    assert train(cls(build(cls.Config, config)))
    return Path(config["run"])


@pytest.fixture(scope="module")
def job(raw: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the ranks' results, NAME.rank_R.json.

    The runs: a whole one; one that rank 1 stops; the same continued with a sharded optimizer; one
    with a NaN on rank 1; one with too many of them; a sharded one that rank 0 stops.
    """
    folder = tmp_path_factory.mktemp("job") / "job"
    runs = [
        {"name": "whole", "raw": raw("whole")},
        {"name": "stopped", "raw": raw("pieces"), "stop": [1, STOP]},
        {"name": "continued", "raw": raw("pieces", shard_optimizer=True)},
        {"name": "spoiled", "raw": raw("spoiled", steps=8, grad_accum_steps=2), "nan": [1, BAD]},
        {"name": "endless", "raw": raw("endless", steps=8, max_skipped=1), "nan": [1, BAD]},
        {"name": "left", "raw": raw("left", shard_optimizer=True), "stop": [0, STOP]},
    ]
    msrun(folder, runs)
    return folder


def results(job: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads((job / f"{name}.rank_{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_are_one(job: Path, alone: Path, raw: Any) -> None:
    ours, theirs = metrics(Path(raw("whole")["run"])), metrics(alone)
    assert [report["step"] for report in ours] == list(range(1, STEPS + 1))
    # 2.5e-5 was measured for the norm: training magnifies rounding.
    for name, rel in (("loss", 1e-5), ("grad_norm", 1e-4)):
        assert [r[name] for r in ours] == pytest.approx([r[name] for r in theirs], rel=rel), name
    assert [r["lr"] for r in ours] == [r["lr"] for r in theirs]


@pytest.mark.parametrize("name", ["whole", "stopped", "continued", "spoiled"])
def test_both_ranks_have_the_same_weights_bit_for_bit(job: Path, name: str) -> None:
    first, second = results(job, name)
    assert first["weights"] == second["weights"]


def test_files_of_a_run_are_written_once(job: Path, alone: Path, raw: Any) -> None:
    found, expected = (
        {
            str(path.relative_to(run))
            for path in run.rglob("*")
            if path.relative_to(run).parts[0] not in ("tensorboard", GRAPHS_FOLDER)
        }
        for run in (Path(raw("whole")["run"]), alone)
    )
    assert found == expected
    assert sorted(
        path.name[-2:] for path in (Path(raw("whole")["run"]) / GRAPHS_FOLDER).iterdir()
    ) == [
        "-0",
        "-1",
    ]


def test_a_signal_to_one_rank_stops_both_after_the_same_step(job: Path) -> None:
    for result in results(job, "stopped"):
        assert (result["finished"], result["steps"]) == (False, STOP)


def test_resumed_and_sharded_equals_uninterrupted_bit_for_bit(job: Path, raw: Any) -> None:
    whole, pieces = Path(raw("whole")["run"]), Path(raw("pieces")["run"])
    exact = [
        [(m["step"], m["loss"], m["lr"], m["grad_norm"]) for m in metrics(run)]
        for run in (whole, pieces)
    ]
    assert exact[0] == exact[1]
    for file in ("model", "ema", "optimizer"):
        a, b = (
            load_file(run / "checkpoints" / f"step_{STEPS:07d}" / f"{file}.safetensors")
            for run in (whole, pieces)
        )
        assert all(a[name].tobytes() == b[name].tobytes() for name in a)


def test_a_nan_on_one_rank_is_skipped_by_both(job: Path, raw: Any) -> None:
    reports = metrics(Path(raw("spoiled")["run"]))
    assert [report["skipped"] for report in reports] == [0] * BAD + [1] * (8 - BAD)
    assert [report["loss"] is None for report in reports] == [step == BAD for step in range(8)]
    assert [result["finished"] for result in results(job, "spoiled")] == [True, True]


def test_too_many_skipped_steps_end_the_job(job: Path) -> None:
    for result in results(job, "endless"):
        assert f"step {BAD + 1}: loss nan" in result["error"]


def test_one_process_resumes_where_two_stopped(job: Path, alone: Path, raw: Any) -> None:
    cls, config = stage_class("base"), raw("left")
    assert len(metrics(Path(config["run"]))) == STOP
    assert train(cls(build(cls.Config, config)))
    ours, theirs = metrics(Path(config["run"])), metrics(alone)
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-5)


def test_each_rank_has_a_heartbeat(job: Path) -> None:
    for rank in range(2):
        beat = json.loads((job / f"rank_{rank}.json").read_text())
        assert (beat["rank"], beat["phase"], beat["step"]) == (rank, "finished", STOP)
        assert beat["error"] is None


def test_a_job_with_a_killed_rank_equals_one_without_bit_for_bit(
    launcher: str, job: Path, raw: Any, tmp_path: Path
) -> None:
    """`cascade train` as a user starts it, and a rank killed by SIGKILL at some step."""
    whole, config = Path(raw("whole")["run"]), raw(launcher)
    run = Path(config["run"])
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    options = [f"launch.launcher={launcher}", "launch.workers=2", "launch.restarts=1"]
    argv = [sys.executable, "-m", "launch", "train", str(tmp_path / "base.yaml"), *options]
    with (tmp_path / "log").open("wb") as log, leaving_nothing(run) as start:
        process = start(argv, stdout=log, stderr=log)

        def trained() -> bool:
            assert process.poll() is None, (tmp_path / "log").read_text()
            return (run / "metrics.jsonl").exists() and len(metrics(run)) >= 12

        until(trained, "12 steps", TIMEOUT)
        os.kill(
            json.loads((run / "logs" / "attempt-0" / "rank_1.json").read_text())["pid"],
            signal.SIGKILL,
        )
        code = process.wait(TIMEOUT)
    log_text = (tmp_path / "log").read_text()
    assert code == 0, log_text
    assert "): killed by SIGKILL\n" in log_text
    assert f"{run}: restart 1 of 1 without a new checkpoint, in 2 s\n" in log_text
    exact = [
        [(m["step"], m["loss"], m["lr"], m["grad_norm"]) for m in metrics(each)]
        for each in (whole, run)
    ]
    assert exact[0] == exact[1]
    for file in ("model", "ema", "optimizer"):
        a, b = (
            (each / "checkpoints" / f"step_{STEPS:07d}" / f"{file}.safetensors")
            for each in (whole, run)
        )
        assert a.read_bytes() == b.read_bytes()
    assert status(run)["restarts"] == 1
