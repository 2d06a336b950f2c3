"""Dropout whose mask is a function of the sample's seed.

A framework's dropout draws from a generator whose state no checkpoint holds. Here the mask depends
neither on the rank, nor on the batch, nor on how often a run was resumed.

Shapes: B images, C channels, H x W pixels.
"""

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

# 2^32 over the golden ratio, as int32: gives neighbouring indices distant bits.
GOLDEN = 0x9E3779B9 - 2**32


class Dropout(nn.Cell):
    """Sets each activation to zero with probability `rate` and divides the others by 1 - rate
    (Srivastava et al., JMLR 2014).

    The mask is a hash of the image's seed, the layer's index, the channel and the position, by the
    finalizer of MurmurHash3.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.layer_index = 0  # the network sets it: see UNet

    def construct(self, x_BCHW: Tensor, seeds_B: Tensor) -> Tensor:
        B, C, H, W = x_BCHW.shape
        bits = mix_bits(seeds_B + self.layer_index)

        # The channels of an image first, then the positions of a channel.
        for rows, count in ((B, C), (B * C, H * W)):
            shape = (rows, count)
            indices = ops.arange(count).astype(mstype.int32) * GOLDEN
            bits = ops.broadcast_to(bits.reshape((rows, 1)), shape) + ops.broadcast_to(
                indices.reshape((1, -1)), shape
            )
            bits = mix_bits(bits)

        # 31 bits, as the highest one is the sign of int32.
        threshold = int(self.rate * 2**31)
        keep_mask = (lowest_bits(bits, 31) >= threshold).astype(x_BCHW.dtype).reshape(x_BCHW.shape)
        return x_BCHW * (keep_mask * (1.0 / (1.0 - self.rate)))


def mix_bits(bits: Tensor) -> Tensor:
    """int32 -> int32 of which each bit depends on all of the input's: MurmurHash3's finalizer
    (Appleby).
    """
    for shift, factor in ((16, 0x85EBCA6B - 2**32), (13, 0xC2B2AE35 - 2**32)):
        bits = bits.bitwise_xor(shift_right(bits, shift)) * factor
    return bits.bitwise_xor(shift_right(bits, 16))


def shift_right(bits: Tensor, shift: int) -> Tensor:
    """int32 shifted to the right, with zeros from the left (a logical shift)."""
    # The shift repeats the sign bit; the mask removes the copies.
    return lowest_bits(ops.bitwise_right_shift(bits, shift), 32 - shift)


def lowest_bits(bits: Tensor, num: int) -> Tensor:
    """The lowest `num` bits of int32."""
    # The mask is a tensor, as a CPU has no kernel for a Python number here.
    return ops.bitwise_and(bits, Tensor(2**num - 1, mstype.int32))
