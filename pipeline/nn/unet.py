"""The two U-Nets of a cascade, built of one set of blocks.

ADM (Dhariwal & Nichol, arXiv 2105.05233), for the base: residual blocks that resample inside, a
skip connection from every block, attention after every block of the levels that have it. Efficient
U-Net (Imagen, arXiv 2205.11487, appendix B), for super-resolution: a level first down-samples, then
runs its blocks, many more of them at low resolution; one skip connection a level and one from stem
to head, scaled by 1/sqrt(2); the way up runs the blocks first and up-samples last.

Both are two lists of stacks in the order they run; each stack of the way down leaves a skip
connection that one of the way up takes. Shapes: see `blocks.py`; T noise levels condition the
network (the picture's own and, for super-resolution, that of its low resolution).
"""

from dataclasses import dataclass, replace
from typing import Literal

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from pipeline.config import ConfigError
from pipeline.nn.attention import Attention, AttentionKind
from pipeline.nn.blocks import (
    ActivationFootprint,
    BlockConfig,
    Conditions,
    Conv,
    Downsample,
    Norm,
    ResBlock,
    Stack,
    Upsample,
    channels_to_space,
    space_to_channels,
    zero_init,
)
from pipeline.nn.dropout import Dropout
from pipeline.nn.embeddings import PADDING, AttentionPool, NoiseLevelEmbedding


@dataclass(frozen=True, kw_only=True)
class UNetConfig(BlockConfig):
    """A U-Net but for what its stage decides: channels in, noise levels, text width."""

    kind: Literal["adm", "efficient"] = "adm"
    channels: int = 512
    channel_mults: tuple[int, ...] = (1, 2, 3, 4)
    num_blocks: tuple[int, ...] = (3, 3, 3, 3)  # residual blocks on a level's way down
    attention: tuple[AttentionKind, ...] = (
        "none",
        "self",
        "self",
        "self",
    )  # self, linear: and text; cross: text alone
    patch: int = 1  # side of the pixel patch that is one position of the first level ("simple diffusion", 2301.11093)
    recompute: bool = False  # forget a layer's activations and compute them again for the gradient

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.channel_mults)
        for name in (
            "channels",
            "channel_mults",
            "num_blocks",
            "head_channels",
            "text_channels",
            "patch",
        ):
            value, least = (
                getattr(self, name),
                0 if name == "text_channels" else 1,
            )  # 0: the blocks see no text
            if min(value if isinstance(value, tuple) else [value], default=0) < least:
                found = list(value) if isinstance(value, tuple) else value
                raise ConfigError(
                    f"{name}: {found} is not made of whole numbers from {least} on; give such numbers"
                )
        for name in ("num_blocks", "attention"):
            if len(getattr(self, name)) != levels:
                raise ConfigError(
                    f"{name}: {list(getattr(self, name))} has {len(getattr(self, name))} entries and channel_mults has "
                    f"{levels}; give one a level"
                )
        if self.channels % 4:
            raise ConfigError(
                f"channels: {self.channels} is not a multiple of 4, which its group normalization needs"
            )
        for mult, kind in zip(self.channel_mults, self.attention, strict=True):
            if kind != "none" and self.channels * mult % self.head_channels:
                raise ConfigError(
                    f"head_channels: {self.head_channels} does not divide the {self.channels * mult} channels of a "
                    "level with attention"
                )

    @property
    def stride(self) -> int:
        """To a multiple of which a picture's sides are filled up."""
        steps = len(self.channel_mults) - (self.kind == "adm")
        return self.patch * 2**steps


