"""The pieces that both U-Nets are made of.

Shapes: B images, C channels, H x W pixels, N = H W positions, L text tokens, D text width, E embedding width, K heads.
Every layer of a stack answers to `construct(x_BCHW, emb_BE, text_BLD, bias_BL)`, so that a stack is a plain list;
`bias_BL` is 0 for a text token and a large negative number for padding.
"""

from typing import Literal

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from pipeline.nn import kernels

GROUPS = 32  # of group normalization, as in DDPM and ADM; fewer in narrow layers
SCORES = 2**26  # of a picture's attention at a time, 256 MiB in float32; none of configs/ has as many


class Conv(nn.Conv2d):
    """A convolution that keeps the picture's size (divided by `stride`)."""

    def __init__(self, width_in: int, width_out: int, size: int, stride: int = 1) -> None:
        super().__init__(width_in, width_out, size, stride, pad_mode="pad", padding=size // 2, has_bias=True)
        self.kernel = kernels.convolution(stride)

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
    """softmax(q k^T / sqrt(c) + bias) v, in (B, K, N, c); `bias` (B, 1, 1, M). The softmax is float32's.

    The plain formula: the one place where a device's fused kernel would branch off. No query's answer depends on other
    queries, so where a picture's scores (K, N, M) are many, some queries are answered after the others.
    """
    B, K, N, _ = q_BKNc.shape
    M = k_BKMc.shape[2]
    num = SCORES // (K * M)  # queries at a time
    if num >= N:
        return answer(q_BKNc, k_BKMc, v_BKMc, bias)
    answers: tuple[Tensor, ...] = ()
    q, num = q_BKNc, max(num, 1)
    for start in range(0, N, num):
        some = min(num, N - start)
        spread = ops.broadcast_to(bias, (B, K, some, M))  # as an addition that does so keeps memory, see bands.moments
        answers = (*answers, answer(ops.narrow(q, 2, start, some), k_BKMc, v_BKMc, spread))
        q = ops.depend(q, answers[-1])  # else all scores might be there at once
    return ops.cat(answers, 2)


def answer(q_BKNc: Tensor, k_BKMc: Tensor, v_BKMc: Tensor, bias: Tensor) -> Tensor:
    """The same for all queries at once; `bias` goes with (B, K, N, M)."""
    scores = ops.matmul(q_BKNc * q_BKNc.shape[-1] ** -0.5, k_BKMc.swapaxes(-1, -2)) + bias
    return ops.matmul(ops.softmax(scores, axis=-1).astype(v_BKMc.dtype), v_BKMc)


class Norm(nn.Cell):
    """Group normalization (Wu & He, arXiv 1803.08494), an optional scale and shift by the embedding, an optional SiLU.

    All of it but SiLU is one multiplication and one addition a channel, so the image is passed over once: it is read as
    rows (B C, H W), the factors as a column. Computed in float32, answered in the input's type.
    """

    def __init__(self, width: int, silu: bool = True) -> None:
        super().__init__()
        # 32 if they are at least 4 channels each; else as many as come out even, for widths such as 144
        self.groups = next(n for n in range(min(GROUPS, width // 4), 0, -1) if width % n == 0)
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

    `emb` is the width of the embedding that scales and shifts; 0: this block has none. With `resample` the picture
    changes size inside, on both paths, as in BigGAN (Brock et al., arXiv 1809.11096) and ADM (arXiv 2105.05233).
    """

    def __init__(self, width_in: int, width: int, emb: int, resample: Literal["", "up", "down"] = "") -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = Norm(width_in)
        self.conv1 = Conv(width_in, width, 3)
        self.emb = nn.Dense(emb, 2 * width) if emb else None
        self.norm2 = Norm(width)
        self.conv2 = zeroed(Conv(width, width, 3))
        self.skip = Conv(width_in, width, 1) if width_in != width else None

    def construct(self, x_BCHW: Tensor, emb_BE: Tensor, text_BLD: Tensor, bias_BL: Tensor) -> Tensor:
        x = x_BCHW
        h = self.norm1(x)
        if self.resample == "up":
            h, x = upsample(h), upsample(x)
        elif self.resample == "down":
            h, x = downsample(h), downsample(x)
        scale_shift = None if self.emb is None else self.emb(emb_BE)
        h = self.conv2(self.norm2(self.conv1(h), scale_shift))
        if self.skip is not None:
            x = self.skip(x)
        return x + h


class Attention(nn.Cell):
    """Every position looks at the text and, unless `cross` (text alone), at every other position.

    Keys and values of text and picture are concatenated (Imagen, appendix F).
    """

    def __init__(self, width: int, head: int, text_width: int, cross: bool) -> None:
        super().__init__()
        self.heads, self.cross = width // head, cross
        self.norm = Norm(width, silu=False)
        self.to_q = nn.Dense(width, width) if cross else nn.Dense(width, 3 * width)  # else q, k and v
        self.text_kv = nn.Dense(text_width, 2 * width)
        self.out = zeroed(nn.Dense(width, width))

    def construct(self, x_BCHW: Tensor, emb_BE: Tensor, text_BLD: Tensor, bias_BL: Tensor) -> Tensor:
        B, C, H, W = x_BCHW.shape
        tokens_BNC = self.norm(x_BCHW).reshape((B, C, H * W)).swapaxes(1, 2)
        k, v = ops.chunk(self.text_kv(text_BLD), 2, 2)
        bias = bias_BL
        if self.cross:
            q = self.to_q(tokens_BNC)
        else:
            q, own_k, own_v = ops.chunk(self.to_q(tokens_BNC), 3, 2)
            k, v = ops.cat((own_k, k), 1), ops.cat((own_v, v), 1)
            bias = ops.cat((ops.zeros((B, H * W), mstype.float32), bias_BL), 1)
        q, k, v = split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads)
        y = attention(q, k, v, bias.reshape((B, 1, 1, -1)))
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

    def construct(
        self, x_BCHW: Tensor, emb_BE: Tensor, text_BLD: Tensor, bias_BL: Tensor, start: int = 0, stop: int = 0
    ) -> Tensor:
        """But for `start` layers at the start and `stop` at the end, which the caller has in bands (see bands.py)."""
        x = x_BCHW
        for layer in range(start, len(self.layers) - stop):
            x = self.layers[layer](x, emb_BE, text_BLD, bias_BL)
        return x
