"""The U-Net in PyTorch: an independent reference for tests, and the baseline of benchmarks.

It has the configuration and the parameter names of pipeline/nn/unet.py, so that weights can be
copied between the two, but shares no arithmetic: every operator is PyTorch's own. Shapes as in
pipeline/nn/unet.py. Import this file late: PyTorch is in the extra `parity`, and neither training
nor sampling needs it.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:  # the process of a benchmark does not import MindSpore
    from pipeline.nn.unet import UNetConfig

Weights = Mapping[str, np.ndarray]  # by parameter name


def twin(
    config: "UNetConfig", channels_in: int, num_levels: int, text_width: int, weights: Weights
) -> "UNet":
    """The network `unet(x_BCHW, logsnr_BT, text_BLD, mask_BL) -> (B, 3, H, W)` with these weights.

    RuntimeError if a name or shape differs.
    """
    network = UNet(config, channels_in, num_levels, text_width)
    network.load_state_dict(
        {name: torch.tensor(value) for name, value in weights.items()}, strict=True
    )
    return network


def conv(width_in: int, width: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, size, stride, padding=size // 2)


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        # As in pipeline/nn/layers.py: at most 32 groups, of at least 4 channels.
        self.groups = max(n for n in range(1, 33) if width % n == 0 and width >= 4 * n)
        self.gain = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, self.gain, self.bias, eps=1e-5)


class LayerNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        # MindSpore's default eps; PyTorch's is 1e-5.
        return F.layer_norm(x, self.gamma.shape, self.gamma, self.beta, eps=1e-7)


class ResBlock(nn.Module):
    def __init__(self, width_in: int, width: int, emb: int, resample: str = "") -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = Norm(width_in)
        self.conv1 = conv(width_in, width)
        self.norm2 = Norm(width)
        self.conv2 = conv(width, width)
        self.emb = nn.Linear(emb, 2 * width) if emb else None
        self.skip = conv(width_in, width, 1) if width_in != width else None

    def resize(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x: Tensor, emb: Tensor, text: Tensor, bias: Tensor) -> Tensor:
        h = self.norm2(self.conv1(self.resize(F.silu(self.norm1(x)))))
        if self.emb is not None:
            scale, shift = self.emb(emb)[:, :, None, None].chunk(2, dim=1)
            # shift + h (1 + scale)
            h = torch.addcmul(shift, h, 1 + scale)

        x = self.resize(x)
        return self.conv2(F.silu(h)) + (x if self.skip is None else self.skip(x))


class Attention(nn.Module):
    def __init__(self, width: int, head: int, text_width: int, cross: bool) -> None:
        super().__init__()
        self.head = head
        self.cross = cross
        self.norm = Norm(width)
        self.to_q = nn.Linear(width, width if cross else 3 * width)
        self.text_kv = nn.Linear(text_width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, emb: Tensor, text: Tensor, bias: Tensor) -> Tensor:
        # (B, N, 1, C) for the query alone, (B, N, 3, C) with key and value.
        qkv = self.to_q(self.norm(x).flatten(2).mT).unflatten(2, (-1, x.shape[1]))
        q = qkv[:, :, 0]
        image_kv = qkv[:, :, 1:]

        kv = self.text_kv(text).unflatten(2, (2, -1))
        if not self.cross:
            kv = torch.cat((image_kv, kv), 1)
            # Zeros for the positions of the image, which come first and are never padding.
            bias = F.pad(bias, (image_kv.shape[1], 0))

        k, v = kv.unbind(2)
        q, k, v = (part.unflatten(2, (-1, self.head)).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias[:, None, None].expand(-1, -1, q.shape[2], -1)
        )
        return x + self.out(y.transpose(1, 2).flatten(2)).mT.reshape(x.shape)


class Resample(nn.Module):
    def __init__(self, width_in: int, width: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = conv(width_in, width, stride=1 if up else 2)

    def forward(self, x: Tensor, emb: Tensor, text: Tensor, bias: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest") if self.up else x)


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, emb: Tensor, text: Tensor, bias: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, emb, text, bias)
        return x


class NoiseLevelEmbedding(nn.Module):
    def __init__(self, width: int, emb: int) -> None:
        super().__init__()
        self.dense1 = nn.Linear(width, emb)
        self.dense2 = nn.Linear(emb, emb)

    def forward(self, logsnr: Tensor) -> Tensor:
        # atan(exp(-logsnr / 2)), by two factors of which neither overflows.
        time = torch.atan2((-logsnr / 4).exp(), (logsnr / 4).exp()) * 2000 / torch.pi
        angles = torch.outer(
            time, torch.logspace(0, -4, self.dense1.in_features // 2, dtype=time.dtype)
        )
        return self.dense2(F.silu(self.dense1(torch.cat((angles.sin(), angles.cos()), 1))))


class AttentionPool(nn.Module):
    def __init__(self, text_width: int, emb: int) -> None:
        super().__init__()
        self.q = nn.Linear(text_width, emb)
        self.kv = nn.Linear(text_width, 2 * emb)
        self.out = nn.Linear(emb, emb)

    def forward(self, text: Tensor, bias: Tensor) -> Tensor:
        mean = (text * bias.softmax(1)[:, :, None]).sum(1, keepdim=True)
        k, v = self.kv(text).chunk(2, 2)
        # HEADS in pipeline/nn/embeddings.py.
        q, k, v = (x.unflatten(2, (8, -1)).transpose(1, 2) for x in (self.q(mean), k, v))
        return self.out(
            F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None]).flatten(1)
        )


class UNet(nn.Module):
    def __init__(
        self, config: "UNetConfig", channels_in: int, num_levels: int, text_width: int
    ) -> None:
        super().__init__()
        emb = 4 * config.channels
        patch = config.patch
        first = config.channels * config.channel_mults[0]
        self.config = config

        self.text_norm = LayerNorm(text_width)
        self.text_in = nn.Linear(text_width, config.text_channels)
        self.text_pool = AttentionPool(config.text_channels, emb)
        self.levels = nn.ModuleList(
            NoiseLevelEmbedding(config.channels, emb) for _ in range(num_levels)
        )

        self.stem = conv(channels_in * patch**2, first)

        build = adm if config.kind == "adm" else efficient
        down, middle, up = build(config, emb)
        self.down = nn.ModuleList(down)
        self.middle = middle
        self.up = nn.ModuleList(up)

        last = first if config.kind == "adm" else 2 * first
        self.norm = Norm(first)
        self.head = conv(last, 3 * patch**2)

    def forward(self, x: Tensor, logsnr: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        bias = torch.where(mask > 0, 0.0, -1e4).to(x.dtype)
        text = self.text_in(self.text_norm(text))
        levels = [
            level(column) for level, column in zip(self.levels, logsnr.unbind(1), strict=True)
        ]
        emb = F.silu(self.text_pool(text, bias) + sum(levels))

        h = self.stem(F.pixel_unshuffle(x, self.config.patch))
        skips = [h]
        for stack in self.down:
            h = stack(h, emb, text, bias)
            skips.append(h)
        h = self.middle(h, emb, text, bias)
        for stack in self.up:
            # An Efficient U-Net scales its skip connections by 1 / sqrt(2).
            skip = skips.pop() if self.config.kind == "adm" else skips.pop() / 2**0.5
            h = stack(torch.cat((h, skip), 1), emb, text, bias)

        h = F.silu(self.norm(h))
        # The one that is left is the stem's.
        if self.config.kind == "efficient":
            h = torch.cat((h, skips.pop() / 2**0.5), 1)
        return F.pixel_shuffle(self.head(h), self.config.patch)


Stacks = tuple[list[Stack], Stack, list[Stack]]


def attend(config: "UNetConfig", level: int) -> list[nn.Module]:
    """The attention that follows a block of this level, if any."""
    kind = config.attention[level]
    width = config.channels * config.channel_mults[level]
    if kind == "none":
        return []
    return [Attention(width, config.head_channels, config.text_channels, cross=kind == "cross")]


def adm(config: "UNetConfig", emb: int) -> Stacks:
    """One block a stack; on the way up, a block's input is concatenated with a skip connection."""
    widths = [config.channels * mult for mult in config.channel_mults]
    depth = len(widths)

    down = []
    skips = [widths[0]]  # widths of skip connections, the stem's first
    for i, width in enumerate(widths):
        for _ in range(config.num_blocks[i]):
            down.append(Stack(ResBlock(skips[-1], width, emb), *attend(config, i)))
            skips.append(width)
        if i + 1 < depth:
            down.append(Stack(ResBlock(width, width, emb, "down")))
            skips.append(width)

    deep = widths[-1]
    middle = Stack(ResBlock(deep, deep, emb), *attend(config, depth - 1), ResBlock(deep, deep, emb))

    up = []
    for i, width in reversed(list(enumerate(widths))):
        # One more than on the way down, for the skip connection of the stem or of down-sampling.
        for block in range(config.num_blocks[i] + 1):
            # A level's first block gets the image of the level below.
            width_in = width if block else widths[min(i + 1, depth - 1)]
            layers = [ResBlock(width_in + skips.pop(), width, emb), *attend(config, i)]
            if i > 0 and block == config.num_blocks[i]:
                layers.append(ResBlock(width, width, emb, "up"))
            up.append(Stack(*layers))
    return down, middle, up


