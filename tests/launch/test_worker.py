"""`cascade train` with a supervisor: one rank, so that neither msrun nor mpirun is needed."""

import json
import subprocess
import sys
from pathlib import Path

import yaml

from tests.conftest import stage_yaml
from tests.helpers.jobs import ROOT


def train(config: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "launch", "train", str(config), "launch.restarts=1", *overrides]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_a_run_under_a_supervisor(shards_folder: Path, t5_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        yaml.safe_dump(stage_yaml("base", tmp_path / "run", shards_folder, t5_folder))
    )
    done = train(tmp_path / "base.yaml")
    attempt = tmp_path / "run" / "logs" / "attempt-0"
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert (tmp_path / "run" / "stage" / "stage.json").exists()
    assert done.stderr == (attempt / "rank_0.log").read_text()
    assert "the stage is in" in done.stderr
    assert json.loads((attempt / "rank_0.end.json").read_text())["code"] == 0


def test_a_users_mistake_is_one_line_and_no_restart(tmp_path: Path) -> None:
    done = train(
        Path("configs/tiny/base64.yaml"), f"run={tmp_path}/run", "data.shards=/nowhere/*.tar"
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("data.shards: /nowhere/*.tar: matches no file")
    assert [path.name for path in (tmp_path / "run" / "logs").iterdir()] == ["attempt-0"]
