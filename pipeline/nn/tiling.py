"""Runs a U-Net on images that are too large to be held at full resolution, tile by tile.

For sampling only, as a gradient keeps all activations. At full resolution an Efficient U-Net has
two convolutions at either end and one normalization:

    x -> stem -> Downsample -> (the levels, from half the side on)
      -> Upsample -> norm, SiLU -> concatenated with the stem -> head

These are computed in bands of rows. Two convolutions see two rows of a band's neighbours, which is
one row at half the side: with this halo a band equals the same rows of the whole image, whose
border is a border of its first and last band too. Only the normalization sees further. So a first
pass takes mean and variance of each band and merges them into those of the bands before it (Chan et
al., 1983); with s the band's share of all rows so far, and m', v' its mean and variance:

    variance <- variance + s (v' - variance) + s (1 - s) (m' - mean)^2
    mean     <- mean + s (m' - mean)

A second pass computes the bands again and normalizes them. The output is the same except for
rounding. The cost: the last up-sampling is computed twice and the stem three times.

Shapes: as in unet.py; G groups of the normalization.
"""

from mindspore import Tensor, ops
from mindspore import dtype as mstype

from pipeline import kernels
from pipeline.nn.blocks import Conditions
from pipeline.nn.layers import Norm, channels_to_space, space_to_channels
from pipeline.nn.unet import UNet

# Elements of one image at full resolution above which it is tiled: 64 MiB of float32.
LIMIT = 2**24

# Rows at half the side, (first, start, stop, end): the band is [start, stop), and [first, end) with
# its halo. A plain tuple, as the graph compiler takes bands apart.
Band = tuple[int, int, int, int]


def tiled(
    unet: UNet,
    x_BCHW: Tensor,
    logsnr_BT: Tensor,
    text_BLD: Tensor | None = None,
    text_mask_BL: Tensor | None = None,
    label_BK: Tensor | None = None,
    dropout_seeds_B: Tensor | None = None,
    limit: int = LIMIT,
) -> Tensor:
    """`unet(x_BCHW, ...)` with the same inputs; large images one after the other, in bands.

    `limit`: an image with more elements than this at full resolution is tiled, in bands of at most
    as many (without halo).
    """
    B, _, H, W = x_BCHW.shape
    size = unet.stem.out_channels * (H // unet.patch) * (W // unet.patch)
    # Other networks have blocks at full resolution.
    can_tile = unet.stem_to_head and len(unet.down) > 0
    if not can_tile or size <= limit:
        return unet(x_BCHW, logsnr_BT, text_BLD, text_mask_BL, label_BK, dropout_seeds_B)

    padded = unet.pad_to_stride(x_BCHW)
    outputs: tuple[Tensor, ...] = ()
    for i in range(B):
        x = ops.narrow(padded, 0, i, 1)
        if i > 0:
            x = ops.depend(x, outputs[-1])  # one image after the other

        conditions = unet.embed(
            ops.narrow(logsnr_BT, 0, i, 1),
            row(text_BLD, i),
            row(text_mask_BL, i),
            row(label_BK, i),
            row(dropout_seeds_B, i),
        )
        outputs = (*outputs, tiled_image(unet, space_to_channels(x, unet.patch), conditions, limit))

    return unet.crop(channels_to_space(ops.cat(outputs), unet.patch), x_BCHW)


def row(input_B: Tensor | None, index: int) -> Tensor | None:
    """Row `index` of an input, as a batch of one; None stays None."""
    if input_B is None:
        return None
    return ops.narrow(input_B, 0, index, 1)


def tiled_image(unet: UNet, x_1CHW: Tensor, conditions: Conditions, limit: int) -> Tensor:
    """The head's output for one image, `x_1CHW`, which is already in patches.

    `ops.depend` orders the bands, so that one is not begun before the last is done, and keeps the
    second pass from reusing the bands of the first, which would have to be kept for it.
    """
    x = x_1CHW
    enter = unet.down[0].layers[0]
    leave = unet.up[-1].layers[-1]
    _, _, H, W = x.shape
    bands = split_rows(H // 2, max(limit // (2 * W * unet.stem.out_channels), 1))

    # To half the side, and through the levels there.
    halves: tuple[Tensor, ...] = ()
    for band in bands:
        half = enter(unet.stem(with_halo(x, band, 2)), *conditions)
        halves = (*halves, without_halo(half, band, 1))
        x = ops.depend(x, halves[-1])
    h = unet.run_stacks(ops.cat(halves, 2), conditions, 1)

    # First pass back at full resolution: statistics.
    mean = 0.0
    variance = 0.0
    for band in bands:
        _, start, stop, _ = band
        share = (stop - start) / stop
        y = without_halo(leave(with_halo(h, band, 1), *conditions), band, 2)
        band_mean, band_variance = moments(y, unet.norm.groups)
        variance = (
            variance
            + share * (band_variance - variance)
            + share * (1 - share) * ops.square(band_mean - mean)
        )
        mean = mean + share * (band_mean - mean)
        h = ops.depend(h, variance)

    # Second pass: normalization and head.
    outputs: tuple[Tensor, ...] = ()
    for band in bands:
        y = normalize(unet.norm, leave(with_halo(h, band, 1), *conditions), mean, variance)
        y = ops.cat((y, unet.stem(with_halo(x, band, 2)) * unet.skip_scale), 1)
        outputs = (*outputs, without_halo(unet.head(y), band, 2))
        h = ops.depend(h, outputs[-1])
        x = ops.depend(x, outputs[-1])
    return ops.cat(outputs, 2)


def split_rows(height: int, rows: int) -> tuple[Band, ...]:
    """The bands of an image with `height` rows at half the side: `rows` each, the last the rest."""
    bands: tuple[Band, ...] = ()
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        bands = (*bands, (max(start - 1, 0), start, stop, min(stop + 1, height)))
    return bands


def with_halo(x_BCHW: Tensor, band: Band, scale: int) -> Tensor:
    """The band, with its halo, of an image that has `scale` rows for each row at half the side."""
    first, _, _, end = band
    return ops.narrow(x_BCHW, 2, first * scale, (end - first) * scale)


def without_halo(x_BCHW: Tensor, band: Band, scale: int) -> Tensor:
    """The band that `with_halo` returned, without the halo."""
    first, start, stop, _ = band
    return ops.narrow(x_BCHW, 2, (start - first) * scale, (stop - start) * scale)


def moments(x_1CHW: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group, (G, 1)."""
    rows = x_1CHW.astype(mstype.float32).reshape((groups, -1))
    mean = rows.mean(axis=1, keep_dims=True)
    # Broadcast by hand: a CPU's subtraction that broadcasts keeps 16 bytes a number until the graph
    # has ended.
    difference = rows - ops.broadcast_to(mean, rows.shape)
    return mean, ops.square(difference).mean(axis=1, keep_dims=True)


def normalize(norm: Norm, x_1CHW: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """The output of `norm` for an image whose groups have these moments, (G, 1).

    Computed by batch normalization in inference mode, which takes known moments per channel.
    """
    C = norm.gain.shape[0]
    per_group = (norm.groups, C // norm.groups)
    mean_C = ops.broadcast_to(mean, per_group).reshape(C)
    variance_C = ops.broadcast_to(variance, per_group).reshape(C)

    x = x_1CHW.astype(mstype.float32)
    y = ops.batch_norm(x, mean_C, variance_C, norm.gain, norm.bias, False, 0.1, kernels.EPSILON)
    return (y * ops.sigmoid(y)).astype(x_1CHW.dtype)