def efficient(config: "UNetConfig", emb: int) -> Stacks:
    """One level a stack: its first block takes the embedding; self-attention follows each block,
    cross-attention the last.
    """
    widths = [config.channels * mult for mult in config.channel_mults]
    outer = widths[:1] + widths[:-1]  # width of the image one level up

    def blocks(level: int, width_in: int) -> list[nn.Module]:
        width = widths[level]
        count = config.num_blocks[level]
        layers: list[nn.Module] = []
        for n in range(count):
            # Only the first block of a level has the embedding.
            layers.append(ResBlock(width if n else width_in, width, 0 if n else emb))
            if n == count - 1 or config.attention[level] == "self":
                layers += attend(config, level)
        return layers

    *upper, lowest = range(len(widths))
    middle = Stack(
        Resample(outer[lowest], widths[lowest], up=False),
        *blocks(lowest, widths[lowest]),
        *blocks(lowest, widths[lowest]),
        Resample(widths[lowest], outer[lowest], up=True),
    )

    down = []
    up = []
    for i in upper:
        down.append(Stack(Resample(outer[i], widths[i], up=False), *blocks(i, widths[i])))
        up.append(Stack(*blocks(i, 2 * widths[i]), Resample(widths[i], outer[i], up=True)))
    # From the lowest level upwards.
    return down, middle, up[::-1]
