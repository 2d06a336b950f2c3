"""The encoder of T5, which turns a caption into one vector a token.

T5 (Raffel et al. 2020, arXiv 1910.10683) is a Transformer with three turns of its own:

- **Relative positions.** There are no position embeddings. Every head adds to its attention score a learned number that
  depends on the distance from the asking token i to the answering token j alone: b[bucket(j - i)]. Half of the buckets
  are for j > i; of each half, the first half holds one distance each and the rest grow logarithmically up to
  `relative_attention_max_distance`. The table belongs to layer 0 and all layers use it.
- **RMS norm** (Zhang & Sennrich, arXiv 1910.07467), before each sub-layer: x / sqrt(mean(x^2) + eps) * gain; no mean
  is taken off and nothing is added.
- **Unscaled scores.** softmax(q k^T + b) v without 1 / sqrt(d): the factor sits in the initial weights of q.

Dense layers have no bias. The feed-forward is wo relu(wi x) in v1.0, and wo (gelu(wi_0 x) * wi_1 x) in v1.1 (Shazeer,
arXiv 2002.05202, with the tanh approximation of GELU), which is the one that Imagen uses, frozen.

Everything is float32: T5 was trained in bfloat16 and its activations leave the range of float16.

Shapes: B captions, L tokens, D model width, K heads, c width of a head, V vocabulary.
"""

from pathlib import Path
from typing import Self

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.common.initializer import initializer
from mindspore.nn.utils import no_init_parameters

from pipeline.nn.t5_folder import T5Config, encoder_tensors, layer_shapes
from pipeline.runtime import compile

MASKED = float(np.finfo(np.float32).min)  # added to the score of a padded token


def buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each distance j - i from -max_distance to max_distance, (2 max_distance + 1,) int32.

    All farther tokens share the last bucket of their side. float32, as where the weights were trained: float64 would
    put some distances on the other side of a border.
    """
    side = num_buckets // 2
    exact = side // 2
    distance = np.arange(-max_distance, max_distance + 1, dtype=np.int32)
    away = np.abs(distance)
    ratio = np.maximum(away, exact).astype(np.float32) / np.float32(exact)
    growth = np.log(ratio) / np.float32(np.log(max_distance / exact))  # 0 where buckets begin to widen, 1 at the end
    far = exact + (growth * np.float32(side - exact)).astype(np.int32)
    return np.where(distance > 0, side, 0).astype(np.int32) + np.where(away < exact, away, np.minimum(far, side - 1))


def rms_norm(x_BLD: Tensor, gain_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * gain, over the last axis."""
    return x_BLD * ops.rsqrt(ops.mean(ops.square(x_BLD), -1, True) + eps) * gain_D


def dense(x_BLD: Tensor, weight: Tensor) -> Tensor:
    """x W, with W (in, out), the transpose of what Hugging Face stores.

    In this form a row's answer does not depend on the other rows, nor on its place among them, to the last bit on a
    CPU; in `nn.Dense`, which transposes inside the product, it does at small widths. So a caption encoded alone gives
    what it gave among others.
    """
    B, L, width = x_BLD.shape
    return ops.matmul(x_BLD.reshape((B * L, width)), weight).reshape((B, L, weight.shape[1]))


