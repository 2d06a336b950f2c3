"""The two architectures of a U-Net, as lists of stacks in the order in which they run.

Each stack of the way down leaves a skip connection, which one stack of the way up takes, the last
one first.
"""

from typing import TYPE_CHECKING, NamedTuple

from mindspore import nn

from pipeline.nn.attention import Attention
from pipeline.nn.blocks import Downsample, ResBlock, Stack, Upsample

if TYPE_CHECKING:  # the network imports this module
    from pipeline.nn.unet import UNetConfig


class Stacks(NamedTuple):
    """The layers of a U-Net between its stem and its head."""

    down: list[Stack]
    middle: Stack
    up: list[Stack]


def adm(config: "UNetConfig", emb: int) -> Stacks:
    """The stacks of an ADM U-Net (arXiv 2105.05233), one block each.

    `emb` is the width of the embedding, which every block receives.
    """
    widths = [config.channels * mult for mult in config.channel_mults]
    lowest = len(widths) - 1
    width = widths[0]

    def attention(level: int) -> list[nn.Cell]:
        kind = config.attention[level]
        return [] if kind == "none" else [Attention(widths[level], config, kind)]

    down = []
    skips = [width]  # widths of the skip connections; the first is the stem's
    for level in range(len(widths)):
        for _ in range(config.num_blocks[level]):
            down.append(Stack([ResBlock(width, widths[level], emb, config), *attention(level)]))
            width = widths[level]
            skips.append(width)
        # Down-sampling is a stack of its own, and so leaves a skip connection.
        if level < lowest:
            down.append(Stack([ResBlock(width, width, emb, config, resample="down")]))
            skips.append(width)

    middle = Stack(
        [
            ResBlock(width, width, emb, config),
            *attention(lowest),
            ResBlock(width, width, emb, config),
        ]
    )

    up = []
    for level in reversed(range(len(widths))):
        last = config.num_blocks[level]
        # One block more than on the way down: the stem, or the down-sampling into this level, has
        # left a skip connection too.
        for block in range(last + 1):
            width_in = width + skips.pop()
            layers = [ResBlock(width_in, widths[level], emb, config), *attention(level)]
            width = widths[level]
            if level > 0 and block == last:
                layers.append(ResBlock(width, width, emb, config, resample="up"))
            up.append(Stack(layers))
    return Stacks(down, middle, up)


def efficient(config: "UNetConfig", emb: int) -> Stacks:
    """The stacks of an Efficient U-Net (Imagen, arXiv 2205.11487, appendix B), one level each.

    The middle is the lowest level, down and up. The embedding, of width `emb`, enters a level once
    on each way, in its first block. Self-attention follows every block of its level; explicit
    cross-attention follows the level's last block on each way. With this reading of appendices B
    and F the number of parameters is the paper's.
    """
    widths = [config.channels * mult for mult in config.channel_mults]

    def blocks(level: int, width_in: int) -> list[nn.Cell]:
        kind = config.attention[level]
        width = widths[level]
        last = config.num_blocks[level] - 1

        layers: list[nn.Cell] = [ResBlock(width_in, width, emb, config)]
        for block in range(last + 1):
            # Width 0: no block but the first has the embedding.
            if block > 0:
                layers.append(ResBlock(width, width, 0, config))
            if kind in ("self", "linear") or (kind == "cross" and block == last):
                layers.append(Attention(width, config, kind))
        return layers

    *upper, lowest = range(len(widths))
    # Width of the image that enters a level on the way down and leaves it on the way up.
    outer_widths = [widths[0], *widths]

    down = []
    for level in upper:
        enter = Downsample(outer_widths[level], widths[level])
        down.append(Stack([enter, *blocks(level, widths[level])]))

    middle = Stack(
        [
            Downsample(outer_widths[lowest], widths[lowest]),
            *blocks(lowest, widths[lowest]),
            *blocks(lowest, widths[lowest]),
            Upsample(widths[lowest], outer_widths[lowest]),
        ]
    )

    up = []
    for level in reversed(upper):
        leave = Upsample(widths[level], outer_widths[level])
        # Twice the width: the image and the skip connection of the same level.
        up.append(Stack([*blocks(level, 2 * widths[level]), leave]))
    return Stacks(down, middle, up)
