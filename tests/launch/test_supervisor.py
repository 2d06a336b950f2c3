"""A supervisor over ranks with faults: how it ends, what it says, and that no process is left.

Everything runs in processes of its own, with ranks that need no MindSpore
(`tests.helpers.fake_ranks`).
"""

import json
import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from launch.jobs import processes
from launch.jobs.heartbeats import read_heartbeat
from pipeline.files import lock
from tests.helpers.jobs import (
    TWO_NODES,
    WAIT,
    Running,
    Supervise,
    beat_of,
    leaving_nothing,
    remaining_processes,
    supervisor_argv,
    until,
)

pytestmark = pytest.mark.slow

LONG = ("0:steps:400", "1:steps:400")
LONG_ON_TWO_NODES = tuple(f"{rank}:steps:400" for rank in range(4))


def test_a_job_without_faults(supervise: Supervise, tmp_path: Path) -> None:
    running = supervise("1:daemon")
    assert running.end() == (0, "")
    assert not remaining_processes(tmp_path / "run")  # nor the daemon
    files = {path.name for path in running.attempt.iterdir()}
    assert files >= {
        f"rank_{rank}{suffix}" for rank in (0, 1) for suffix in (".log", ".json", ".end.json")
    }


def test_rank_0_is_shown_and_the_warnings_of_the_others(supervise: Supervise) -> None:
    running = supervise("1:chatter")
    _, err = running.process.communicate(timeout=WAIT)
    lines = err.splitlines()
    steps = [f"rank 0 step {step}" for step in range(1, 21)]
    assert [line for line in lines if "rank 0" in line] == steps
    assert [line for line in lines if "rank 0" not in line] == ["[rank 1] warning: hot"]


WHERE = "rank 1 (pid PID on HOST, step 3)"
TRACEBACK = "  Traceback (most recent call last):\n    in the middle of it\n  ValueError: too hot\n"
FAULTS = {
    "killed": (["1:kill"], f"{WHERE}: killed by SIGKILL\n"),
    "raised": (["1:raise"], f"{WHERE}: ValueError: too hot\n{TRACEBACK}"),
    "rank 0 raised": (["0:raise"], "rank 0 (pid PID on HOST, step 3): ValueError: too hot\n"),
    "killed, and the neighbour raised": (
        ["0:late", "1:kill"],
        f"{WHERE}: killed by SIGKILL\n",
    ),
    "hangs": (["1:hang"], f"{WHERE}: hangs: training, nothing new for 4 s\n"),
    "hangs and ignores SIGTERM": (
        ["1:deaf"],
        f"{WHERE}: hangs: training, nothing new for 4 s\n",
    ),
    "all hang, rank 1 first": (["0:hang:6", "1:hang:3"], f"{WHERE}: hangs: training, "),
    "stopped": (["1:freeze"], f"{WHERE}: is stopped, by SIGSTOP or a debugger\n"),
    "before its first heartbeat": (
        ["1:silent"],
        "a rank ended before its first heartbeat (exit code 9)\n",
    ),
}


AT_ONCE = 3  # jobs that mostly wait


@dataclass
class Ended:
    attempt: Path
    code: int
    err: str


@pytest.fixture(scope="module")
def ended_jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """A job with each of FAULTS, after its end."""
    folder = tmp_path_factory.mktemp("faults")
    names = list(FAULTS)
    ended = {}
    with leaving_nothing(folder) as start:
        for first in range(0, len(names), AT_ONCE):
            jobs = {}
            for name in names[first : first + AT_ONCE]:
                run = folder / name.replace(" ", "_")
                jobs[name] = Running(run, start(supervisor_argv(run, *FAULTS[name][0])))
            for name, running in jobs.items():
                code, err = running.end()
                ended[name] = Ended(running.attempt, code, err)
    return ended


@pytest.mark.parametrize("name", FAULTS)
def test_the_first_rank_to_fail_is_named(ended_jobs: dict[str, Ended], name: str) -> None:
    job = ended_jobs[name]
    message = FAULTS[name][1]
    if message.startswith("rank"):
        beat = beat_of(job.attempt, int(message.split()[1]))
        message = message.replace("PID", str(beat.pid)).replace("HOST", beat.host)
    assert job.code == 1
    assert job.err.startswith(message)
    assert job.err.endswith(f"logs: {job.attempt}\n")


