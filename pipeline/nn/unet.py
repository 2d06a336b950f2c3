"""The two U-Nets of a cascade, built of one set of blocks.

ADM (Dhariwal & Nichol, arXiv 2105.05233), for the base: residual blocks that resample inside, a
skip connection from every block, attention after every block of the levels that have it.

Efficient U-Net (Imagen, arXiv 2205.11487, appendix B), for super-resolution: a level down-samples
first and then runs its blocks, more of them at low resolution; there is one skip connection per
level and one from stem to head, scaled by 1/sqrt(2); on the way up, the blocks run first and
up-sampling is last.

`architectures.py` lists their stacks; this file has what is before, between and after them.

Shapes: B images, C channels, H x W pixels, T noise levels (the image's own and, in
super-resolution, that of the low-resolution image), L text tokens, D text width, K classes, E
embedding width.
"""

from dataclasses import dataclass, replace
from typing import Literal

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from pipeline.config import ConfigError
from pipeline.nn.architectures import adm, efficient
from pipeline.nn.attention import AttentionKind
from pipeline.nn.blocks import ActivationFootprint, BlockConfig, Conditions
from pipeline.nn.dropout import Dropout
from pipeline.nn.embeddings import PADDING, AttentionPool, NoiseLevelEmbedding
from pipeline.nn.layers import Conv, Norm, channels_to_space, space_to_channels, zero_init

# The least value of each size; with `text_channels` 0 the blocks do not use the text.
MINIMUM = {
    "channels": 1,
    "channel_mults": 1,
    "num_blocks": 1,
    "head_channels": 1,
    "text_channels": 0,
    "patch": 1,
}


@dataclass(frozen=True, kw_only=True)
class UNetConfig(BlockConfig):
    """A U-Net, except what its stage decides: input channels, noise levels, text width, classes."""

    # adm: skip from every block; efficient: Imagen's Efficient U-Net
    kind: Literal["adm", "efficient"] = "adm"
    # Width of the first level, and the factor by which each level is wider.
    channels: int = 512
    channel_mults: tuple[int, ...] = (1, 2, 3, 4)  # channels of each level, as multiples
    # Residual blocks per level on the way down.
    num_blocks: tuple[int, ...] = (3, 3, 3, 3)
    # Per level: self and linear attend to image and text, cross to the text alone.
    attention: tuple[AttentionKind, ...] = ("none", "self", "self", "self")
    # Side in pixels of the patch that is one position of the first level ("simple diffusion",
    # arXiv 2301.11093).
    patch: int = 1
    # Recompute the activations of each layer for the gradient instead of keeping them.
    recompute: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in MINIMUM.items():
            value = getattr(self, name)
            sizes = list(value) if isinstance(value, tuple) else [value]
            if min(sizes, default=least - 1) < least:
                shown = sizes if isinstance(value, tuple) else value
                raise ConfigError(
                    f"{name}: {shown} is not valid; use whole numbers from {least} on"
                )

        num_levels = len(self.channel_mults)
        for name in ("num_blocks", "attention"):
            entries = list(getattr(self, name))
            if len(entries) != num_levels:
                raise ConfigError(
                    f"{name}: {entries} has {len(entries)} entries, but channel_mults has "
                    f"{num_levels}; give one per level"
                )

        if self.channels % 4:
            raise ConfigError(
                f"channels: {self.channels} is not a multiple of 4, as group normalization "
                "requires; use one"
            )
        for mult, kind in zip(self.channel_mults, self.attention, strict=True):
            width = self.channels * mult
            if kind != "none" and width % self.head_channels:
                raise ConfigError(
                    f"head_channels: {self.head_channels} does not divide the {width} channels of "
                    "a level with attention; use a divisor"
                )

    @property
    def stride(self) -> int:
        """The sides of an image are padded to a multiple of this, in pixels."""
        # ADM's first level has the full resolution; an Efficient U-Net halves in every level.
        num_halvings = len(self.channel_mults) - (self.kind == "adm")
        return self.patch * 2**num_halvings


