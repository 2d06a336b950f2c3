"""Classifier-free guidance, and the thresholding that keeps large weights from burning the picture.

Guidance extrapolates from the unconditional to the conditional answer (Ho & Salimans, arXiv
2207.12598). With a large weight x leaves the range of images; static thresholding cuts it at 1,
dynamic thresholding finds the size s below which a share of an image's values lie, cuts there and
divides by s, so that saturated pixels are pulled inwards (Imagen, arXiv 2205.11487, section 2.3).
"""

from typing import Literal

from mindspore import Tensor, ops
from mindspore import dtype as mstype

from pipeline import kernels

Threshold = Literal["none", "static", "dynamic"]


def guide(conditional: Tensor, unconditional: Tensor, weight: float | Tensor) -> Tensor:
    """unconditional + weight (conditional - unconditional): 0 ignores the text, 1 is no guidance."""
    return unconditional + weight * (conditional - unconditional)


def quantile(values_BN: Tensor, q: float) -> Tensor:
    """The q-quantile of each row (B, 1), between its two neighbours in order, as `numpy.quantile`
    has it.

    A CPU's kernel selects; elsewhere the largest values are sorted, few as q is close to 1.
    """
    num = values_BN.shape[1]
    place = q * (num - 1)
    below = int(place)
    kernel = kernels.quantile()
    if kernel is not None:
        return kernel(
            values_BN, Tensor([below // 4096, below % 4096, place - below], mstype.float32)
        )
    largest = ops.topk(values_BN, num - below)[
        0
    ]  # descending, so the last one is number `below` of the row
    upper = largest[:, max(num - below - 2, 0)]
    return (largest[:, -1] + (place - below) * (upper - largest[:, -1])).reshape((-1, 1))


def threshold(x_BCHW: Tensor, kind: Threshold, q: float = 0.995) -> Tensor:
    """x held to [-1, 1] by `kind`; `q` is the share of values that dynamic thresholding leaves
    unsaturated.
    """
    if kind == "none":
        return x_BCHW
    if kind == "static":
        return ops.clamp(x_BCHW, -1.0, 1.0)
    x_BN = x_BCHW.reshape((x_BCHW.shape[0], -1))
    size = ops.maximum(quantile(ops.abs(x_BN), q), 1.0)
    rate = ops.broadcast_to(
        1.0 / size, x_BN.shape
    )  # by hand: a CPU's operators are 15 times slower when they spread
    return ops.clamp(x_BN * rate, -1.0, 1.0).reshape(x_BCHW.shape)
