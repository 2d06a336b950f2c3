"""What depends on device and machine: the only file that touches the environment and MindSpore's
context.

`prepare_environment` runs when `pipeline` is imported, before MindSpore can be: some of its
libraries read their environment only once. It sets defaults; what the user has set stands.

A job is one process or several, its ranks, which their launcher tells their numbers by environment:
`msrun` by RANK_ID, MS_WORKER_NUM and DEVICE_ID, `mpirun` by OMPI_COMM_WORLD_*, from which
MindSpore's own names are made here.
"""

import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Any

from pipeline.device import on_ascend
from pipeline.errors import JobError

# Seconds that a rank waits for the others. MindSpore on CPU gives up after 30; HCCL on Ascend after
# half an hour, which is what rank 0 may take for samples or a slow disk. A rank that died is found
# by the launcher, long before.
PATIENCE = 1800
GATHERING = 600  # seconds for all ranks to have started
CALLS = 10_000  # within each other, that the compiler follows; MindSpore's 1,000 are too few for 298 parameters

# Of what may have started us: mpirun would take itself for a part of it, and ranks would take its
# numbers for theirs.
FOREIGN = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_")
STALE = (
    "MS_ROLE",
    "MS_NODE_ID",
    "MS_SCHED_HOST",
    "MS_SCHED_PORT",
    "MS_WORKER_NUM",
    "RANK_ID",
    "RANK_SIZE",
)


@dataclass(frozen=True)
class RankInfo:
    """This process among those of its job. `local_rank`, `local_world`: among those on this
    machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def prepare_environment() -> None:
    """Defaults that have to stand before `import mindspore`."""
    defaults = {
        "GLOG_v": "3",  # MindSpore's log: errors only
        "LOCAL_DEFAULT_PATH": str(
            Path(tempfile.gettempdir()) / "mindformers"
        ),  # else it makes ./output at import
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",  # transformers announces that PyTorch is missing; we do not use it
    }
    if {
        "OMPI_COMM_WORLD_RANK",
        "CASCADE_FIRST_RANK",
    } <= os.environ.keys():  # one mpirun on each node, see launch
        local = os.environ["OMPI_COMM_WORLD_RANK"]
        rank = str(int(os.environ["CASCADE_FIRST_RANK"]) + int(local))
        for name in [name for name in os.environ if name.startswith(FOREIGN)]:
            del os.environ[name]  # MindSpore would take the rank on this node for the rank
        os.environ.update(
            {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": rank, "RANK_ID": rank, "DEVICE_ID": local}
        )
    elif os.environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        rank, size, local = (
            os.environ[f"OMPI_COMM_WORLD_{name}"] for name in ("RANK", "SIZE", "LOCAL_RANK")
        )
        mine = {
            "MS_ROLE": "MS_WORKER",
            "MS_WORKER_NUM": size,
            "MS_NODE_ID": rank,
            "RANK_ID": rank,
            "DEVICE_ID": local,
        }
        defaults |= mine
    if not on_ascend():
        defaults |= {"MS_NODE_TIMEOUT": str(PATIENCE), "MS_TOPO_TIMEOUT": str(GATHERING)}
        # Else the main thread waits for a graph by spinning: of two cores that takes one from the
        # graph.
        defaults["MS_DEV_HOST_BLOCKING_RUN"] = "1"
        if not which(
            "g++"
        ):  # and so, perhaps, none of the kernels that take the place of MindSpore's own
            # oneDNN 3.10 runs its 3x3 convolutions in reference code on machines with AVX-512: 70
            # times slower.
            defaults["ONEDNN_MAX_CPU_ISA"] = "AVX2"
            if "mindspore" in sys.modules and "ONEDNN_MAX_CPU_ISA" not in os.environ:
                warnings.warn(
                    "mindspore was imported before pipeline, so ONEDNN_MAX_CPU_ISA=AVX2 comes too late and "
                    "convolutions may be many times slower; import pipeline first or set it in the environment",
                    stacklevel=3,
                )
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    with suppress(JobError):  # `start_communication` says it, where an error can be shown
        take_cores(job())


def is_scheduler() -> bool:
    """Whether this process only brings the ranks together: it ends within `start_communication`."""
    return os.environ.get("MS_ROLE") == "MS_SCHED"


def job() -> RankInfo:
    """Who this process is; a job of its own where nothing says otherwise. JobError if that makes no
    sense.
    """

    def number(name: str, otherwise: int) -> int:
        text = os.environ.get(name, str(otherwise))
        if not text.isdigit():
            raise JobError(
                f"{name}={text} in the environment is not a whole number; unset it or start by a launcher"
            )
        return int(text)

    # A single process may inherit RANK_ID from a cluster's machinery: without MS_ROLE there is
    # nobody to meet.
    world = number("MS_WORKER_NUM", 1) if os.environ.get("MS_ROLE") == "MS_WORKER" else 1
    if world == 1:
        return RankInfo()
    rank = number("RANK_ID", world)
    if rank >= world:
        raise JobError(
            f"RANK_ID={os.environ.get('RANK_ID', '')} in the environment of a job of {world} ranks; give each one of 0 "
            f"to {world - 1} (msrun: --node_rank)"
        )
    local = number("OMPI_COMM_WORLD_LOCAL_SIZE", number("CASCADE_LOCAL_WORKERS", world))
    return RankInfo(rank, world, number("DEVICE_ID", rank), local)


def attempt() -> Path | None:
    """The folder of this attempt's logs, if the launcher named one."""
    folder = os.environ.get("CASCADE_ATTEMPT")
    return Path(folder) if folder else None


