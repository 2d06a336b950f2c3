"""What a job starts on each node, as lists: no process runs here."""

import json
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.cli.check import as_text
from launch.cli.check_report import check
from launch.jobs.plan import (
    LaunchConfig,
    Process,
    find_port,
    node_processes,
    rank_program,
    read_launch,
    remote_processes,
    train_command,
)
from pipeline.config import ConfigError, build
from pipeline.errors import UserError
from pipeline.runtime import STARTUP_TIMEOUT, child_environment, detect_cluster

CONFIG, OVERRIDES = "configs/tiny/base64.yaml", ["train.steps=4", "run=/runs/a b"]
PROGRAM = ["-m", "launch.jobs.worker", CONFIG, *OVERRIDES]
ATTEMPT = Path("/runs/a b/logs/attempt-0")
TWO_NODES: dict[str, Any] = {"workers": 2, "nodes": 2, "master": "10.0.0.1"}


def rank_environment(first: int, workers: int = 2) -> dict[str, str]:
    return {
        "CASCADE_ATTEMPT": str(ATTEMPT),
        "CASCADE_LOCAL_WORKERS": str(workers),
        "CASCADE_FIRST_RANK": str(first),
    }


@pytest.fixture(autouse=True)
def not_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)


def test_the_program_of_a_rank() -> None:
    assert rank_program(CONFIG, OVERRIDES) == PROGRAM


def test_one_process() -> None:
    started = node_processes(LaunchConfig(), PROGRAM, attempt=ATTEMPT, port=0)
    assert started == [
        Process(name="rank_0", argv=[sys.executable, *PROGRAM], environment=rank_environment(0, 1))
    ]


@pytest.mark.parametrize("node", [0, 1])
def test_msrun(node: int) -> None:
    config = LaunchConfig(launcher="msrun", node_rank=node, **TWO_NODES)
    argv = [
        str(Path(sys.executable).parent / "msrun"),
        *("--worker_num=4", "--local_worker_num=2", "--master_addr=10.0.0.1", "--master_port=8118"),
        *(
            f"--node_rank={node}",
            f"--log_dir={ATTEMPT}",
            "--worker_log_name=rank",
            "--tail_worker_log=99999",
        ),
        *("--join=True", f"--cluster_time_out={STARTUP_TIMEOUT}", "python", *PROGRAM),
    ]
    started = node_processes(config, PROGRAM, attempt=ATTEMPT, port=8118)
    assert started == [
        Process(name=f"msrun_{node}", argv=argv, environment=rank_environment(2 * node))
    ]


@pytest.mark.parametrize("node", [0, 1])
def test_mpirun(node: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open MPI starts a node's own ranks; the scheduler is one more process, on node 0."""
    config = LaunchConfig(launcher="mpirun", node_rank=node, **TWO_NODES)
    argv = ["mpirun", "--host", "localhost:2", "--oversubscribe", "--bind-to", "none", "-np", "2"]
    network = {"MS_SCHED_HOST": "10.0.0.1", "MS_SCHED_PORT": "8118", "MS_WORKER_NUM": "4"}
    scheduler = Process(
        name="scheduler_0",
        argv=[sys.executable, "-m", "launch.jobs.scheduler"],
        environment={**network, "MS_ROLE": "MS_SCHED"},
    )
    ranks = Process(
        name=f"mpirun_{node}",
        argv=[*argv, sys.executable, *PROGRAM],
        environment=rank_environment(2 * node) | network,
    )
    assert node_processes(config, PROGRAM, attempt=ATTEMPT, port=8118) == (
        [ranks] if node else [scheduler, ranks]
    )
    monkeypatch.setattr("os.geteuid", lambda: 0)
    *_, ranks = node_processes(config, PROGRAM, attempt=ATTEMPT, port=8118)
    assert ranks.argv[:2] == ["mpirun", "--allow-run-as-root"]


def test_other_nodes_by_ssh() -> None:
    config = LaunchConfig(launcher="msrun", hosts=("n1",), **TWO_NODES)
    words = [
        *train_command(CONFIG, OVERRIDES)[:-1],
        "'run=/runs/a b'",
        "launch.node_rank=1",
        "'launch.hosts=[]'",
    ]
    line = f"cd {Path.cwd()} && exec {' '.join(words)}"
    argv = ["ssh", "-o", "BatchMode=yes", "--", "n1", line]
    assert remote_processes(config, CONFIG, OVERRIDES) == [
        Process(name="ssh_1", argv=argv, environment={})
    ]
    assert remote_processes(replace(config, node_rank=1), CONFIG, OVERRIDES) == []
    assert remote_processes(LaunchConfig(), CONFIG, OVERRIDES) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 2}, "launch.workers: 2 with launcher none, which starts one process; choose "),
        ({"nodes": 2}, "launch.nodes: 2 with launcher none, which starts one process; choose "),
        ({"workers": 0}, "launch.workers: 0 is not positive; give 1 or more"),
        (
            {**TWO_NODES, "launcher": "msrun", "node_rank": 2},
            "launch.node_rank: 2 is not in [0, 2); count the nodes from 0",
        ),
        ({"restarts": -1}, "launch.restarts: -1 is negative; give 0 for none"),
        ({"port": 80}, "launch.port: 80 is not in [1024, 65535]; leave it out for a free one"),
        (
            {"launcher": "msrun", "nodes": 2},
            "launch.master: 127.0.0.1 is a loopback address, which each of the 2 nodes takes for ",
        ),
        ({"master": "--x"}, "launch.master: '--x' is not an address; give the address of node 0"),
        (
            {**TWO_NODES, "launcher": "msrun", "hosts": ["a", "b"]},
            "launch.hosts: 2 for 2 nodes; list all nodes but node 0",
        ),
        (
            {**TWO_NODES, "launcher": "msrun", "hosts": ["-oProxyCommand=x"]},
            "launch.hosts: '-oProxyCommand=x' is not a host; ",
        ),
    ],
)
def test_contradictory_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(LaunchConfig, options, "launch")
    assert str(error.value).startswith(message)


