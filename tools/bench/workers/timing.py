"""Time and memory of a call, and how a worker answers. The standard library alone."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def timed(run: Callable[[], Result]) -> tuple[float, Result]:
    """Seconds of one call, and its result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def time_calls(run: Callable[[], object], num: int) -> dict[str, Any]:
    """Times the first call, which compiles, and `num` more.

    `first` and `seconds`: of them; `peak`: the process's largest resident memory so far, in bytes.
    """
    first, _ = timed(run)
    seconds = [timed(run)[0] for _ in range(num)]
    return {"first": first, "seconds": seconds, "peak": peak_memory()}


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in status)
    # The high-water mark of the resident set, in units of 1,024 bytes.
    return 1024 * int(fields["VmHWM"].split()[0])


def print_answer(answer: Mapping[str, Any]) -> None:
    """As `process.run_json` reads it."""
    print(json.dumps(answer))
