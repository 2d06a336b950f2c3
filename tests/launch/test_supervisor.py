"""A supervisor over ranks that misbehave: how it ends, what it says, and that nothing is left
behind.

Everything runs in processes of its own, with ranks that need no MindSpore
(`tests.helpers.fake_ranks`).
"""

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from launch.jobs import processes
from launch.jobs.heartbeats import read_beat
from pipeline.files import lock
from tests.helpers.jobs import TWO, WAIT, left, until


def test_a_job_that_goes_well(supervise, tmp_path):
    running = supervise("1:daemon")
    assert running.end() == (0, "")
    assert not left(tmp_path / "run")  # the daemon neither
    files = {path.name for path in running.attempt.iterdir()}
    assert files >= {
        f"rank_{rank}{end}" for rank in (0, 1) for end in (".log", ".json", ".end.json")
    }


def test_rank_0_is_shown_and_of_the_others_the_warnings(supervise):
    running = supervise("1:chatter")
    _, err = running.process.communicate(timeout=WAIT)
    assert [f"rank 0 step {step}" for step in range(1, 21)] == [
        line for line in err.splitlines() if "rank 0" in line
    ]
    assert [line for line in err.splitlines() if "rank 0" not in line] == ["[rank 1] warning: hot"]


TRACEBACK = "  Traceback (most recent call last):\n    in the middle of it\n  ValueError: too hot\n"
FAULTS = {
    "killed": (["1:kill"], "rank 1 (pid PID on HOST, step 3): killed by SIGKILL\n"),
    "raised": (["1:raise"], f"rank 1 (pid PID on HOST, step 3): ValueError: too hot\n{TRACEBACK}"),
    "rank 0 raised": (["0:raise"], "rank 0 (pid PID on HOST, step 3): ValueError: too hot\n"),
    "killed, and the neighbour raised": (
        ["0:late", "1:kill"],
        "rank 1 (pid PID on HOST, step 3): killed by SIGKILL\n",
    ),
    "hangs": (
        ["1:hang"],
        "rank 1 (pid PID on HOST, step 3): hangs: training, nothing new for 4 s\n",
    ),
    "hangs, deaf": (
        ["1:deaf"],
        "rank 1 (pid PID on HOST, step 3): hangs: training, nothing new for 4 s\n",
    ),
    "all hang, rank 1 first": (
        ["0:hang:6", "1:hang:3"],
        "rank 1 (pid PID on HOST, step 3): hangs: training, ",
    ),
    "stopped": (
        ["1:freeze"],
        "rank 1 (pid PID on HOST, step 3): is stopped, by SIGSTOP or a debugger\n",
    ),
    "before its first beat": (
        ["1:silent"],
        "a rank ended before its first heartbeat (exit code 9)\n",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_first_rank_to_fail_is_named(supervise, name):
    faults, message = FAULTS[name]
    running = supervise(*faults)
    code, err = running.end()
    if message.startswith("rank"):
        beat = read_beat(running.attempt, int(message.split()[1]))
        message = message.replace("PID", str(beat.pid)).replace("HOST", beat.host)
    assert code == 1
    assert err.startswith(message)
    assert err.endswith(f"logs: {running.attempt}\n")


def test_a_rank_that_waits_for_another_does_not_hang(supervise):
    assert supervise("0:sample", "1:wait").end() == (0, "")


def launcher_of(running):
    """Its process id."""
    (pid,) = [pid for pid in left(running.run) if processes.stat(pid)[1] == running.process.pid and
              "tests.helpers.fake_ranks" in Path(f"/proc/{pid}/cmdline").read_text()]  # fmt: skip
    return pid


def test_a_launcher_that_is_killed_is_named(supervise):
    running = supervise("0:steps:400", "1:steps:400")
    running.steps(3)
    os.kill(launcher_of(running), signal.SIGKILL)
    code, err = running.end()
    assert (code, err.splitlines()[0]) == (1, "msrun_0 ended (killed by SIGKILL)")


def test_a_launcher_that_the_signal_reaches_too_is_no_fault(supervise):
    """As msrun does, it leaves its ranks, which save."""
    running = supervise("0:steps:400", "1:steps:400", settle=0.1)
    running.steps(3)
    launcher = launcher_of(running)
    running.process.terminate()
    os.kill(launcher, signal.SIGTERM)
    assert running.end() == (75, "")


def test_a_users_mistake_is_passed_on_and_not_tried_again(supervise):
    running = supervise("1:mistake", restarts=3)
    assert running.end() == (2, "data.shards: nothing.tar: no such file; give what is there\n")
    assert [path.name for path in (running.run / "logs").iterdir()] == ["attempt-0"]


# Signals.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_to_the_ranks_which_save(supervise, number):
    running = supervise("0:steps:400", "1:steps:400", "1:daemon")
    running.steps(3)
    running.process.send_signal(number)
    assert running.end() == (75, "")
    assert [
        json.loads((running.attempt / f"rank_{rank}.end.json").read_text())["code"]
        for rank in (0, 1)
    ] == [75, 75]


def test_before_the_first_step_there_is_nothing_to_save(supervise):
    running = supervise("0:compile", "1:compile", restarts=2)
    until(
        lambda: (beat := read_beat(running.attempt, 1)) and beat.phase == "compiling", "compiling"
    )
    running.process.terminate()
    assert running.end() == (75, "stopped before the first step; the same command goes on\n")


def test_a_rank_that_does_not_stop_is_killed(supervise):
    running = supervise("0:steps:400", "1:steps:400", "1:stubborn", "1:deaf:8")
    running.steps(3)
    running.process.terminate()
    code, err = running.end()
    assert code == 1
    assert err.startswith(
        "told to stop, rank 1 did not within 3 s and was killed; the newest checkpoint is as it was"
    )


def test_a_second_sigint_does_not_wait(supervise):
    running = supervise("0:deaf", "1:deaf", hang=600, stop=600)
    running.steps(3, rank=1)
    running.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    running.process.send_signal(signal.SIGINT)
    assert running.end() == (130, "interrupted\n")


def test_a_supervisor_that_is_killed_leaves_nothing(supervise, tmp_path):
    running = supervise("0:steps:400", "1:deaf", "1:daemon:2", hang=600)
    running.steps(3, rank=1)
    running.process.kill()
    running.process.wait(WAIT)
    until(lambda: not left(tmp_path / "run"), "a process was left behind")


# Restarts.


def test_attempts_without_a_new_checkpoint_are_counted(supervise):
    running = supervise("1:kill", restarts=2)
    code, err = running.end()
    said = [line for line in err.splitlines() if line.startswith(str(running.run))]
    assert code == 1
    assert said == [
        f"{running.run}: restart 1 of 2 without a new checkpoint, in 0.2 s",
        f"{running.run}: restart 2 of 2 without a new checkpoint, in 0.4 s",
        f"{running.run}: given up after 2 restarts without a new checkpoint",
    ]
    assert sorted(path.name for path in (running.run / "logs").iterdir()) == [
        "attempt-0",
        "attempt-1",
        "attempt-2",
    ]


def test_a_new_checkpoint_starts_the_count_anew(supervise):
    running = supervise("1:kill@0", "0:save:2@1", "1:kill:8@1", restarts=1)
    code, err = running.end()
    said = [line for line in err.splitlines() if line.startswith(str(running.run))]
    assert (code, said) == (
        0,
        [f"{running.run}: restart 1 of 1 without a new checkpoint, in 0.2 s"] * 2,
    )


# The run folder, and several nodes that share it.


def test_a_run_folder_in_use_is_refused_before_a_rank_starts(supervise, tmp_path):
    with lock(tmp_path / "run", ".node-0.lock"):
        code, err = supervise().end()
    message = f"{tmp_path}/run: in use by another run (pid {os.getpid()}); stop it or choose another folder\n"
    assert (code, err) == (2, message)
    assert not (tmp_path / "run" / "logs").exists()


def test_of_two_jobs_with_one_run_folder_the_second_is_refused(supervise):
    running = supervise()
    running.steps(1)
    code, err = supervise().end()
    assert code == 2
    assert (
        f"in use by another run (pid {running.process.pid}); stop it or choose another folder\n"
        in err
    )
    assert running.end() == (0, "")


def test_a_port_in_use_is_refused_before_a_rank_starts(supervise):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        running = supervise(port=port, restarts=3)
        code, err = running.end()
    assert (code, err) == (
        2,
        f"launch.port: {port} cannot be had here (Address already in use); give another, or leave it out for a free "
        "one\n",
    )
    assert [path.name for path in (running.run / "logs").iterdir()] == ["attempt-0"]
    assert not list(running.attempt.iterdir())


def test_two_nodes(supervise):
    nodes = [supervise(**TWO, node_rank=rank) for rank in (1, 0)]
    assert [node.end()[0] for node in nodes] == [0, 0]
    assert {f"rank_{rank}.end.json" for rank in range(4)} <= {
        path.name for path in nodes[0].attempt.iterdir()
    }


@pytest.mark.parametrize("fault", ["3:kill", "3:mistake"])
def test_a_failure_on_one_node_ends_the_other(supervise, fault):
    first, other = (
        supervise("0:steps:400", "1:steps:400", fault, **TWO, node_rank=rank) for rank in (0, 1)
    )
    (code, said), (other_code, other_said) = first.end(), other.end()
    assert (code, other_code) == ((1, 1) if fault == "3:kill" else (2, 2))
    assert said == (f"node 1: {other_said}" if code == 1 else other_said)


def test_the_node_that_failed_first_is_named_on_both(supervise):
    """Rank 0 raises because rank 3 is gone, and its supervisor learns why."""
    faults = ("0:raise:6", "1:steps:400", "3:kill:5")
    first, other = (supervise(*faults, **TWO, node_rank=rank) for rank in (0, 1))
    (_, said), (_, other_said) = first.end(), other.end()
    assert "killed by SIGKILL" in other_said
    assert said.startswith(f"node 1: {other_said}rank 0 (pid ")


def test_nodes_start_again_together(supervise):
    first, other = (supervise("3:kill@0", **TWO, node_rank=rank, restarts=1) for rank in (0, 1))
    assert [first.end()[0], other.end()[0]] == [0, 0]
    assert (first.run / "logs" / "attempt-1" / "rank_3.end.json").exists()


def test_a_signal_to_one_node_stops_all(supervise):
    first, other = (
        supervise(*(f"{r}:steps:400" for r in range(4)), **TWO, node_rank=rank) for rank in (0, 1)
    )
    first.steps(3)
    other.steps(3, rank=3)
    other.process.terminate()
    assert [first.end()[0], other.end()[0]] == [75, 75]


def test_a_node_that_dies_is_missed(supervise):
    first, other = (
        supervise(*(f"{r}:steps:400" for r in range(4)), **TWO, node_rank=rank) for rank in (0, 1)
    )
    first.steps(3)
    other.process.kill()
    code, err = first.end()
    other.process.wait(WAIT)
    assert code == 1
    assert err.startswith("node 1 of 2 has said nothing for 4 s: its machine or its way to ")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_node_whose_peers_never_come_says_so(supervise, rank):
    code, err = supervise(**TWO | {"meet": 1.5}, node_rank=rank).end()
    assert code == 1
    assert (
        "node 1 of 2 not here within 1.5 s"
        if rank == 0
        else "node 0 of 2 has not started here within 1.5 s"
    ) in err
