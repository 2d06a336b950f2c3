"""The folder of compiled graphs: what its name depends on, and when it is complete. That a resumed
run loads its graphs is in test_loop.py, as MindSpore takes one folder per process.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.train.compile_cache import (
    GRAPHS_FOLDER,
    CompileCache,
    graph_key,
    source_files,
    toolchain,
)

NewProcess = Callable[..., CompileCache]


@pytest.fixture
def new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NewProcess:
    """(shaped_by, rank) -> the cache of a run in `tmp_path`, as the first one of a process."""

    def make(shaped_by: str = "a", rank: int = 0) -> CompileCache:
        monkeypatch.setattr(CompileCache, "in_use", False)
        return CompileCache(tmp_path, rank, CompileCache(), shaped_by)

    return make


def test_what_shapes_a_graph_is_in_its_key() -> None:
    stage = CompileCache()
    keys = [
        graph_key(stage, "a", ("2.9", "1.9", "CPU")),
        graph_key(stage, "b", ("2.9", "1.9", "CPU")),
        graph_key(stage, "a", ("2.10", "1.9", "CPU")),
        graph_key(Path(), "a", ("2.9", "1.9", "CPU")),
    ]
    assert len(set(keys)) == 4
    assert graph_key(stage, "a", toolchain()) == graph_key(stage, "a", toolchain())


def test_the_sources_of_library_and_stage_are_in_its_key() -> None:
    class Stage(CompileCache):
        """A stage of this package, based on a class of the library."""

    names = [path.name for path in source_files(Stage())]
    assert {"unet.py", "step.py", "test_compile_cache.py", "test_loop.py"} <= set(names)


def test_configurations_and_ranks_have_folders_of_their_own(new_process: NewProcess) -> None:
    first = new_process().target
    assert first == new_process().target
    assert len({first, new_process("b").target, new_process(rank=1).target}) == 3


def test_only_complete_graphs_stay_and_outdated_ones_go(
    new_process: NewProcess, tmp_path: Path
) -> None:
    unfinished = new_process().folder
    assert unfinished is not None
    outdated = tmp_path / GRAPHS_FOLDER / "0123456789abcdef-0"
    of_another_rank = tmp_path / GRAPHS_FOLDER / "0123456789abcdef-1"
    for folder in (unfinished, outdated, of_another_rank):
        (folder / "rank_0").mkdir(parents=True)

    # The process before ended without `commit`.
    cache = new_process()
    assert not cache.warm
    assert list((tmp_path / GRAPHS_FOLDER).iterdir()) == [of_another_rank]

    # MindSpore has stored nothing.
    cache.commit()
    assert not new_process().warm

    cache = new_process()
    assert cache.folder is not None
    cache.folder.mkdir()
    cache.commit()
    assert new_process().warm


def test_only_the_first_training_of_a_process_is_cached(
    new_process: NewProcess, tmp_path: Path
) -> None:
    assert new_process().folder is not None
    assert CompileCache(tmp_path / "other", 0, CompileCache(), "a").folder is None
