"""What depends on the machine and on the launcher: the only module that touches the environment and
MindSpore's context.

`prepare_environment` runs when `pipeline` is imported, before MindSpore can be: some of its
libraries read their environment only once. It sets defaults; what the user has set stands.

A job is one process or several, its ranks. The launcher numbers them by environment variables:
`msrun` by RANK_ID, MS_WORKER_NUM and DEVICE_ID, `mpirun` by OMPI_COMM_WORLD_*, from which
MindSpore's variables are set here.
"""

import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Any

from pipeline.device import on_ascend
from pipeline.errors import JobError

# Seconds that a rank waits in a collective for the others. MindSpore's default on CPU is 30, HCCL's
# on Ascend half an hour, which is what rank 0 may need for samples or a slow disk. A rank that died
# is noticed by the launcher, long before.
COLLECTIVE_TIMEOUT = 1800

STARTUP_TIMEOUT = 600  # seconds within which all ranks have to start

# Depth of nested calls that MindSpore's graph compiler accepts. Its default of 1,000 is too small
# for an optimizer step over 298 parameters.
RECURSION_LIMIT = 10_000

# Variables of the launcher that started this process. A child must not inherit them: mpirun would
# take itself for a rank of the outer job, and ranks would take its numbers for theirs.
LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_")
RANK_VARIABLES = (
    "MS_ROLE",
    "MS_NODE_ID",
    "MS_SCHED_HOST",
    "MS_SCHED_PORT",
    "MS_WORKER_NUM",
    "RANK_ID",
    "RANK_SIZE",
)


# This process.


def prepare_environment() -> None:
    """Sets what has to be in the environment before `import mindspore`. Idempotent."""
    defaults = {
        # MindSpore's log: errors only.
        "GLOG_v": "3",
        # Else MindFormers creates ./output when it is imported.
        "LOCAL_DEFAULT_PATH": str(Path(tempfile.gettempdir()) / "mindformers"),
        "TOKENIZERS_PARALLELISM": "false",
        # Else transformers warns that PyTorch, which is not used here, is missing.
        "TRANSFORMERS_VERBOSITY": "error",
    }

    if {"OMPI_COMM_WORLD_RANK", "CASCADE_FIRST_RANK"} <= os.environ.keys():
        _adopt_node_mpirun()
    elif os.environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        defaults |= _mpirun_variables()

    if not on_ascend():
        defaults |= _cpu_defaults()

    for name, value in defaults.items():
        os.environ.setdefault(name, value)

    # `start_communication` raises the error again, where it can be reported.
    with suppress(JobError):
        pin_cores(rank_info())


