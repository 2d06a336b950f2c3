"""`python -m tests.helpers.supervised RUN OPTIONS WORD...`: a supervisor in a process of its own,
as `cascade train` has it.

OPTIONS is JSON, fields of LaunchConfig and of Timeouts; `hosts` get the same command by ssh, with
`launch.NAME=VALUE` as last words. With launcher none, the other words are faults for
`tests.helpers.fake_ranks`, `FAULT@K` in attempt K only; else the arguments of
`tests.helpers.sum_ranks`, under that launcher.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from launch.jobs.attempt import Timeouts
from launch.jobs.plan import LaunchConfig, Process, node_processes, remote_processes
from launch.jobs.supervisor import supervise
from pipeline.config import apply_overrides
from pipeline.terminal import run


def main(argv: Sequence[str]) -> int:
    run_dir, options_json, *words = argv
    overrides = [word for word in words if word.startswith("launch.")]
    words = [word for word in words if word not in overrides]

    options = apply_overrides({"launch": json.loads(options_json)}, overrides)["launch"]
    timeout_names = {field.name for field in fields(Timeouts)}
    timeouts = {name: value for name, value in options.items() if name in timeout_names}
    launch = {name: value for name, value in options.items() if name not in timeout_names}
    real = launch.get("launcher", "none") != "none"
    launch |= {
        "workers": launch.get("workers", 2),
        "hosts": tuple(launch.get("hosts", ())),
        "launcher": launch["launcher"] if real else "msrun",
    }
    config = LaunchConfig(**launch)

    def plan(attempt: Path, port: int) -> list[Process]:
        if real:
            program = ["-m", "tests.helpers.sum_ranks", *words]
            return node_processes(config, program, attempt=attempt, port=port)
        return [fake_launcher(config, attempt, words)]

    remotes = [
        through_this_module(process)
        for process in remote_processes(config, run_dir, [options_json, *words])
    ]
    return supervise(config, Path(run_dir), plan, remotes=remotes, timeouts=Timeouts(**timeouts))


def fake_launcher(config: LaunchConfig, attempt: Path, words: Sequence[str]) -> Process:
    """The fake launcher with the faults of this attempt."""
    number = attempt.name.removeprefix("attempt-")
    faults = []
    for word in words:
        fault, _, only = word.partition("@")
        if only in ("", number):
            faults.append(fault)

    program = ["-m", "tests.helpers.fake_ranks", str(config.workers), str(config.ranks[0])]
    return Process(
        name=f"msrun_{config.node_rank}",
        argv=[sys.executable, *program, *faults],
        environment={"CASCADE_ATTEMPT": str(attempt)},
    )


def through_this_module(process: Process) -> Process:
    """An ssh command that starts this module on the other node instead of `cascade train`."""
    *ssh, line = process.argv
    return replace(
        process, argv=[*ssh, line.replace("-m launch train", "-m tests.helpers.supervised")]
    )


if __name__ == "__main__":
    run(main, sys.argv[1:])
