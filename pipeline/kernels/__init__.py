"""Convolution, normalization, softmax and quantiles in C++ for CPUs.

They take half the time of MindSpore's own and less memory. `build.py` compiles them when the first
network is made. Where that is not possible, and on other devices, `convolution` and the other
functions return None, and the caller computes the same in MindSpore's operators.

All tensors are float32. Shapes: B images, C channels, H x W pixels, G groups of c channels, K
heads, N queries, M keys.
"""

from functools import cache
from pathlib import Path

from mindspore import Tensor, ops

from pipeline import device
from pipeline.kernels.build import EPSILON, build_library, onednn_library

__all__ = ["EPSILON", "convolution", "library", "normalization", "quantile", "softmax"]


@cache
def library() -> Path | None:
    """The compiled kernels; None on other devices and where they cannot be built."""
    if device.on_ascend():
        return None
    return build_library(onednn_library())


@cache
def convolution(stride: int) -> ops.Custom | None:
    """(x_BCHW, weight, bias) -> the convolution that keeps the image's size, divided by `stride`
    and rounded up.

    ValueError for a stride other than 1 and 2: the kernel infers it from the sizes.
    """
    if stride not in (1, 2):
        raise ValueError(f"stride: {stride} is not supported; use 1 or 2")
    if library() is None:
        return None

    # `Custom` takes functions that infer shape and type of the outputs from those of the inputs.
    input_gradient = ops.Custom(
        f"{library()}:convolve_input", lambda dy, x, w: x, lambda dy, x, w: dy, "aot"
    )
    weight_gradient = ops.Custom(
        f"{library()}:convolve_weight",
        lambda dy, x, w: (w, (w[0],)),
        lambda dy, x, w: (dy, dy),
        "aot",
    )

    def shape(x: tuple[int, ...], w: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
        return (x[0], w[0], -(-x[2] // stride), -(-x[3] // stride))

    def bprop(x: Tensor, w: Tensor, b: Tensor, y: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        dw, db = weight_gradient(dy, x, w)
        return input_gradient(dy, x, w), dw, db

    operator = ops.Custom(f"{library()}:convolve", shape, lambda x, w, b: x, "aot", bprop=bprop)
    # MindSpore merges operators whose attributes are equal, so the stride has to be one.
    return operator.add_prim_attr("stride", stride)


@cache
def normalization(silu: bool) -> ops.Custom | None:
    """(x_BCHW, a_BGc, b_BGc) -> a z + b, or SiLU of that, where z is x normalized in each group."""
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
    """(x_BKNM, b_BM) -> softmax(x + b) over M. b has no gradient."""
    if library() is None:
        return None

    gradient = ops.Custom(f"{library()}:softmax_gradient", lambda dy, y: y, lambda dy, y: y, "aot")

    def bprop(x: Tensor, b: Tensor, y: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        # MindSpore expects a gradient for each input.
        return gradient(dy, y), ops.zeros_like(b)

    return ops.Custom(f"{library()}:softmax", lambda x, b: x, lambda x, b: x, "aot", bprop=bprop)


@cache
def quantile() -> ops.Custom | None:
    """(x_BN, position_3) -> (B, 1): of each row the value at a position in ascending order, with
    linear interpolation. It has no gradient.

    The position is 4096 p[0] + p[1] + p[2], as float32 holds whole numbers up to 2^24 only.
    """
    if library() is None:
        return None

    return ops.Custom(f"{library()}:quantile", lambda x, at: (x[0], 1), lambda x, at: x, "aot")
