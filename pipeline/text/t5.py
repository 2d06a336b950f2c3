"""The encoder of T5, which turns a caption into one vector a token.

T5 (Raffel et al. 2020, arXiv 1910.10683) is a Transformer with three turns of its own:

- **Relative positions.** There are no position embeddings. Every head adds to its attention score a
learned number that
  depends on the distance from the asking token i to the answering token j alone: b[bucket(j - i)].
      Half of the buckets
  are for j > i; of each half, the first half holds one distance each and the rest grow logarithmically up to
  `relative_attention_max_distance`. The table belongs to layer 0 and all layers use it.
- **RMS norm** (Zhang & Sennrich, arXiv 1910.07467), before each sub-layer: x / sqrt(mean(x^2) +
eps) * gain; no mean
  is taken off and nothing is added.
- **Unscaled scores.** softmax(q k^T + b) v without 1 / sqrt(d): the factor sits in the initial
weights of q.

Dense layers have no bias. The feed-forward is wo relu(wi x) in v1.0, and wo (gelu(wi_0 x) * wi_1 x)
in v1.1 (Shazeer, arXiv 2002.05202, with the tanh approximation of GELU), which is the one that
Imagen uses, frozen.

Activations are float32: T5 was trained in bfloat16 and its activations leave the range of float16.
Weights stay as they are stored, T5-XXL's often in half precision, and become float32 inside the
layer, which changes no value: so the encoder takes the memory of its file, 9.4 GB, and of one layer
in float32, rather than twice the file.

Shapes: B captions, L tokens, T = B L rows, D model width, K heads, c width of a head, V vocabulary,
N buckets.
"""

import math
from pathlib import Path
from typing import Self

import numpy as np
from mindspore import Tensor, ops
from mindspore import dtype as mstype

from pipeline.runtime import jit
from pipeline.text.hugging_face import Stored, as_float32
from pipeline.text.t5_folder import T5Config, encoder_tensors, layer_shapes

MASKED = float(np.finfo(np.float32).min)  # added to the score of a padded token


def buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each distance j - i from -max_distance to max_distance, (2 max_distance + 1,)
    int32.

    All farther tokens share the last bucket of their side. float32, as where the weights were
    trained: float64 would put some distances on the other side of a border.
    """
    side = num_buckets // 2
    exact = side // 2
    distance = np.arange(-max_distance, max_distance + 1, dtype=np.int32)
    away = np.abs(distance)
    ratio = np.maximum(away, exact).astype(np.float32) / np.float32(exact)
    growth = np.log(ratio) / np.float32(
        np.log(max_distance / exact)
    )  # 0 where buckets begin to widen, 1 at the end
    far = exact + (growth * np.float32(side - exact)).astype(np.int32)
    return np.where(distance > 0, side, 0).astype(np.int32) + np.where(
        away < exact, away, np.minimum(far, side - 1)
    )


def rms_norm(x_TD: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain, over the last axis. In rows: with three axes a CPU takes
    twice as long.
    """
    return x_TD * ops.rsqrt(ops.mean(ops.square(x_TD), -1, True) + eps) * gain_D


def gelu(x: Tensor) -> Tensor:
    """x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3); (1 + tanh u) / 2 is sigmoid(2
    u).

    On a CPU `ops.gelu` takes ten times as long, and `ops.tanh` is off by 1e-4.
    """
    return x * ops.sigmoid(x * (0.044715 * x * x + 1.0) * math.sqrt(8 / math.pi))


