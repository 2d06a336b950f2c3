"""Two nodes on one machine: network namespaces with an address each, so that they share nothing but
the run folder.

msrun and mpirun start one rank in each, under a supervisor of its own; `make test-launchers`, as
root on Linux.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.jobs import WAIT, Process, beat_of, leaving_nothing, until_step
from tests.launch.test_launchers import sum_report

pytestmark = pytest.mark.launchers
ADDRESSES = ("10.213.0.1", "10.213.0.2")
Nodes = list[Process]
Start = Callable[..., Nodes]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30)


@pytest.fixture(scope="module")
def namespaces() -> Iterator[list[str]]:
    """The names of two namespaces with a cable between them."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the `ip` of iproute2")
    names = [f"cascade-{os.getpid()}-{node}" for node in (0, 1)]
    created = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                created.append(name)
            ends = ("netns", names[0], "type", "veth", "peer", "name", "wire", "netns", names[1])
            ip("link", "add", "wire", *ends)
            for name, address in zip(names, ADDRESSES, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "wire")
                ip("-n", name, "link", "set", "wire", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here, although for root: {error.stderr.strip()}")
        yield names
    finally:
        for name in created:  # and with each its end of the cable, which takes the other end along
            subprocess.run(["ip", "netns", "del", name], timeout=30)


@pytest.fixture
def start(launcher: str, namespaces: list[str], tmp_path: Path) -> Iterator[Start]:
    """Starts a job's two supervisors, which share tmp_path/run; at the end nothing may be left of
    them.
    """
    run = tmp_path / "run"
    with leaving_nothing(run) as begin:

        def job(*words: str) -> Nodes:
            options = {"launcher": launcher, "workers": 1, "nodes": 2, "master": ADDRESSES[0]}
            nodes: Nodes = []
            for node, name in enumerate(namespaces):
                options_json = json.dumps({**options, "node_rank": node})
                program = [sys.executable, "-m", "tests.helpers.supervised", str(run), options_json]
                # `ip` becomes what it starts, so that the pid is the supervisor's.
                nodes.append(begin(["ip", "netns", "exec", name, *program, *words]))
            return nodes

        yield job


def ending(nodes: Nodes) -> tuple[list[int], list[str]]:
    """The nodes' exit codes, and the stderr of each."""
    outputs = [process.communicate(timeout=WAIT) for process in nodes]
    assert [out for out, _ in outputs] == ["", ""]
    return [process.returncode for process in nodes], [err for _, err in outputs]


def test_two_nodes_sum(start: Start, tmp_path: Path) -> None:
    codes, errs = ending(start("5"))
    assert codes == [0, 0], errs
    assert [sum_report(tmp_path / "run", rank)["sum"] for rank in (0, 1)] == [3.0, 3.0]


def test_a_rank_that_is_killed_is_named_on_both_nodes(start: Start, tmp_path: Path) -> None:
    codes, errs = ending(start("100000", "1:kill:3"))
    beat = beat_of(tmp_path / "run" / "logs" / "attempt-0", 1)
    message = f"rank 1 (pid {beat.pid} on {beat.host}, step 3): killed by SIGKILL\n"
    assert codes == [1, 1], errs
    assert errs[0].startswith(f"node 1: {message}")
    assert errs[1].startswith(message)


def test_a_signal_to_node_1_stops_both(start: Start, tmp_path: Path) -> None:
    attempt = tmp_path / "run" / "logs" / "attempt-0"
    nodes = start("100000")
    until_step(3, attempt, (0, 1), nodes)
    nodes[1].terminate()
    codes, errs = ending(nodes)
    assert codes == [75, 75], errs
    reports = [json.loads((attempt / f"rank_{rank}.end.json").read_text()) for rank in (0, 1)]
    assert [report["code"] for report in reports] == [75, 75]
