"""A U-Net's answer to pictures that are too large to be held at full resolution; for sampling, as a
gradient holds all.

At full resolution an Efficient U-Net has but two convolutions at either end, and a normalization:

    x -> stem -> Downsample -> (the levels, from half the side on) -> Upsample -> norm, SiLU -> beside the stem -> head

So these are computed in bands of rows. Of a band's neighbours two convolutions see two rows, one at
half the side: with this halo a band comes out as in the whole picture, whose border is a border of
its first and its last band too. Only the normalization sees further. So a first pass takes mean and
variance of each band and merges them into those of the bands before (Chan et al., 1983), of which
with the band's there are so many rows that its share is s:

    variance <- variance + s (variance' - variance) + s (1 - s) (mean' - mean)^2,    mean <- mean + s (mean' - mean)

and a second pass computes the bands again and normalizes. But for rounding the answer is the same.
The price: the last up-sampling is done twice and the stem three times.
"""

from mindspore import Tensor, ops
from mindspore import dtype as mstype

from pipeline import kernels
from pipeline.nn.blocks import Conditions, Norm, channels_to_space, space_to_channels
from pipeline.nn.unet import UNet

LIMIT = 2**24  # numbers of an image at full resolution, above which it is tiled: 64 MiB of float32

Band = tuple[
    int, int, int, int
]  # rows at half the side: [start, stop) in the middle, with its halo [first, end)


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
    """`unet(x_BCHW, ...)` with the same inputs, large images one after the other and in bands.

    `limit`: an image that has more numbers than this at full resolution is tiled, in bands of at
    most so many.
    """
    B, _, H, W = x_BCHW.shape
    split = unet.stem_to_head and len(unet.down) > 0  # else there are blocks at full resolution
    if not split or unet.stem.out_channels * (H // unet.patch) * (W // unet.patch) <= limit:
        return unet(x_BCHW, logsnr_BT, text_BLD, text_mask_BL, label_BK, dropout_seeds_B)

    filled = unet.filled(x_BCHW)
    outputs: tuple[Tensor, ...] = ()
    for i in range(B):
        x = ops.narrow(filled, 0, i, 1)
        if i > 0:
            x = ops.depend(x, outputs[-1])

        conditions = unet.embed(
            ops.narrow(logsnr_BT, 0, i, 1),
            row(text_BLD, i),
            row(text_mask_BL, i),
            row(label_BK, i),
            row(dropout_seeds_B, i),
        )
        outputs = (*outputs, tiled_image(unet, space_to_channels(x, unet.patch), conditions, limit))

    return unet.cut(channels_to_space(ops.cat(outputs), unet.patch), x_BCHW)


def row(input_B: Tensor | None, index: int) -> Tensor | None:
    """Row `index` of an input that the network may not have, as a batch of one."""
    if input_B is None:
        return None
    return ops.narrow(input_B, 0, index, 1)


def tiled_image(unet: UNet, x_BCHW: Tensor, conditions: Conditions, limit: int) -> Tensor:
    """The head's output for one image, `x_BCHW`, which is already in patches.

    `depend` keeps a band from being begun before the last one is done, and the second pass from
    finding its bands in the first, which would have to keep them.
    """
    x, enter, leave = x_BCHW, unet.down[0].layers[0], unet.up[-1].layers[-1]
    _, _, H, W = x.shape
    bands = cut(H // 2, max(limit // (2 * W * unet.stem.out_channels), 1))

    halves: tuple[Tensor, ...] = ()
    for band in bands:
        half = enter(unet.stem(with_halo(x, band, 2)), *conditions)
        halves = (*halves, without_halo(half, band, 1))
        x = ops.depend(x, halves[-1])
    h = unet.stacks(ops.cat(halves, 2), conditions, 1)

    mean, variance = 0.0, 0.0
    for band in bands:
        _, start, stop, _ = band
        share = (stop - start) / stop
        y = without_halo(leave(with_halo(h, band, 1), *conditions), band, 2)
        of_band, spread = moments(y, unet.norm.groups)
        variance = (
            variance
            + share * (spread - variance)
            + share * (1 - share) * ops.square(of_band - mean)
        )
        mean = mean + share * (of_band - mean)
        h = ops.depend(h, variance)

    answers: tuple[Tensor, ...] = ()
    for band in bands:
        y = normalized(unet.norm, leave(with_halo(h, band, 1), *conditions), mean, variance)
        y = ops.cat((y, unet.stem(with_halo(x, band, 2)) * unet.skip_scale), 1)
        answers = (*answers, without_halo(unet.head(y), band, 2))
        h, x = ops.depend(h, answers[-1]), ops.depend(x, answers[-1])
    return ops.cat(answers, 2)


def cut(height: int, rows: int) -> tuple[Band, ...]:
    """The bands of a picture with `height` rows at half the side: `rows` each, the last what is
    left.
    """
    bands: tuple[Band, ...] = ()
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        bands = (*bands, (max(start - 1, 0), start, stop, min(stop + 1, height)))
    return bands


def with_halo(x_BCHW: Tensor, band: Band, scale: int) -> Tensor:
    """The band of a picture that has `scale` rows for each of the band's, with its halo."""
    first, _, _, end = band
    return ops.narrow(x_BCHW, 2, first * scale, (end - first) * scale)


def without_halo(x_BCHW: Tensor, band: Band, scale: int) -> Tensor:
    """What is left of a band when its halo is cut off."""
    first, start, stop, _ = band
    return ops.narrow(x_BCHW, 2, (start - first) * scale, (stop - start) * scale)


def moments(x_1CHW: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of each group (G, 1).

    The mean is spread by hand, as a CPU's subtraction that does so keeps 16 bytes a number until
    the graph has ended.
    """
    rows = x_1CHW.astype(mstype.float32).reshape((groups, -1))
    mean = rows.mean(axis=1, keep_dims=True)
    return mean, ops.square(rows - ops.broadcast_to(mean, rows.shape)).mean(axis=1, keep_dims=True)


def normalized(norm: Norm, x_1CHW: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """What `norm` makes of a picture whose groups have these moments; known ones are what batch
    normalization takes.
    """
    C = norm.gain.shape[0]
    mean_C, variance_C = (
        ops.broadcast_to(n, (norm.groups, C // norm.groups)).reshape(C) for n in (mean, variance)
    )
    x = x_1CHW.astype(mstype.float32)
    y = ops.batch_norm(x, mean_C, variance_C, norm.gain, norm.bias, False, 0.1, kernels.EPSILON)
    return (y * ops.sigmoid(y)).astype(x_1CHW.dtype)
