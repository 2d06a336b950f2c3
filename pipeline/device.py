"""What differs by device: each a function, the plain formula as its other branch. None of it has
run on an Ascend.

MindSpore is imported where it is used, as its environment has to stand first (see runtime.py).
"""

from pathlib import Path


def on_ascend() -> bool:
    """Whether this machine has an Ascend device (its driver's device file)."""
    return Path("/dev/davinci_manager").exists()


def to_device(array):  # type: ignore[no-untyped-def]
    """A tensor of `array`, which must not change any more; to an Ascend the copy goes on behind
    (never run there).
    """
    import mindspore as ms

    tensor = ms.Tensor.from_numpy(array)
    return tensor.move_to("Ascend", blocking=False) if on_ascend() else tensor


def sum_of_squares(vectors, lengths):  # type: ignore[no-untyped-def]
    """Of the first `lengths` numbers of float32 `vectors`, which are followed by zeros, as a float.

    A CPU's tensors are its memory, over which NumPy goes at once, in an order that depends on how
    many numbers there are: the zeros are left out, for their number is the ranks'. An Ascend's stay
    where they are (never run there).
    """
    import mindspore as ms
    import numpy as np

    if on_ascend():
        return float(
            ms.ops.stack([ms.ops.square(vector).sum() for vector in vectors]).sum().asnumpy()
        )
    with np.errstate(over="ignore", invalid="ignore"):
        arrays = (
            vector.asnumpy()[:length] for vector, length in zip(vectors, lengths, strict=True)
        )
        return sum(float(np.vdot(array, array)) for array in arrays)


def precisions() -> tuple[str, ...]:
    """In which the device convolves and multiplies matrices: a CPU has no kernels for bfloat16."""
    return ("float32", "bfloat16", "float16") if on_ascend() else ("float32", "float16")


def processor() -> str:
    """What tells one kind of CPU from another: its name and the instructions it knows."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return " ".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    )