def test_a_rank_that_waits_for_another_does_not_hang(supervise: Supervise) -> None:
    assert supervise("0:sample", "1:wait").end() == (0, "")


def launcher_pid(running: Running) -> int:
    pids = []
    for pid in remaining_processes(running.run):
        process = processes.stat(pid)
        arguments = Path(f"/proc/{pid}/cmdline").read_text()
        child = process is not None and process.parent == running.process.pid
        if child and "tests.helpers.fake_ranks" in arguments:
            pids.append(pid)
    (pid,) = pids
    return pid


def test_a_launcher_that_is_killed_is_named(supervise: Supervise) -> None:
    running = supervise(*LONG)
    running.steps(3)
    os.kill(launcher_pid(running), signal.SIGKILL)
    code, err = running.end()
    assert (code, err.splitlines()[0]) == (1, "msrun_0 ended (killed by SIGKILL)")


def test_a_signal_that_reaches_the_launcher_too_is_no_fault(supervise: Supervise) -> None:
    """As msrun does, it leaves its ranks, which save."""
    running = supervise(*LONG, report_wait=0.1)
    running.steps(3)
    launcher = launcher_pid(running)
    running.process.terminate()
    os.kill(launcher, signal.SIGTERM)
    assert running.end() == (75, "")


def test_a_users_mistake_is_passed_on_and_not_tried_again(supervise: Supervise) -> None:
    running = supervise("1:mistake", restarts=3)
    assert running.end() == (2, "data.shards: nothing.tar: no such file; give what is there\n")
    assert [path.name for path in (running.run / "logs").iterdir()] == ["attempt-0"]


# Signals.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_to_the_ranks_which_save(
    supervise: Supervise, number: signal.Signals
) -> None:
    running = supervise(*LONG, "1:daemon")
    running.steps(3)
    running.process.send_signal(number)
    assert running.end() == (75, "")
    ends = [json.loads((running.attempt / f"rank_{rank}.end.json").read_text()) for rank in (0, 1)]
    assert [end["code"] for end in ends] == [75, 75]


def test_before_the_first_step_there_is_nothing_to_save(supervise: Supervise) -> None:
    running = supervise("0:compile", "1:compile", restarts=2)
    until(
        lambda: (beat := read_heartbeat(running.attempt, 1)) and beat.phase == "compiling",
        "compiling",
    )
    running.process.terminate()
    assert running.end() == (75, "stopped before the first step; the same command resumes\n")


def test_a_rank_that_does_not_stop_is_killed(supervise: Supervise) -> None:
    running = supervise(*LONG, "1:stubborn", "1:deaf:8")
    running.steps(3)
    running.process.terminate()
    code, err = running.end()
    assert code == 1
    assert err.startswith(
        "rank 1 did not stop within 3 s of the signal and was killed; the newest checkpoint is "
        "intact"
    )


def test_a_second_sigint_does_not_wait(supervise: Supervise) -> None:
    running = supervise("0:deaf", "1:deaf", hang=600, stop=600)
    running.steps(3, rank=1)
    running.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    running.process.send_signal(signal.SIGINT)
    assert running.end() == (130, "interrupted\n")


def test_a_supervisor_that_is_killed_leaves_no_process(
    supervise: Supervise, tmp_path: Path
) -> None:
    running = supervise("0:steps:400", "1:deaf", "1:daemon:2", hang=600)
    running.steps(3, rank=1)
    running.process.kill()
    running.process.wait(WAIT)
    until(lambda: not remaining_processes(tmp_path / "run"), "no process is left")


# Restarts.


def messages_about(running: Running, err: str) -> list[str]:
    """The lines that begin with the run folder."""
    return [line for line in err.splitlines() if line.startswith(str(running.run))]


def test_attempts_without_a_new_checkpoint_are_counted(supervise: Supervise) -> None:
    running = supervise("1:kill", restarts=2)
    code, err = running.end()
    assert code == 1
    assert messages_about(running, err) == [
        f"{running.run}: restart 1 of 2 without a new checkpoint, in 0.2 s",
        f"{running.run}: restart 2 of 2 without a new checkpoint, in 0.4 s",
        f"{running.run}: given up after 2 restarts without a new checkpoint",
    ]
    folders = sorted(path.name for path in (running.run / "logs").iterdir())
    assert folders == ["attempt-0", "attempt-1", "attempt-2"]


