"""The pieces that both U-Nets are made of.

Shapes: B images, C channels, H x W pixels, N = H W positions, L text tokens, D text width, E
embedding width, K heads. Every layer of a stack has the same inputs, see `Conditions`, so that
a stack is a plain list. It also says, by `footprint(pixels, tokens)`, what its
gradient will need: see `ActivationFootprint`.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from pipeline import kernels
from pipeline.config import ConfigError
from pipeline.nn.dropout import Dropout

GROUPS = 32  # of group normalization, as in DDPM and ADM; fewer in narrow layers

NormKind = Literal["group", "layer", "instance"]

# The conditioning that every layer receives beside the image, as `layer(x_BCHW, *conditions)`:
#     emb_BE           embedding of noise levels, pooled text and label
#     text_BLD         projected text; None: no text
#     text_bias_BL     added to attention scores, 0 for a token and PADDING for padding; None: no text
#     dropout_seeds_B  int32, one an image; None: nothing is dropped
# A plain tuple, as the graph compiler does not take a NamedTuple, not even one made inside the
# graph. `UNet.embed` makes it; it is only ever spread into a layer's named parameters.
Conditions = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What the blocks of a network have in common."""

    block: Literal["residual", "convnext"] = "residual"
    norm: NormKind = (
        "group"  # over groups of channels; `layer`: over all of them; `instance`: over each
    )
    dropout: float = 0.0  # share of a residual block's numbers that training sets to zero before its last convolution
    head_channels: int = 64
    text_channels: int = 1024  # width to which the text is projected, once, for all blocks

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout: {self.dropout} is no share in [0, 1); ADM has 0.1")


class ActivationFootprint(NamedTuple):
    """What of one image a layer's gradient needs, in numbers: its input, and what it makes on its
    way. `largest` is the longest of these tensors, `pixels` the positions of the layer's answer,
    which is the next layer's input.
    """

    input: int
    inside: int
    largest: int
    pixels: int


