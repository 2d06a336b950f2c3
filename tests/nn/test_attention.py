"""Attention against its definitions, and when its scores are computed in chunks."""

import numpy as np
import pytest
from mindspore import Tensor

from pipeline import runtime
from pipeline.nn.attention import LinearAttention, ScaledDotProductAttention
from pipeline.nn.embeddings import PADDING


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    exponentials = np.exp(x - x.max(axis, keepdims=True))
    return exponentials / exponentials.sum(axis, keepdims=True)


@pytest.mark.parametrize("text", [False, True])
def test_linear_attention(text: bool) -> None:
    """In float64; masked keys have no influence."""
    stream = np.random.default_rng(0)
    q, k, v = stream.standard_normal((3, 2, 2, 5, 4))
    bias = np.zeros((2, 5))
    bias[1, 3:] = PADDING * text

    channels_first = [array.swapaxes(-1, -2) for array in (q, k, v)]
    tensors = [Tensor(array.astype(np.float32)) for array in (*channels_first, bias)]
    output = LinearAttention()(*tensors).asnumpy().swapaxes(-1, -2)

    k = softmax(k + bias[:, None, :, None], -2)
    if text:
        k = k[1:, :, :3]
        v = v[1:, :, :3]
    expected = softmax(q, -1)[-len(k) :] / 2 @ (k.swapaxes(-1, -2) @ v)
    np.testing.assert_allclose(output[-len(k) :], expected, atol=1e-5)


def test_equal_scores_give_the_mean_of_the_unmasked_values() -> None:
    """And the mean of all values where all are masked."""
    v = np.random.default_rng(0).standard_normal((2, 1, 4, 3)).astype(np.float32)
    bias = np.array([[0, 0, PADDING], [PADDING] * 3], np.float32)
    q = Tensor(np.zeros((2, 1, 4, 5), np.float32))
    k = Tensor(np.zeros_like(v))
    output = ScaledDotProductAttention()(q, k, Tensor(v), Tensor(bias)).asnumpy()

    for image, values in enumerate((v[0, 0, :, :2], v[1, 0])):
        expected = np.tile(values.mean(1, keepdims=True), 5)
        np.testing.assert_allclose(output[image, 0], expected, atol=1e-5)


@pytest.mark.usefixtures("both")
def test_chunks_of_queries_give_the_same_output() -> None:
    """Never more scores at once than the maximum, also where the last chunk is smaller."""
    heads, channels, num_queries, num_keys = 3, 4, 11, 7
    stream = np.random.default_rng(0)
    q, k, v = (
        Tensor(stream.standard_normal((2, heads, channels, num)).astype(np.float32))
        for num in (num_queries, num_keys, num_keys)
    )
    bias = Tensor(np.where(np.arange(num_keys) < [[5], [7]], 0, PADDING).astype(np.float32))
    expected = ScaledDotProductAttention()(q, k, v, bias).asnumpy()

    # Four queries at a time, and part of a fifth.
    chunked = ScaledDotProductAttention(max_scores=heads * num_keys * 4 + 5)
    compiled = runtime.jit(chunked)(q, k, v, bias).asnumpy()
    np.testing.assert_allclose(compiled, expected, atol=1e-6)

    product = chunked.scores
    chunks = []

    def record(q: Tensor, k: Tensor) -> Tensor:
        chunks.append(q.shape[3])
        return product(q, k)

    chunked.scores = record
    np.testing.assert_allclose(chunked(q, k, v, bias).asnumpy(), expected, atol=1e-6)
    assert chunks == [4, 4, 3]
