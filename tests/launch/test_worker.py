"""`cascade train` with a supervisor: one rank, so that neither msrun nor mpirun is needed."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from launch.jobs.status import status
from tests.conftest import stage_yaml
from tests.helpers.jobs import ROOT

pytestmark = pytest.mark.slow


def train(config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "launch", "train", str(config), "launch.restarts=1", *overrides]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@dataclass
class TrainedRun:
    folder: Path
    process: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def trained_run(
    shards_folder: Path, t5_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> TrainedRun:
    """A run that was trained to its end under a supervisor."""
    folder = tmp_path_factory.mktemp("supervised")
    raw = stage_yaml("base", folder / "run", shards_folder, t5_folder)
    (folder / "base.yaml").write_text(yaml.safe_dump(raw))
    return TrainedRun(folder / "run", train(folder / "base.yaml"))


def test_a_run_under_a_supervisor(trained_run: TrainedRun) -> None:
    done = trained_run.process
    attempt = trained_run.folder / "logs" / "attempt-0"
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert (trained_run.folder / "stage" / "stage.json").exists()
    assert done.stderr == (attempt / "rank_0.log").read_text()
    assert "the stage is in" in done.stderr
    assert json.loads((attempt / "rank_0.end.json").read_text())["code"] == 0


def test_its_status(trained_run: TrainedRun) -> None:
    report = status(trained_run.folder)
    assert report["state"] == "finished"
    assert report["step"] == report["steps"] == report["checkpoint"] > 0
    assert report["loss"] > 0
    assert [rank["phase"] for rank in report["ranks"]] == ["finished"]


def test_a_users_mistake_is_one_line_and_no_restart(tmp_path: Path) -> None:
    done = train(
        Path("configs/tiny/base64.yaml"), f"run={tmp_path}/run", "data.shards=/nowhere/*.tar"
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("data.shards: /nowhere/*.tar: matches no file")
    assert [path.name for path in (tmp_path / "run" / "logs").iterdir()] == ["attempt-0"]
