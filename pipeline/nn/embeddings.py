"""What conditions every block of a U-Net: noise levels and pooled text, as one vector.

Shapes: B images, T noise levels an image, L text tokens, D text width, E embedding width.
"""

import math

import numpy as np
from mindspore import Tensor, nn, ops

from pipeline.nn.attention import ScaledDotProductAttention, split_heads

HEADS = 8  # of the text's pooling
PADDING = -1e4  # added to the score of a padded token; within float16


class NoiseLevelEmbedding(nn.Cell):
    """One noise level (B,) -> (B, E): sines and cosines, then two dense layers.

    The level is first brought to [0, 1] as the time at which the cosine schedule has it, 2/pi
    atan(exp(-logsnr / 2)): even over what matters, whatever schedule is trained (Salimans & Ho's
    released code, arXiv 2202.00512). It then stands for DDPM's step number of 1000; frequencies
    fall from 1 to 1e-4 (Vaswani et al., arXiv 1706.03762).
    """

    def __init__(self, width: int, emb: int) -> None:
        super().__init__()
        self.frequencies = Tensor(
            np.exp(np.linspace(0, -np.log(1e4), width // 2)).astype(np.float32)
        )
        self.dense1, self.dense2 = nn.Dense(width, emb), nn.Dense(emb, emb)

    def construct(self, logsnr_B: Tensor) -> Tensor:
        # A power, since MindSpore's exp on a CPU is good to 5e-6 alone, and one radian in 1,000
        # needs better.
        time_B1 = ops.atan(ops.pow(math.exp(-0.5), logsnr_B)).reshape((-1, 1)) * (2000.0 / math.pi)
        angles = time_B1 * self.frequencies
        return self.dense2(ops.silu(self.dense1(ops.cat((ops.sin(angles), ops.cos(angles)), 1))))


class AttentionPool(nn.Cell):
    """Attention pooling: the mean token asks, all tokens answer, (B, L, D) -> (B, E) (Imagen,
    appendix F).

    Its heads can look at different words: one at the colour, one at the shape.
    """

    def __init__(self, text_width: int, emb: int) -> None:
        super().__init__()
        self.q, self.kv = nn.Dense(text_width, emb), nn.Dense(text_width, 2 * emb)
        self.lookup = ScaledDotProductAttention()
        self.out = nn.Dense(emb, emb)

    def construct(self, text_BLD: Tensor, bias_BL: Tensor) -> Tensor:
        share_BL = ops.softmax(bias_BL, axis=-1)  # even over the tokens that are there
        q_BE1 = self.q(ops.matmul(share_BL.expand_dims(1), text_BLD)).swapaxes(1, 2)
        k_BEL, v_BEL = ops.chunk(self.kv(text_BLD).swapaxes(1, 2), 2, 1)
        q, k, v = split_heads(q_BE1, HEADS), split_heads(k_BEL, HEADS), split_heads(v_BEL, HEADS)
        return self.out(self.lookup(q, k, v, bias_BL).reshape((text_BLD.shape[0], -1)))
