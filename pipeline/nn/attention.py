"""Attention: what positions of a picture look up in the text and in one another.

Shapes: see blocks.py; c channels a head, M what is looked at: tokens of the text, positions, or
both.
"""

from typing import Literal

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from pipeline import kernels
from pipeline.nn.blocks import (
    ActivationFootprint,
    BlockConfig,
    Conv1x1,
    Norm,
    zero_init,
)

SCORES = (
    2**26
)  # of a picture's attention at a time, 256 MiB in float32; none of configs/ has as many

AttentionKind = Literal["none", "self", "cross", "linear"]


def split_heads(x_BCN: Tensor, num_heads: int) -> Tensor:
    """(B, C, N) or a picture -> (B, K, C / K, N): channels before positions, so that nothing moves."""
    B, C = x_BCN.shape[:2]
    return x_BCN.reshape((B, num_heads, C // num_heads, -1))


class ScaledDotProductAttention(nn.Cell):
    """Attention: v softmax(q^T k / sqrt(c) + bias)^T for each head, (B, K, c, N). The softmax is
    float32's.

    The plain formula: the one place where a device's fused kernel would branch off. Products
    transpose as they read, since MindSpore's transposition on a CPU keeps 8 bytes a number for as
    long as a graph lives. A query's answer does not depend on the others, so where a picture's
    scores (K, N, M) are many, some queries are answered after others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernel = kernels.softmax()
        self.scores, self.values = (
            ops.BatchMatMul(transpose_a=True),
            ops.BatchMatMul(transpose_b=True),
        )

    def construct(self, q_BKcN: Tensor, k_BKcM: Tensor, v_BKcM: Tensor, bias_BM: Tensor) -> Tensor:
        _, K, c, N = q_BKcN.shape
        num = max(SCORES // (K * k_BKcM.shape[3]), 1)  # queries at a time
        answers: tuple[Tensor, ...] = ()
        for start in range(0, N, num):
            q = q_BKcN if num >= N else ops.narrow(q_BKcN, 3, start, min(num, N - start))
            if start > 0:
                q = ops.depend(q, answers[-1])  # else all scores might be there at once
            scores = self.scores(q * c**-0.5, k_BKcM).astype(mstype.float32)
            if self.kernel is None:
                bias = ops.broadcast_to(
                    bias_BM.expand_dims(1).expand_dims(1), scores.shape
                )  # see bands.moments
                weights = ops.softmax(scores + bias, axis=-1)
            else:
                weights = self.kernel(scores, bias_BM)
            answers = (*answers, self.values(v_BKcM, weights.astype(v_BKcM.dtype)))
        return answers[0] if num >= N else ops.cat(answers, 3)


class LinearAttention(nn.Cell):
    """Linear attention: (v k'^T) q', in (B, K, c, N), with q' = softmax(q) / sqrt(c) over channels
    and k' = softmax(k + bias) over positions: its cost grows with N, not N^2 (Shen et al., arXiv
    1812.01243).
    """

    def __init__(self) -> None:
        super().__init__()
        self.product, self.product_transposed = ops.BatchMatMul(), ops.BatchMatMul(transpose_b=True)

    def construct(self, q_BKcN: Tensor, k_BKcM: Tensor, v_BKcM: Tensor, bias_BM: Tensor) -> Tensor:
        q = ops.softmax(q_BKcN, axis=2) * q_BKcN.shape[2] ** -0.5
        k = ops.softmax(k_BKcM + bias_BM.expand_dims(1).expand_dims(1), axis=-1).astype(
            v_BKcM.dtype
        )
        return self.product(self.product_transposed(v_BKcM, k), q.astype(v_BKcM.dtype))


class Attention(nn.Cell):
    """Every position looks at the text, if there is one, and, unless `kind` is "cross", at every
    other position.

    Keys and values of text and picture are concatenated (Imagen, appendix F).
    """

    def __init__(self, width: int, config: BlockConfig, kind: AttentionKind) -> None:
        super().__init__()
        self.heads, self.cross, self.text_channels = (
            width // config.head_channels,
            kind == "cross",
            config.text_channels,
        )
        self.norm = Norm(width, config.norm, silu=False)
        self.to_q = Conv1x1(width, width if self.cross else 3 * width)  # else q, k and v
        if self.text_channels:
            self.text_kv = nn.Dense(self.text_channels, 2 * width)
        self.lookup = LinearAttention() if kind == "linear" else ScaledDotProductAttention()
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
            keys, values, biases = (k,), (v,), (ops.zeros((B, H * W), mstype.float32),)
        if self.text_channels:
            k, v = ops.chunk(self.text_kv(text_BLD).swapaxes(1, 2), 2, 1)
            keys, values, biases = (*keys, k), (*values, v), (*biases, text_bias_BL)
        k, v, bias = ops.cat(keys, 2), ops.cat(values, 2), ops.cat(biases, 1)
        q, k, v = split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads)
        return x_BCHW + self.out(self.lookup(q, k, v, bias).reshape((B, C, H, W)))

    def footprint(self, pixels: int, tokens: int) -> ActivationFootprint:
        """The normalized picture, queries, keys, values, how far each position looks where, what it
        finds.
        """
        width = self.out.in_channels
        seen = (0 if self.cross else pixels) + (tokens if self.text_channels else 0)
        looks = self.heads * pixels * seen
        inside = 3 * width * pixels + 2 * width * seen + looks
        return ActivationFootprint(width * pixels, inside, max(width * pixels, looks), pixels)
