"""The pieces that both U-Nets are made of.

Shapes: B images, C channels, H x W pixels, N = H W positions, L text tokens, D text width, E embedding width, K heads.
Every layer of a stack answers to `construct(x_BCHW, emb_BE, text_BLD, bias_BL)`, so that a stack is a plain list;
`bias_BL` is 0 for a text token and a large negative number for padding.
"""

from dataclasses import dataclass
from typing import Literal

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from pipeline.nn import kernels

GROUPS = 32  # of group normalization, as in DDPM and ADM; fewer in narrow layers

AttentionKind = Literal["none", "self", "cross", "linear"]
NormKind = Literal["group", "layer", "instance"]


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What the blocks of a network have in common."""

    block: Literal["residual", "convnext"] = "residual"
    norm: NormKind = "group"  # over groups of channels; `layer`: over all of them; `instance`: over each
    head_channels: int = 64
    text_channels: int = 1024  # width to which the text is projected, once, for all blocks


class Conv(nn.Conv2d):
    """A convolution that keeps the picture's size (divided by `stride`)."""

    def __init__(self, width_in: int, width_out: int, size: int, stride: int = 1, group: int = 1) -> None:
        options = {"pad_mode": "pad", "padding": size // 2, "has_bias": True}
        super().__init__(width_in, width_out, size, stride, group=group, **options)
        self.kernel = kernels.convolution(stride) if group == 1 else None

    def construct(self, x_BCHW: Tensor) -> Tensor:
        if self.kernel is None:
            return super().construct(x_BCHW)
        weight, bias = self.weight.astype(mstype.float32), self.bias.astype(mstype.float32)
        return self.kernel(x_BCHW.astype(mstype.float32), weight, bias).astype(x_BCHW.dtype)


def zeroed(cell: nn.Cell) -> nn.Cell:
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


def split_heads(tokens_BNC: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) -> (B, K, N, C / K)."""
    B, N, C = tokens_BNC.shape
    return tokens_BNC.reshape((B, N, num_heads, C // num_heads)).swapaxes(1, 2)


def attention(q_BKNc: Tensor, k_BKMc: Tensor, v_BKMc: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(c) + bias) v, in (B, K, N, c); `bias` goes with (B, K, N, M). The softmax is float32's.

    The plain formula: the one place where a device's fused kernel would branch off.
    """
    scores = ops.matmul(q_BKNc * q_BKNc.shape[-1] ** -0.5, k_BKMc.swapaxes(-1, -2)) + bias
    return ops.matmul(ops.softmax(scores, axis=-1).astype(v_BKMc.dtype), v_BKMc)


def linear_attention(q_BKNc: Tensor, k_BKMc: Tensor, v_BKMc: Tensor, bias: Tensor) -> Tensor:
    """q' (k'^T v), in (B, K, N, c), with q' = softmax(q) / sqrt(c) over channels and k' = softmax(k + bias) over
    positions: its cost grows with N, not N^2 (Shen et al., arXiv 1812.01243). `bias` is (B, 1, 1, M).
    """
    q = ops.softmax(q_BKNc, axis=-1) * q_BKNc.shape[-1] ** -0.5
    k = ops.softmax(k_BKMc + bias.swapaxes(-1, -2), axis=-2).astype(v_BKMc.dtype)
    return ops.matmul(q.astype(v_BKMc.dtype), ops.matmul(k.swapaxes(-1, -2), v_BKMc))


class Norm(nn.Cell):
    """Group normalization (Wu & He, arXiv 1803.08494), an optional scale and shift by the embedding, an optional SiLU.

    All of it but SiLU is one multiplication and one addition a channel, so the image is passed over once: it is read as
    rows (B C, H W), the factors as a column. Computed in float32, answered in the input's type.
    """

    def __init__(self, width: int, kind: NormKind = "group", silu: bool = True) -> None:
        super().__init__()
        # 32 if they are at least 4 channels each; else as many as come out even, for widths such as 144
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
        mean, rate = (ops.broadcast_to(n.reshape((B, self.groups, 1)), per_group).reshape((B, C)) for n in (mean, rate))
        factor = rate * factor
        offset = offset - mean * factor
        y = x.reshape((B * C, H * W)) * factor.reshape((-1, 1)) + offset.reshape((-1, 1))
        if self.silu:
            y = y * ops.sigmoid(y)
        return y.reshape((B, C, H, W)).astype(x_BCHW.dtype)


class ResBlock(nn.Cell):
    """Norm, SiLU, convolution, norm with scale and shift, SiLU, convolution; added to the input.

    As a ConvNeXt block (Liu et al., arXiv 2201.03545): a convolution of each channel by itself, 7 x 7, norm with scale
    and shift, 1 x 1 to four times the width, SiLU (GELU there), 1 x 1 back.

    `emb` is the width of the embedding that scales and shifts; 0: this block has none. With `resample` the picture
    changes size inside, on both paths, as in BigGAN (Brock et al., arXiv 1809.11096) and ADM (arXiv 2105.05233).
    """

    def __init__(
        self, width_in: int, width: int, emb: int, config: BlockConfig, resample: Literal["", "up", "down"] = ""
    ) -> None:
        super().__init__()
        self.resample, self.convnext = resample, config.block == "convnext"
        middle = width_in if self.convnext else width
        self.norm1 = None if self.convnext else Norm(width_in, config.norm)
        self.conv1 = Conv(width_in, width_in, 7, group=width_in) if self.convnext else Conv(width_in, width, 3)
        self.emb = nn.Dense(emb, 2 * middle) if emb else None
        self.norm2 = Norm(middle, config.norm, silu=not self.convnext)
        self.widen = Conv(width_in, 4 * width, 1) if self.convnext else None
        self.conv2 = zeroed(Conv(4 * width, width, 1) if self.convnext else Conv(width, width, 3))
        self.skip = Conv(width_in, width, 1) if width_in != width else None

    def construct(self, x_BCHW: Tensor, emb_BE: Tensor, text_BLD: Tensor, bias_BL: Tensor) -> Tensor:
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
        h = self.conv2(h)
        if self.skip is not None:
            x = self.skip(x)
        return x + h


class Attention(nn.Cell):
    """Every position looks at the text, if there is one, and, unless `kind` is "cross", at every other position.

    Keys and values of text and picture are concatenated (Imagen, appendix F).
    """

    def __init__(self, width: int, config: BlockConfig, kind: AttentionKind) -> None:
        super().__init__()
        self.heads, self.cross, self.linear = width // config.head_channels, kind == "cross", kind == "linear"
        self.norm = Norm(width, config.norm, silu=False)
        self.to_q = nn.Dense(width, width) if self.cross else nn.Dense(width, 3 * width)  # else q, k and v
        self.text_kv = nn.Dense(config.text_channels, 2 * width) if config.text_channels else None
        self.out = zeroed(nn.Dense(width, width))

    def construct(self, x_BCHW: Tensor, emb_BE: Tensor, text_BLD: Tensor, bias_BL: Tensor) -> Tensor:
        B, C, H, W = x_BCHW.shape
        tokens_BNC = self.norm(x_BCHW).reshape((B, C, H * W)).swapaxes(1, 2)
        if self.cross:
            q, bias = self.to_q(tokens_BNC), bias_BL
            k, v = ops.chunk(self.text_kv(text_BLD), 2, 2)  # type: ignore[misc]  # cross: there is text
        else:
            q, k, v = ops.chunk(self.to_q(tokens_BNC), 3, 2)
            bias = ops.zeros((B, H * W), mstype.float32)
            if self.text_kv is not None:
                text_k, text_v = ops.chunk(self.text_kv(text_BLD), 2, 2)
                k, v = ops.cat((k, text_k), 1), ops.cat((v, text_v), 1)
                bias = ops.cat((bias, bias_BL), 1)
        q, k, v = split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads)
        bias = bias.reshape((B, 1, 1, -1))
        y = linear_attention(q, k, v, bias) if self.linear else attention(q, k, v, bias)
        y_BNC = self.out(y.swapaxes(1, 2).reshape((B, H * W, C)))
        return x_BCHW + y_BNC.swapaxes(1, 2).reshape((B, C, H, W))


class Downsample(nn.Cell):
    """A convolution of stride 2."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv = Conv(width_in, width, 3, stride=2)

    def construct(self, x_BCHW: Tensor, emb_BE: Tensor, text_BLD: Tensor, bias_BL: Tensor) -> Tensor:
        return self.conv(x_BCHW)


class Upsample(nn.Cell):
    """Each pixel repeated, then a convolution."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv = Conv(width_in, width, 3)

    def construct(self, x_BCHW: Tensor, emb_BE: Tensor, text_BLD: Tensor, bias_BL: Tensor) -> Tensor:
        return self.conv(upsample(x_BCHW))


class Stack(nn.Cell):
    """Layers in a row; what comes out is one skip connection's worth."""

    def __init__(self, layers: list[nn.Cell]) -> None:
        super().__init__()
        self.layers = nn.CellList(layers)

    def construct(self, x_BCHW: Tensor, emb_BE: Tensor, text_BLD: Tensor, bias_BL: Tensor) -> Tensor:
        x = x_BCHW
        for layer in self.layers:
            x = layer(x, emb_BE, text_BLD, bias_BL)
        return x