# Ports.


def test_a_free_port_is_found() -> None:
    assert 1024 <= find_port(LaunchConfig(launcher="msrun")) <= 65535


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        config = LaunchConfig(launcher="msrun", port=other.getsockname()[1])
        with pytest.raises(UserError) as error:
            find_port(config)
    assert str(error.value) == (
        f"launch.port: {config.port} is not available on this node (Address already in use); give "
        "another, or leave it out for a free one"
    )
    assert find_port(config) == config.port


# What a cluster's scheduler tells.

SLURM = {"SLURM_NODEID": "1", "SLURM_JOB_NUM_NODES": "3", "SLURM_LAUNCH_NODE_IPADDR": "10.1.0.1"}
VOLCANO = {"VC_TASK_INDEX": "1", "VC_WORKER_HOSTS": "w-0.job,w-1.job"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, {}),
        (SLURM, {"nodes": 3, "node_rank": 1, "master": "10.1.0.1"}),
        ({**SLURM, "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0"}, {"nodes": 1, "node_rank": 0}),
        ({**SLURM, "SLURM_NODEID": "?"}, {}),
        (VOLCANO, {"nodes": 2, "node_rank": 1, "master": "w-0.job"}),
        (OPEN_MPI, {"nodes": 2, "node_rank": 1}),
        (
            {**SLURM, "SLURM_NODEID": "0", **OPEN_MPI},
            {"nodes": 2, "node_rank": 1},
        ),  # which srun started on node 1
    ],
)
def test_nodes_are_read_from_the_scheduler(
    environment: dict[str, str], expected: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", dict(environment))
    assert detect_cluster() == expected

    # What the configuration says has precedence.
    raw = {"launcher": "msrun", "master": "10.9.9.9"}
    assert read_launch(raw) == build(LaunchConfig, {**expected, **raw}, "launch")


def test_one_process_needs_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", dict(SLURM))
    assert read_launch({"launcher": "none"}) == LaunchConfig()


def test_ranks_do_not_take_another_launchers_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "os.environ", {**SLURM, **OPEN_MPI, "RANK_ID": "5", "MS_ROLE": "MS_SCHED", "HOME": "/h"}
    )
    environment = child_environment({"A": "b"})
    assert environment.pop("PATH").startswith(f"{Path(sys.executable).parent}:")
    assert environment == {"HOME": "/h", "PYTHONUNBUFFERED": "1", "A": "b"}


# What `check` shows.


def test_check_shows_what_each_node_starts() -> None:
    overrides = [
        "run=/r",
        "launch.launcher=mpirun",
        "launch.workers=2",
        "launch.nodes=2",
        "launch.master=10.0.0.1",
    ]
    report = json.loads(json.dumps(check(CONFIG, overrides)))
    assert [[process["name"] for process in node] for node in report["nodes"]] == [
        ["scheduler_0", "mpirun_0"],
        ["mpirun_1"],
    ]
    assert report["nodes"][1][0]["argv"][-3:] == overrides[-3:]
    assert report["nodes"][1][0]["environment"]["CASCADE_ATTEMPT"] == "/r/logs/attempt-0"
    assert (
        as_text(report)
        .splitlines()[-1]
        .startswith("node 1      CASCADE_ATTEMPT=/r/logs/attempt-0 ")
    )


def test_check_counts_the_ranks_of_all_nodes() -> None:
    overrides = [
        "launch.launcher=msrun",
        "launch.workers=8",
        "launch.nodes=3",
        "launch.master=10.0.0.1",
    ]
    with pytest.raises(UserError) as error:
        check(CONFIG, overrides)
    assert str(error.value).startswith(
        "data.global_batch: 32 is not a multiple of 24, the number of micro-batches "
    )
