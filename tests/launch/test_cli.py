"""The command line: what can be said, and how a mistake is answered: one line on stderr, exit code
2.
"""

import argparse
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.cli import arguments
from launch.cli import main as cli
from launch.jobs.plan import NODE_LOCK
from pipeline.errors import JobError
from pipeline.files import lock
from tests.helpers.jobs import ROOT

BASE = "configs/tiny/base64.yaml"

# What scripts may rely on. A change here is a change for the users.
COMMANDS = {
    "check": ["CONFIG|CASCADE", "key=value *", "--memory GIB", "--json"],
    "train": ["CONFIG", "key=value *"],
    "train-all": ["CASCADE", "key=value *", "--at-once N"],
    "status": ["RUN +", "--json"],
    "sample": [
        *(
            "CASCADE|STAGE",
            "--prompt TEXT +",
            "--prompts FILE",
            "--out DIR !",
            "--seed N",
            "--steps S +",
        ),
        *("--guidance G +", "--aug-level A +", "--to STAGE", "--num N", "--from STAGE"),
    ],
    "edit": [
        *(
            "CASCADE|STAGE",
            "--prompt TEXT +",
            "--prompts FILE",
            "--out DIR !",
            "--seed N",
            "--steps S +",
        ),
        *("--guidance G +", "--aug-level A +", "--to STAGE", "--from STAGE"),
        *("--image PATH !", "--mask PATH", "--strength S +", "--repaint-steps N"),
    ],
    "restore": [
        *(
            "STAGE",
            "--task TASK !",
            "--image PATH !",
            "--mask PATH",
            "--extend N",
            "--out DIR !",
            "--seed N",
        ),
        *("--steps S", "--samples N", "--weights W +", "--repaint-share SHARE", "--prompt TEXT"),
    ],
    "explore": [
        "STAGE|CASCADE",
        "--out DIR !",
        "--seed N",
        "--num N",
        "--prompt TEXT +",
        "--image FILE",
    ],
}
TOOLS = {
    "agreement": "[--manifest MANIFEST] [--json] IMAGES_DIR",
    "bench": "all|{benches} ...",
    "bench compile": "[--rounds N] [--json]",
    "bench data": "[--shards DIR] [--seconds S] [--rounds N] [--cores N [N ...]] [--memory N] [--json]",
    "bench memory": "[--steps N] [--rows ROW [ROW ...]] [--json]",
    "bench sample": "[--rounds N] [--batches N] [--json]",
    "bench scaling": "[--steps N] [--rounds N] [--json]",
    "bench steps": "[--images N] [--large N] [--json] CASCADE",
    "bench text": "[--captions N] [--rounds N] [--json]",
    "bench tiling": "[--rounds N] [--json]",
    "bench train": "[--steps N] [--rounds N] [--json]",
    "cache_text": "config [key=value ...]",
    "export": "config",
    "glyphs": "--num NUM --seed SEED [--shard-size SHARD_SIZE] [--workers WORKERS] OUT",
    "index": "[--weights W [W ...]] [--cache DIR] [--workers WORKERS] [--json] SHARDS [SHARDS ...]",
    "overview": "IMAGES PNG",
    "photographs": "--size SIZE --num NUM [--held-out HELD_OUT] [--seed SEED] [--shard-size SHARD_SIZE] OUT",
    "pixels": "SHARDS [SHARDS ...]",
    "references": "[NAME ...]",
    "restoration": "--shards TAR [TAR ...] --out DIR [--num N] [--samples N] [--steps S] [--seed N] "
    "[--train TAR [TAR ...]] STAGE [STAGE ...]",
    "shapes": "--num NUM --size SIZE --seed SEED [--shard-size SHARD_SIZE] [--workers WORKERS] OUT",
    "tiny_t5": "--captions FILE [FILE ...] [--width WIDTH] [--layers LAYERS] [--heads HEADS] [--vocab VOCAB] "
    "[--seed SEED] OUT",
}


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
        cli.main(argv)
    assert isinstance(end.value.code, int)
    return end.value.code, *capsys.readouterr()


def spelled(action: argparse.Action) -> str:
    """`--option METAVAR` and how many: * any number, + one or more, ! exactly one that must be
    given.
    """
    metavar = "" if action.nargs == 0 else str(action.metavar)
    count = (
        action.nargs
        if isinstance(action.nargs, str)
        else "!"
        if action.required and action.option_strings
        else ""
    )
    return " ".join(word for word in ("/".join(action.option_strings), metavar, count) if word)


