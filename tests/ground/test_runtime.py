"""Ranks from the launchers' environment variables, cores, and host names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import JobError
from pipeline.runtime import (
    COLLECTIVE_TIMEOUT,
    RankInfo,
    attempt_dir,
    pin_cores,
    prepare_environment,
    rank_info,
    resolve_host,
)

MSRUN = {"MS_ROLE": "MS_WORKER", "MS_WORKER_NUM": "4", "RANK_ID": "3", "DEVICE_ID": "1"}
MPIRUN = {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}


@pytest.fixture(autouse=True)
def without_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without a launcher's variables, restored afterwards; no core is pinned."""
    monkeypatch.setattr(
        os, "environ", {k: v for k, v in os.environ.items() if not k.startswith(("MS_", "OMPI_"))}
    )
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: None)


def test_a_single_process_is_rank_0_of_1() -> None:
    assert rank_info() == RankInfo(rank=0, world_size=1, local_rank=0, local_world_size=1)
    os.environ |= {"RANK_ID": "5", "DEVICE_ID": "5"}  # left there by a cluster's machinery
    assert rank_info() == RankInfo()
    os.environ |= {**MSRUN, "MS_WORKER_NUM": "1", "RANK_ID": "0"}
    assert rank_info() == RankInfo()


def test_ranks_of_msrun() -> None:
    os.environ |= MSRUN
    assert rank_info() == RankInfo(rank=3, world_size=4, local_rank=1, local_world_size=4)
    os.environ["CASCADE_LOCAL_WORKERS"] = "2"
    assert rank_info() == RankInfo(rank=3, world_size=4, local_rank=1, local_world_size=2)


def test_ranks_of_mpirun() -> None:
    os.environ |= {f"OMPI_COMM_WORLD_{name}": value for name, value in MPIRUN.items()}
    prepare_environment()
    assert rank_info() == RankInfo(rank=3, world_size=4, local_rank=1, local_world_size=2)
    assert {name: os.environ[name] for name in MSRUN} == MSRUN
    assert os.environ["MS_NODE_ID"] == "3"


def test_ranks_of_an_mpirun_per_node() -> None:
    """The node's first rank and the number of all ranks are set beside Open MPI's variables."""
    open_mpi = {"RANK": "1", "LOCAL_RANK": "1", "SIZE": "2", "LOCAL_SIZE": "2"}
    os.environ |= {f"OMPI_COMM_WORLD_{name}": value for name, value in open_mpi.items()}
    os.environ |= {
        "CASCADE_FIRST_RANK": "2",
        "CASCADE_LOCAL_WORKERS": "2",
        "MS_WORKER_NUM": "4",
        "DEVICE_ID": "7",
    }
    prepare_environment()
    assert rank_info() == RankInfo(rank=3, world_size=4, local_rank=1, local_world_size=2)
    assert os.environ["MS_NODE_ID"] == "3"

    # MindSpore would take the rank within the node for the rank.
    assert not [name for name in os.environ if name.startswith("OMPI_")]


def test_an_mpirun_of_one_process_is_rank_0_of_1() -> None:
    os.environ |= {
        f"OMPI_COMM_WORLD_{name}": value
        for name, value in {**MPIRUN, "SIZE": "1", "RANK": "0"}.items()
    }
    prepare_environment()
    assert rank_info() == RankInfo()
    assert "MS_ROLE" not in os.environ


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"RANK_ID": "4"},
            "RANK_ID=4 in the environment of a job of 4 ranks; give each one of 0 to 3",
        ),
        ({"MS_WORKER_NUM": "two"}, "MS_WORKER_NUM=two in the environment is not a whole number"),
    ],
)
def test_invalid_ranks(change: dict[str, str], message: str) -> None:
    os.environ |= {**MSRUN, **change}
    with pytest.raises(JobError) as error:
        rank_info()
    assert str(error.value).startswith(message)
    prepare_environment()  # does not raise


def test_the_users_timeout_takes_precedence() -> None:
    prepare_environment()
    assert os.environ["MS_NODE_TIMEOUT"] == str(COLLECTIVE_TIMEOUT)
    os.environ["MS_NODE_TIMEOUT"] = "60"
    prepare_environment()
    assert os.environ["MS_NODE_TIMEOUT"] == "60"


@pytest.mark.parametrize(
    ("num", "world", "expected"),
    [
        (8, 2, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (5, 2, [[0, 1], [2, 3]]),
        (2, 3, [None] * 3),
        (4, 1, [None]),
    ],
)
def test_ranks_on_one_machine_have_separate_cores(
    monkeypatch: pytest.MonkeyPatch, num: int, world: int, expected: list[list[int] | None]
) -> None:
    pinned: list[list[int] | None] = [None] * world
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num)))
    for rank in range(world):
        monkeypatch.setattr(
            os,
            "sched_setaffinity",
            lambda pid, cores, rank=rank: pinned.__setitem__(rank, list(cores)),
        )
        pin_cores(RankInfo(rank, world, local_rank=rank, local_world_size=world))
    assert pinned == expected


def test_the_launcher_sets_the_folder_of_the_attempt() -> None:
    assert attempt_dir() is None
    os.environ["CASCADE_ATTEMPT"] = "runs/x/logs/attempt-0"
    assert attempt_dir() == Path("runs/x/logs/attempt-0")


def test_a_host_name_is_resolved() -> None:
    assert [resolve_host(host) for host in ("10.0.0.1", "fd00::1", "localhost")] == [
        "10.0.0.1",
        "fd00::1",
        "127.0.0.1",
    ]
    with pytest.raises(JobError) as error:
        resolve_host("no-such-host.invalid")
    assert str(error.value).startswith("MS_SCHED_HOST=no-such-host.invalid: no such host (")


def test_a_graph_compiles_where_python_runs_no_file(tmp_path: Path) -> None:
    """As in a notebook: MindSpore's cache of graphs would look for the program."""
    code = (
        "import sys; from pathlib import Path; from pipeline import runtime\n"
        "from mindspore import Tensor\n"
        "from mindspore.ops import square\n"
        "with runtime.graph_cache(Path(sys.argv[1])):\n"
        "    print(runtime.jit(square)(Tensor(3.0)))\n"
    )
    argv = [sys.executable, "-c", code, str(tmp_path)]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert (result.stdout, result.returncode) == ("9.0\n", 0), result.stderr
