"""From configuration to the processes that a node starts: pure, so that they can be shown before
and compared in tests.

A job is `workers` ranks on each of `nodes` nodes; a rank trains a share of every batch. The same
`cascade train` runs once on every node, with its own `launch.node_rank`, and starts there

    none     python -m launch.jobs.worker CONFIG ...                  one rank, and no one to talk to
    msrun    msrun --worker_num=... python -m launch.jobs.worker ...  MindSpore's launcher; on node 0 also its scheduler
    mpirun   mpirun -np ... python -m launch.jobs.worker ...          Open MPI starts the ranks, and MindSpore's own network
             python -m launch.jobs.scheduler                          joins them, through a scheduler that node 0 adds

What the ranks are told by environment: MS_SCHED_HOST, MS_SCHED_PORT and MS_WORKER_NUM, where they
meet and how many they are; CASCADE_ATTEMPT, the folder of their logs and heartbeats;
CASCADE_LOCAL_WORKERS and CASCADE_FIRST_RANK, how many share this machine's cores and which rank is
the first of them; CASCADE_JOB, by which the supervisor finds them.
"""

import ipaddress
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.config import ConfigError, build
from pipeline.errors import UserError
from pipeline.runtime import STARTUP_TIMEOUT, detect_cluster

NODE_LOCK = ".node-{}.lock"  # by which the supervisor of a node has the run folder
MEETING = 300  # seconds within which all nodes have to be there


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How the processes of a job are started, and how often again after a failure."""

    launcher: Literal["none", "msrun", "mpirun"] = "none"
    workers: int = 1  # ranks on each node: on Ascend, its devices
    nodes: int = 1
    node_rank: int = (
        0  # this node; Slurm's, Volcano's and Open MPI's own numbers are taken if none is given
    )
    restarts: int = 0  # in a row without a new checkpoint between them
    master: str = "127.0.0.1"  # node 0, as the others reach it
    port: int | None = None  # of node 0; none: a free one, which it tells the others
    hosts: tuple[str, ...] = ()  # node 0 starts the same command on these, the other nodes, by ssh

    def __post_init__(self) -> None:
        for name in ("workers", "nodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not positive; give 1 or more")
        if self.launcher == "none" and self.size > 1:
            name = "workers" if self.workers > 1 else "nodes"
            raise ConfigError(f"{name}: {getattr(self, name)} with launcher none, which starts one process; "
                              "choose launch.launcher=msrun or mpirun")  # fmt: skip
        if not 0 <= self.node_rank < self.nodes:
            raise ConfigError(
                f"node_rank: {self.node_rank} is not in [0, {self.nodes}); count the nodes from 0"
            )
        if self.restarts < 0:
            raise ConfigError(f"restarts: {self.restarts} is negative; give 0 for none")
        if self.port is not None and not 1024 <= self.port <= 65535:
            raise ConfigError(
                f"port: {self.port} is not in [1024, 65535]; leave it out for a free one"
            )
        if self.nodes > 1 and loopback(self.master):
            raise ConfigError(f"master: {self.master} is every node itself, and there are {self.nodes}; "
                              "give the address of node 0")  # fmt: skip
        if not self.master or self.master.startswith("-"):
            raise ConfigError(f"master: {self.master!r} is no address; give the address of node 0")
        if self.hosts and len(self.hosts) != self.nodes - 1:
            raise ConfigError(
                f"hosts: {len(self.hosts)} for {self.nodes} nodes; list all nodes but node 0"
            )
        for host in self.hosts:
            if not host or host.startswith("-"):
                raise ConfigError(
                    f"hosts: {host!r} is no host; give names or addresses that ssh knows"
                )

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.workers * self.nodes

    @property
    def ranks(self) -> range:
        """Those of this node."""
        return range(self.node_rank * self.workers, (self.node_rank + 1) * self.workers)


def read_launch(raw: dict[str, Any]) -> LaunchConfig:
    """The `launch` section of a configuration; what it leaves open of the nodes, the cluster's
    scheduler may know.
    """
    found = detect_cluster() if raw.get("launcher", "none") != "none" else {}
    return build(LaunchConfig, {**found, **raw}, "launch")


def loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


@dataclass(frozen=True, kw_only=True)
class Process:
    """What the supervisor starts: an argv, and its environment on top of the supervisor's own."""

    name: str  # of its log in the attempt's folder
    argv: list[str]
    environment: dict[str, str]


