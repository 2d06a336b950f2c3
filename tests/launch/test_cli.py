"""The command line: its arguments, and how a mistake is reported: in one line, with exit code 2."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cli.main import main
from launch.jobs.plan import NODE_LOCK
from pipeline.files import lock
from tests.helpers.jobs import ROOT

BASE = "configs/tiny/base64.yaml"

# What scripts may rely on: the usage of each command. A change here is a change for the users.
SOURCES = "[--prompt TEXT [TEXT ...] | --prompts FILE"
SAMPLING = (
    "[--seed N] [--steps S [S ...]] [--guidance G [G ...]] [--aug-level A [A ...]] [--from STAGE] "
    "[--to STAGE]"
)
COMMANDS = {
    "check": "[--memory GIB] [--json] CONFIG|CASCADE [key=value ...]",
    "train": "CONFIG [key=value ...]",
    "train-all": "[--at-once N] CASCADE [key=value ...]",
    "status": "[--json] RUN [RUN ...]",
    "sample": f"{SOURCES} | --num N] --out DIR {SAMPLING} CASCADE|STAGE",
    "edit": f"{SOURCES}] --out DIR {SAMPLING} --image PATH [--mask PATH] "
    "[--strength S [S ...]] [--repaint-steps N] CASCADE|STAGE",
    "restore": "--task TASK --image PATH [--mask PATH | --extend N N N N] --out DIR [--seed N] "
    "[--steps S] [--samples N] [--weights W [W ...]] [--repaint-share SHARE] [--prompt TEXT] STAGE",
    "explore": "--out DIR [--seed N] [--num N] [--prompt TEXT [TEXT ...]] [--image FILE] "
    "STAGE|CASCADE",
    "index": "[--weights W [W ...]] [--cache DIR] [--workers N] [--json] SHARDS [SHARDS ...]",
    "cache-text": "CONFIG [key=value ...]",
    "export": "CASCADE_CONFIG",
}
ALL_COMMANDS = "|".join(COMMANDS)

# Modules that take long to import.
HEAVY = {"mindspore", "mindformers", "transformers", "numpy", "yaml", "PIL", "torch"}


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """From the project's folder; signals and logging as before afterwards."""
    monkeypatch.chdir(ROOT)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    log = logging.getLogger("cascade")
    before, level = list(log.handlers), log.level
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    log.handlers[:] = before
    log.setLevel(level)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `cascade`."""
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert isinstance(end.value.code, int)
    return end.value.code, *capsys.readouterr()


def test_the_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert out.splitlines()[0] == f"usage: cascade [-h] {ALL_COMMANDS} ..."


@pytest.mark.parametrize("name", COMMANDS)
def test_the_arguments_of_a_command(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert out.splitlines()[0] == f"usage: cascade {name} [-h] {COMMANDS[name]}"


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_imports_nothing_heavy(name: str) -> None:
    argv = [sys.executable, "-X", "importtime", "-m", "launch", *name.split(), "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: cascade")
    imported = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()
    }
    assert {"launch", "pipeline", "argparse"} <= imported
    assert not imported & HEAVY


HELP = "; see cascade --help"
SAMPLE_HELP = "; see cascade sample --help"
NO_PROMPT = (
    "no prompt; give --prompt TEXT, or --prompts FILE with one per line, or --num N for a stage "
    "without text"
)
SAMPLE = ("sample", "nowhere", "--out", "{tmp}/out")

MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), f"the following arguments are required: {ALL_COMMANDS}{HELP}"),
    "command": (
        ("trian",),
        f"argument {ALL_COMMANDS}: invalid choice: 'trian' (choose from "
        f"{', '.join(map(repr, COMMANDS))}){HELP}",
    ),
    "option": (("check", BASE, "--jsn"), f"unrecognized arguments: --jsn{HELP}"),
    "no file named": (
        ("train",),
        "the following arguments are required: CONFIG; see cascade train --help",
    ),
    "no such file": (
        ("train", "{tmp}/a.yaml"),
        "{tmp}/a.yaml: cannot be read: No such file or directory; give the path of a YAML file",
    ),
    "no such file to check": (
        ("check", "{tmp}/a.yaml"),
        "{tmp}/a.yaml: cannot be read: No such file or directory; give the path of a YAML file",
    ),
    "key in the file": (
        ("train", "{tmp}/typo.yaml"),
        "{tmp}/typo.yaml: train.stesp: no such field in TrainConfig; did you mean 'steps'?",
    ),
    "key in an override": (
        ("train", BASE, "data.global_bach=8"),
        f"{BASE}: data.global_bach: no such field in DataConfig; did you mean 'global_batch'?",
    ),
    "number that YAML reads as text": (
        ("train", BASE, "optimizer.lr=3e-5"),
        f"{BASE}: optimizer.lr: expected a number, got text '3e-5'; write 3.0e-5 without quotes "
        "(YAML reads a bare 3e-5 as text, 3.0e-5 as a number)",
    ),
    "override without =": (
        ("train", BASE, "train.steps"),
        "train.steps: is not an override; write section.key=value, like data.global_batch=8",
    ),
    "launcher": (
        ("train", BASE, "launch.launcher=slurm"),
        "launch.launcher: text 'slurm' is not one of ",
    ),
    "kind": (
        ("check", BASE, "kind=bass"),
        f"{BASE}: kind: 'bass' is ",
    ),
    "override of a cascade's file": (
        ("check", "configs/tiny/cascade.yaml", "folder=x"),
        "folder=x: a cascade's file takes no overrides; check its stages one by one",
    ),
    "override of a cascade's folder": (
        ("check", "{tmp}", "folder=x"),
        "folder=x: a cascade folder takes no overrides; give a YAML file",
    ),
    "shards": (
        ("train", BASE, "run={tmp}/run", "data.shards={tmp}/*.tar"),
        f"data.shards: {{tmp}}/*.tar: matches no file (searched from {ROOT})",
    ),
    "memory that is none": (
        ("check", BASE, "--memory", "0"),
        "argument --memory: 0 is not a number above 0; see cascade check --help",
    ),
    "memory for a cascade's folder": (
        ("check", "{tmp}", "--memory", "16"),
        "--memory: a cascade folder is not trained; give the YAML file of a stage or of a cascade",
    ),
    "no prompt": (
        SAMPLE,
        NO_PROMPT,
    ),
    "blank prompt": (
        (*SAMPLE, "--prompt", "a circle", " "),
        NO_PROMPT,
    ),
    "blank file": (
        (*SAMPLE, "--prompts", "{tmp}/blank.txt"),
        NO_PROMPT,
    ),
    "no such prompts": (
        (*SAMPLE, "--prompts", "{tmp}/none.txt"),
        "{tmp}/none.txt: cannot be read ([Errno 2] No such file or directory: '{tmp}/none.txt'); ",
    ),
    "prompts in Latin-1": (
        (*SAMPLE, "--prompts", "{tmp}/latin.txt"),
        "{tmp}/latin.txt: cannot be read ('utf-8' codec can't decode byte 0xe9 in position 3: "
        "unexpected end of data); give a UTF-8 text file",
    ),
    "prompts twice": (
        (*SAMPLE, "--prompt", "a", "--prompts", "{tmp}/blank.txt"),
        f"argument --prompts: not allowed with argument --prompt{SAMPLE_HELP}",
    ),
    "prompt and number": (
        (*SAMPLE, "--prompt", "a", "--num", "3"),
        f"argument --num: not allowed with argument --prompt{SAMPLE_HELP}",
    ),
    "no number": ((*SAMPLE, "--num", "0"), f"argument --num: 0 is less than 1{SAMPLE_HELP}"),
    "no out": (
        ("sample", "nowhere", "--prompt", "a"),
        f"the following arguments are required: --out{SAMPLE_HELP}",
    ),
    "seed below 0": ((*SAMPLE, "--prompt", "a", "--seed", "-1"), "--seed: -1 is not in [0, 2**63)"),
    "seed in words": (
        (*SAMPLE, "--prompt", "a", "--seed", "x"),
        f"argument --seed: invalid int value: 'x'{SAMPLE_HELP}",
    ),
    "no such cascade": (
        (*SAMPLE, "--prompt", "a"),
        "nowhere/cascade.json: no such file; ",
    ),
    "index weights that do not fit": (
        ("index", "a.tar", "b.tar", "--weights", "1", "0"),
        "--weights: [1.0, 0.0] for 2 SHARDS; give one above 0 for each",
    ),
    "repainting without a mask": (
        ("edit", *SAMPLE[1:], "--prompt", "a", "--image", "a.png", "--repaint-steps", "5"),
        "--repaint-steps: repeats the steps inside a mask; give --mask, or leave it out",
    ),
    "folder that is no cascade": (
        ("check", "{tmp}"),
        "{tmp}/cascade.json: no such file; ",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_reported_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "typo.yaml").write_text(
        (ROOT / BASE).read_text().replace("train: {", "train: {stesp: 600, ")
    )
    (tmp_path / "blank.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes("un é".encode("latin-1"))
    argv, message = MISTAKES[name]
    code, out, err = run(capsys, *(word.replace("{tmp}", str(tmp_path)) for word in argv))
    assert err.startswith(message.replace("{tmp}", str(tmp_path)))
    assert err.endswith("\n")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert not (tmp_path / "out").exists()


def test_a_mistake_in_a_process_of_its_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch", "train"], capture_output=True, text=True, check=False
    )
    message = "the following arguments are required: CONFIG; see cascade train --help\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_the_run_folder_of_a_supervised_job_is_refused_between_its_attempts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with lock(tmp_path / "run", NODE_LOCK.format(0)):
        code, _, err = run(capsys, "train", BASE, f"run={tmp_path}/run")
    assert code == 2
    assert err == (
        f"{tmp_path}/run: in use by another job (pid {os.getpid()}); stop it or choose another "
        "folder\n"
    )


def test_check_is_one_json_object(shards_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"data.shards={shards_folder}/*.tar", "data.global_batch=8", "optimizer.lr=3.0e-5"]
    code, out, _ = run(capsys, "check", BASE, *overrides, "--json")
    report = json.loads(out)
    assert (code, out.count("\n")) == (0, 1)
    assert list(report) == ["config", "parameters", "memory", "data", "argv"]
    assert report["config"]["data"]["global_batch"] == 8
    assert report["config"]["optimizer"]["lr"] == 3e-5
    assert report["config"]["launch"]["launcher"] == "none"
    assert report["memory"]["weights"] == 4 * report["parameters"] > 0
    assert report["data"] == {
        "shards": 2,
        "samples": 24,
        "steps_per_epoch": 3.0,
        "removed": {},
        "damaged": 0,
    }
    assert report["argv"] == [sys.executable, "-m", "launch", "train", BASE, *overrides]


def test_check_counts_the_samples_for_validation(
    shards_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"data.shards={shards_folder}/*.tar", "data.global_batch=8", "data.validation=0.5"]
    _, out, _ = run(capsys, "check", BASE, *overrides, "--json")
    data = json.loads(out)["data"]
    assert data["samples"] + data["validation"] == 24
    assert data["removed"] == {"held out for validation": data["validation"]}


def test_check_says_whether_a_training_fits(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "check", "configs/sr256.yaml", "data.global_batch=16", "--memory", "24", "--json"
    )
    report = json.loads(out)
    assert code == 0
    assert not report["fit"]["fits"]
    assert report["fit"]["device"] == 24 * 2**30 < report["memory"]["total"]
    assert report["fit"]["instead"][0]["set"].keys() == {"train.grad_accum_steps"}
    code, out, _ = run(capsys, "check", BASE, "--memory", "24")
    assert code == 0
    assert "fits        yes, 24.00 GiB are enough\n" in out


def test_check_away_from_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "check", BASE, f"data.shards={tmp_path}/a.tar")
    assert code == 0
    assert f"data        error data.shards: {tmp_path}/a.tar: no such file" in out
    assert out.splitlines()[-1].startswith(f"runs        {sys.executable} -m launch train {BASE} ")
