"""What differs by device: one function each, with the plain formula as its other branch.

The Ascend branches are compiled by tests but have not been run on an Ascend. MindSpore and NumPy
are imported inside the functions: MindSpore's environment has to be set first (see runtime.py), and
this module is imported before a command line is parsed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def on_ascend() -> bool:
    """Whether this machine has an Ascend device (its driver's device file)."""
    return Path("/dev/davinci_manager").exists()


def to_device(array: "np.ndarray") -> Any:
    """A tensor of `array`, which must not be modified afterwards.

    On Ascend the copy to the device is asynchronous (not run there yet).
    """
    import mindspore as ms

    # On CPU the tensor shares the array's memory.
    tensor = ms.Tensor.from_numpy(array)

    return tensor.move_to("Ascend", blocking=False) if on_ascend() else tensor


def sum_of_squares(vectors: Sequence[Any], lengths: Sequence[int]) -> float:
    """The sum of squares over the first `lengths[i]` elements of each float32 tensor `vectors[i]`.

    The elements after them are zero padding, whose length depends on the number of ranks. NumPy's
    order of summation depends on the number of elements, so on CPU the padding is left out, and the
    result has the same bits with any number of ranks. On Ascend the sum runs on the device (not run
    there yet).
    """
    import mindspore as ms
    import numpy as np

    if on_ascend():
        squares = [ms.ops.square(vector).sum() for vector in vectors]
        return float(ms.ops.stack(squares).sum().asnumpy())

    # Gradients that overflow give inf or NaN here, which the caller handles.
    with np.errstate(over="ignore", invalid="ignore"):
        arrays = (
            vector.asnumpy()[:length] for vector, length in zip(vectors, lengths, strict=True)
        )
        return sum(float(np.vdot(array, array)) for array in arrays)


def supported_precisions() -> tuple[str, ...]:
    """Data types in which the device has convolutions and matrix products.

    MindSpore has no bfloat16 kernels for CPU.
    """
    return ("float32", "bfloat16", "float16") if on_ascend() else ("float32", "float16")


def cpu_model() -> str:
    """The CPU's model name and instruction sets, which identify what native code runs on it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = ("model name", "flags", "Features")

    # A set, as each core repeats the same lines.
    return " ".join(sorted({line for line in lines if line.startswith(fields)}))
