"""The embedding of noise levels."""

import numpy as np
from mindspore import Tensor

from pipeline.nn.embeddings import NoiseLevelEmbedding
from tests.helpers.compare import assign_random


def test_noise_level_embedding() -> None:
    """Against the definition in float64: angles up to 1,000 radians keep float32's precision."""
    level = NoiseLevelEmbedding(8, 16)
    weights = assign_random(level)
    logsnr = np.linspace(-20, 20, 41).astype(np.float32)
    output = level(Tensor(logsnr)).asnumpy()

    time = 1000 * 2 / np.pi * np.arctan(np.exp(-logsnr.astype(np.float64) / 2))
    angles = time[:, None] * 10000.0 ** -np.array([0, 1 / 3, 2 / 3, 1])
    waves = np.concatenate((np.sin(angles), np.cos(angles)), axis=1)
    hidden = waves @ weights["dense1.weight"].T + weights["dense1.bias"]
    hidden = hidden / (1 + np.exp(-hidden))
    expected = hidden @ weights["dense2.weight"].T + weights["dense2.bias"]
    np.testing.assert_allclose(output, expected, atol=1e-4)