def test_a_new_checkpoint_resets_the_count(supervise: Supervise) -> None:
    running = supervise("1:kill@0", "0:save:2@1", "1:kill:8@1", restarts=1)
    code, err = running.end()
    restart = f"{running.run}: restart 1 of 1 without a new checkpoint, in 0.2 s"
    assert (code, messages_about(running, err)) == (0, [restart, restart])


# The run folder, and several nodes that share it.


def test_a_run_folder_in_use_is_refused_before_a_rank_starts(
    supervise: Supervise, tmp_path: Path
) -> None:
    with lock(tmp_path / "run", ".node-0.lock"):
        code, err = supervise().end()
    assert code == 2
    assert err.startswith(f"{tmp_path}/run: in use by another run (pid {os.getpid()}); stop it or ")
    assert not (tmp_path / "run" / "logs").exists()


def test_the_second_job_in_a_run_folder_is_refused(supervise: Supervise) -> None:
    running = supervise()
    running.steps(1)
    code, err = supervise().end()
    assert code == 2
    assert f"in use by another run (pid {running.process.pid}); stop it or " in err
    assert running.end() == (0, "")


def test_a_port_in_use_is_refused_before_a_rank_starts(supervise: Supervise) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        running = supervise(port=port, restarts=3)
        code, err = running.end()
    assert code == 2
    assert err.startswith(f"launch.port: {port} is not available on this node (Address already in ")
    assert [path.name for path in (running.run / "logs").iterdir()] == ["attempt-0"]
    assert not list(running.attempt.iterdir())


def test_two_nodes(supervise: Supervise) -> None:
    nodes = [supervise(**TWO_NODES, node_rank=rank) for rank in (1, 0)]
    assert [node.end()[0] for node in nodes] == [0, 0]
    assert {f"rank_{rank}.end.json" for rank in range(4)} <= {
        path.name for path in nodes[0].attempt.iterdir()
    }


@pytest.mark.parametrize("fault", ["3:kill", "3:mistake"])
def test_a_failure_on_one_node_ends_the_other(supervise: Supervise, fault: str) -> None:
    first, other = (supervise(*LONG, fault, **TWO_NODES, node_rank=rank) for rank in (0, 1))
    code, err = first.end()
    other_code, other_err = other.end()
    assert (code, other_code) == ((1, 1) if fault == "3:kill" else (2, 2))
    assert err == (f"node 1: {other_err}" if code == 1 else other_err)


def test_the_node_that_failed_first_is_named_on_both(supervise: Supervise) -> None:
    """Rank 0 raises because rank 3 is gone, and its supervisor learns why."""
    faults = ("0:raise:6", "1:steps:400", "3:kill:5")
    first, other = (supervise(*faults, **TWO_NODES, node_rank=rank) for rank in (0, 1))
    _, err = first.end()
    _, other_err = other.end()
    assert "killed by SIGKILL" in other_err
    assert err.startswith(f"node 1: {other_err}rank 0 (pid ")


def test_nodes_restart_together(supervise: Supervise) -> None:
    first, other = (
        supervise("3:kill@0", **TWO_NODES, node_rank=rank, restarts=1) for rank in (0, 1)
    )
    assert [first.end()[0], other.end()[0]] == [0, 0]
    assert (first.run / "logs" / "attempt-1" / "rank_3.end.json").exists()


def test_a_signal_to_one_node_stops_all(supervise: Supervise) -> None:
    first, other = (supervise(*LONG_ON_TWO_NODES, **TWO_NODES, node_rank=rank) for rank in (0, 1))
    first.steps(3)
    other.steps(3, rank=3)
    other.process.terminate()
    assert [first.end()[0], other.end()[0]] == [75, 75]


def test_a_node_that_dies_is_missed(supervise: Supervise) -> None:
    first, other = (supervise(*LONG_ON_TWO_NODES, **TWO_NODES, node_rank=rank) for rank in (0, 1))
    first.steps(3)
    other.process.kill()
    code, err = first.end()
    other.process.wait(WAIT)
    assert code == 1
    assert err.startswith("node 1 of 2 has sent nothing for 4 s: its machine or its access to ")


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "node 1 of 2 not here within 1.5 s"),
        (1, "node 0 of 2 has not started here within 1.5 s"),
    ],
)
def test_a_node_whose_peers_never_come_says_so(
    supervise: Supervise, rank: int, message: str
) -> None:
    code, err = supervise(**TWO_NODES | {"rendezvous": 1.5}, node_rank=rank).end()
    assert code == 1
    assert message in err
