"""Nodes that node 0 starts by ssh: a supervisor at each end, with ranks that need no MindSpore
(`tests.helpers.fake_ranks`).

The `ssh` is a program of this test. As with the real one, what runs on the other side has another
parent and another environment, and outlives the connection.
"""

import contextlib
import json
import os
import shlex
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from tests.helpers.jobs import ROOT, TWO_NODES, Supervise, remaining_processes, until

pytestmark = pytest.mark.slow

CLIENT = """#!{python}
import json, socket, sys
connection = socket.create_connection(("127.0.0.1", {port}))
connection.sendall(json.dumps(sys.argv[1:]).encode() + b"\\n")
output, code = connection.makefile("rb").read().rsplit(b"\\0", 1)
sys.stdout.buffer.write(output)
sys.exit(int(code))
"""


class Machines(socketserver.ThreadingTCPServer):
    """An ssh server for every host name, while the context lasts."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Login)
        # By host: the command that it was to run, as a shell splits it, and its exit code.
        self.lines: dict[str, list[str]] = {}
        self.codes: dict[str, int] = {}
        self.refused: str | None = None  # a host that refuses connections
        self.delay = 0.0  # seconds until a command starts

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()
        self.server_close()


class Login(socketserver.StreamRequestHandler):
    server: Machines

    def handle(self) -> None:
        *options, host, line = json.loads(self.rfile.readline())
        if options != ["-o", "BatchMode=yes", "--"]:
            self.end(b"unknown options", 2)
        elif host == self.server.refused:
            self.end(f"ssh: connect to host {host} port 22: Connection refused\n".encode(), 255)
        else:
            time.sleep(self.server.delay)
            self.server.lines[host] = shlex.split(line)
            environment = {"PATH": os.environ["PATH"]}
            process = subprocess.Popen(
                ["sh", "-c", line],
                cwd="/",
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=self.connection,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self.server.codes[host] = process.wait()
            self.end(b"", process.returncode)

    def end(self, words: bytes, code: int) -> None:
        with contextlib.suppress(OSError):
            self.wfile.write(b"%s\0%d" % (words, code))


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    with Machines() as machines:
        (tmp_path / "bin").mkdir()
        ssh = tmp_path / "bin" / "ssh"
        ssh.write_text(CLIENT.format(python=sys.executable, port=machines.server_address[1]))
        ssh.chmod(0o755)
        monkeypatch.setenv("PATH", f"{ssh.parent}{os.pathsep}{os.environ['PATH']}")
        yield machines


LONG = tuple(f"{rank}:steps:400" for rank in range(4))
SSH = TWO_NODES | {"hosts": ["n1"]}


def test_node_0_starts_the_other(supervise: Supervise, machines: Machines, tmp_path: Path) -> None:
    running = supervise(**SSH)
    assert running.end() == (0, "")
    assert machines.codes == {"n1": 0}
    words = machines.lines["n1"]
    assert words[:7] == [
        "cd",
        str(ROOT),
        "&&",
        "exec",
        sys.executable,
        "-m",
        "tests.helpers.supervised",
    ]
    assert words[-2:] == ["launch.node_rank=1", "launch.hosts=[]"]
    assert {f"rank_{rank}.end.json" for rank in range(4)} <= {
        path.name for path in running.attempt.iterdir()
    }
    assert not remaining_processes(tmp_path / "run")


def test_the_error_of_ssh_is_the_reason(supervise: Supervise, machines: Machines) -> None:
    machines.refused = "n1"
    started = time.monotonic()
    code, err = supervise(**SSH | {"rendezvous": 600.0}).end()
    message = "ssh_1 ended (exit code 255): ssh: connect to host n1 port 22: Connection refused\n"
    assert (code, err) == (1, message)
    assert time.monotonic() - started < 60


def test_a_node_does_not_wait_for_one_that_cannot_come(
    supervise: Supervise, machines: Machines
) -> None:
    machines.refused = "n1"
    code, err = supervise(**SSH | {"nodes": 3, "hosts": ["n1", "n2"], "rendezvous": 600.0}).end()
    assert (code, err[:26]) == (1, "ssh_1 ended (exit code 255")
    until(lambda: "n2" in machines.codes, "node 2 has ended")
    assert machines.codes == {"n2": 1}


def test_without_ssh_the_job_is_refused(
    supervise: Supervise, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    message = (
        "launch.hosts: ssh cannot be started (No such file or directory); install it, or give "
        "another value\n"
    )
    assert supervise(**SSH).end() == (2, message)


def test_a_signal_to_node_0_stops_the_others(supervise: Supervise, machines: Machines) -> None:
    running = supervise(*LONG, **SSH)
    running.steps(3)
    running.steps(3, rank=3)
    running.process.terminate()
    assert running.end() == (75, "")
    assert machines.codes == {"n1": 75}


def test_a_node_that_starts_after_the_end_learns_it(
    supervise: Supervise, machines: Machines
) -> None:
    machines.delay = 4.0
    running = supervise(*LONG, **SSH | {"rendezvous": 600.0})
    until((running.attempt / "node_0.json").exists, "an attempt")
    running.process.terminate()
    assert running.end() == (
        75,
        "stopped while waiting for node 1 of 2; the same command resumes\n",
    )
    assert machines.codes == {"n1": 75}


def test_a_node_0_that_is_killed_is_missed(
    supervise: Supervise, machines: Machines, tmp_path: Path
) -> None:
    """Its guard ends its own ranks and ssh; the other node ends by itself."""
    running = supervise(*LONG, **SSH)
    running.steps(3)
    running.steps(3, rank=3)
    running.process.kill()
    running.process.wait()
    until(lambda: not remaining_processes(tmp_path / "run"), "no process is left")
    until(lambda: machines.codes, "node 1 has ended")
    assert machines.codes == {"n1": 1}
