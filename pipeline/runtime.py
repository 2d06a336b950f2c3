"""What depends on device and machine: the only file that touches the environment and MindSpore's context.

`prepare_environment` runs when `pipeline` is imported, before MindSpore can be: some of its libraries read their
environment only once. It sets defaults; what the user has set stands.

A job is one process or several, its ranks, which their launcher tells their numbers by environment: `msrun` by RANK_ID,
MS_WORKER_NUM and DEVICE_ID, `mpirun` by OMPI_COMM_WORLD_*, from which MindSpore's own names are made here.
"""

import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import JobError

# Seconds that a rank waits for the others. MindSpore on CPU gives up after 30; HCCL on Ascend after half an hour, which
# is what rank 0 may take for samples or a slow disk. A rank that died is found by the launcher, long before.
PATIENCE = 1800
GATHERING = 600  # seconds for all ranks to have started


@dataclass(frozen=True)
class Job:
    """This process among those of its job. `local_rank`, `local_world`: among those on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


def prepare_environment() -> None:
    """Defaults that have to stand before `import mindspore`."""
    defaults = {
        "GLOG_v": "3",  # MindSpore's log: errors only
        "LOCAL_DEFAULT_PATH": str(Path(tempfile.gettempdir()) / "mindformers"),  # else it makes ./output at import
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",  # transformers announces that PyTorch is missing; we do not use it
    }
    if os.environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        rank, size, local = (os.environ[f"OMPI_COMM_WORLD_{name}"] for name in ("RANK", "SIZE", "LOCAL_RANK"))
        mine = {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": size, "MS_NODE_ID": rank, "RANK_ID": rank, "DEVICE_ID": local}
        defaults |= mine
    if not on_ascend():
        defaults |= {"MS_NODE_TIMEOUT": str(PATIENCE), "MS_TOPO_TIMEOUT": str(GATHERING)}
        # oneDNN 3.10 runs 3x3 convolutions in its reference code on machines with AVX-512: 70 times slower.
        defaults["ONEDNN_MAX_CPU_ISA"] = "AVX2"
        if "mindspore" in sys.modules and "ONEDNN_MAX_CPU_ISA" not in os.environ:
            warnings.warn(
                "mindspore was imported before pipeline, so ONEDNN_MAX_CPU_ISA=AVX2 comes too late and convolutions "
                "may be many times slower; import pipeline first or set it in the environment",
                stacklevel=3,
            )
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if not on_ascend():
        with suppress(JobError):  # `start_communication` says it, where an error can be shown
            take_cores(job())


def is_scheduler() -> bool:
    """Whether this process only brings the ranks together: it ends within `start_communication`."""
    return os.environ.get("MS_ROLE") == "MS_SCHED"


def job() -> Job:
    """Who this process is; a job of its own where nothing says otherwise. JobError if that makes no sense."""

    def number(name: str, otherwise: int) -> int:
        text = os.environ.get(name, str(otherwise))
        if not text.isdigit():
            raise JobError(f"{name}={text} in the environment is not a whole number; unset it or start by a launcher")
        return int(text)

    # A single process may inherit RANK_ID from a cluster's machinery: without MS_ROLE there is nobody to meet.
    world = number("MS_WORKER_NUM", 1) if os.environ.get("MS_ROLE") == "MS_WORKER" else 1
    if world == 1:
        return Job()
    rank = number("RANK_ID", world)
    if rank >= world:
        raise JobError(
            f"RANK_ID={os.environ.get('RANK_ID', '')} in the environment of a job of {world} ranks; give each one of 0 "
            f"to {world - 1} (msrun: --node_rank)"
        )
    local = number("OMPI_COMM_WORLD_LOCAL_SIZE", number("CASCADE_LOCAL_WORKERS", world))
    return Job(rank, world, number("DEVICE_ID", rank), local)


def attempt() -> Path | None:
    """The folder of this attempt's logs, if the launcher named one."""
    folder = os.environ.get("CASCADE_ATTEMPT")
    return Path(folder) if folder else None


def take_cores(mine: Job) -> None:
    """Ranks that share a machine get cores of their own, as each would else start a thread for every core.

    Done before MindSpore is imported, which sizes its pools by what it may use. The bits of a sum depend on the number
    of threads, so that a run repeats its bits only with as many cores a rank.
    """
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // mine.local_world
    if mine.local_world > 1 and each:
        first = mine.local_rank % mine.local_world * each
        os.sched_setaffinity(0, cores[first : first + each])
        os.environ.setdefault("OMP_NUM_THREADS", str(each))


def start_communication() -> Job:
    """Meets the other ranks, if there are any; may be called again. JobError if they do not come."""
    mine = job()
    if mine.world > 1 or is_scheduler():
        from mindspore import communication

        if not communication.GlobalComm.INITED:
            try:
                communication.init("hccl" if on_ascend() else "mccl")
            except RuntimeError as error:
                reason = next((line.strip() for line in str(error).splitlines() if line.strip("- ")), "no reason given")
                raise JobError(
                    f"rank {mine.rank} of {mine.world} could not meet the others at {os.environ.get('MS_SCHED_HOST')}:"
                    f"{os.environ.get('MS_SCHED_PORT')} ({reason}); look at their logs"
                ) from None
    return mine


