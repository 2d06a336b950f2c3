"""From configuration to the processes that a node starts: pure functions, so that the plan can be
shown before a job runs and compared in tests.

A job has `workers` ranks on each of `nodes` nodes; each rank trains on a part of every batch. The
same `cascade train` runs once on every node, with its own `launch.node_rank`, and starts there

    none     python -m launch.jobs.worker CONFIG ...
             One rank, without communication.
    msrun    msrun --worker_num=... python -m launch.jobs.worker ...
             MindSpore's launcher; on node 0 it starts MindSpore's scheduler too.
    mpirun   mpirun -np ... python -m launch.jobs.worker ...
             python -m launch.jobs.scheduler
             Open MPI starts the ranks; MindSpore's own network connects them, through the scheduler
             on node 0.

The ranks get these environment variables: MS_SCHED_HOST, MS_SCHED_PORT (the rendezvous) and
MS_WORKER_NUM (number of ranks); CASCADE_ATTEMPT (folder of their logs and heartbeats);
CASCADE_LOCAL_WORKERS and CASCADE_FIRST_RANK (ranks that share this machine's cores, and the first
of them); CASCADE_JOB (job id, by which the supervisor finds them).
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

NODE_LOCK = ".node-{}.lock"  # file by which the supervisor of a node locks the run folder
RENDEZVOUS_TIMEOUT = 300.0  # seconds within which all nodes have to start


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How the processes of a job are started, and how often again after a failure."""

    launcher: Literal["none", "msrun", "mpirun"] = "none"  # none: one process
    # Ranks on each node: on Ascend, its devices.
    workers: int = 1
    nodes: int = 1  # machines
    # Rank of this node. If it is left out, that of Slurm, Volcano or Open MPI.
    node_rank: int = 0
    # Restarts in a row without a new checkpoint between them.
    restarts: int = 0
    # Address of node 0, as the other nodes reach it.
    master: str = "127.0.0.1"
    # Port of node 0. None: a free one, which node 0 passes on to the others.
    port: int | None = None
    # The other nodes, on which node 0 starts the same command by ssh.
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._check_counts()
        self._check_addresses()

    def _check_counts(self) -> None:
        for name in ("workers", "nodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: {getattr(self, name)} is not positive; give 1 or more")

        if self.launcher == "none" and self.size > 1:
            name = "workers" if self.workers > 1 else "nodes"
            raise ConfigError(
                f"{name}: {getattr(self, name)} with launcher none, which starts one process; "
                "choose launch.launcher=msrun or mpirun"
            )
        if not 0 <= self.node_rank < self.nodes:
            raise ConfigError(
                f"node_rank: {self.node_rank} is not in [0, {self.nodes}); count the nodes from 0"
            )

        if self.restarts < 0:
            raise ConfigError(f"restarts: {self.restarts} is negative; give 0 for none")

    def _check_addresses(self) -> None:
        if self.port is not None and not 1024 <= self.port <= 65535:
            raise ConfigError(
                f"port: {self.port} is not in [1024, 65535]; leave it out for a free one"
            )

        if self.nodes > 1 and is_loopback(self.master):
            raise ConfigError(
                f"master: {self.master} is a loopback address, which each of the {self.nodes} "
                "nodes takes for itself; give the address of node 0"
            )
        # A leading - would be read as an option by msrun or ssh.
        if not self.master or self.master.startswith("-"):
            raise ConfigError(
                f"master: {self.master!r} is not an address; give the address of node 0"
            )

        if self.hosts and len(self.hosts) != self.nodes - 1:
            raise ConfigError(
                f"hosts: {len(self.hosts)} for {self.nodes} nodes; list all nodes but node 0"
            )
        for host in self.hosts:
            if not host or host.startswith("-"):
                raise ConfigError(
                    f"hosts: {host!r} is not a host; give names or addresses that ssh knows"
                )

    @property
    def size(self) -> int:
        """Number of ranks of the job."""
        return self.workers * self.nodes

    @property
    def ranks(self) -> range:
        """The ranks of this node."""
        return range(self.node_rank * self.workers, (self.node_rank + 1) * self.workers)


def read_launch(raw: dict[str, Any]) -> LaunchConfig:
    """The `launch` section; the cluster's scheduler supplies what it leaves out."""
    # Without a launcher it is one process, whatever cluster the environment describes.
    from_cluster = detect_cluster() if raw.get("launcher", "none") != "none" else {}
    return build(LaunchConfig, {**from_cluster, **raw}, "launch")


