"""Compiled graphs stored in the run folder, so that a resumed run does not compile again.

MindSpore can store a process's graphs in a folder and load them in another process. It leaves three
things to the caller:

- It numbers graphs in the order of compilation and does not check what shaped them. Here the
  folder's name is a digest of sources, configuration and versions, and a training compiles in a
  fixed order.
- It finds a graph's parameters by name in the cell that was compiled. Here that is a cell that
  holds exactly these parameters.
- It writes in place. Here a folder is renamed to its final name only when it is complete.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

from mindspore import Parameter, ParameterTuple, Tensor, nn

from pipeline import device, kernels, runtime
from pipeline.files import remove_folder, replace_folder

log = logging.getLogger("cascade")

GRAPHS_FOLDER = "graphs"  # in a run folder


class CompiledFunction(nn.Cell):
    """A function of positional tensors, compiled at its first call, or loaded from a folder.

    Args:
        function: what is compiled.
        parameters: all that the function uses, with distinct names.
        folder: where MindSpore stores and looks for the graph; None: it is not stored.
    """

    def __init__(
        self, function: Callable[..., Any], parameters: Iterable[Parameter], folder: Path | None
    ) -> None:
        super().__init__()
        self.function = function

        # In the cell, where MindSpore looks for the parameters of a graph that it loads.
        self.used_parameters = ParameterTuple(parameters)
        self.folder = folder
        self.graph = runtime.jit(type(self).construct)

    def construct(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)

    def __call__(self, *tensors: Tensor) -> Any:
        if self.folder is None:
            return self.graph(self, *tensors)

        # The first call compiles; only this call may see the folder.
        folder = self.folder
        self.folder = None
        with runtime.graph_cache(folder):
            return self.graph(self, *tensors)


class CompileCache:
    """Compiles the functions of one training, and stores their graphs in its run folder.

    MindSpore takes one folder a process, so only the first training of a process is cached. Until
    `commit`, graphs that are not there yet are stored in a temporary folder.

    Args:
        run: the run folder; without one nothing is stored.
        rank: of this process.
        stage: what is trained; its sources are part of the key.
        shaped_by: what else the graphs depend on, as text.
    """

    # Whether a training of this process has the cache already.
    in_use: ClassVar[bool] = False

    def __init__(
        self, run: Path | None = None, rank: int = 0, stage: object = None, shaped_by: str = ""
    ) -> None:
        self.folder: Path | None = None  # that MindSpore uses
        self.target: Path | None = None  # that `commit` renames it to
        if run is None or CompileCache.in_use:
            return
        CompileCache.in_use = True

        # Graphs of another configuration or version are of no use to this run any more.
        target = run / GRAPHS_FOLDER / f"{graph_key(stage, shaped_by, toolchain())}-{rank}"
        for other in target.parent.glob(f"*-{rank}"):
            if other != target:
                remove_folder(other)

        if target.exists():
            self.folder = target
        else:
            self.folder = target.with_name(f".new-{target.name}")
            self.target = target
            # What an attempt left that was stopped before `commit`.
            remove_folder(self.folder)

    @property
    def warm(self) -> bool:
        """Whether an earlier process has left the graphs."""
        return self.folder is not None and self.target is None

    def compile(
        self, function: Callable[..., Any], parameters: Iterable[Parameter]
    ) -> CompiledFunction:
        """`function` of positional tensors, which uses `parameters`, as a compiled function."""
        return CompiledFunction(function, parameters, self.folder)

    def commit(self) -> None:
        """Makes the new graphs permanent. To be called once every compiled function has run."""
        target = self.target
        self.target = None
        if target is None or self.folder is None or not self.folder.exists():
            return

        try:
            replace_folder(self.folder, target)
        except OSError as error:
            # The next start has to compile again, which is no reason to end this training.
            log.warning("%s: compiled graphs cannot be stored: %s", target, error.strerror)


def graph_key(stage: object, shaped_by: str, tools: Sequence[str]) -> str:
    """A hexadecimal digest of all that shapes the graphs of a training."""
    digest = blake2b(shaped_by.encode(), digest_size=8)
    for path in source_files(stage):
        digest.update(path.read_bytes())

    for tool in tools:
        digest.update(tool.encode())
    return digest.hexdigest()


def source_files(stage: object) -> list[Path]:
    """The sources of the library, of the package of the stage's class, and of its base classes."""
    modules = (sys.modules.get(cls.__module__) for cls in type(stage).__mro__)
    files = (str(getattr(module, "__file__", "")) for module in modules)
    own, *bases = (Path(file) for file in files if file.endswith(".py"))

    # All of it, as any module may shape a graph.
    library = sorted(Path(runtime.__file__).parent.rglob("*.py"))
    # Beside a module without a package lie files that are not its own.
    in_package = "." in type(stage).__module__
    package = sorted(own.parent.rglob("*.py")) if in_package else [own]
    return [*library, *package, *bases]


def toolchain() -> tuple[str, ...]:
    """The versions of what compiles, and the kind of device or the library of CPU kernels."""
    library = kernels.library()
    # The name of the kernels is a digest of their sources, the compiler's flags and the processor.
    target = library.name if library else "CPU"
    if device.on_ascend():
        target = "Ascend"
    return version("mindspore"), version("mindformers"), target