class UNet(nn.Cell):
    """What a stage trains: `unet(x_BCHW, logsnr_BT, [text_BLD, mask_BL,] [label_BK,] [seeds_B]) ->
    (B, 3, H, W)`.

    Training with dropout gives the seeds, int32 and one an image; without them nothing is dropped.

    Args:
        config: depth, widths, attention.
        channels_in: 3, and as many again for each picture that is concatenated.
        num_levels: T, how many noise levels condition the network.
        text_width: D, of the text encoder; 0: there is no text.
        num_classes: K, of the label, a row with a one or, where no class is told, of zeros; 0:
            there is no label.
    """

    def __init__(
        self,
        config: UNetConfig,
        channels_in: int,
        num_levels: int,
        text_width: int,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        self.patch, self.stride = config.patch, config.stride
        width, emb = config.channels * config.channel_mults[0], 4 * config.channels
        self.skip_scale = 1.0 if config.kind == "adm" else 0.5**0.5
        self.has_text, self.has_label = text_width > 0, num_classes > 0
        if self.has_text:
            self.text_norm = nn.LayerNorm((text_width,))
            self.text_in = nn.Dense(text_width, config.text_channels)
            self.text_pool = AttentionPool(config.text_channels, emb)
        else:
            config = replace(config, text_channels=0)
        if self.has_label:
            self.label_in = nn.Dense(num_classes, emb, has_bias=False)
        self.levels = nn.CellList(
            [NoiseLevelEmbedding(config.channels, emb) for _ in range(num_levels)]
        )
        self.stem = Conv(channels_in * config.patch**2, width, 3)
        down, middle, up = (adm if config.kind == "adm" else efficient)(config, emb)
        self.down, self.middle, self.up = nn.CellList(down), middle, nn.CellList(up)
        self.stem_to_head = len(up) == len(
            down
        )  # else the last stack of the way up has taken the stem
        self.norm = Norm(width, config.norm)
        self.head = zero_init(
            Conv(2 * width if self.stem_to_head else width, 3 * config.patch**2, 3)
        )
        for number, cell in enumerate(
            cell for _, cell in self.cells_and_names() if isinstance(cell, Dropout)
        ):
            cell.number = number
        if config.recompute:
            for stack in [*down, middle, *up]:
                for layer in stack.layers:
                    layer.recompute()

    def construct(
        self,
        x_BCHW: Tensor,
        logsnr_BT: Tensor,
        text_BLD: Tensor | None = None,
        text_mask_BL: Tensor | None = None,
        label_BK: Tensor | None = None,
        dropout_seeds_B: Tensor | None = None,
    ) -> Tensor:
        stem = self.stem(space_to_channels(self.filled(x_BCHW), self.patch))
        conditions = self.embed(logsnr_BT, text_BLD, text_mask_BL, label_BK, dropout_seeds_B)
        h = self.norm(self.stacks(stem, conditions))
        if (
            self.stem_to_head
        ):  # not normalized: so the low resolution keeps its contrast, and copying it is linear
            h = ops.cat((h, stem * self.skip_scale), 1)
        return self.cut(channels_to_space(self.head(h), self.patch), x_BCHW)

    def filled(self, x_BCHW: Tensor) -> Tensor:
        """With rows and columns of zeros up to multiples of the stride."""
        H, W = x_BCHW.shape[2:]
        if H % self.stride == 0 and W % self.stride == 0:
            return x_BCHW
        return ops.pad(x_BCHW, (0, -W % self.stride, 0, -H % self.stride))

    def cut(self, y_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
        """Without what `filled` added to `x_BCHW`; float32."""
        H, W = x_BCHW.shape[2:]
        y = y_BCHW.astype(mstype.float32)
        return y if y.shape[2:] == (H, W) else y[:, :, :H, :W]

    def embed(
        self,
        logsnr_BT: Tensor,
        text_BLD: Tensor | None = None,
        text_mask_BL: Tensor | None = None,
        label_BK: Tensor | None = None,
        dropout_seeds_B: Tensor | None = None,
    ) -> Conditions:
        """The conditioning that every layer receives, from the inputs of `construct`."""
        emb = 0.0
        text = None
        text_bias_BL = None

        if self.has_text:
            if text_BLD is None or text_mask_BL is None:
                raise ValueError(
                    "text_BLD, text_mask_BL: None, but the network has text; pass both"
                )
            text_bias_BL = (1.0 - text_mask_BL) * PADDING
            text = self.text_in(self.text_norm(text_BLD)).astype(mstype.float32)
            emb = self.text_pool(text, text_bias_BL)

        if self.has_label:
            if label_BK is None:
                raise ValueError("label_BK: None, but the network has classes; pass a label")
            emb = emb + self.label_in(label_BK)

        if not self.has_text and text_BLD is not None:
            raise ValueError("text_BLD: given, but the network has no text; pass None")
        if not self.has_label and label_BK is not None:
            raise ValueError("label_BK: given, but the network has no classes; pass None")

        for i, level in enumerate(self.levels):
            emb = emb + level(logsnr_BT[:, i])

        # SiLU here, as every block would begin with it.
        return ops.silu(emb), text, text_bias_BL, dropout_seeds_B

    def stacks(self, h: Tensor, conditions: Conditions, outer: int = 0) -> Tensor:
        """All between stem and head, but for `outer` layers at either end."""
        skips: tuple[Tensor, ...] = (h,)  # a tuple, as a list's pop() leaves the compiled graph
        for i, stack in enumerate(self.down):
            h = stack(h, conditions, outer if i == 0 else 0)
            skips = (*skips, h)
        h = self.middle(h, conditions)
        for i, stack in enumerate(self.up):
            h = ops.cat((h, skips[-1 - i] * self.skip_scale), 1)
            h = stack(h, conditions, 0, outer if i == len(self.up) - 1 else 0)
        return h

    def footprint(self, side: int, tokens: int) -> list[ActivationFootprint]:
        """What of one picture of `side` pixels the gradient needs, by layer in the order they run,
        the head the last.

        A skip connection counts once on the way down, as the next layer's input, and once more
        where it is joined to another's, which is a copy.
        """
        pixels, found = (side // self.patch) ** 2, []
        for stack in [*self.down, self.middle, *self.up]:
            for layer in stack.layers:
                found.append(layer.footprint(pixels, tokens))
                pixels = found[-1].pixels
        width, head = self.stem.out_channels * pixels, self.head.in_channels * pixels
        return [*found, ActivationFootprint(width, head, max(width, head), pixels)]


Stacks = tuple[list[Stack], Stack, list[Stack]]


def adm(config: UNetConfig, emb: int) -> Stacks:
    """The way down, the middle and the way up of an ADM U-Net: one block a stack."""
    widths = [config.channels * mult for mult in config.channel_mults]
    last = len(widths) - 1
    width = widths[0]
    down, skips = [], [width]  # the stem is the first skip connection

    def attend(level: int) -> list[nn.Cell]:
        kind = config.attention[level]
        if kind == "none":
            return []
        return [Attention(widths[level], config, kind)]

    for level in range(len(widths)):
        for _ in range(config.num_blocks[level]):
            down.append(Stack([ResBlock(width, widths[level], emb, config), *attend(level)]))
            width = widths[level]
            skips.append(width)
        if level < last:
            down.append(Stack([ResBlock(width, width, emb, config, resample="down")]))
            skips.append(width)
    middle = Stack(
        [ResBlock(width, width, emb, config), *attend(last), ResBlock(width, width, emb, config)]
    )
    up = []
    for level in reversed(range(len(widths))):
        for block in range(config.num_blocks[level] + 1):
            layers = [ResBlock(width + skips.pop(), widths[level], emb, config), *attend(level)]
            width = widths[level]
            if level and block == config.num_blocks[level]:
                layers.append(ResBlock(width, width, emb, config, resample="up"))
            up.append(Stack(layers))
    return down, middle, up


def efficient(config: UNetConfig, emb: int) -> Stacks:
    """The same of an Efficient U-Net: one level a stack; the lowest level, down and up, is the
    middle.

    The embedding enters a level once on each way, in its first block. Self-attention follows every
    block of its level; explicit cross-attention follows the level's blocks once on each way: with
    this reading of appendix B and F the parameters come out as the paper counts them.
    """
    widths = [config.channels * mult for mult in config.channel_mults]

    def blocks(level: int, width_in: int) -> list[nn.Cell]:
        layers: list[nn.Cell] = []
        kind, width = config.attention[level], widths[level]
        for block in range(config.num_blocks[level]):
            first = block == 0
            layers.append(
                ResBlock(width_in if first else width, width, emb if first else 0, config)
            )
            if kind in ("self", "linear") or (
                kind == "cross" and block == config.num_blocks[level] - 1
            ):
                layers.append(Attention(width, config, kind))
        return layers

    *upper, lowest = range(len(widths))
    before = [widths[0], *widths]  # what each level receives on the way down and hands on upwards
    down = [Stack([Downsample(before[i], widths[i]), *blocks(i, widths[i])]) for i in upper]
    bottom = widths[lowest]
    middle = Stack(
        [
            Downsample(before[lowest], bottom),
            *blocks(lowest, bottom),
            *blocks(lowest, bottom),
            Upsample(bottom, before[lowest]),
        ]
    )
    up = [
        Stack([*blocks(i, 2 * widths[i]), Upsample(widths[i], before[i])]) for i in reversed(upper)
    ]
    return down, middle, up