def is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process that the supervisor starts."""

    name: str  # its log is NAME.log in the attempt's folder
    argv: list[str]
    environment: dict[str, str]  # added to the supervisor's own


def train_command(path: str, overrides: Sequence[str]) -> list[str]:
    """The argv of the job that trains the stage configured in `path`."""
    return [sys.executable, "-m", "launch", "train", path, *overrides]


def rank_program(path: str, overrides: Sequence[str]) -> list[str]:
    """What a rank runs, as arguments of Python."""
    return ["-m", "launch.jobs.worker", path, *overrides]


def node_processes(
    config: LaunchConfig, program: Sequence[str], *, attempt: Path, port: int
) -> list[Process]:
    """What node `config.node_rank` starts so that its ranks run `program`.

    `attempt` is the folder of logs and heartbeats; port 0 stands for a free one.
    """
    environment = {
        "CASCADE_ATTEMPT": str(attempt),
        "CASCADE_LOCAL_WORKERS": str(config.workers),
        "CASCADE_FIRST_RANK": str(config.ranks[0]),
    }
    if config.launcher == "none":
        return [Process(name="rank_0", argv=[sys.executable, *program], environment=environment)]

    if config.launcher == "msrun":
        argv = msrun_argv(config, program, attempt=attempt, port=port)
        return [Process(name=f"msrun_{config.node_rank}", argv=argv, environment=environment)]

    # msrun sets these itself; Open MPI knows nothing of MindSpore's rendezvous.
    network = {
        "MS_SCHED_HOST": config.master,
        "MS_SCHED_PORT": str(port),
        "MS_WORKER_NUM": str(config.size),
    }
    ranks = Process(
        name=f"mpirun_{config.node_rank}",
        argv=mpirun_argv(config, program),
        environment=environment | network,
    )
    if config.node_rank != 0:
        return [ranks]

    scheduler = Process(
        name="scheduler_0",
        argv=[sys.executable, "-m", "launch.jobs.scheduler"],
        environment=network | {"MS_ROLE": "MS_SCHED"},
    )
    return [scheduler, ranks]


def msrun_argv(
    config: LaunchConfig, program: Sequence[str], *, attempt: Path, port: int
) -> list[str]:
    return [
        str(Path(sys.executable).with_name("msrun")),
        f"--worker_num={config.size}",
        f"--local_worker_num={config.workers}",
        f"--master_addr={config.master}",
        f"--master_port={port}",
        f"--node_rank={config.node_rank}",
        f"--log_dir={attempt}",
        # rank_R.log, the same file that the rank itself writes.
        "--worker_log_name=rank",
        # A rank that does not exist, so that msrun shows no log: the supervisor does.
        "--tail_worker_log=99999",
        "--join=True",
        f"--cluster_time_out={STARTUP_TIMEOUT}",
        # msrun accepts no other word; PATH in the environment makes it this Python.
        "python",
        *program,
    ]


def mpirun_argv(config: LaunchConfig, program: Sequence[str]) -> list[str]:
    argv = ["mpirun"]
    if os.geteuid() == 0:
        argv.append("--allow-run-as-root")

    # Only this node's ranks: each node starts its own.
    argv += ["--host", f"localhost:{config.workers}"]
    # Ranks choose their cores themselves, the same under either launcher.
    argv += ["--oversubscribe", "--bind-to", "none"]
    return [*argv, "-np", str(config.workers), sys.executable, *program]


def remote_processes(config: LaunchConfig, path: str, overrides: Sequence[str]) -> list[Process]:
    """What node 0 starts on the other nodes: the same command by ssh, in the same folder.

    ssh hands one line to a shell on the other machine, so each word is quoted.
    """
    if config.node_rank != 0:
        return []

    remotes = []
    for node_rank, host in enumerate(config.hosts, 1):
        # Later overrides win. A node that is started by ssh starts no others.
        command = [
            *train_command(path, overrides),
            f"launch.node_rank={node_rank}",
            "launch.hosts=[]",
        ]
        line = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(command)}"
        # BatchMode: ssh fails where it would ask for a password, which nobody would answer.
        argv = ["ssh", "-o", "BatchMode=yes", "--", host, line]
        remotes.append(Process(name=f"ssh_{node_rank}", argv=argv, environment={}))

    return remotes


def find_port(config: LaunchConfig) -> int:
    """The port of node 0 for the rendezvous of the ranks, free at this moment.

    UserError if the configured one is in use.
    """
    with socket.socket() as probe:
        # The port of the last attempt may still be closing.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", config.port or 0))
        except OSError as error:
            raise UserError(
                f"launch.port: {config.port} is not available on this node ({error.strerror}); "
                "give another, or leave it out for a free one"
            ) from None

        return int(probe.getsockname()[1])
