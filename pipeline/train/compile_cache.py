"""Compiled graphs that stay with a run, so that who goes on in it does not compile again.

MindSpore can store a process's graphs in a folder and load them in another process, and leaves
three things to its caller. It numbers them in the order of compilation and does not look at what
shaped them: here the folder's name is a digest of all that does, sources, configuration, versions,
and a training compiles in one order. It finds a graph's parameters by their names in the cell that
was compiled: here a cell that holds just these. It writes in place: here the folder is whole or not
there.
"""

import logging
import sys
from collections.abc import Callable, Iterable
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mindspore import Parameter, ParameterTuple, Tensor, nn

from pipeline import device, kernels, runtime
from pipeline.files import remove_folder, replace_folder

log = logging.getLogger("cascade")

KEPT = "graphs"  # in a run folder


class Graph(nn.Cell):
    """`function` of tensors, given positionally, compiled at its first call with what `folder` has
    for it, if any.

    `parameters` are all that the function uses, each under a name of its own.
    """

    def __init__(
        self, function: Callable[..., Any], parameters: Iterable[Parameter], folder: Path | None
    ) -> None:
        super().__init__()
        self.function, self.held, self.folder = function, ParameterTuple(parameters), folder
        self.graph = runtime.jit(type(self).construct)

    def construct(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)

    def __call__(self, *tensors: Tensor) -> Any:
        if self.folder is None:
            return self.graph(self, *tensors)
        folder, self.folder = self.folder, None
        with runtime.graph_cache(folder):
            return self.graph(self, *tensors)


class CompileCache:
    """Compiles a training's functions. MindSpore takes one folder a process, so that the first
    training's stay.

    Args:
        run: its folder; without one nothing is kept.
        rank: which of its ranks this is.
        stage: what is trained; its sources and those beside it count.
        shaped_by: what else the graphs depend on, as text.
    """

    taken = False  # by this process's first

    def __init__(
        self, run: Path | None = None, rank: int = 0, stage: object = None, shaped_by: str = ""
    ) -> None:
        self.folder: Path | None = None
        self.target: Path | None = None
        if run is None or CompileCache.taken:
            return
        CompileCache.taken = True
        digest = blake2b(shaped_by.encode(), digest_size=8)
        modules = (sys.modules.get(cls.__module__) for cls in type(stage).__mro__)
        files = (str(getattr(module, "__file__", "")) for module in modules)
        mine, *others = (Path(file) for file in files if file.endswith(".py"))
        beside = (
            mine.parent.rglob("*.py") if "." in type(stage).__module__ else [mine]
        )  # one without a package
        for path in (
            *sorted(Path(runtime.__file__).parent.rglob("*.py")),
            *sorted(beside),
            *others,
        ):
            digest.update(path.read_bytes())
        library = kernels.library()
        kind = "Ascend" if device.on_ascend() else library.name if library else "CPU"
        for known in (version("mindspore"), version("mindformers"), kind):
            digest.update(known.encode())
        target = run / KEPT / f"{digest.hexdigest()}-{rank}"
        for other in (run / KEPT).glob(f"*-{rank}"):
            if other != target:
                remove_folder(other)
        self.folder = target
        if not target.exists():
            self.folder, self.target = target.with_name(f".new-{target.name}"), target
            remove_folder(self.folder)

    @property
    def warm(self) -> bool:
        """Whether they are there from before."""
        return self.folder is not None and self.target is None

    def compile(self, function: Callable[..., Any], parameters: Iterable[Parameter]) -> Graph:
        return Graph(function, parameters, self.folder)

    def keep(self) -> None:
        """Lets those that were compiled stay; once all have been called."""
        target, self.target = self.target, None
        if target and self.folder and self.folder.exists():
            try:
                replace_folder(self.folder, target)
            except OSError as error:
                log.warning("%s: the compiled graphs are not kept: %s", target, error.strerror)