class UNet(nn.Cell):
    """The network of a stage, see `construct`.

    Args:
        config: depth, widths, attention.
        channels_in: 3, and 3 more for each image that is concatenated.
        num_levels: T, the number of noise levels that condition the network.
        text_width: D, of the text encoder; 0: no text.
        num_classes: K, of the label; 0: no label.
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
        width = config.channels * config.channel_mults[0]
        emb = 4 * config.channels
        self.patch = config.patch
        self.stride = config.stride
        self.skip_scale = 1.0 if config.kind == "adm" else 0.5**0.5
        self.has_text = text_width > 0
        self.has_label = num_classes > 0

        # The order of these cells is the order in which `initialize` numbers their draws.
        if self.has_text:
            self.text_norm = nn.LayerNorm((text_width,))
            self.text_in = nn.Dense(text_width, config.text_channels)
            self.text_pool = AttentionPool(config.text_channels, emb)
        else:
            # Else the layers would attend to a text that never comes.
            config = replace(config, text_channels=0)
        if self.has_label:
            # No bias: a dropped label, a row of zeros, then adds nothing.
            self.label_in = nn.Dense(num_classes, emb, has_bias=False)
        levels = [NoiseLevelEmbedding(config.channels, emb) for _ in range(num_levels)]
        self.levels = nn.CellList(levels)

        self.stem = Conv(channels_in * config.patch**2, width, size=3)
        build = adm if config.kind == "adm" else efficient
        stacks = build(config, emb)
        self.down = nn.CellList(stacks.down)
        self.middle = stacks.middle
        self.up = nn.CellList(stacks.up)
        # In ADM there is one more stack on the way up, which takes the stem's skip connection.
        self.stem_to_head = len(stacks.up) == len(stacks.down)

        self.norm = Norm(width, config.norm)
        head_width = 2 * width if self.stem_to_head else width
        self.head = zero_init(Conv(head_width, 3 * config.patch**2, size=3))

        # By its index a layer's mask differs from those of layers of the same shape.
        dropouts = [cell for _, cell in self.cells_and_names() if isinstance(cell, Dropout)]
        for index, cell in enumerate(dropouts):
            cell.layer_index = index

        if config.recompute:
            for stack in [*stacks.down, stacks.middle, *stacks.up]:
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
        """The network's output, float32 (B, 3, H, W).

        Args:
            x_BCHW: the noisy image, and others concatenated to it.
            logsnr_BT: the noise levels.
            text_BLD, text_mask_BL: embedded tokens, and 1 for a token, 0 for padding; all zeros
                where the text is dropped.
            label_BK: one-hot rows, or zeros where the label is dropped.
            dropout_seeds_B: int32, one per image; None: no dropout.

        Raises ValueError for a missing input, and for one that the network does not have.
        """
        stem = self.stem(space_to_channels(self.pad_to_stride(x_BCHW), self.patch))
        conditions = self.embed(logsnr_BT, text_BLD, text_mask_BL, label_BK, dropout_seeds_B)
        h = self.norm(self.run_stacks(stem, conditions))
        if self.stem_to_head:
            # Not normalized: so the low-resolution image keeps its contrast, and copying it is
            # linear.
            h = ops.cat((h, stem * self.skip_scale), 1)
        return self.crop(channels_to_space(self.head(h), self.patch), x_BCHW)

    def pad_to_stride(self, x_BCHW: Tensor) -> Tensor:
        """`x_BCHW` with rows and columns of zeros up to multiples of the stride."""
        H, W = x_BCHW.shape[2:]
        if H % self.stride == 0 and W % self.stride == 0:
            return x_BCHW
        return ops.pad(x_BCHW, (0, -W % self.stride, 0, -H % self.stride))

    def crop(self, y_BCHW: Tensor, x_BCHW: Tensor) -> Tensor:
        """`y_BCHW` in float32, without what `pad_to_stride` added to `x_BCHW`."""
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
        elif text_BLD is not None:
            raise ValueError("text_BLD: given, but the network has no text; pass None")

        if self.has_label:
            if label_BK is None:
                raise ValueError("label_BK: None, but the network has classes; pass a label")
            emb = emb + self.label_in(label_BK)
        elif label_BK is not None:
            raise ValueError("label_BK: given, but the network has no classes; pass None")

        for i, level in enumerate(self.levels):
            emb = emb + level(logsnr_BT[:, i])

        # SiLU here, as every block would begin with it.
        return ops.silu(emb), text, text_bias_BL, dropout_seeds_B

    def run_stacks(self, h: Tensor, conditions: Conditions, skip_outer: int = 0) -> Tensor:
        """All layers between stem and head, except `skip_outer` layers at either end."""
        skips: tuple[Tensor, ...] = (h,)  # a tuple, as the graph compiler refuses list.pop()
        for i, stack in enumerate(self.down):
            h = stack(h, conditions, skip_outer if i == 0 else 0)
            skips = (*skips, h)

        h = self.middle(h, conditions)

        for i, stack in enumerate(self.up):
            h = ops.cat((h, skips[-1 - i] * self.skip_scale), 1)
            h = stack(h, conditions, 0, skip_outer if i == len(self.up) - 1 else 0)
        return h

    def footprint(self, side: int, tokens: int) -> list[ActivationFootprint]:
        """What the gradient keeps of one image of `side` pixels, by layer in the order they run,
        the head last.

        A skip connection counts once on the way down, as the next layer's input, and once more
        where it is concatenated, which is a copy.
        """
        pixels = (side // self.patch) ** 2
        footprints = []
        for stack in [*self.down, self.middle, *self.up]:
            for layer in stack.layers:
                footprints.append(layer.footprint(pixels, tokens))
                pixels = footprints[-1].pixels

        # Up-sampled to the first level again, where the head runs.
        stem = self.stem.out_channels * pixels
        head = self.head.in_channels * pixels
        last = ActivationFootprint(input=stem, inside=head, largest=max(stem, head), pixels=pixels)
        return [*footprints, last]
