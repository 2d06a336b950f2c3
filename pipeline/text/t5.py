"""The encoder of T5: token ids of captions to one vector a token.

T5 (Raffel et al. 2020, arXiv 1910.10683) is a Transformer with three differences:

- **Relative positions.** There are no position embeddings. Every head adds to its attention scores
  a learned bias that depends only on the distance from query token i to key token j:
  b[bucket(j - i)]. Half of the buckets are for j > i; of each half, the first half has one bucket
  for each distance and the rest grow logarithmically up to `relative_attention_max_distance`. All
  layers share the table, which is stored in layer 0.
- **RMS norm** (Zhang & Sennrich, arXiv 1910.07467) before each sub-layer: x / sqrt(mean(x^2) + eps)
  * gain; no mean is subtracted and no bias is added.
- **Unscaled scores.** softmax(q k^T + b) v without 1 / sqrt(d): the factor is part of the initial
  weights of q.

Dense layers have no bias. The feed-forward is wo relu(wi x) in v1.0, and wo (gelu(wi_0 x) * wi_1 x)
in v1.1 (Shazeer, arXiv 2002.05202, with the tanh approximation of GELU), which is the one that
Imagen uses, frozen.

Activations are float32: T5 was trained in bfloat16 and its activations exceed the range of float16.
Weights are kept as stored, T5-XXL's often in half precision, and become float32 inside the layer,
which is exact: so the encoder takes the memory of its file, 9.4 GB, and of one layer in float32,
rather than twice the file.

Shapes: B captions, L tokens, T = B L rows, D model width, E = K c, K heads, c width of a head, V
vocabulary, N buckets.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Self

import numpy as np
from mindspore import Tensor, ops
from mindspore import dtype as mstype

from pipeline.runtime import jit
from pipeline.text.hugging_face import StoredTensor, as_float32
from pipeline.text.t5_folder import T5Config, encoder_tensors, layer_shapes

MASKED = float(np.finfo(np.float32).min)  # added to the score of a padded token


def buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each distance j - i from -max_distance to max_distance, (2 max_distance + 1,)
    int32.

    All larger distances share the last bucket of their side. In float32, as in training: float64
    would put some distances on the other side of a boundary.
    """
    num_side = num_buckets // 2
    num_exact = num_side // 2
    distance = np.arange(-max_distance, max_distance + 1, dtype=np.int32)
    magnitude = np.abs(distance)

    # 0 where the buckets begin to widen, 1 at max_distance.
    ratio = np.maximum(magnitude, num_exact).astype(np.float32) / np.float32(num_exact)
    growth = np.log(ratio) / np.float32(np.log(max_distance / num_exact))
    wide = num_exact + (growth * np.float32(num_side - num_exact)).astype(np.int32)

    first = np.where(distance > 0, num_side, 0).astype(np.int32)
    return first + np.where(magnitude < num_exact, magnitude, np.minimum(wide, num_side - 1))


