"""Attention: of the positions of an image to one another and to the text.

Shapes: B images, C channels, H x W pixels, N = H W positions (queries), K heads, c = C / K channels
per head, M keys (text tokens, positions, or both), L text tokens, D text width.
"""

from typing import Literal

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from pipeline import kernels
from pipeline.nn.blocks import ActivationFootprint, BlockConfig
from pipeline.nn.layers import Conv1x1, Norm, zero_init

# Scores (K, N, M) of one image that are computed at once: 256 MiB in float32. No network of
# configs/ has as many.
MAX_SCORES = 2**26

AttentionKind = Literal["none", "self", "cross", "linear"]


def split_heads(x_BCN: Tensor, num_heads: int) -> Tensor:
    """(B, C, N) or (B, C, H, W) -> (B, K, c, N).

    Channels stand before positions, so that no data moves.
    """
    B, C = x_BCN.shape[:2]
    return x_BCN.reshape((B, num_heads, C // num_heads, -1))


class ScaledDotProductAttention(nn.Cell):
    """v softmax(q^T k / sqrt(c) + bias)^T for each head, (B, K, c, N). The softmax is in float32.

    This is the plain formula, and the one place where a device's fused kernel would branch off.
    The matrix products transpose as they read: MindSpore's transposition on a CPU keeps 8 bytes a
    number for as long as the graph lives.

    Args:
        max_scores: more scores (K, N, M) of one image than this are computed in chunks of queries,
            which do not depend on one another.
    """

    def __init__(self, max_scores: int = MAX_SCORES) -> None:
        super().__init__()
        self.max_scores = max_scores
        self.softmax = kernels.softmax()
        self.scores = ops.BatchMatMul(transpose_a=True)
        self.values = ops.BatchMatMul(transpose_b=True)

    def construct(self, q_BKcN: Tensor, k_BKcM: Tensor, v_BKcM: Tensor, bias_BM: Tensor) -> Tensor:
        _, K, c, N = q_BKcN.shape
        chunk = max(self.max_scores // (K * k_BKcM.shape[3]), 1)  # queries at a time

        outputs: tuple[Tensor, ...] = ()
        for start in range(0, N, chunk):
            q = q_BKcN if chunk >= N else ops.narrow(q_BKcN, 3, start, min(chunk, N - start))
            if start > 0:
                # One chunk after the other; without this, all scores may exist at the same time.
                q = ops.depend(q, outputs[-1])

            scores = self.scores(q * c**-0.5, k_BKcM).astype(mstype.float32)
            if self.softmax is None:
                # Broadcast by hand: a CPU's addition that broadcasts keeps 16 bytes a number.
                bias = ops.broadcast_to(bias_BM.expand_dims(1).expand_dims(1), scores.shape)
                weights = ops.softmax(scores + bias, axis=-1)
            else:
                weights = self.softmax(scores, bias_BM)
            outputs = (*outputs, self.values(v_BKcM, weights.astype(v_BKcM.dtype)))

        return outputs[0] if chunk >= N else ops.cat(outputs, 3)


class LinearAttention(nn.Cell):
    """(v k'^T) q', (B, K, c, N), with q' = softmax(q) / sqrt(c) over channels and k' = softmax(k +
    bias) over positions.

    The cost grows with N, not with N^2 (Shen et al., arXiv 1812.01243).
    """

    def __init__(self) -> None:
        super().__init__()
        self.product = ops.BatchMatMul()
        self.product_transposed = ops.BatchMatMul(transpose_b=True)

    def construct(self, q_BKcN: Tensor, k_BKcM: Tensor, v_BKcM: Tensor, bias_BM: Tensor) -> Tensor:
        q = ops.softmax(q_BKcN, axis=2) * q_BKcN.shape[2] ** -0.5
        bias = bias_BM.expand_dims(1).expand_dims(1)
        k = ops.softmax(k_BKcM + bias, axis=-1).astype(v_BKcM.dtype)
        # Keys with values first, a matrix (c, c) for each head: so the cost is linear in N.
        return self.product(self.product_transposed(v_BKcM, k), q.astype(v_BKcM.dtype))


class Attention(nn.Cell):
    """Attention of every position to the text, if there is any, and, unless `kind` is "cross", to
    every position of the image.

    Keys and values of image and text are concatenated (Imagen, arXiv 2205.11487, appendix F).
    """

    def __init__(self, width: int, config: BlockConfig, kind: AttentionKind) -> None:
        super().__init__()
        self.num_heads = width // config.head_channels
        self.cross = kind == "cross"
        self.text_channels = config.text_channels

        self.norm = Norm(width, config.norm, silu=False)
        # The queries alone, or queries, keys and values of the image.
        self.to_q = Conv1x1(width, width if self.cross else 3 * width)
        if self.text_channels:
            self.text_kv = nn.Dense(self.text_channels, 2 * width)
        self.attend = LinearAttention() if kind == "linear" else ScaledDotProductAttention()
        self.out = zero_init(Conv1x1(width, width))

    def construct(
        self,
        x_BCHW: Tensor,
        emb_BE: Tensor | None = None,
        text_BLD: Tensor | None = None,
        text_bias_BL: Tensor | None = None,
        dropout_seeds_B: Tensor | None = None,
    ) -> Tensor:
        B, C, H, W = x_BCHW.shape
        q = self.to_q(self.norm(x_BCHW)).reshape((B, -1, H * W))

        keys: tuple[Tensor, ...] = ()
        values: tuple[Tensor, ...] = ()
        biases: tuple[Tensor, ...] = ()
        if not self.cross:
            q, k, v = ops.chunk(q, 3, 1)
            keys = (k,)
            values = (v,)
            # A position of the image is never padding.
            biases = (ops.zeros((B, H * W), mstype.float32),)
        if self.text_channels:
            k, v = ops.chunk(self.text_kv(text_BLD).swapaxes(1, 2), 2, 1)
            keys = (*keys, k)
            values = (*values, v)
            biases = (*biases, text_bias_BL)

        # One softmax over both, so that image and text compete for the attention.
        k = ops.cat(keys, 2)
        v = ops.cat(values, 2)
        bias = ops.cat(biases, 1)

        q = split_heads(q, self.num_heads)
        k = split_heads(k, self.num_heads)
        v = split_heads(v, self.num_heads)
        return x_BCHW + self.out(self.attend(q, k, v, bias).reshape((B, C, H, W)))

    def footprint(self, pixels: int, tokens: int) -> ActivationFootprint:
        """The normalized image, queries, keys, values, attention weights and their output."""
        width = self.out.in_channels
        num_keys = (0 if self.cross else pixels) + (tokens if self.text_channels else 0)
        weights = self.num_heads * pixels * num_keys
        return ActivationFootprint(
            input=width * pixels,
            # Of `pixels`: the normalized image, queries and output. Of the keys: keys and values.
            inside=3 * width * pixels + 2 * width * num_keys + weights,
            largest=max(width * pixels, weights),
            pixels=pixels,
        )