def command(path: str, overrides: Sequence[str]) -> list[str]:
    """The argv of the job that trains the stage in `path`."""
    return [sys.executable, "-m", "launch", "train", path, *overrides]


def rank_program(path: str, overrides: Sequence[str]) -> list[str]:
    """What a rank runs, as Python's arguments."""
    return ["-m", "launch.jobs.worker", path, *overrides]


def processes(
    config: LaunchConfig, program: Sequence[str], attempt: Path, port: int
) -> list[Process]:
    """What node `config.node_rank` starts for its ranks to run `program`. A port of 0 stands for a
    free one.
    """
    environment = {
        "CASCADE_ATTEMPT": str(attempt),
        "CASCADE_LOCAL_WORKERS": str(config.workers),
        "CASCADE_FIRST_RANK": str(config.ranks[0]),
    }
    if config.launcher == "none":
        return [Process(name="rank_0", argv=[sys.executable, *program], environment=environment)]
    network = {
        "MS_SCHED_HOST": config.master,
        "MS_SCHED_PORT": str(port),
        "MS_WORKER_NUM": str(config.size),
    }
    if config.launcher == "msrun":
        argv = [
            str(Path(sys.executable).with_name("msrun")),
            f"--worker_num={config.size}",
            f"--local_worker_num={config.workers}",
            f"--master_addr={config.master}",
            f"--master_port={port}",
            f"--node_rank={config.node_rank}",
            f"--log_dir={attempt}",
            "--worker_log_name=rank",  # rank_R.log, where ours are
            "--tail_worker_log=99999",  # none: the supervisor shows what is to be seen
            "--join=True",
            f"--cluster_time_out={STARTUP_TIMEOUT}",
            *(
                "python",
                *program,
            ),  # msrun takes no other word; the environment's PATH makes it this Python
        ]
        return [Process(name=f"msrun_{config.node_rank}", argv=argv, environment=environment)]
    mpirun = [
        "mpirun",
        *(("--allow-run-as-root",) if os.geteuid() == 0 else ()),
        *("--host", f"localhost:{config.workers}"),  # this node's ranks; each node starts its own
        *(
            "--oversubscribe",
            "--bind-to",
            "none",
        ),  # ranks bind themselves, the same under either launcher
        *("-np", str(config.workers)),
        *(sys.executable, *program),
    ]
    ranks = Process(
        name=f"mpirun_{config.node_rank}",
        argv=mpirun,
        environment=environment | network,
    )
    scheduler = [sys.executable, "-m", "launch.jobs.scheduler"]
    first = (
        [Process(name="scheduler_0", argv=scheduler, environment=network | {"MS_ROLE": "MS_SCHED"})]
        if config.node_rank == 0
        else []
    )
    return [*first, ranks]


def remotes(config: LaunchConfig, path: str, overrides: Sequence[str]) -> list[Process]:
    """What node 0 starts on the other nodes: itself, by ssh, in the same folder.

    ssh hands one line to a shell on the other side, so each word is quoted for it.
    """
    started = []
    for number, host in enumerate(config.hosts if config.node_rank == 0 else (), 1):
        there = [*command(path, overrides), f"launch.node_rank={number}", "launch.hosts=[]"]
        line = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(there)}"
        argv = ["ssh", "-o", "BatchMode=yes", "--", host, line]
        started.append(Process(name=f"ssh_{number}", argv=argv, environment={}))
    return started


def find_port(config: LaunchConfig) -> int:
    """The port on which the ranks meet, on node 0: free at this moment. UserError if the one given
    is not.
    """
    with socket.socket() as mine:
        mine.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # the last attempt's may still be closing
        try:
            mine.bind(("", config.port or 0))
        except OSError as error:
            fix = "give another, or leave it out for a free one"
            raise UserError(
                f"launch.port: {config.port} cannot be had here ({error.strerror}); {fix}"
            ) from None
        return int(mine.getsockname()[1])
