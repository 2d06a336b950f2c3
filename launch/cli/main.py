"""The `cascade` command: check, train, train-all, status, sample, edit, restore, explore.

Exit codes: 0 done; 1 the job failed; 2 the user's input, in one line on stderr; 75 stopped by a
signal after saving, the same command goes on. MindSpore is imported only once the command line is
known to be in order.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from launch.cli.arguments import parser
from pipeline.errors import UserError
from pipeline.terminal import run

if TYPE_CHECKING:
    from pipeline.stage.manifest import Manifest

T = TypeVar("T")


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
        "edit": run_edit,
        "restore": run_restore,
        "explore": run_explore,
    }
    return commands[arguments.command](arguments)


def run_check(arguments: argparse.Namespace) -> int:
    from launch.cli.report import as_text, check

    report = check(arguments.path, arguments.overrides, arguments.memory)
    print(json.dumps(report) if arguments.json else as_text(report))
    return 0


def run_train(arguments: argparse.Namespace) -> int:
    from launch.jobs.plan import NODE_LOCK, processes, rank_program, read_launch, remotes
    from pipeline.files import lock_holder
    from pipeline.stage.registry import read_stage_config
    from pipeline.train.resume import finished

    config, raw = read_stage_config(arguments.path, arguments.overrides)
    launch = read_launch(raw)
    if finished(config):  # before any rank, or a network of billions, is made for nothing
        print(f"{config.run}: done before, the stage is in {config.run}/stage", file=sys.stderr)
        return 0
    if (
        launch.launcher == "none" and not launch.restarts
    ):  # in this process: what is simple stays easy to debug
        from launch.jobs.worker import train

        if pid := lock_holder(
            Path(config.run), NODE_LOCK.format(0)
        ):  # of which no rank may run at this moment
            raise UserError(
                f"{config.run}: in use by another job (pid {pid}); stop it or choose another folder"
            )
        return train(arguments.path, arguments.overrides)
    from launch.jobs.supervisor import supervise

    program = rank_program(arguments.path, arguments.overrides)
    return supervise(
        launch,
        Path(config.run),
        lambda attempt, port: processes(launch, program, attempt, port),
        remotes(launch, arguments.path, arguments.overrides),
    )


def run_train_all(arguments: argparse.Namespace) -> int:
    from launch.jobs.train_all import plan, train_all

    return train_all(plan(arguments.path, arguments.overrides), arguments.at_once)


def run_status(arguments: argparse.Namespace) -> int:
    from launch.jobs.status import as_text, status

    found = [status(run) for run in arguments.runs]
    print(
        "\n".join(json.dumps(each) for each in found)
        if arguments.json
        else "\n\n".join(map(as_text, found))
    )
    return 0


def run_sample(arguments: argparse.Namespace) -> int:
    said = prompts_in(arguments, arguments.num)
    from pipeline.generate.cascade import Cascade, check_prompts
    from pipeline.generate.cascade_folder import read_cascade
    from pipeline.generate.output_folder import generate
    from pipeline.log import setup_logging

    setup_logging()
    manifests, _ = read_cascade(Path(arguments.path))
    prompts = check_prompts(manifests, said, arguments.num)
    options = sampling_options(arguments, manifests)
    cascade = Cascade.load(arguments.path)
    written = generate(
        cascade,
        prompts,
        arguments.out,
        arguments.seed,
        options=options,
        start=arguments.start,
        stop=arguments.stop,
    )
    told = f" for {len(prompts)} prompts" if any(prompts) else ""
    print(f"{arguments.out}: {written} pictures written{told}, listed in manifest.jsonl")
    return 0


def run_edit(arguments: argparse.Namespace) -> int:
    prompts = prompts_in(arguments)
    from pipeline.generate.cascade import Cascade
    from pipeline.generate.cascade_folder import read_cascade
    from pipeline.generate.edit import open_edit_files, strengths
    from pipeline.generate.output_folder import generate
    from pipeline.imaging.user_images import list_images
    from pipeline.log import setup_logging

    setup_logging()
    images = list_images(arguments.image)
    num = max(len(images), len(prompts))
    if not {len(images), len(prompts)} <= {1, num}:
        raise UserError(
            f"--image: {len(images)} pictures for {len(prompts)} prompts; give one of either, or as many"
        )
    manifests, _ = read_cascade(Path(arguments.path))
    options, masked = sampling_options(arguments, manifests), arguments.mask is not None
    if arguments.repaint_steps and not masked:
        raise UserError(
            "--repaint-steps: it is in a hole that steps are made again; give --mask, or leave it out"
        )
    for chosen in options.values() if arguments.repaint_steps else ():
        chosen["repaint_steps"] = arguments.repaint_steps
    names = list(options)
    strength = strengths(by_stage("strength", arguments.strength, names), masked, names)
    size = list(manifests.values())[-1].size_out
    editing = open_edit_files(
        images * (num // len(images)), arguments.mask, size=size, strengths=strength
    )
    cascade, prompts = Cascade.load(arguments.path), prompts * (num // len(prompts))
    written = generate(
        cascade,
        prompts,
        arguments.out,
        arguments.seed,
        options=options,
        start=arguments.start,
        stop=arguments.stop,
        edit_files=editing,
    )
    print(f"{arguments.out}: {written} pictures written for {num} edits, listed in manifest.jsonl")
    return 0


def prompts_in(arguments: argparse.Namespace, num: int | None = None) -> list[str]:
    """Those of --prompt or --prompts, of which there may be none if `num` says how many pictures
    are wanted.
    """
    prompts = arguments.prompt
    if arguments.prompts:
        try:
            lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{arguments.prompts}: cannot be read ({error}); give a UTF-8 text file"
            ) from None
        prompts = [line.strip() for line in lines if line.strip()]
    if num is None and not (prompts and all(prompt.strip() for prompt in prompts)):
        raise UserError(
            "no prompt; give --prompt TEXT, --prompts FILE with one a line, or --num N where none is told"
        )
    check_seed(arguments.seed)
    return prompts


def sampling_options(
    arguments: argparse.Namespace, manifests: Mapping[str, "Manifest"]
) -> dict[str, dict[str, Any]]:
    """What --steps, --guidance and --aug-level say of each stage that runs."""
    from pipeline.generate.cascade import stages_between

    names = stages_between(list(manifests), arguments.start, arguments.stop)
    enlarging = [name for name in names if manifests[name].size_in is not None]
    options: dict[str, dict[str, Any]] = {name: {} for name in names}
    for option in ("steps", "guidance", "aug_level"):
        stages = enlarging if option == "aug_level" else names
        for name, value in by_stage(option, getattr(arguments, option), stages).items():
            options[name][option] = value
    for name in enlarging:
        low, high = manifests[name].aug_range or (0.0, 0.0)
        level = options[name].get("aug_level", low)
        if not low <= level <= high:
            raise UserError(
                f"--aug-level: {level} is not in [{low}, {high}], which {name} was trained with"
            )
    if any(number < 1 for number in arguments.steps):
        raise UserError(f"--steps: {arguments.steps} holds a number below 1; give positive numbers")
    return options


def run_restore(arguments: argparse.Namespace) -> int:
    check_seed(arguments.seed)
    from pipeline.generate.cascade import Cascade
    from pipeline.generate.cascade_folder import read_cascade
    from pipeline.generate.restore import RestoreOptions, check_task, read_damaged, restore
    from pipeline.log import setup_logging

    setup_logging()
    folder, weights = Path(arguments.path), arguments.weights
    how = RestoreOptions(
        task=arguments.task,
        seed=arguments.seed,
        samples=arguments.samples,
        weights=weights and tuple(weights),
        repaint_share=arguments.repaint_share,
    )
    check_task(read_cascade(folder)[0], how.task)
    found = read_damaged(
        how.task, arguments.image, arguments.mask, arguments.extend and tuple(arguments.extend)
    )
    done = restore(
        Cascade.load(folder),
        found,
        how,
        arguments.out,
        prompt=arguments.prompt,
        steps=arguments.steps,
    )
    print(
        f"{arguments.out}: {done} of {len(found)} pictures restored now, listed in manifest.jsonl"
    )
    return 0


def run_explore(arguments: argparse.Namespace) -> int:
    check_seed(arguments.seed)
    if not all(prompt.strip() for prompt in arguments.prompt):
        raise UserError("--prompt: holds an empty one; give words, or leave it out")

    from pipeline.generate.cascade import Cascade, check_prompts
    from pipeline.generate.cascade_folder import read_cascade
    from pipeline.generate.inspect import inspect, read_square
    from pipeline.log import setup_logging

    setup_logging()
    manifests, _ = read_cascade(Path(arguments.path))
    name, first = next(iter(manifests.items()))
    if first.size_in is not None or first.tasks:
        raise UserError(
            f"{arguments.path}: {name} starts from a picture; give the folder of a stage that needs none"
        )
    prompts = check_prompts(
        {name: first}, arguments.prompt, None if arguments.prompt else arguments.num
    )
    picture = read_square(arguments.image, first.size_out) if arguments.image else None
    cascade = Cascade.load(arguments.path)
    sheets = inspect(
        cascade,
        prompts,
        arguments.out,
        seed=arguments.seed,
        num_images=arguments.num,
        image=picture,
    )
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