def split_heads(x_BLE: Tensor, heads: int) -> Tensor:
    """(B, L, K c) -> (B, K, L, c)"""
    B, L, width = x_BLE.shape
    return x_BLE.reshape((B, L, heads, width // heads)).transpose((0, 2, 1, 3))


def attention(
    config: T5Config, x_BLD: Tensor, bias_BKLL: Tensor, norm: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor
) -> Tensor:
    """x + o softmax(q k^T + bias) v, of the normed x."""
    B, L, _ = x_BLD.shape
    h = rms_norm(x_BLD, norm, config.layer_norm_epsilon)
    q_BKLc = split_heads(dense(h, q), config.num_heads)
    k_BKLc = split_heads(dense(h, k), config.num_heads)
    v_BKLc = split_heads(dense(h, v), config.num_heads)
    share_BKLL = ops.softmax(ops.matmul(q_BKLc, k_BKLc.swapaxes(-1, -2)) + bias_BKLL, axis=-1)
    mixed_BLE = ops.matmul(share_BKLL, v_BKLc).transpose((0, 2, 1, 3)).reshape((B, L, o.shape[0]))
    return x_BLD + dense(mixed_BLE, o)


def feed_forward(config: T5Config, x_BLD: Tensor, norm: Tensor, *weights: Tensor) -> Tensor:
    """x + wo relu(wi h) (v1.0) or x + wo (gelu(wi_0 h) * wi_1 h) (v1.1), h the normed x."""
    h = rms_norm(x_BLD, norm, config.layer_norm_epsilon)
    if config.feed_forward_proj == "relu":
        hidden = ops.relu(dense(h, weights[0]))
    else:
        hidden = ops.gelu(dense(h, weights[0]), approximate="tanh") * dense(h, weights[1])
    return x_BLD + dense(hidden, weights[-1])


class T5Encoder(nn.Cell):
    """Token ids (B, L) int32 and their mask (B, L), bool or integer, 0 for padding -> (B, L, D) float32.

    One compiled graph of a layer serves all layers: its weights are arguments. A graph of the whole encoder is a little
    faster (15 % on a CPU), but it keeps the activations of every layer: 2.8 GB beside 1.3 GB of weights.
    """

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.reach = config.relative_attention_max_distance
        self.buckets = Tensor(buckets(config.relative_attention_num_buckets, self.reach))
        self.embedding = Parameter(initializer("normal", (config.vocab_size, config.d_model)))
        self.position_bias = Parameter(initializer("normal", (config.relative_attention_num_buckets, config.num_heads)))
        self.layers = ParameterTuple(
            Parameter(initializer("normal", shape[::-1]), name=f"layers.{number}.{name}")  # (in, out): see `dense`
            for number in range(config.num_layers)
            for name, shape in layer_shapes(config).items()
        )
        self.norm = Parameter(initializer("ones", (config.d_model,)))

        def layer(x_BLD: Tensor, bias_BKLL: Tensor, *weights: Tensor) -> Tensor:
            return feed_forward(config, attention(config, x_BLD, bias_BKLL, *weights[:5]), *weights[5:])

        def finish(x_BLD: Tensor, gain_D: Tensor) -> Tensor:
            return rms_norm(x_BLD, gain_D, config.layer_norm_epsilon)

        self.bias, self.layer, self.finish = compile(self.score_bias), compile(layer), compile(finish)

    def score_bias(self, mask_BL: Tensor, bias_NK: Tensor) -> Tensor:
        """What all layers add to their scores, (B, K, L, L): for the distance of two tokens, and for padding."""
        position = ops.arange(mask_BL.shape[1])
        distance_LL = ops.clamp(position.reshape((1, -1)) - position.reshape((-1, 1)), -self.reach, self.reach)
        bias_KLL = bias_NK[self.buckets[distance_LL + self.reach]].transpose((2, 0, 1))
        padding_B11L = (1.0 - mask_BL.astype(mstype.float32)).expand_dims(1).expand_dims(1) * MASKED
        return bias_KLL.expand_dims(0) + padding_B11L

    def construct(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        x_BLD = ops.gather(self.embedding, ids_BL, 0)  # not compiled: a graph would keep a copy of the table
        bias_BKLL = self.bias(mask_BL, self.position_bias.value())
        size = len(self.layers) // self.config.num_layers
        for start in range(0, len(self.layers), size):
            x_BLD = self.layer(x_BLD, bias_BKLL, *[weight.value() for weight in self.layers[start : start + size]])
        return self.finish(x_BLD, self.norm.value())

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """The encoder in a Hugging Face folder, which may hold the whole T5; `UserError` if a parameter is not there.

        One tensor at a time, read rather than mapped: the peak is the encoder in float32 and its largest tensor.
        """
        with no_init_parameters():
            encoder = cls(T5Config.read(folder))
        stored = encoder_tensors(folder, encoder.config)
        for parameter in encoder.get_parameters():
            values = stored[parameter.name].read()
            turned = values.T if parameter.name.startswith("layers.") else values
            parameter.set_data(Tensor.from_numpy(np.ascontiguousarray(turned)))
            parameter.requires_grad = False
        return encoder.set_train(False)