def test_all_that_can_be_said() -> None:
    (commands,) = (
        action
        for action in arguments.parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    assert {
        name: [spelled(action) for action in parser._actions if action.dest != "help"]
        for name, parser in commands.choices.items()
    } == COMMANDS


def test_every_tool_is_listed() -> None:
    """A tool is a file with a main, or a folder whose __main__.py has one: its modules, each with
    `run`, follow it.
    """
    sources = {path: path.read_text() for path in (ROOT / "tools").rglob("*.py")}
    found = {
        path.stem
        for path, text in sources.items()
        if path.parent.name == "tools" and "\ndef main(" in text
    }
    for main in (path for path in sources if path.name == "__main__.py"):
        modules = [
            path for path in main.parent.glob("*.py") if "\ndef add_arguments(" in sources[path]
        ]
        found |= {main.parent.name, *(f"{main.parent.name} {path.stem}" for path in modules)}
    assert found == TOOLS.keys()


@pytest.mark.parametrize("name", TOOLS)
def test_what_the_tools_take(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    tool, *words = name.split()
    module = f"tools.{tool}.__main__" if (ROOT / "tools" / tool).is_dir() else f"tools.{tool}"
    with pytest.raises(SystemExit) as end:
        importlib.import_module(module).main([*words, "--help"])
    assert end.value.code == 0
    benches = "|".join(
        other.removeprefix("bench ") for other in TOOLS if other.startswith("bench ")
    )
    usage = TOOLS[name].format(benches=benches)
    assert capsys.readouterr().out.splitlines()[0] == f"usage: python -m tools.{name} [-h] {usage}"


def test_help_comes_from_a_light_program() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "launch", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage: cascade [-h]")
    assert f"{EVERY} ...\n" in done.stdout
    imported = {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()
    }
    assert {"launch", "pipeline", "argparse"} <= imported
    assert not imported & {
        "mindspore",
        "mindformers",
        "transformers",
        "numpy",
        "yaml",
        "PIL",
        "torch",
    }


EVERY = "|".join(COMMANDS)
HELP = "; see cascade --help"
SAMPLE_HELP = "; see cascade sample --help"
SAMPLE = ("sample", "nowhere", "--out", "{tmp}/out")

MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {
    "nothing": ((), f"the following arguments are required: {EVERY}{HELP}"),
    "command": (
        ("trian",),
        f"argument {EVERY}: invalid choice: 'trian' (choose from {', '.join(map(repr, COMMANDS))}){HELP}",
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
        f"{BASE}: optimizer.lr: expected a number, got text '3e-5'; write 3.0e-5 without quotes (YAML reads a bare "
        "3e-5 as text, 3.0e-5 as a number)",
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
        f"{BASE}: kind: 'bass' is no kind of stage; there are base, image_to_image, super_resolution",
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
        f"data.shards: {{tmp}}/*.tar: matches no file (looked from {ROOT})",
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
        "no prompt; give --prompt TEXT, --prompts FILE with one a line, or --num N where none is told",
    ),
    "blank prompt": (
        (*SAMPLE, "--prompt", "a circle", " "),
        "no prompt; give --prompt TEXT, --prompts FILE with one a line, or --num N where none is told",
    ),
    "blank file": (
        (*SAMPLE, "--prompts", "{tmp}/blank.txt"),
        "no prompt; give --prompt TEXT, --prompts FILE with one a line, or --num N where none is told",
    ),
    "no such prompts": (
        (*SAMPLE, "--prompts", "{tmp}/none.txt"),
        "{tmp}/none.txt: cannot be read ([Errno 2] No such file or directory: '{tmp}/none.txt'); give a UTF-8 ",
    ),
    "prompts in Latin-1": (
        (*SAMPLE, "--prompts", "{tmp}/latin.txt"),
        "{tmp}/latin.txt: cannot be read ('utf-8' codec can't decode byte 0xe9 in position 3: unexpected end of data); "
        "give a UTF-8 text file",
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
        "nowhere/cascade.json: no such file; `python -m tools.export` makes a cascade folder",
    ),
    "folder that is no cascade": (
        ("check", "{tmp}"),
        "{tmp}/cascade.json: no such file; `python -m tools.export` makes a cascade folder",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_in_one_line(
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


def test_what_is_no_mistake_of_the_user_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python then shows the traceback and ends with code 1."""

    def fail(*arguments: object) -> int:
        raise ZeroDivisionError("the job")

    monkeypatch.setattr(cli, "run_check", fail)
    with pytest.raises(ZeroDivisionError, match="the job"):
        cli.main(["check", BASE])


def test_a_job_that_cannot_go_on_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> int:
        raise JobError("the server is away")

    monkeypatch.setattr(cli, "run_check", fail)
    assert run(capsys, "check", BASE) == (1, "", "the server is away\n")


def test_an_interruption_has_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_check", interrupt)
    assert run(capsys, "check", BASE) == (130, "", "interrupted\n")


def test_a_supervised_jobs_folder_is_refused_between_its_attempts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with lock(tmp_path / "run", NODE_LOCK.format(0)):
        code, _, err = run(capsys, "train", BASE, f"run={tmp_path}/run")
    assert code == 2
    assert (
        err
        == f"{tmp_path}/run: in use by another job (pid {os.getpid()}); stop it or choose another folder\n"
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