def on_ascend() -> bool:
    """Whether this machine has an Ascend device (its driver's device file)."""
    return Path("/dev/davinci_manager").exists()


def to_device(array):  # type: ignore[no-untyped-def]
    """A tensor of `array`, which must not change any more; to an Ascend the copy goes on behind (never run there)."""
    import mindspore as ms

    tensor = ms.Tensor.from_numpy(array)
    return tensor.move_to("Ascend", blocking=False) if on_ascend() else tensor


def compile(function):  # type: ignore[no-untyped-def]
    """`function` of tensors, given positionally, as one compiled graph."""
    import mindspore as ms

    return ms.jit(function)


# A job of several processes. What `launch.command` says to the ranks by environment, they read here.

FOREIGN = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_")  # of what may have started us: mpirun would take itself for it
STALE = ("MS_ROLE", "MS_NODE_ID", "MS_SCHED_HOST", "MS_SCHED_PORT", "MS_WORKER_NUM", "RANK_ID", "RANK_SIZE")


def child_environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment for one that is to be a rank or to start ranks, with `more`.

    Without what other launchers have left there, and with this Python's programs first on the path.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN) and name not in STALE}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}"
    return kept | {"PATH": path, "PYTHONUNBUFFERED": "1"} | dict(more)


def environment_of(pid: int) -> list[str]:
    """What process `pid` was started with, as NAME=value; nothing if it is gone or another user's."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def find_program(name: str) -> str | None:
    """Where the PATH has `name`."""
    return shutil.which(name)


def cluster() -> dict[str, Any]:
    """What a cluster's scheduler says of this node, as fields of `LaunchConfig`: nothing if there is none.

    Slurm under `srun --ntasks-per-node=1`, Volcano's job with tasks named `worker`, Open MPI's `mpirun -npernode 1`
    (which does not say where node 0 is).
    """
    got = os.environ
    try:
        if {"SLURM_NODEID", "SLURM_JOB_NUM_NODES", "SLURM_LAUNCH_NODE_IPADDR"} <= got.keys():
            nodes, rank, master = got["SLURM_JOB_NUM_NODES"], got["SLURM_NODEID"], got["SLURM_LAUNCH_NODE_IPADDR"]
        elif {"VC_TASK_INDEX", "VC_WORKER_HOSTS"} <= got.keys():
            hosts = got["VC_WORKER_HOSTS"].split(",")
            nodes, rank, master = str(len(hosts)), got["VC_TASK_INDEX"], hosts[0]
        elif {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"} <= got.keys():
            nodes, rank, master = got["OMPI_COMM_WORLD_SIZE"], got["OMPI_COMM_WORLD_RANK"], ""
        else:
            return {}
        found: dict[str, Any] = {"nodes": int(nodes), "node_rank": int(rank)}
    except ValueError:  # no numbers, so not what it looks like
        return {}
    return found | ({"master": master} if master and int(nodes) > 1 else {})


def attempt() -> Path | None:
    """The folder of logs and heartbeats of the attempt that this process is a rank of, if it is one."""
    return Path(os.environ["CASCADE_ATTEMPT"]) if "CASCADE_ATTEMPT" in os.environ else None


def is_scheduler() -> bool:
    """Whether msrun started this process to be MindSpore's scheduler rather than a rank."""
    return os.environ.get("MS_ROLE") == "MS_SCHED"


def take_place() -> int:
    """Makes this process the rank that its launcher meant it to be, before MindSpore is imported; the rank.

    msrun sets MindSpore's variables; from mpirun's they are made here, and mpirun's taken out, as MindSpore would take
    the rank on this node for the rank. Ranks that share a CPU get cores of their own and as many threads.
    """
    first, workers = int(os.environ.get("CASCADE_FIRST_RANK", 0)), int(os.environ.get("CASCADE_LOCAL_WORKERS", 1))
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        local = int(os.environ["OMPI_COMM_WORLD_LOCAL_RANK"])
        made = {"MS_ROLE": "MS_WORKER", "MS_NODE_ID": first + local, "RANK_ID": first + local, "DEVICE_ID": local,
                "RANK_SIZE": os.environ.get("MS_WORKER_NUM", workers)}  # fmt: skip
        for name in [name for name in os.environ if name.startswith(FOREIGN)]:
            del os.environ[name]
        os.environ.update({name: str(value) for name, value in made.items()})
    rank = int(os.environ.get("RANK_ID", first))
    if workers > 1 and not on_ascend():
        cores = cores_of(rank - first, workers, sorted(os.sched_getaffinity(0)))
        os.sched_setaffinity(0, cores)
        os.environ.setdefault("OMP_NUM_THREADS", str(len(cores)))
    return rank


def cores_of(local_rank: int, workers: int, cores: Sequence[int]) -> Sequence[int]:
    """The share of `cores` of one of `workers` processes: disjoint ones, or one that it has to share."""
    if len(cores) < workers:
        return [cores[local_rank % len(cores)]]
    return cores[local_rank * len(cores) // workers : (local_rank + 1) * len(cores) // workers]