class Conv(nn.Conv2d):
    """A convolution that keeps the picture's size (divided by `stride`)."""

    def __init__(
        self, width_in: int, width_out: int, size: int, stride: int = 1, group: int = 1
    ) -> None:
        options = {"pad_mode": "pad", "padding": size // 2, "has_bias": True}
        super().__init__(width_in, width_out, size, stride, group=group, **options)
        self.kernel = kernels.convolution(stride) if group == 1 else None

    def construct(self, x_BCHW: Tensor) -> Tensor:
        if self.kernel is None:
            return super().construct(x_BCHW)
        return convolve(self.kernel, x_BCHW, self.weight, self.bias)


def convolve(kernel: ops.Custom, x_BCHW: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """By a CPU's kernel, which knows float32 alone."""
    y = kernel(
        x_BCHW.astype(mstype.float32), weight.astype(mstype.float32), bias.astype(mstype.float32)
    )
    return y.astype(x_BCHW.dtype)


class Conv1x1(nn.Dense):
    """A dense layer over the channels of each position, which is a convolution of size 1: pictures
    stay pictures.

    Its weight is a matrix all the same, which Adafactor factors.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out)
        self.kernel = kernels.convolution(1)

    def construct(self, x_BCHW: Tensor) -> Tensor:
        weight = self.weight.reshape((*self.weight.shape, 1, 1))
        if self.kernel is None:
            return ops.conv2d(x_BCHW, weight, self.bias)
        return convolve(self.kernel, x_BCHW, weight, self.bias)


def zero_init(cell: nn.Cell) -> nn.Cell:
    """`cell`, to start with weights of zero: what it feeds is the identity (or zero) at first."""
    cell.starts_at_zero = True
    return cell


def upsample(x_BCHW: Tensor) -> Tensor:
    """Twice the height and width, each pixel repeated."""
    B, C, H, W = x_BCHW.shape
    x = ops.stack((x_BCHW, x_BCHW), -1).reshape((B, C, H, 2 * W))
    return ops.stack((x, x), -2).reshape((B, C, 2 * H, 2 * W))


def downsample(x_BCHW: Tensor) -> Tensor:
    """Half the height and width, the mean of each 2 x 2 pixels."""
    return ops.avg_pool2d(x_BCHW, kernel_size=2, stride=2)


def space_to_channels(x_BCHW: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, C p p, H / p, W / p): each p x p patch becomes one position."""
    B, C, H, W = x_BCHW.shape
    x = x_BCHW.reshape((B, C, H // patch, patch, W // patch, patch))
    return x.transpose((0, 1, 3, 5, 2, 4)).reshape((B, C * patch * patch, H // patch, W // patch))


def channels_to_space(x_BCHW: Tensor, patch: int) -> Tensor:
    """The inverse of `space_to_channels`."""
    B, C, H, W = x_BCHW.shape
    x = x_BCHW.reshape((B, C // (patch * patch), patch, patch, H, W))
    return x.transpose((0, 1, 4, 2, 5, 3)).reshape((B, C // (patch * patch), H * patch, W * patch))


class Norm(nn.Cell):
    """Group normalization (Wu & He, arXiv 1803.08494), an optional scale and shift by the
    embedding, an optional SiLU.

    All of it but SiLU is one multiplication and one addition a channel, so the image is passed over
    once: it is read as rows (B C, H W), the factors as a column. Computed in float32, answered in
    the input's type.
    """

    def __init__(self, width: int, kind: NormKind = "group", silu: bool = True) -> None:
        super().__init__()
        # 32 if they are at least 4 channels each; else as many as come out even, for widths such as
        # 144
        groups = next(n for n in range(min(GROUPS, width // 4), 0, -1) if width % n == 0)
        self.groups = {"group": groups, "layer": 1, "instance": width}[kind]
        self.silu = silu
        self.gain = Parameter(ops.ones(width))
        self.bias = Parameter(ops.zeros(width))
        self.kernel = kernels.normalization(silu)

    def construct(self, x_BCHW: Tensor, scale_shift: Tensor | None = None) -> Tensor:
        B, C, H, W = x_BCHW.shape
        x, per_group = x_BCHW.astype(mstype.float32), (B, self.groups, C // self.groups)
        factor, offset = self.gain, self.bias
        if scale_shift is not None:
            scale, shift = ops.chunk(scale_shift, 2, 1)
            factor, offset = factor * (1.0 + scale), offset * (1.0 + scale) + shift
        factor, offset = ops.broadcast_to(factor, (B, C)), ops.broadcast_to(offset, (B, C))
        if self.kernel is not None:
            y = self.kernel(x, factor.reshape(per_group), offset.reshape(per_group))
            return y.astype(x_BCHW.dtype)
        rows = x.reshape((B * self.groups, -1))
        mean = rows.mean(axis=1, keep_dims=True)
        variance = (rows * rows).mean(axis=1, keep_dims=True) - mean * mean
        rate = ops.rsqrt(ops.maximum(variance, 0.0) + kernels.EPSILON)
        mean, rate = (
            ops.broadcast_to(n.reshape((B, self.groups, 1)), per_group).reshape((B, C))
            for n in (mean, rate)
        )
        factor = rate * factor
        offset = offset - mean * factor
        y = x.reshape((B * C, H * W)) * factor.reshape((-1, 1)) + offset.reshape((-1, 1))
        if self.silu:
            y = y * ops.sigmoid(y)
        return y.reshape((B, C, H, W)).astype(x_BCHW.dtype)


class ResBlock(nn.Cell):
    """Norm, SiLU, convolution, norm with scale and shift, SiLU, convolution; added to the input.

    As a ConvNeXt block (Liu et al., arXiv 2201.03545): a convolution of each channel by itself, 7 x
    7, norm with scale and shift, 1 x 1 to four times the width, SiLU (GELU there), 1 x 1 back.

    `emb` is the width of the embedding that scales and shifts; 0: this block has none. With
    `resample` the picture changes size inside, on both paths, as in BigGAN (Brock et al., arXiv
    1809.11096) and ADM (arXiv 2105.05233).
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        emb: int,
        config: BlockConfig,
        resample: Literal["", "up", "down"] = "",
    ) -> None:
        super().__init__()
        self.resample, self.convnext = resample, config.block == "convnext"
        middle = width_in if self.convnext else width
        self.norm1 = None if self.convnext else Norm(width_in, config.norm)
        self.conv1 = (
            Conv(width_in, width_in, 7, group=width_in)
            if self.convnext
            else Conv(width_in, width, 3)
        )
        self.emb = nn.Dense(emb, 2 * middle) if emb else None
        self.norm2 = Norm(middle, config.norm, silu=not self.convnext)
        self.widen = Conv(width_in, 4 * width, 1) if self.convnext else None
        self.dropout = Dropout(config.dropout) if config.dropout else None
        self.conv2 = zero_init(
            Conv(4 * width, width, 1) if self.convnext else Conv(width, width, 3)
        )
        self.skip = Conv(width_in, width, 1) if width_in != width else None

    def construct(
        self,
        x_BCHW: Tensor,
        emb_BE: Tensor | None = None,
        text_BLD: Tensor | None = None,
        text_bias_BL: Tensor | None = None,
        dropout_seeds_B: Tensor | None = None,
    ) -> Tensor:
        x = x_BCHW
        h = x if self.norm1 is None else self.norm1(x)
        if self.resample == "up":
            h, x = upsample(h), upsample(x)
        elif self.resample == "down":
            h, x = downsample(h), downsample(x)
        scale_shift = None if self.emb is None else self.emb(emb_BE)
        h = self.norm2(self.conv1(h), scale_shift)
        if self.widen is not None:
            h = ops.silu(self.widen(h))
        if self.dropout is not None and dropout_seeds_B is not None:
            h = self.dropout(h, dropout_seeds_B)
        h = self.conv2(h)
        if self.skip is not None:
            x = self.skip(x)
        return x + h

    def footprint(self, pixels: int, tokens: int) -> ActivationFootprint:
        """The convolutions' inputs and what is normalized."""
        after = {"up": 4 * pixels, "down": pixels // 4, "": pixels}[self.resample]
        wide, width = self.conv1.in_channels, self.conv1.out_channels
        inside = (
            wide + 2 * width if self.widen is None else wide + width + 2 * self.widen.out_channels
        )
        inside += self.conv2.in_channels if self.dropout is not None else 0  # its mask
        largest = max(wide * pixels, wide * after, self.conv2.in_channels * after)
        return ActivationFootprint(wide * pixels, inside * after, largest, after)


class Downsample(nn.Cell):
    """A convolution of stride 2."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv = Conv(width_in, width, 3, stride=2)

    def construct(
        self,
        x_BCHW: Tensor,
        emb_BE: Tensor | None = None,
        text_BLD: Tensor | None = None,
        text_bias_BL: Tensor | None = None,
        dropout_seeds_B: Tensor | None = None,
    ) -> Tensor:
        return self.conv(x_BCHW)

    def footprint(self, pixels: int, tokens: int) -> ActivationFootprint:
        picture = self.conv.in_channels * pixels
        return ActivationFootprint(picture, 0, picture, pixels // 4)


class Upsample(nn.Cell):
    """Each pixel repeated, then a convolution."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv = Conv(width_in, width, 3)

    def construct(
        self,
        x_BCHW: Tensor,
        emb_BE: Tensor | None = None,
        text_BLD: Tensor | None = None,
        text_bias_BL: Tensor | None = None,
        dropout_seeds_B: Tensor | None = None,
    ) -> Tensor:
        return self.conv(upsample(x_BCHW))

    def footprint(self, pixels: int, tokens: int) -> ActivationFootprint:
        """The convolution's input alone, which is not the layer's."""
        picture = 4 * self.conv.in_channels * pixels
        return ActivationFootprint(0, picture, picture, 4 * pixels)


class Stack(nn.Cell):
    """Layers in a row; what comes out is one skip connection's worth."""

    def __init__(self, layers: list[nn.Cell]) -> None:
        super().__init__()
        self.layers = nn.CellList(layers)

    def construct(
        self, x_BCHW: Tensor, conditions: Conditions, start: int = 0, stop: int = 0
    ) -> Tensor:
        """But for `start` layers at the start and `stop` at the end, which the caller has in bands
        (see bands.py).
        """
        x = x_BCHW
        for layer in range(start, len(self.layers) - stop):
            x = self.layers[layer](x, *conditions)
        return x
