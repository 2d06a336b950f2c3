"""The `cascade` command: check, train, train-all, status, sample, explore.

Exit codes: 0 done; 1 the job failed; 2 the user's input, in one line on stderr; 75 stopped by a signal after saving,
the same command goes on. MindSpore is imported only once the command line is known to be in order.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from launch.terminal import Parser, positive, run
from pipeline.errors import UserError

T = TypeVar("T")


def parser() -> Parser:
    """All that can be said on the command line."""
    top = Parser(prog="cascade", description="Train the stages of an Imagen-style cascade and sample from them.")
    commands = top.add_subparsers(dest="command", required=True, metavar="check|train|train-all|status|sample|explore")

    check = commands.add_parser("check", help="what a configuration or a cascade amounts to, before anything runs")
    check.add_argument("path", metavar="CONFIG|CASCADE", help="a YAML file of configs/, or a cascade folder")
    check.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="instead of the file's, as data.global_batch=8"
    )
    check.add_argument("--json", action="store_true", help="one JSON object instead of text")

    train = commands.add_parser("train", help="train one stage; the same command again resumes")
    train.add_argument("path", metavar="CONFIG", help="a YAML file of configs/")
    train.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="instead of the file's, as train.steps=1000"
    )

    every = commands.add_parser("train-all", help="train all stages of a cascade, each as a job of its own")
    every.add_argument("path", metavar="CASCADE", help="a cascade's YAML file, as configs/cascade.yaml")
    every.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="for every stage's file")
    every.add_argument("--at-once", metavar="N", type=positive, default=1, help="jobs at a time (default 1: in turn)")

    status = commands.add_parser("status", help="where runs are: step, loss, speed, time left, checkpoint, restarts")
    status.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run folder")
    status.add_argument("--json", action="store_true", help="one JSON object a line instead of text")

    sample = commands.add_parser("sample", help="prompts to pictures; the same command again makes what is missing")
    sample.add_argument("path", metavar="CASCADE|STAGE", help="a cascade folder, or that of a stage without text")
    text = sample.add_mutually_exclusive_group()
    text.add_argument("--prompt", metavar="TEXT", nargs="+", default=[], help="one picture each; or names of classes")
    text.add_argument("--prompts", metavar="FILE", type=Path, help="one prompt a line; empty lines do not count")
    text.add_argument(
        "--num", metavar="N", type=positive, help="so many pictures of a stage without text, of its classes in turn"
    )
    sample.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="gets 00000.png, STAGE/00000.png, manifest.jsonl"
    )
    sample.add_argument("--seed", metavar="N", type=int, default=0, help="of the noise (default 0)")
    for name, kind, what in (
        ("steps", int, "network calls, for each stage that runs or one for all"),
        ("guidance", float, "weight of the text, for each stage that runs or one for all; 1 is no guidance"),
        ("augment", float, "noise on the low resolution, for each super-resolution stage that runs or one for all"),
    ):
        sample.add_argument(f"--{name}", metavar=name[0].upper(), type=kind, nargs="+", default=[], help=what)
    sample.add_argument("--from", dest="start", metavar="STAGE", help="first stage to run, from the pictures in --out")
    sample.add_argument("--to", dest="stop", metavar="STAGE", help="last stage to run")

    explore = commands.add_parser(
        "explore", help="a look at a stage: five sheets of its samples and of what makes them"
    )
    explore.add_argument("path", metavar="STAGE|CASCADE", help="the folder of a stage without text, or a cascade's")
    explore.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="gets grid, path, steps, interpolation and noising.png"
    )
    explore.add_argument("--seed", metavar="N", type=int, default=0, help="of the noise (default 0)")
    explore.add_argument("--num", metavar="N", type=positive, default=16, help="pictures in grid.png (default 16)")
    explore.add_argument(
        "--prompt", metavar="TEXT", nargs="+", default=[], help="in turn; from the first to the second is interpolated"
    )
    explore.add_argument(
        "--image", metavar="FILE", type=Path, help="the picture that noising.png shows (default: the first of grid.png)"
    )
    return top


def main(argv: Sequence[str] | None = None) -> NoReturn:
    run(answer, argv)


def answer(argv: Sequence[str]) -> int:
    """Does what `argv` says; the exit code."""
    arguments = parser().parse_args(argv)
    commands = {
        "check": run_check,
        "train": run_train,
        "train-all": run_train_all,
        "status": run_status,
        "sample": run_sample,
        "explore": run_explore,
    }
    return commands[arguments.command](arguments)


def run_check(arguments: argparse.Namespace) -> int:
    from launch.report import as_text, check

    report = check(arguments.path, arguments.overrides)
    print(json.dumps(report) if arguments.json else as_text(report))
    return 0


def run_train(arguments: argparse.Namespace) -> int:
    from launch.command import NODE_LOCK, processes, rank_program, read_launch, remotes
    from pipeline.files import holder
    from pipeline.kinds import read_stage_config
    from pipeline.train.resume import finished

    config, raw = read_stage_config(arguments.path, arguments.overrides)
    launch = read_launch(raw)
    if finished(config):  # before any rank, or a network of billions, is made for nothing
        print(f"{config.run}: done before, the stage is in {config.run}/stage", file=sys.stderr)
        return 0
    if launch.launcher == "none" and not launch.restarts:  # in this process: what is simple stays easy to debug
        from launch.worker import train

        if pid := holder(Path(config.run), NODE_LOCK.format(0)):  # of which no rank may run at this moment
            raise UserError(f"{config.run}: in use by another job (pid {pid}); stop it or choose another folder")
        return train(arguments.path, arguments.overrides)
    from launch.supervisor import supervise

    program = rank_program(arguments.path, arguments.overrides)
    return supervise(
        launch,
        Path(config.run),
        lambda attempt, port: processes(launch, program, attempt, port),
        remotes(launch, arguments.path, arguments.overrides),
    )


def run_train_all(arguments: argparse.Namespace) -> int:
    from launch.staged import plan, train_all

    return train_all(plan(arguments.path, arguments.overrides), arguments.at_once)


def run_status(arguments: argparse.Namespace) -> int:
    from launch.status import as_text, status

    found = [status(run) for run in arguments.runs]
    print("\n".join(json.dumps(each) for each in found) if arguments.json else "\n\n".join(map(as_text, found)))
    return 0


def run_sample(arguments: argparse.Namespace) -> int:
    prompts = arguments.prompt
    if arguments.prompts:
        try:
            lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{arguments.prompts}: cannot be read ({error}); give a UTF-8 text file") from None
        prompts = [line.strip() for line in lines if line.strip()]
    if arguments.num is None and not (prompts and all(prompt.strip() for prompt in prompts)):
        raise UserError("no prompt; give --prompt TEXT, --prompts FILE with one a line, or --num N where none is told")
    check_seed(arguments.seed)

    from pipeline.cascade import Cascade, prompts_of, read_cascade, span
    from pipeline.gallery import generate
    from pipeline.log import setup_logging

    setup_logging()
    folder = Path(arguments.path)
    manifests, _ = read_cascade(folder)
    prompts = prompts_of(manifests, prompts, arguments.num)
    names = span(list(manifests), arguments.start, arguments.stop)
    enlarging = [name for name in names if manifests[name].size_in is not None]
    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    for option in ("steps", "guidance", "augment"):
        stages = enlarging if option == "augment" else names
        for name, value in by_stage(option, getattr(arguments, option), stages).items():
            options[name][option] = value
    for name in enlarging:
        low, high = manifests[name].augment or (0.0, 0.0)
        level = options[name].get("augment", low)
        if not low <= level <= high:
            raise UserError(f"--augment: {level} is not in [{low}, {high}], which {name} was trained with")
    if any(number < 1 for number in arguments.steps):
        raise UserError(f"--steps: {arguments.steps} holds a number below 1; give positive numbers")
    written = generate(
        Cascade.load(folder), prompts, arguments.out, arguments.seed, options, arguments.start, arguments.stop
    )
    told = f" for {len(prompts)} prompts" if any(prompts) else ""
    print(f"{arguments.out}: {written} pictures written{told}, listed in manifest.jsonl")
    return 0


def run_explore(arguments: argparse.Namespace) -> int:
    check_seed(arguments.seed)
    if not all(prompt.strip() for prompt in arguments.prompt):
        raise UserError("--prompt: holds an empty one; give words, or leave it out")

    from pipeline.cascade import Cascade, prompts_of, read_cascade
    from pipeline.explore import explore, read_picture
    from pipeline.log import setup_logging

    setup_logging()
    manifests, _ = read_cascade(Path(arguments.path))
    name, first = next(iter(manifests.items()))
    if first.size_in is not None:
        raise UserError(f"{arguments.path}: {name} starts from a picture; give the folder of a stage that needs none")
    prompts = prompts_of({name: first}, arguments.prompt, None if arguments.prompt else arguments.num)
    picture = read_picture(arguments.image, first.size_out) if arguments.image else None
    cascade = Cascade.load(arguments.path)
    sheets = explore(cascade, prompts, arguments.out, arguments.seed, arguments.num, picture)
    print(f"{arguments.out}: {', '.join(sheets)}")
    return 0


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed: {seed} is not in [0, 2**63)")


def by_stage(name: str, values: Sequence[T], stages: Sequence[str]) -> dict[str, T]:
    """One value for all stages, or one for each."""
    if len(values) == 1:
        values = list(values) * len(stages)
    if values and len(values) != len(stages):
        raise UserError(
            f"--{name}: {len(values)} values for {len(stages)} stages ({', '.join(stages)}); give one for each or one "
            "for all"
        )
    return dict(zip(stages, values, strict=False))