def _adopt_node_mpirun() -> None:
    """Sets MindSpore's variables where each node runs an mpirun of its own.

    Open MPI's rank is then the rank within the node, so the node's first rank is added, and Open
    MPI's variables are removed, as MindSpore would take that number for the rank.
    """
    local_rank = os.environ["OMPI_COMM_WORLD_RANK"]
    rank = str(int(os.environ["CASCADE_FIRST_RANK"]) + int(local_rank))

    for name in [name for name in os.environ if name.startswith(LAUNCHER_PREFIXES)]:
        del os.environ[name]

    os.environ.update(
        {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": rank, "RANK_ID": rank, "DEVICE_ID": local_rank}
    )


def _mpirun_variables() -> dict[str, str]:
    """MindSpore's variables for a rank of one mpirun over all nodes."""
    rank = os.environ["OMPI_COMM_WORLD_RANK"]

    return {
        "MS_ROLE": "MS_WORKER",
        "MS_WORKER_NUM": os.environ["OMPI_COMM_WORLD_SIZE"],
        "MS_NODE_ID": rank,
        "RANK_ID": rank,
        "DEVICE_ID": os.environ["OMPI_COMM_WORLD_LOCAL_RANK"],
    }


def _cpu_defaults() -> dict[str, str]:
    defaults = {
        "MS_NODE_TIMEOUT": str(COLLECTIVE_TIMEOUT),
        "MS_TOPO_TIMEOUT": str(STARTUP_TIMEOUT),
        # Else the main thread spins while a graph runs, and takes a core from it.
        "MS_DEV_HOST_BLOCKING_RUN": "1",
    }

    # Without a compiler there are none of the kernels that replace MindSpore's convolutions. Those
    # run in oneDNN 3.10, whose 3x3 convolutions fall back to reference code on machines with
    # AVX-512: 70 times slower.
    if not which("g++"):
        defaults["ONEDNN_MAX_CPU_ISA"] = "AVX2"
        if "mindspore" in sys.modules and "ONEDNN_MAX_CPU_ISA" not in os.environ:
            warnings.warn(
                "mindspore was imported before pipeline, so ONEDNN_MAX_CPU_ISA=AVX2 comes too late "
                "and convolutions may be many times slower; import pipeline first or set it in the "
                "environment",
                stacklevel=4,
            )

    return defaults


@dataclass(frozen=True)
class RankInfo:
    """This process among the processes of its job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0  # among those on this machine
    local_world_size: int = 1  # processes on this machine


def rank_info() -> RankInfo:
    """This process's rank, by the launcher's environment variables; without a launcher, rank 0 of
    1. JobError if they contradict each other.
    """
    # A cluster's scheduler may set RANK_ID for a single process: only MS_ROLE means a job of ranks.
    is_worker = os.environ.get("MS_ROLE") == "MS_WORKER"
    world_size = _read_int("MS_WORKER_NUM", 1) if is_worker else 1
    if world_size == 1:
        return RankInfo()

    rank = _read_int("RANK_ID", world_size)
    if rank >= world_size:
        raise JobError(
            f"RANK_ID={os.environ.get('RANK_ID', '')} in the environment of a job of {world_size} "
            f"ranks; give each one of 0 to {world_size - 1} (msrun: --node_rank)"
        )

    local_world_size = _read_int("CASCADE_LOCAL_WORKERS", world_size)
    return RankInfo(
        rank=rank,
        world_size=world_size,
        local_rank=_read_int("DEVICE_ID", rank),
        local_world_size=_read_int("OMPI_COMM_WORLD_LOCAL_SIZE", local_world_size),
    )


def _read_int(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise JobError(
            f"{name}={text} in the environment is not a whole number; unset it or start with a "
            "launcher"
        )
    return int(text)


def is_scheduler() -> bool:
    """Whether this process is MindSpore's scheduler, which only connects the ranks: it ends within
    `start_communication`.
    """
    return os.environ.get("MS_ROLE") == "MS_SCHED"


def attempt_dir() -> Path | None:
    """The folder for the logs of this attempt at the job; None if the launcher set none."""
    folder = os.environ.get("CASCADE_ATTEMPT")
    return Path(folder) if folder else None


def pin_cores(info: RankInfo) -> None:
    """Gives each rank on this machine its own cores, as each would otherwise start a thread per
    core of the machine.

    Has to run before MindSpore is imported, which sizes its thread pools by the cores that it may
    use. The bits of a sum depend on the number of threads, so a run repeats bit for bit only with
    the same number of cores per rank.
    """
    cores = sorted(os.sched_getaffinity(0))
    num_cores = len(cores) // info.local_world_size
    if info.local_world_size == 1 or num_cores == 0:
        return

    first = info.local_rank % info.local_world_size * num_cores
    os.sched_setaffinity(0, cores[first : first + num_cores])
    os.environ.setdefault("OMP_NUM_THREADS", str(num_cores))


# Communication.


def start_communication() -> RankInfo:
    """Connects to the other ranks, if there are any. Idempotent. JobError if that fails."""
    info = rank_info()
    if info.world_size == 1 and not is_scheduler():
        return info

    from mindspore import communication

    if communication.GlobalComm.INITED:
        return info

    if "MS_SCHED_HOST" in os.environ:
        os.environ["MS_SCHED_HOST"] = resolve_host(os.environ["MS_SCHED_HOST"])

    try:
        communication.init("hccl" if on_ascend() else "mccl")
    except RuntimeError as error:
        # MindSpore's messages have lines of dashes around the reason.
        lines = (line.strip() for line in str(error).splitlines() if line.strip("- "))
        reason = next(lines, "no reason given")
        host = os.environ.get("MS_SCHED_HOST")
        port = os.environ.get("MS_SCHED_PORT")
        raise JobError(
            f"rank {info.rank} of {info.world_size} could not connect to the others at "
            f"{host}:{port} ({reason}); look at their logs"
        ) from None

    return info


def resolve_host(host: str) -> str:
    """The IP address of `host`; JobError if it has none.

    MindSpore accepts no host names. msrun resolves them, mpirun does not.
    """
    try:
        return host if ":" in host else socket.gethostbyname(host)
    except OSError as error:
        raise JobError(
            f"MS_SCHED_HOST={host}: no such host ({error}); give the IP address of node 0"
        ) from None


# Compilation.


def cache_folder() -> Path:
    """The folder for what is built for this machine and user, such as compiled kernels."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imagen-cascade"


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of positional tensors, compiled as one graph."""
    import mindspore as ms

    # Each turn of a loop is a nested call to the compiler, and an optimizer's step may loop over
    # hundreds of parameters.
    ms.set_recursion_limit(RECURSION_LIMIT)
    return ms.jit(function)


@contextmanager
def graph_cache(folder: Path) -> Iterator[None]:
    """Loads the one graph that is compiled in this context from `folder`, or stores it there.

    Not where Python runs no file, as in `python -c`: MindSpore reads the program to find what the
    graph depends on, and fails without one.
    """
    import mindspore as ms

    if not Path(sys.argv[0]).is_file():
        yield
        return

    ms.set_context(enable_compile_cache=True, compile_cache_path=str(folder))
    try:
        yield
    finally:
        ms.set_context(enable_compile_cache=False)


def save_graphs(folder: str) -> None:
    """Writes every graph that is compiled from now on to `folder` as text, after optimization."""
    os.environ.update(
        MS_DEV_SAVE_GRAPHS="1", MS_DEV_DUMP_IR_PASSES="validate", MS_DEV_SAVE_GRAPHS_PATH=folder
    )


# Other processes.


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment for a child process that becomes a rank or starts ranks: this process's and
    `extra`.

    Without the variables of other launchers, and with this Python's folder first on the path.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(LAUNCHER_PREFIXES) and name not in RANK_VARIABLES
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{inherited.get('PATH', os.defpath)}"

    return inherited | {"PATH": path, "PYTHONUNBUFFERED": "1"} | dict(extra)


def initial_environment() -> dict[str, str]:
    """The environment that this process was started with, before `prepare_environment`; today's
    where a program has overwritten it to show a title.
    """
    entries = process_environment(os.getpid())
    found = dict(entry.split("=", 1) for entry in entries if "=" in entry)
    return found or dict(os.environ)


def process_environment(pid: int) -> list[str]:
    """What process `pid` was started with, as NAME=value.

    Empty if the process has ended or belongs to another user.
    """
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def detect_cluster() -> dict[str, Any]:
    """This node's place in the cluster, as the cluster's scheduler gives it: `nodes`, `node_rank`,
    and `master` (the host of node 0) where it is given; empty without a scheduler.

    Supported: Open MPI's `mpirun -npernode 1` (which gives no master; within a Slurm job its
    numbers take precedence), Slurm's `srun --ntasks-per-node=1`, and Volcano jobs whose tasks are
    named `worker`.
    """
    env = os.environ
    master = ""

    if {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"} <= env.keys():
        nodes = env["OMPI_COMM_WORLD_SIZE"]
        node_rank = env["OMPI_COMM_WORLD_RANK"]
    elif {"SLURM_NODEID", "SLURM_JOB_NUM_NODES", "SLURM_LAUNCH_NODE_IPADDR"} <= env.keys():
        nodes = env["SLURM_JOB_NUM_NODES"]
        node_rank = env["SLURM_NODEID"]
        master = env["SLURM_LAUNCH_NODE_IPADDR"]
    elif {"VC_TASK_INDEX", "VC_WORKER_HOSTS"} <= env.keys():
        hosts = env["VC_WORKER_HOSTS"].split(",")
        nodes = str(len(hosts))
        node_rank = env["VC_TASK_INDEX"]
        master = hosts[0]
    else:
        return {}

    try:
        cluster: dict[str, Any] = {"nodes": int(nodes), "node_rank": int(node_rank)}
    except ValueError:
        # Variables of these names that something else has set.
        return {}

    if master and cluster["nodes"] > 1:
        cluster["master"] = master
    return cluster