def split_heads(x_TE: Tensor, batch: int, heads: int) -> Tensor:
    """(B L, K c) -> (B, K, L, c)"""
    rows, width = x_TE.shape
    return x_TE.reshape((batch, rows // batch, heads, width // heads)).transpose((0, 2, 1, 3))


def attention(
    config: T5Config,
    x_TD: Tensor,
    bias_BKLL: Tensor,
    norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
) -> Tensor:
    """x + o softmax(q k^T + bias) v, of the normed x."""
    batch, heads = bias_BKLL.shape[:2]
    h_TD = rms_norm(x_TD, norm, config.layer_norm_epsilon)
    q_BKLc = split_heads(ops.matmul(h_TD, q), batch, heads)
    k_BKLc = split_heads(ops.matmul(h_TD, k), batch, heads)
    v_BKLc = split_heads(ops.matmul(h_TD, v), batch, heads)
    share_BKLL = ops.softmax(ops.matmul(q_BKLc, k_BKLc.swapaxes(-1, -2)) + bias_BKLL, axis=-1)
    mixed_BLKc = ops.matmul(share_BKLL, v_BKLc).transpose((0, 2, 1, 3))
    return x_TD + ops.matmul(mixed_BLKc.reshape((x_TD.shape[0], o.shape[0])), o)


def feed_forward(config: T5Config, x_TD: Tensor, norm: Tensor, *weights: Tensor) -> Tensor:
    """x + wo relu(wi h) (v1.0) or x + wo (gelu(wi_0 h) * wi_1 h) (v1.1), h the normed x."""
    h_TD = rms_norm(x_TD, norm, config.layer_norm_epsilon)
    if config.feed_forward_proj == "relu":
        hidden = ops.relu(ops.matmul(h_TD, weights[0]))
    else:
        hidden = gelu(ops.matmul(h_TD, weights[0])) * ops.matmul(h_TD, weights[1])
    return x_TD + ops.matmul(hidden, weights[-1])


def floats(weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple([weight.astype(mstype.float32) for weight in weights])


class T5Encoder:
    """Token ids (B, L) and their mask (B, L), bool or integer, 0 for padding -> (B, L, D) float32;
    all of NumPy.

    One compiled graph of a layer serves all layers: its weights are arguments. A graph of the whole
    encoder is a little faster (15 % on a CPU), but it keeps the activations of every layer: 2.8 GB
    sidecar_path 1.3 GB of weights. A caption's embeddings are the same to the last bit whoever is encoded
    with it, as long as B and L are the same.
    """

    def __init__(self, config: T5Config, weights: dict[str, np.ndarray]) -> None:
        """`weights` have the names and shapes of `encoder_shapes`, and the types that `Stored.read`
        gives.
        """
        self.config = config
        self.reach = config.relative_attention_max_distance
        self.buckets = Tensor(buckets(config.relative_attention_num_buckets, self.reach))
        self.embedding = weights[
            "embedding"
        ]  # stays with the host: a graph would keep a copy of the table
        self.position_bias = tensor(weights["position_bias"])
        self.layers = [
            tuple(tensor(weights[f"layers.{number}.{name}"]) for name in layer_shapes(config))
            for number in range(config.num_layers)
        ]
        self.norm = tensor(weights["norm"])

        def layer(x_TD: Tensor, bias_BKLL: Tensor, *stored: Tensor) -> Tensor:
            weights = floats(stored)
            return feed_forward(
                config, attention(config, x_TD, bias_BKLL, *weights[:5]), *weights[5:]
            )

        def finish(x_TD: Tensor, gain_D: Tensor) -> Tensor:
            return rms_norm(x_TD, gain_D.astype(mstype.float32), config.layer_norm_epsilon)

        self.bias, self.layer, self.finish = (
            jit(self.score_bias),
            jit(layer),
            jit(finish),
        )

    def score_bias(self, mask_BL: Tensor, bias_NK: Tensor) -> Tensor:
        """What all layers add to their scores, (B, K, L, L): for the distance of two tokens, and
        for padding.
        """
        position = ops.arange(mask_BL.shape[1])
        distance_LL = ops.clamp(
            position.reshape((1, -1)) - position.reshape((-1, 1)), -self.reach, self.reach
        )
        bias_KLL = bias_NK.astype(mstype.float32)[self.buckets[distance_LL + self.reach]].transpose(
            (2, 0, 1)
        )
        padding_B11L = (1.0 - mask_BL.astype(mstype.float32)).expand_dims(1).expand_dims(1) * MASKED
        return bias_KLL.expand_dims(0) + padding_B11L

    def __call__(self, ids_BL: np.ndarray, mask_BL: np.ndarray) -> np.ndarray:
        x_TD = Tensor.from_numpy(as_float32(self.embedding[ids_BL.reshape(-1)]))
        bias_BKLL = self.bias(Tensor(mask_BL), self.position_bias)
        for weights in self.layers:
            x_TD = self.layer(x_TD, bias_BKLL, *weights)
        return np.asarray(self.finish(x_TD, self.norm).asnumpy().reshape((*ids_BL.shape, -1)))

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The encoder in a Hugging Face folder, which may hold the whole T5; `UserError` if a
        parameter is not there.

        One tensor at a time, read rather than mapped: the peak is the encoder as stored and its
        largest tensor.
        """
        config = T5Config.read(folder)
        return cls(
            config,
            {name: read(name, stored) for name, stored in encoder_tensors(folder, config).items()},
        )


def read(name: str, stored: Stored) -> np.ndarray:
    """A dense layer as (in, out), the transpose of what is stored.

    In this form a row's answer does not depend on the other rows, nor on its place among them, to
    the last bit on a CPU; transposed inside the product, it does at small widths. So a caption
    encoded alone gives what it gave among others.
    """
    values = stored.read()
    return np.ascontiguousarray(values.T) if name.startswith("layers.") else values


def tensor(values: np.ndarray) -> Tensor:
    """`values` without a copy, with bfloat16 under its own name."""
    shared = Tensor.from_numpy(values)
    return shared.view(mstype.bfloat16) if values.dtype == np.uint16 else shared
