"""Guidance and thresholding, one image at a time, against `numpy.quantile` and `numpy.clip`."""

from collections.abc import Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from pipeline.diffusion.guidance import Threshold, guide, quantile, threshold

KINDS: tuple[Threshold, ...] = ("none", "static", "dynamic")
RNG = np.random.default_rng(0)
# Three images: within the range, a little beyond it, far beyond it.
X = RNG.uniform(-1, 1, (3, 3, 8, 8)).astype(np.float32) * np.array(
    [0.9, 1.5, 20], np.float32
).reshape(3, 1, 1, 1)


def reference(x_BCHW: np.ndarray, kind: Threshold, q: float) -> np.ndarray:
    if kind == "none":
        return x_BCHW
    if kind == "static":
        return np.clip(x_BCHW, -1, 1)
    images = []
    for x in x_BCHW.astype(np.float64):
        size = max(np.quantile(np.abs(x), q), 1)
        images.append(np.clip(x, -size, size) / size)
    return np.stack(images)


class TestGuide:
    conditional, unconditional = RNG.standard_normal((2, 2, 3, 4, 4)).astype(np.float32)

    @pytest.mark.parametrize("weight", [0, 0.5, 1, 7.5])
    @pytest.mark.parametrize(
        "kind", [float, lambda weight: Tensor(np.float32(weight))], ids=["float", "tensor"]
    )
    def test_is_a_line_through_both_outputs(
        self, weight: float, kind: Callable[[float], float | Tensor]
    ) -> None:
        output = guide(Tensor(self.conditional), Tensor(self.unconditional), kind(weight)).asnumpy()
        expected = weight * self.conditional.astype(np.float64) + (1 - weight) * self.unconditional
        assert output.dtype == np.float32
        np.testing.assert_allclose(output, expected, atol=1e-5)

    def test_weight_0_ignores_the_text(self) -> None:
        output = guide(Tensor(self.conditional), Tensor(self.unconditional), 0.0).asnumpy()
        np.testing.assert_array_equal(output, self.unconditional)

    def test_weight_1_is_no_guidance(self) -> None:
        output = guide(Tensor(self.conditional), Tensor(self.unconditional), 1.0).asnumpy()
        np.testing.assert_allclose(output, self.conditional, atol=1e-6)


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("q", [0.01, 0.5, 0.9, 0.995, 0.99999, 1.0])
@pytest.mark.parametrize("num", [1, 2, 3, 11, 200, 3 * 64 * 64])
@pytest.mark.parametrize("ties", [False, True])
def test_quantile_equals_numpy(q: float, num: int, ties: bool) -> None:
    values = np.random.default_rng(num).standard_normal((4, num)).astype(np.float32)
    values = values.round() if ties else values
    output = quantile(Tensor(values), q).asnumpy()
    expected = np.quantile(values.astype(np.float64), q, axis=1, keepdims=True)
    np.testing.assert_allclose(output, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("both")
def test_quantile_of_more_values_than_float32_counts() -> None:
    """2^24 + 3 values, of which the four largest differ."""
    num = 2**24 + 3
    values = np.zeros((1, num), np.float32)
    values[0, :4] = (4, 3, 2, 1)
    output = [
        quantile(Tensor(values), q).asnumpy()[0, 0]
        for q in (1.0, 1 - 1 / (num - 1), 1 - 2.5 / (num - 1))
    ]
    np.testing.assert_allclose(output, (4, 3, 1.5), atol=0.01)


@pytest.mark.usefixtures("both")
class TestThreshold:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("q", [0.5, 0.9, 0.995, 1.0])
    def test_equals_its_definition(self, kind: Threshold, q: float) -> None:
        np.testing.assert_allclose(
            threshold(Tensor(X), kind, q).asnumpy(), reference(X, kind, q), atol=1e-6
        )

    @pytest.mark.parametrize("kind", ["static", "dynamic"])
    def test_output_is_within_the_range(self, kind: Threshold) -> None:
        output = threshold(Tensor(X), kind).asnumpy()
        assert np.abs(output).max() == 1
        assert (np.sign(output) == np.sign(X)).all()

    @pytest.mark.parametrize("kind", KINDS)
    def test_values_within_the_range_stay(self, kind: Threshold) -> None:
        np.testing.assert_array_equal(threshold(Tensor(X[:1]), kind).asnumpy(), X[:1])

    def test_dynamic_only_clips_where_few_values_are_too_large(self) -> None:
        x = X[:1].copy()
        # 2 of 192 values; the quantile 0.98 is below them.
        x[0, 0, 0, 0] = 5
        x[0, 1, 2, 3] = -9
        np.testing.assert_array_equal(
            threshold(Tensor(x), "dynamic", 0.98).asnumpy(), np.clip(x, -1, 1)
        )

    def test_dynamic_at_quantile_1_only_divides(self) -> None:
        largest = np.abs(X[1:]).max(axis=(1, 2, 3), keepdims=True)
        np.testing.assert_allclose(
            threshold(Tensor(X[1:]), "dynamic", 1.0).asnumpy(), X[1:] / largest, atol=1e-7
        )

    @pytest.mark.parametrize("kind", KINDS)
    def test_images_are_independent(self, kind: Threshold) -> None:
        others = np.concatenate((10 * X[:1], X[1:]))
        output = threshold(Tensor(X), kind).asnumpy()[1:]
        np.testing.assert_array_equal(threshold(Tensor(others), kind).asnumpy()[1:], output)

    @pytest.mark.parametrize("kind", KINDS)
    def test_compiled_after_guidance(self, kind: Threshold) -> None:

        @ms.jit
        def denoise(conditional: Tensor, unconditional: Tensor, weight: Tensor) -> Tensor:
            return threshold(guide(conditional, unconditional, weight), kind, 0.9)

        output = denoise(Tensor(X), Tensor(-X), Tensor(np.float32(2.0))).asnumpy()
        np.testing.assert_allclose(output, reference(3 * X, kind, 0.9), rtol=1e-6, atol=1e-6)
