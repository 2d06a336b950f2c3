"""Layers below the blocks: convolutions, normalization and changes of resolution.

On a CPU the project's own kernels compute convolutions and normalizations where they can be built
(see `pipeline.kernels`); elsewhere the same formula runs in MindSpore's operators.

Shapes: B images, C channels, H x W pixels.
"""

from typing import Literal

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from pipeline import kernels

MAX_GROUPS = 32  # of group normalization, as in DDPM and ADM; narrow layers have fewer

# Over groups of channels, over all channels, or over each channel by itself.
NormKind = Literal["group", "layer", "instance"]


class Conv(nn.Conv2d):
    """A convolution that keeps the image's size, or divides it by `stride`."""

    def __init__(
        self, width_in: int, width_out: int, size: int, stride: int = 1, group: int = 1
    ) -> None:
        options = {"pad_mode": "pad", "padding": size // 2, "has_bias": True}
        super().__init__(width_in, width_out, size, stride, group=group, **options)
        # The CPU kernel has no groups: a depthwise convolution is MindSpore's.
        self.kernel = kernels.convolution(stride) if group == 1 else None

    def construct(self, x_BCHW: Tensor) -> Tensor:
        if self.kernel is None:
            return super().construct(x_BCHW)
        return convolve(self.kernel, x_BCHW, self.weight, self.bias)


class Conv1x1(nn.Dense):
    """A convolution of size 1: a dense layer over the channels of each position.

    Its weight is stored as a matrix, which Adafactor can factor.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out)
        self.kernel = kernels.convolution(1)

    def construct(self, x_BCHW: Tensor) -> Tensor:
        weight = self.weight.reshape((*self.weight.shape, 1, 1))
        if self.kernel is None:
            return ops.conv2d(x_BCHW, weight, self.bias)
        return convolve(self.kernel, x_BCHW, weight, self.bias)


def convolve(kernel: ops.Custom, x_BCHW: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution by the CPU kernel, in float32; the output has the input's type.

    Call it with positional arguments. Given by keyword, MindSpore's `to_float` rounds the weight to
    16 bits as well, which changes the results of float16.
    """
    y = kernel(
        x_BCHW.astype(mstype.float32), weight.astype(mstype.float32), bias.astype(mstype.float32)
    )
    return y.astype(x_BCHW.dtype)


class Norm(nn.Cell):
    """Group normalization (Wu & He, arXiv 1803.08494), then an optional scale and shift by the
    embedding, then an optional SiLU.

    The affine parts are folded into one factor and one offset per channel, so that the image is
    read once: as rows (B C, H W), with the factors as a column. Computed in float32; the output
    has the input's type.
    """

    def __init__(self, width: int, kind: NormKind = "group", silu: bool = True) -> None:
        super().__init__()
        # At most 32 groups, of at least 4 channels, and as many as divide widths such as 144.
        most = min(MAX_GROUPS, width // 4)
        num_groups = next(num for num in range(most, 0, -1) if width % num == 0)

        self.groups = {"group": num_groups, "layer": 1, "instance": width}[kind]
        self.silu = silu
        self.gain = Parameter(ops.ones(width))
        self.bias = Parameter(ops.zeros(width))
        self.kernel = kernels.normalization(silu)

    def construct(self, x_BCHW: Tensor, scale_shift: Tensor | None = None) -> Tensor:
        """`scale_shift`: (B, 2 C), the scale (0 for none) before the shift."""
        B, C, H, W = x_BCHW.shape
        x = x_BCHW.astype(mstype.float32)
        per_group = (B, self.groups, C // self.groups)

        # (gain z + bias) (1 + scale) + shift, as one factor and one offset of the normalized z.
        factor = self.gain
        offset = self.bias
        if scale_shift is not None:
            scale, shift = ops.chunk(scale_shift, 2, 1)
            factor = factor * (1.0 + scale)
            offset = offset * (1.0 + scale) + shift
        factor = ops.broadcast_to(factor, (B, C))
        offset = ops.broadcast_to(offset, (B, C))

        if self.kernel is not None:
            y = self.kernel(x, factor.reshape(per_group), offset.reshape(per_group))
            return y.astype(x_BCHW.dtype)

        rows = x.reshape((B * self.groups, -1))
        mean = rows.mean(axis=1, keep_dims=True)
        # E[x^2] - E[x]^2, which needs no second pass over x - E[x].
        variance = (rows * rows).mean(axis=1, keep_dims=True) - mean * mean
        # Rounding can make the variance of equal values negative.
        rate = ops.rsqrt(ops.maximum(variance, 0.0) + kernels.EPSILON)

        # From one value per group to one per channel.
        column = (B, self.groups, 1)
        mean = ops.broadcast_to(mean.reshape(column), per_group).reshape((B, C))
        rate = ops.broadcast_to(rate.reshape(column), per_group).reshape((B, C))

        # z = (x - mean) rate: the mean moves into the offset.
        factor = rate * factor
        offset = offset - mean * factor
        y = x.reshape((B * C, H * W)) * factor.reshape((-1, 1)) + offset.reshape((-1, 1))
        if self.silu:
            y = y * ops.sigmoid(y)
        return y.reshape((B, C, H, W)).astype(x_BCHW.dtype)


def zero_init(cell: nn.Cell) -> nn.Cell:
    """Marks `cell` to be initialized with weights of zero (see `parameters.initialize`)."""
    cell.starts_at_zero = True
    return cell


def upsample(x_BCHW: Tensor) -> Tensor:
    """Nearest neighbour: (B, C, H, W) -> (B, C, 2 H, 2 W), each pixel repeated."""
    B, C, H, W = x_BCHW.shape
    x = ops.stack((x_BCHW, x_BCHW), -1).reshape((B, C, H, 2 * W))
    return ops.stack((x, x), -2).reshape((B, C, 2 * H, 2 * W))


def downsample(x_BCHW: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H / 2, W / 2): the mean of each 2 x 2 pixels."""
    return ops.avg_pool2d(x_BCHW, kernel_size=2, stride=2)


def space_to_channels(x_BCHW: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, C p p, H / p, W / p): each p x p patch becomes one position."""
    B, C, H, W = x_BCHW.shape
    x = x_BCHW.reshape((B, C, H // patch, patch, W // patch, patch))
    # Axes (B, C, H/p, p, W/p, p) to (B, C, p, p, H/p, W/p).
    return x.transpose((0, 1, 3, 5, 2, 4)).reshape((B, C * patch * patch, H // patch, W // patch))


def channels_to_space(x_BCHW: Tensor, patch: int) -> Tensor:
    """The inverse of `space_to_channels`."""
    B, C, H, W = x_BCHW.shape
    x = x_BCHW.reshape((B, C // (patch * patch), patch, patch, H, W))
    # Axes (B, C, p, p, H, W) to (B, C, H, p, W, p).
    return x.transpose((0, 1, 4, 2, 5, 3)).reshape((B, C // (patch * patch), H * patch, W * patch))
