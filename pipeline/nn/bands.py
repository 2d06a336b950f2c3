"""A U-Net's answer to a picture that is too large to be held at full resolution. For sampling: a gradient holds it all.

At full resolution an Efficient U-Net has but two convolutions at either end, and a normalization:

    x -> stem -> Downsample -> (the levels, at half the side) -> Upsample -> norm, SiLU -> beside the stem -> head

So these are computed in bands of rows. Of a band's neighbours two convolutions see two rows, one at half the side: with
this halo a band comes out as in the whole picture, whose border is the border of the bands at its ends. Only the
normalization sees further. So a first pass takes mean and variance of each band, which are merged (Chan et al., 1983),

    mean = sum_i s_i mean_i,    variance = sum_i s_i (variance_i + (mean_i - mean)^2),    s_i the band's share of rows,

and a second pass computes the bands again and normalizes. Only rounding is different. The price: up-sampling is done
twice and the stem three times, which at the paper's SR1024 is 5 % of all operations.
"""

from mindspore import Tensor, ops
from mindspore import dtype as mstype

from pipeline.nn.blocks import channels_to_space, space_to_channels
from pipeline.nn.unet import UNet

LIMIT = 2**24  # numbers of a picture at full resolution (64 MiB in float32) above which it is computed in bands of so many

Band = tuple[int, int, int, int]  # rows at half the side: first, start, stop, end; it is [start, stop) of [first, end)


def in_bands(unet: UNet, x_BCHW: Tensor, logsnr_BT: Tensor, text_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """`unet(x_BCHW, logsnr_BT, text_BLD, mask_BL)`; large pictures in bands and one after the other."""
    B, _, H, W = x_BCHW.shape
    if not (unet.stem_to_head and len(unet.down)) or unet.stem.out_channels * (H // unet.patch) * (W // unet.patch) <= LIMIT:
        return unet(x_BCHW, logsnr_BT, text_BLD, mask_BL)
    answers: tuple[Tensor, ...] = ()
    for i in range(B):
        x = space_to_channels(ops.narrow(x_BCHW, 0, i, 1), unet.patch)
        if i:
            x = ops.depend(x, answers[-1])
        told = unet.conditions(ops.narrow(logsnr_BT, 0, i, 1), ops.narrow(text_BLD, 0, i, 1), ops.narrow(mask_BL, 0, i, 1))
        answers = (*answers, picture(unet, x, *told))
    return channels_to_space(ops.cat(answers), unet.patch).astype(mstype.float32)


def bands(height: int, rows: int) -> tuple[Band, ...]:
    """Those of a picture that has `height` rows at half the side, of `rows` each, the last of what is left."""
    found: tuple[Band, ...] = ()
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        found = (*found, (max(start - 1, 0), start, stop, min(stop + 1, height)))
    return found


def with_halo(x_BCHW: Tensor, band: Band, scale: int) -> Tensor:
    """The rows of `x_BCHW`, which has `scale` rows for each of the band's."""
    first, _, _, end = band
    return ops.narrow(x_BCHW, 2, first * scale, (end - first) * scale)


def without_halo(x_BCHW: Tensor, band: Band, scale: int) -> Tensor:
    first, start, stop, _ = band
    return ops.narrow(x_BCHW, 2, (start - first) * scale, (stop - start) * scale)


def moments(x_BCHW: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group (B G, 1)."""
    rows = x_BCHW.astype(mstype.float32).reshape((x_BCHW.shape[0] * groups, -1))
    mean = rows.mean(axis=1, keep_dims=True)
    return mean, ops.square(rows - mean).mean(axis=1, keep_dims=True)


def picture(unet: UNet, x_BCHW: Tensor, emb: Tensor, text: Tensor, bias_BL: Tensor) -> Tensor:
    """What the head answers to x, which are patches."""
    _, _, H, W = x_BCHW.shape
    parts = bands(H // 2, max(LIMIT // (2 * W * unet.stem.out_channels), 1))
    enter, leave = unet.down[0].layers[0], unet.up[-1].layers[-1]

    halves: tuple[Tensor, ...] = ()
    x = x_BCHW
    for band in parts:
        half = enter(unet.stem(with_halo(x, band, 2)), emb, text, bias_BL)
        halves = (*halves, without_halo(half, band, 1))
        x = ops.depend(x, halves[-1])
    h = unet.stacks(ops.cat(halves, 2), emb, text, bias_BL, 1)

    means: tuple[Tensor, ...] = ()
    variances: tuple[Tensor, ...] = ()
    for band in parts:
        y = leave(with_halo(h, band, 1), emb, text, bias_BL)
        mean, variance = moments(without_halo(y, band, 2), unet.norm.groups)
        means, variances = (*means, mean), (*variances, variance)
        h = ops.depend(h, variance)
    whole = merged(parts, means, variances)

    answers: tuple[Tensor, ...] = ()
    for band in parts:
        y = unet.norm(leave(with_halo(h, band, 1), emb, text, bias_BL), None, whole)
        y = ops.cat((y, unet.stem(with_halo(x, band, 2)) * unet.skip_scale), 1)
        answers = (*answers, without_halo(unet.head(y), band, 2))
        h, x = ops.depend(h, answers[-1]), ops.depend(x, answers[-1])
    return ops.cat(answers, 2)


def merged(parts: tuple[Band, ...], means: tuple[Tensor, ...], variances: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Mean and variance of the picture's groups, of those of its bands."""
    height = parts[-1][2]
    mean, variance = ops.zeros_like(means[0]), ops.zeros_like(means[0])
    for (_, start, stop, _), one in zip(parts, means):
        mean = mean + one * ((stop - start) / height)
    for (_, start, stop, _), one, spread in zip(parts, means, variances):
        variance = variance + (spread + ops.square(one - mean)) * ((stop - start) / height)
    return mean, variance
