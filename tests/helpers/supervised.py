"""`python -m tests.helpers.supervised RUN OPTIONS WORD...`: a supervisor in a process of its own,
as `cascade train` has it.

OPTIONS is JSON, fields of LaunchConfig and of Limits; `hosts` get the same command by ssh, with
`launch.NAME=VALUE` as last words. With launcher none, the other words are faults for
`tests.helpers.fake_ranks`, `FAULT@K` in attempt K only; else the arguments of
`tests.helpers.sum_ranks`, under that launcher.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch.jobs.attempt import Limits
from launch.jobs.plan import LaunchConfig, Process, processes, remotes
from launch.jobs.supervisor import supervise
from pipeline.config import apply_overrides
from pipeline.terminal import run


def main(argv: Sequence[str]) -> int:
    folder, options, *words = argv
    overrides = [word for word in words if word.startswith("launch.")]
    words = [word for word in words if word not in overrides]
    given = apply_overrides({"launch": json.loads(options)}, overrides)["launch"]
    limits = {name: given.pop(name) for name in list(given) if name in Limits.__dataclass_fields__}
    real = given.get("launcher", "none") != "none"
    config = LaunchConfig(
        **{
            "workers": 2,
            **given,
            "hosts": tuple(given.get("hosts", ())),
            "launcher": given["launcher"] if real else "msrun",
        }
    )

    def plan(attempt: Path, port: int) -> list[Process]:
        if real:
            return processes(config, ["-m", "tests.helpers.sum_ranks", *words], attempt, port)
        number = int(attempt.name.removeprefix("attempt-"))
        now = [
            word.partition("@")[0] for word in words if word.partition("@")[2] in ("", str(number))
        ]
        start = [
            sys.executable,
            "-m",
            "tests.helpers.fake_ranks",
            str(config.workers),
            str(config.ranks[0]),
            *now,
        ]
        return [
            Process(
                name=f"msrun_{config.node_rank}",
                argv=start,
                environment={"CASCADE_ATTEMPT": str(attempt)},
            )
        ]

    others = []
    for process in remotes(config, folder, [options, *words]):
        *ssh, line = process.argv
        others.append(
            replace(
                process, argv=[*ssh, line.replace("-m launch train", "-m tests.helpers.supervised")]
            )
        )
    return supervise(config, Path(folder), plan, others, Limits(**limits))


if __name__ == "__main__":
    run(main, sys.argv[1:])
