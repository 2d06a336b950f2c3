"""Convolution, normalization, softmax and quantiles for CPUs, in C++: half the time, less memory
than MindSpore's own.

`g++` builds them when the first network is made, for this processor, into the user's cache. Where
that cannot be, or on another device, `convolution` and the others answer None, and who asked does
the same in MindSpore's operators. All tensors are float32.
"""

import atexit
import ctypes
import logging
import shutil
import subprocess
from contextlib import suppress
from functools import cache
from hashlib import blake2b
from pathlib import Path
from tempfile import mkdtemp

import mindspore
from mindspore import Tensor, ops

from pipeline import device, runtime
from pipeline.files import atomic_replace

log = logging.getLogger("cascade")

EPSILON = 1e-5  # added to the variance of a group
ONEDNN = (3, 10)  # whose interface the sources declare
FLAGS = (
    *(
        "-std=c++17",
        "-O3",
        "-march=native",
        "-fopenmp-simd",
        "-fno-math-errno",
        "-fno-trapping-math",
    ),
    *("-shared", "-fPIC", "-pthread", "-Wl,--no-undefined", f"-DEPSILON={EPSILON}"),
)


@cache
def library() -> Path | None:
    """The compiled kernels; None where they cannot be had, which is said once."""
    if device.on_ascend():
        return None
    here, onednn = Path(__file__).parent, Path(mindspore.__file__).parent / "lib" / "libdnnl.so.3"
    sources = sorted(here.glob("*.cc"))
    made_of = [path.read_bytes() for path in (*sources, *sorted(here.glob("*.h")))]
    made_of += map(str.encode, (*FLAGS, str(onednn), mindspore.__version__, device.cpu_model()))
    name = f"kernels-{blake2b(b' '.join(made_of), digest_size=8).hexdigest()}.so"
    inputs = [*map(str, sources), str(onednn), f"-Wl,-rpath,{onednn.parent}"]
    try:
        check_version(onednn)
        try:
            return built(runtime.cache_folder() / name, inputs)
        except (OSError, RuntimeError):  # a home that is not there, or cannot be written?
            own = mkdtemp(prefix="imagen-cascade-")
            atexit.register(shutil.rmtree, own, ignore_errors=True)
            return built(Path(own, name), inputs)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        log.warning(
            "kernels not built (%s): networks take twice their time, and many times it on a CPU with AVX-512 unless "
            "ONEDNN_MAX_CPU_ISA=AVX2 is set%s",
            next((line for line in said if "error" in line), said[-1]),
            "; install g++" if isinstance(error, FileNotFoundError) else "",
        )
        return None


def check_version(onednn: Path) -> None:
    """OSError unless this is the oneDNN whose interface the sources declare."""
    version = ctypes.CDLL(str(onednn)).dnnl_version
    version.restype = ctypes.POINTER(ctypes.c_int * 2)
    if (found := tuple(version().contents)) != ONEDNN:
        raise OSError(
            f"{onednn} is oneDNN {'.'.join(map(str, found))}, not {'.'.join(map(str, ONEDNN))}"
        )


def built(path: Path, inputs: list[str]) -> Path:
    """`path`, compiled from `inputs` if it is not there or is no library, and loaded."""
    if path.exists():
        with suppress(OSError):
            ctypes.CDLL(str(path))
            return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_replace(path) as side:  # ranks may build at once: each its own, any may stay
        argv = ["g++", *FLAGS, *inputs, "-o", str(side)]
        subprocess.run(argv, check=True, capture_output=True, text=True, timeout=300)
    ctypes.CDLL(str(path))
    return path


@cache
def convolution(stride: int) -> ops.Custom | None:
    """(x_BCHW, weight, bias) -> the convolution that keeps the picture's size, divided by `stride`
    and rounded up.

    ValueError for a stride but 1 and 2: the kernel tells it by the sizes.
    """
    if stride not in (1, 2):
        raise ValueError(f"stride {stride}: 1 and 2 are known")
    if library() is None:
        return None
    towards_x = ops.Custom(
        f"{library()}:convolve_input", lambda dy, x, w: x, lambda dy, x, w: dy, "aot"
    )
    towards_weight = ops.Custom(
        f"{library()}:convolve_weight",
        lambda dy, x, w: (w, (w[0],)),
        lambda dy, x, w: (dy, dy),
        "aot",
    )

    def shape(x: tuple[int, ...], w: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
        return (x[0], w[0], -(-x[2] // stride), -(-x[3] // stride))

    def bprop(x: Tensor, w: Tensor, b: Tensor, y: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        dw, db = towards_weight(dy, x, w)
        return towards_x(dy, x, w), dw, db

    operator = ops.Custom(f"{library()}:convolve", shape, lambda x, w, b: x, "aot", bprop=bprop)
    return operator.add_prim_attr(
        "stride", stride
    )  # operators alike in attributes are one to MindSpore


@cache
def normalization(silu: bool) -> ops.Custom | None:
    """(x_BCHW, a_BGc, b_BGc) -> a z + b, or SiLU of that, where z is x normalized in each of G
    groups of c channels.
    """
    if library() is None:
        return None
    name = "normalize_silu" if silu else "normalize"
    gradient = ops.Custom(
        f"{library()}:{name}_gradient",
        lambda dy, x, a, b: (x, a, b),
        lambda dy, x, a, b: (x, a, b),
        "aot",
    )

    def bprop(x: Tensor, a: Tensor, b: Tensor, y: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        return gradient(dy, x, a, b)

    return ops.Custom(
        f"{library()}:{name}", lambda x, a, b: x, lambda x, a, b: x, "aot", bprop=bprop
    )


@cache
def softmax() -> ops.Custom | None:
    """(x_BKNM, b_BM) -> softmax(x + b) over M. No gradient goes to b."""
    if library() is None:
        return None
    gradient = ops.Custom(f"{library()}:softmax_gradient", lambda dy, y: y, lambda dy, y: y, "aot")

    def bprop(x: Tensor, b: Tensor, y: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        return gradient(dy, y), ops.zeros_like(b)

    return ops.Custom(f"{library()}:softmax", lambda x, b: x, lambda x, b: x, "aot", bprop=bprop)


@cache
def quantile() -> ops.Custom | None:
    """(x_BN, at_3) -> (B, 1): of each row the number at place 4096 at[0] + at[1] + at[2] in order,
    between neighbours: float32 counts to 2^24 alone. It has no gradient.
    """
    if library() is None:
        return None
    return ops.Custom(f"{library()}:quantile", lambda x, at: (x[0], 1), lambda x, at: x, "aot")
