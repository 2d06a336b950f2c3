"""The blocks that both U-Nets are made of, except attention (see `attention.py`).

Every layer of a stack has the same inputs, `construct(x_BCHW, *conditions)` with the names under
`Conditions`, so that a stack is a plain list. Every layer also reports what its gradient has to
keep in memory, by `footprint(pixels, tokens) -> ActivationFootprint`.

Shapes: B images, C channels, H x W pixels, L text tokens, D text width, E embedding width.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from mindspore import Tensor, nn, ops

from pipeline.config import ConfigError
from pipeline.nn.dropout import Dropout
from pipeline.nn.layers import Conv, Norm, NormKind, downsample, upsample, zero_init

# The conditioning that every layer receives beside the image:
#     emb_BE           embedding of noise levels, pooled text and label
#     text_BLD         projected text; None: no text
#     text_bias_BL     added to attention scores, 0 for tokens, PADDING for padding; None: no text
#     dropout_seeds_B  int32, one per image; None: nothing is dropped
# A plain tuple, since the graph compiler refuses a NamedTuple, even one made inside the graph.
# `UNet.embed` makes it; it is only ever unpacked into the named parameters of a layer.
Conditions = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """The options that all blocks of a network share."""

    # residual: BigGAN's; convnext: ConvNeXt's, depthwise 7 x 7
    block: Literal["residual", "convnext"] = "residual"
    # Over groups of channels, over all channels (layer), or over each channel (instance).
    norm: NormKind = "group"
    # Probability of dropping an activation, in training, before a block's last convolution.
    dropout: float = 0.0
    # Channels per attention head.
    head_channels: int = 64
    # Width to which the text is projected, once, for all blocks.
    text_channels: int = 1024

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout: {self.dropout} is not in [0, 1); ADM uses 0.1")


class ActivationFootprint(NamedTuple):
    """What the gradient of a layer keeps in memory for one image, in numbers of elements."""

    input: int  # of the layer's input
    inside: int  # of all tensors that it makes on the way
    largest: int  # of the largest of these tensors
    pixels: int  # positions of its output, which is the next layer's input


class ResBlock(nn.Cell):
    """A residual block: norm, SiLU, convolution, norm with scale and shift, SiLU, convolution.

    As a ConvNeXt block (Liu et al., arXiv 2201.03545): a 7 x 7 convolution of each channel by
    itself, norm with scale and shift, 1 x 1 convolution to four times the width, SiLU (GELU in the
    paper), 1 x 1 convolution back.

    Args:
        width_in, width: channels of the input and of the output.
        emb: width of the embedding that scales and shifts; 0: this block does not use it.
        config: shared options.
        resample: the image changes size inside the block, on both paths, as in BigGAN (Brock et
            al., arXiv 1809.11096) and ADM (arXiv 2105.05233).
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
        self.resample = resample
        self.convnext = config.block == "convnext"
        # The first convolution of a ConvNeXt block keeps the width.
        middle = width_in if self.convnext else width

        self.norm1 = None if self.convnext else Norm(width_in, config.norm)
        if self.convnext:
            self.conv1 = Conv(width_in, width_in, size=7, group=width_in)
        else:
            self.conv1 = Conv(width_in, width, size=3)
        self.emb = nn.Dense(emb, 2 * middle) if emb else None
        # A ConvNeXt block has a single activation, after `widen`.
        self.norm2 = Norm(middle, config.norm, silu=not self.convnext)
        self.widen = Conv(width_in, 4 * width, size=1) if self.convnext else None

        self.dropout = Dropout(config.dropout) if config.dropout else None
        # Zero: at first the block only passes its input on, through `skip` where widths differ.
        if self.convnext:
            self.conv2 = zero_init(Conv(4 * width, width, size=1))
        else:
            self.conv2 = zero_init(Conv(width, width, size=3))

        self.skip = Conv(width_in, width, size=1) if width_in != width else None

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
            h = upsample(h)
            x = upsample(x)
        elif self.resample == "down":
            h = downsample(h)
            x = downsample(x)

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
        """The inputs of the convolutions and of the normalizations."""
        pixels_out = {"up": 4 * pixels, "down": pixels // 4, "": pixels}[self.resample]
        width_in = self.conv1.in_channels
        width = self.conv1.out_channels
        last = self.conv2.in_channels

        if self.widen is None:
            # Inputs of conv1, norm2 and conv2.
            inside = width_in + 2 * width
        else:
            # Inputs of norm2 and `widen`, and the widened image before and after SiLU.
            inside = width_in + width + 2 * self.widen.out_channels
        if self.dropout is not None:
            inside += last  # the mask

        return ActivationFootprint(
            input=width_in * pixels,
            inside=inside * pixels_out,
            largest=max(width_in * pixels, width_in * pixels_out, last * pixels_out),
            pixels=pixels_out,
        )


class Downsample(nn.Cell):
    """A 3 x 3 convolution of stride 2."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv = Conv(width_in, width, size=3, stride=2)

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
        size = self.conv.in_channels * pixels
        return ActivationFootprint(input=size, inside=0, largest=size, pixels=pixels // 4)


class Upsample(nn.Cell):
    """Nearest-neighbour up-sampling, then a 3 x 3 convolution."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.conv = Conv(width_in, width, size=3)

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
        """The convolution's input alone: the layer's own input is not kept."""
        size = 4 * self.conv.in_channels * pixels
        return ActivationFootprint(input=0, inside=size, largest=size, pixels=4 * pixels)


class Stack(nn.Cell):
    """Layers that run one after the other between two skip connections."""

    def __init__(self, layers: list[nn.Cell]) -> None:
        super().__init__()
        self.layers = nn.CellList(layers)

    def construct(
        self, x_BCHW: Tensor, conditions: Conditions, skip_first: int = 0, skip_last: int = 0
    ) -> Tensor:
        """All layers except `skip_first` at the start and `skip_last` at the end, which the caller
        runs itself (see `tiling.py`).
        """
        x = x_BCHW
        for layer in range(skip_first, len(self.layers) - skip_last):
            x = self.layers[layer](x, *conditions)
        return x
