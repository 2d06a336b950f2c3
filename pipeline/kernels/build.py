"""Compiles the C++ kernels with `g++` for this processor, once, into the user's cache."""

import atexit
import ctypes
import logging
import shutil
import subprocess
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from tempfile import mkdtemp

import mindspore

from pipeline import device, runtime
from pipeline.files import atomic_replace

log = logging.getLogger("cascade")

EPSILON = 1e-5  # added to the variance of a group in normalization
ONEDNN_VERSION = (3, 10)  # the version whose interface the sources declare
COMPILE_SECONDS = 300  # time limit of the compiler
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-shared",
    "-fPIC",
    "-pthread",
    "-Wl,--no-undefined",
    f"-DEPSILON={EPSILON}",
)


def onednn_library() -> Path:
    """The oneDNN that MindSpore brings."""
    return Path(mindspore.__file__).parent / "lib" / "libdnnl.so.3"


def build_library(onednn: Path, version: tuple[int, int] = ONEDNN_VERSION) -> Path | None:
    """The shared library of kernels, linked with `onednn`, which has to be of this version.

    Where it cannot be built, a warning says why and the result is None.
    """
    sources = sorted(Path(__file__).parent.glob("*.cc"))
    # The digest is of sources and processor too, so a library for others is never loaded.
    name = f"kernels-{digest(sources, onednn)}.so"
    # rpath: MindSpore's oneDNN is not on the loader's path.
    inputs = [*map(str, sources), str(onednn), f"-Wl,-rpath,{onednn.parent}"]

    try:
        check_version(onednn, version)
        try:
            return compile_once(runtime.cache_folder() / name, inputs)
        except (OSError, RuntimeError):
            # No home folder, or one that cannot be written: a folder for this process alone.
            temporary = mkdtemp(prefix="imagen-cascade-")
            atexit.register(shutil.rmtree, temporary, ignore_errors=True)
            return compile_once(Path(temporary, name), inputs)
    except (OSError, subprocess.SubprocessError) as error:
        warn(error)
        return None


def digest(sources: list[Path], onednn: Path) -> str:
    """A hash of all that the library depends on."""
    headers = sorted(Path(__file__).parent.glob("*.h"))
    parts = [path.read_bytes() for path in (*sources, *headers)]
    parts += map(str.encode, (*FLAGS, str(onednn), mindspore.__version__, device.cpu_model()))
    return blake2b(b" ".join(parts), digest_size=8).hexdigest()


def check_version(onednn: Path, version: tuple[int, int]) -> None:
    """OSError unless `onednn` is of this version, whose interface the sources declare."""
    function = ctypes.CDLL(str(onednn)).dnnl_version
    function.restype = ctypes.POINTER(ctypes.c_int * 2)
    actual = tuple(function().contents)
    if actual != version:
        raise OSError(
            f"{onednn} is oneDNN {'.'.join(map(str, actual))}, not {'.'.join(map(str, version))}"
        )


def compile_once(path: Path, inputs: list[str]) -> Path:
    """`path`, loaded; compiled from `inputs` first if it is missing or is not a library."""
    if path.exists():
        # One that is damaged does not load, and is compiled again.
        with suppress(OSError):
            ctypes.CDLL(str(path))
            return path

    path.parent.mkdir(parents=True, exist_ok=True)
    # Ranks may compile at the same time, each a file of its own; whichever stays will do.
    with atomic_replace(path) as temporary:
        argv = ["g++", *FLAGS, *inputs, "-o", str(temporary)]
        subprocess.run(argv, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    # Fails here if it cannot be loaded, rather than in a compiled graph.
    ctypes.CDLL(str(path))
    return path


def warn(error: OSError | subprocess.SubprocessError) -> None:
    """Logs why there are no kernels, by the compiler's first error if it has one."""
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
    reason = next((line for line in lines if "error" in line), lines[-1])
    log.warning(
        "kernels not built (%s): networks take twice their time, and many times it on a CPU with "
        "AVX-512 unless ONEDNN_MAX_CPU_ISA=AVX2 is set%s",
        reason,
        "; install g++" if isinstance(error, FileNotFoundError) else "",
    )