def take_cores(mine: RankInfo) -> None:
    """Ranks that share a machine get cores of their own, as each would else start a thread for
    every core.

    Done before MindSpore is imported, which sizes its pools by what it may use. The bits of a sum
    depend on the number of threads, so that a run repeats its bits only with as many cores a rank.
    """
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // mine.local_world
    if mine.local_world > 1 and each:
        first = mine.local_rank % mine.local_world * each
        os.sched_setaffinity(0, cores[first : first + each])
        os.environ.setdefault("OMP_NUM_THREADS", str(each))


def start_communication() -> RankInfo:
    """Meets the other ranks, if there are any; may be called again. JobError if they do not come."""
    mine = job()
    if mine.world > 1 or is_scheduler():
        from mindspore import communication

        if not communication.GlobalComm.INITED:
            if "MS_SCHED_HOST" in os.environ:
                os.environ["MS_SCHED_HOST"] = address(os.environ["MS_SCHED_HOST"])
            try:
                communication.init("hccl" if on_ascend() else "mccl")
            except RuntimeError as error:
                reason = next(
                    (line.strip() for line in str(error).splitlines() if line.strip("- ")),
                    "no reason given",
                )
                raise JobError(
                    f"rank {mine.rank} of {mine.world} could not meet the others at {os.environ.get('MS_SCHED_HOST')}:"
                    f"{os.environ.get('MS_SCHED_PORT')} ({reason}); look at their logs"
                ) from None
    return mine


def address(host: str) -> str:
    """The address of `host`, as MindSpore takes no names; msrun looks them up, mpirun does not.
    JobError if none.
    """
    try:
        return host if ":" in host else socket.gethostbyname(host)
    except OSError as error:
        raise JobError(
            f"MS_SCHED_HOST={host}: no such host ({error}); give launch.master an address"
        ) from None


def cache_folder() -> Path:
    """Where what is made for this machine is kept for this user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imagen-cascade"


def compile(function):  # type: ignore[no-untyped-def]
    """`function` of tensors, given positionally, as one compiled graph."""
    import mindspore as ms

    # Each turn of a loop is a call to the compiler, and Adafactor's step loops over hundreds of
    # parameters.
    ms.set_recursion_limit(CALLS)
    return ms.jit(function)


@contextmanager
def keeping_graphs(folder: Path) -> Iterator[None]:
    """The one graph that is compiled inside is loaded from `folder`, or stored there."""
    import mindspore as ms

    ms.set_context(enable_compile_cache=True, compile_cache_path=str(folder))
    try:
        yield
    finally:
        ms.set_context(enable_compile_cache=False)


def write_graphs(folder: str) -> None:
    """Every graph that is compiled from now on is also written to `folder` as text, as it is once
    it is optimized.
    """
    os.environ.update(
        MS_DEV_SAVE_GRAPHS="1", MS_DEV_DUMP_IR_PASSES="validate", MS_DEV_SAVE_GRAPHS_PATH=folder
    )


def child_environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment for one that is to be a rank or to start ranks, with `more`.

    Without what other launchers have left there, and with this Python's programs first on the path.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(FOREIGN) and name not in STALE
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}"
    return kept | {"PATH": path, "PYTHONUNBUFFERED": "1"} | dict(more)


def first_environment() -> dict[str, str]:
    """What this process was started with, before `prepare_environment` added to it."""
    return dict(entry.split("=", 1) for entry in environment_of(os.getpid()) if "=" in entry)


def environment_of(pid: int) -> list[str]:
    """What process `pid` was started with, as NAME=value; nothing if it is gone or another user's."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def cluster() -> dict[str, Any]:
    """What a cluster's scheduler says of this node, as fields of `LaunchConfig`: nothing if there
    is none.

    Open MPI's `mpirun -npernode 1` (which does not say where node 0 is; within a Slurm job its
    numbers are the right ones), Slurm's `srun --ntasks-per-node=1`, Volcano's job with tasks named
    `worker`.
    """
    got = os.environ
    try:
        if {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"} <= got.keys():
            nodes, rank, master = got["OMPI_COMM_WORLD_SIZE"], got["OMPI_COMM_WORLD_RANK"], ""
        elif {"SLURM_NODEID", "SLURM_JOB_NUM_NODES", "SLURM_LAUNCH_NODE_IPADDR"} <= got.keys():
            nodes, rank, master = (
                got["SLURM_JOB_NUM_NODES"],
                got["SLURM_NODEID"],
                got["SLURM_LAUNCH_NODE_IPADDR"],
            )
        elif {"VC_TASK_INDEX", "VC_WORKER_HOSTS"} <= got.keys():
            hosts = got["VC_WORKER_HOSTS"].split(",")
            nodes, rank, master = str(len(hosts)), got["VC_TASK_INDEX"], hosts[0]
        else:
            return {}
        found: dict[str, Any] = {"nodes": int(nodes), "node_rank": int(rank)}
    except ValueError:  # no numbers, so not what it looks like
        return {}
    return found | ({"master": master} if master and int(nodes) > 1 else {})
