"""Classifier-free guidance, and thresholding against the saturation that large weights cause.

Guidance extrapolates from the unconditional to the conditional output (Ho & Salimans, arXiv
2207.12598). With a large weight x leaves the range of images. Static thresholding clips it to [-1,
1]. Dynamic thresholding takes s, the quantile of the absolute values of an image but at least 1,
clips to [-s, s] and divides by s, which pulls saturated pixels inwards (Imagen, arXiv 2205.11487,
section 2.3).
"""

from typing import Literal

from mindspore import Tensor, ops
from mindspore import dtype as mstype

from pipeline import kernels

Threshold = Literal["none", "static", "dynamic"]


def guide(conditional: Tensor, unconditional: Tensor, weight: float | Tensor) -> Tensor:
    """unconditional + weight (conditional - unconditional).

    Weight 0 ignores the prompt, 1 is no guidance.
    """
    return unconditional + weight * (conditional - unconditional)


def quantile(values_BN: Tensor, q: float) -> Tensor:
    """The q-quantile of each row, (B, 1), with linear interpolation as `numpy.quantile`.

    The CPU kernel selects; elsewhere the largest values are sorted, which are few as q is near 1.
    """
    num = values_BN.shape[1]
    position = q * (num - 1)
    below = int(position)
    rest = position - below

    kernel = kernels.quantile()
    if kernel is not None:
        return kernel(values_BN, Tensor([below // 4096, below % 4096, rest], mstype.float32))

    # In descending order: the last one has `below` smaller values.
    largest = ops.topk(values_BN, num - below)[0]
    lower = largest[:, -1]
    upper = largest[:, max(num - below - 2, 0)]
    return (lower + rest * (upper - lower)).reshape((-1, 1))


def threshold(x_BCHW: Tensor, kind: Threshold, q: float = 0.995) -> Tensor:
    """x limited to [-1, 1] by thresholding of this kind; `q` is the quantile of the dynamic one."""
    if kind == "none":
        return x_BCHW
    if kind == "static":
        return ops.clamp(x_BCHW, -1.0, 1.0)

    x_BN = x_BCHW.reshape((x_BCHW.shape[0], -1))
    size = ops.maximum(quantile(ops.abs(x_BN), q), 1.0)
    # Broadcast by hand: on a CPU, an operator that broadcasts takes 15 times as long.
    rate = ops.broadcast_to(1.0 / size, x_BN.shape)
    return ops.clamp(x_BN * rate, -1.0, 1.0).reshape(x_BCHW.shape)