def rms_norm(x_TD: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain, over the last axis. On two axes: with three a CPU takes
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
    # Rows are caption after caption.
    rows, width = x_TE.shape
    return x_TE.reshape((batch, rows // batch, heads, width // heads)).transpose((0, 2, 1, 3))


def attention(x_TD: Tensor, bias_BKLL: Tensor, weights: tuple[Tensor, ...], eps: float) -> Tensor:
    """x + o softmax(q k^T + bias) v of the normalized x. `weights`: norm, q, k, v, o."""
    norm, q, k, v, o = weights
    batch, heads = bias_BKLL.shape[:2]
    h_TD = rms_norm(x_TD, norm, eps)

    q_BKLc = split_heads(ops.matmul(h_TD, q), batch, heads)
    k_BKLc = split_heads(ops.matmul(h_TD, k), batch, heads)
    v_BKLc = split_heads(ops.matmul(h_TD, v), batch, heads)

    # Without 1 / sqrt(c), which T5 has in the initial weights of q.
    scores_BKLL = ops.matmul(q_BKLc, k_BKLc.swapaxes(-1, -2)) + bias_BKLL
    mixed_BLKc = ops.matmul(ops.softmax(scores_BKLL, axis=-1), v_BKLc).transpose((0, 2, 1, 3))
    return x_TD + ops.matmul(mixed_BLKc.reshape((x_TD.shape[0], o.shape[0])), o)


def feed_forward(x_TD: Tensor, weights: tuple[Tensor, ...], eps: float, is_gated: bool) -> Tensor:
    """x + wo relu(wi h) (v1.0) or x + wo (gelu(wi_0 h) * wi_1 h) (v1.1), h the normalized x.
    `weights`: norm, wi or wi_0 and wi_1, wo.
    """
    h_TD = rms_norm(x_TD, weights[0], eps)
    if is_gated:
        hidden = gelu(ops.matmul(h_TD, weights[1])) * ops.matmul(h_TD, weights[2])
    else:
        hidden = ops.relu(ops.matmul(h_TD, weights[1]))
    return x_TD + ops.matmul(hidden, weights[-1])


@lru_cache
def compiled_score_bias(num_buckets: int, max_distance: int) -> Callable[..., Tensor]:
    """(mask_BL, bias_NK as stored) -> (B, K, L, L), added to the scores of all layers: the bias of
    relative positions, and MASKED for padded tokens. Compiled once for all encoders.
    """
    bucket_of_distance = Tensor(buckets(num_buckets, max_distance))

    def score_bias(mask_BL: Tensor, bias_NK: Tensor) -> Tensor:
        position = ops.arange(mask_BL.shape[1])
        # All distances from `max_distance` on share a bucket, so the table ends there.
        distance_LL = ops.clamp(
            position.reshape((1, -1)) - position.reshape((-1, 1)), -max_distance, max_distance
        )
        bucket_LL = bucket_of_distance[distance_LL + max_distance]
        bias_KLL = bias_NK.astype(mstype.float32)[bucket_LL].transpose((2, 0, 1))

        padding_BL = 1.0 - mask_BL.astype(mstype.float32)
        padding_B11L = padding_BL.expand_dims(1).expand_dims(1) * MASKED
        return bias_KLL.expand_dims(0) + padding_B11L

    return jit(score_bias)


@lru_cache
def compiled_layer(eps: float, is_gated: bool) -> Callable[..., Tensor]:
    """(x_TD, bias_BKLL, *weights as stored) -> (T, D), compiled once for all encoders."""

    def layer(x_TD: Tensor, bias_BKLL: Tensor, *stored: Tensor) -> Tensor:
        weights = to_float32(stored)
        x_TD = attention(x_TD, bias_BKLL, weights[:5], eps)
        return feed_forward(x_TD, weights[5:], eps, is_gated)

    return jit(layer)


@lru_cache
def compiled_final_norm(eps: float) -> Callable[..., Tensor]:
    """(x_TD, gain_D as stored) -> (T, D), compiled once for all encoders."""

    def final_norm(x_TD: Tensor, gain_D: Tensor) -> Tensor:
        return rms_norm(x_TD, gain_D.astype(mstype.float32), eps)

    return jit(final_norm)


def to_float32(weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple([weight.astype(mstype.float32) for weight in weights])


class T5Encoder:
    """Token ids (B, L) and their mask (B, L), bool or integer, 0 for padding -> (B, L, D) float32;
    all of NumPy.

    One compiled graph of a layer serves all layers: its weights are arguments. A graph of the whole
    encoder is a little faster (15 % on a CPU), but it keeps the activations of every layer: 2.8 GB
    besides 1.3 GB of weights. A caption's embeddings are the same to the last bit whatever other
    captions are in the batch, as long as B and L are the same.
    """

    def __init__(self, config: T5Config, weights: dict[str, np.ndarray]) -> None:
        """`weights` have the names of `encoder_shapes` and the types of `StoredTensor.read`; dense
        layers are (in, out).
        """
        self.config = config

        # On the host: a graph would keep a copy of the table.
        self.embedding = weights["embedding"]
        self.position_bias = to_tensor(weights["position_bias"])
        self.layers = [
            tuple(to_tensor(weights[f"layers.{index}.{name}"]) for name in layer_shapes(config))
            for index in range(config.num_layers)
        ]
        self.norm = to_tensor(weights["norm"])

        eps = config.layer_norm_epsilon
        self._score_bias = compiled_score_bias(
            config.relative_attention_num_buckets, config.relative_attention_max_distance
        )
        self._layer = compiled_layer(eps, is_gated=config.feed_forward_proj == "gated-gelu")
        self._final_norm = compiled_final_norm(eps)

    def __call__(self, ids_BL: np.ndarray, mask_BL: np.ndarray) -> np.ndarray:
        # Tokens are looked up on the host; only their rows become a tensor.
        x_TD = Tensor.from_numpy(as_float32(self.embedding[ids_BL.reshape(-1)]))
        bias_BKLL = self._score_bias(Tensor(mask_BL), self.position_bias)
        for weights in self.layers:
            x_TD = self._layer(x_TD, bias_BKLL, *weights)
        out_TD = self._final_norm(x_TD, self.norm).asnumpy()
        return np.asarray(out_TD.reshape((*ids_BL.shape, -1)))

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The encoder in a Hugging Face folder, which may contain the whole T5; `UserError` if a
        parameter is missing.

        Tensors are read one at a time, not mapped: the peak of memory is the encoder as stored and
        its largest tensor.
        """
        config = T5Config.read(folder)
        tensors = encoder_tensors(folder, config)
        return cls(config, {name: read_weight(name, tensor) for name, tensor in tensors.items()})


def read_weight(name: str, stored: StoredTensor) -> np.ndarray:
    """A weight; a dense layer as (in, out), the transpose of the stored matrix.

    With (in, out) matrices a row of the product does not depend on the other rows, nor on its
    position among them, to the last bit on a CPU; transposed inside the product, it does at small
    widths. So a caption has the same embeddings alone and in a batch.
    """
    values = stored.read()
    return np.ascontiguousarray(values.T) if name.startswith("layers.") else values


def to_tensor(values: np.ndarray) -> Tensor:
    """A tensor that shares the memory of `values`; uint16 becomes bfloat16."""
    shared = Tensor.from_numpy(values)
    return shared.view(mstype.bfloat16) if values.dtype == np.uint16 else shared
