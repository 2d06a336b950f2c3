"""`python -m tests.supervised RUN OPTIONS FAULT...`: a supervisor over `tests.fake_ranks`, in a process of its own.

OPTIONS is JSON: fields of LaunchConfig and of Limits.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.command import LaunchConfig, Process
from launch.supervisor import Limits, supervise
from launch.terminal import run


def main(argv: Sequence[str]) -> int:
    folder, options, *faults = argv
    given = json.loads(options)
    limits = {name: given.pop(name) for name in list(given) if name in Limits.__dataclass_fields__}
    config = LaunchConfig(**{"launcher": "msrun", "workers": 2, **given})

    def plan(attempt: Path, port: int) -> list[Process]:
        number = int(attempt.name.removeprefix("attempt-"))
        now = [fault.partition("@")[0] for fault in faults if fault.partition("@")[2] in ("", str(number))]
        start = [sys.executable, "-m", "tests.fake_ranks", str(config.workers), str(config.ranks[0]), *now]
        return [Process(name=f"msrun_{config.node_rank}", argv=start, environment={"CASCADE_ATTEMPT": str(attempt)})]

    return supervise(config, Path(folder), plan, limits=Limits(**limits))


if __name__ == "__main__":
    run(main, sys.argv[1:])
