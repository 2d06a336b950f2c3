"""Dropout that belongs to the sample: a framework's draws from a state that no checkpoint holds.

Shapes: see blocks.py.
"""

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

GOLDEN = 0x9E3779B9 - 2**32  # 2^32 over the golden ratio: spreads neighbours


class Dropout(nn.Cell):
    """Sets a share `rate` of the numbers to zero and divides the others by 1 - rate (Srivastava et
    al., JMLR 2014).

    Which ones is a function of the image's seed, the layer's `number` and the place, by the
    finalizer of MurmurHash3: it depends neither on the rank, nor on the batch, nor on how often a
    run was continued.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.number = rate, 0  # the network numbers its layers

    def construct(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        B, C, H, W = x_BCHW.shape
        bits = mix_bits(seeds_B + self.number)
        for rows, count in (
            (B, C),
            (B * C, H * W),
        ):  # channels of an image, then places of a channel
            numbers = ops.arange(count).astype(mstype.int32) * GOLDEN
            shape = (rows, count)
            bits = ops.broadcast_to(bits.reshape((rows, 1)), shape) + ops.broadcast_to(
                numbers.reshape((1, -1)), shape
            )
            bits = mix_bits(bits)
        mask = (
            (lowest(bits, 31) >= int(self.rate * 2**31)).astype(x_BCHW.dtype).reshape(x_BCHW.shape)
        )
        return x_BCHW * (mask * (1.0 / (1.0 - self.rate)))


def mix_bits(bits: Tensor) -> Tensor:
    """Of int32, each bit of the answer depending on all: the finalizer of MurmurHash3 (Appleby)."""
    for shift, factor in ((16, 0x85EBCA6B - 2**32), (13, 0xC2B2AE35 - 2**32)):
        bits = bits.bitwise_xor(shifted(bits, shift)) * factor
    return bits.bitwise_xor(shifted(bits, 16))


def shifted(bits: Tensor, shift: int) -> Tensor:
    """int32 to the right, zeros from the left."""
    return lowest(ops.bitwise_right_shift(bits, shift), 32 - shift)


def lowest(bits: Tensor, num: int) -> Tensor:
    """The lowest `num` bits of int32. (The mask is a tensor: a CPU has no kernel for a number
    there.)
    """
    return ops.bitwise_and(bits, Tensor(2**num - 1, mstype.int32))
