"""The embedding that conditions every block of a U-Net: noise levels and pooled text.

Shapes: B images, L text tokens, D text width, E embedding width.
"""

import math

import numpy as np
from mindspore import Tensor, nn, ops

from pipeline.nn.attention import ScaledDotProductAttention, split_heads

HEADS = 8  # of the attention that pools the text
PADDING = -1e4  # added to the score of a padded token; within the range of float16


class NoiseLevelEmbedding(nn.Cell):
    """The embedding of one noise level, (B,) -> (B, E): sines and cosines, then two dense layers.

    The level is first mapped to [0, 1], to the time at which the cosine schedule reaches it, 2/pi
    atan(exp(-logsnr / 2)), whatever schedule is trained (Salimans & Ho's released code, arXiv
    2202.00512). Times 1000 it takes the place of DDPM's step; frequencies fall from 1 to 1e-4
    (Vaswani et al., arXiv 1706.03762).
    """

    def __init__(self, width: int, emb: int) -> None:
        super().__init__()
        frequencies = np.exp(np.linspace(0, -np.log(1e4), width // 2))
        self.frequencies = Tensor(frequencies.astype(np.float32))
        self.dense1 = nn.Dense(width, emb)
        self.dense2 = nn.Dense(emb, emb)

    def construct(self, logsnr_B: Tensor) -> Tensor:
        # exp(-logsnr / 2) as a power: MindSpore's exp has a relative error of 5e-6 on a CPU, too
        # much for angles up to 1,000 radians.
        ratio = ops.pow(math.exp(-0.5), logsnr_B)
        time_B1 = ops.atan(ratio).reshape((-1, 1)) * (2000.0 / math.pi)
        angles = time_B1 * self.frequencies

        return self.dense2(ops.silu(self.dense1(ops.cat((ops.sin(angles), ops.cos(angles)), 1))))


class AttentionPool(nn.Cell):
    """Attention pooling of the text, (B, L, D) -> (B, E), with the mean token as the query (Imagen,
    arXiv 2205.11487, appendix F).
    """

    def __init__(self, text_width: int, emb: int) -> None:
        super().__init__()
        self.q = nn.Dense(text_width, emb)
        self.kv = nn.Dense(text_width, 2 * emb)
        self.attend = ScaledDotProductAttention()
        self.out = nn.Dense(emb, emb)

    def construct(self, text_BLD: Tensor, text_bias_BL: Tensor) -> Tensor:
        share_BL = ops.softmax(text_bias_BL, axis=-1)  # equal for all tokens but padding
        q_BE1 = self.q(ops.matmul(share_BL.expand_dims(1), text_BLD)).swapaxes(1, 2)

        # Channels before tokens, as `split_heads` wants them.
        k_BEL, v_BEL = ops.chunk(self.kv(text_BLD).swapaxes(1, 2), 2, 1)

        q = split_heads(q_BE1, HEADS)
        k = split_heads(k_BEL, HEADS)
        v = split_heads(v_BEL, HEADS)
        # One query, so that what it returns is a vector: (B, K, c, 1).
        pooled = self.attend(q, k, v, text_bias_BL)
        return self.out(pooled.reshape((text_BLD.shape[0], -1)))
