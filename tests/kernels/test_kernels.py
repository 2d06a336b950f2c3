"""The CPU's own kernels: against the definitions in float64, at sizes that blocks and threads do
not divide.
"""

import logging
import re

import numpy as np
import pytest
from mindspore import Tensor, value_and_grad

from pipeline import kernels, runtime

pytestmark = pytest.mark.skipif(
    kernels.library() is None, reason="the kernels are not built here: no C++ compiler"
)


def convolved(x, w, b, stride):
    """The definition: the sum over the kernel's places of shifted pictures, zeros around them."""
    side = w.shape[2] // 2
    padded = np.pad(x, ((0, 0), (0, 0), (side, side), (side, side)))
    height, width = (-(-size // stride) for size in x.shape[2:])
    y = np.zeros((len(x), len(w), height, width)) + b[:, None, None]
    for i in range(w.shape[2]):
        for j in range(w.shape[3]):
            rows, columns = (
                slice(at, at + (n - 1) * stride + 1, stride) for at, n in ((i, height), (j, width))
            )
            y += np.einsum("bchw,oc->bohw", padded[:, :, rows, columns], w[:, :, i, j])
    return y


def normalized(x, a, b, silu):
    grouped = x.reshape(*a.shape[:2], -1)
    z = (grouped - grouped.mean(2, keepdims=True)) / np.sqrt(
        grouped.var(2, keepdims=True) + kernels.EPSILON
    )
    u = z.reshape(*a.shape, -1) * a[..., None] + b[..., None]
    return (u / (1 + np.exp(-u)) if silu else u).reshape(x.shape)


def answers(operator, arrays):
    """What it makes of `arrays`, and its gradient along a fixed direction, in a compiled graph."""
    tensors = [Tensor(array.astype(np.float32)) for array in arrays]
    direction = np.random.default_rng(1).standard_normal(operator(*tensors).shape)

    def along(*inputs):
        return (operator(*inputs) * Tensor(direction.astype(np.float32))).sum()

    _, gradients = runtime.jit(value_and_grad(along, tuple(range(len(tensors)))))(*tensors)
    return operator(*tensors).asnumpy(), [gradient.asnumpy() for gradient in gradients], direction


def assert_gradients(definition, arrays, gradients, direction):
    """Each against the slope of the definition, in float64, along a few directions of its own."""
    for place, gradient in enumerate(gradients):
        for seed in range(3):
            step = np.random.default_rng((place, seed)).standard_normal(arrays[place].shape)
            before, after = (
                definition(*arrays[:place], arrays[place] + sign * step, *arrays[place + 1 :])
                for sign in (-1e-5, 1e-5)
            )
            slope = ((after - before) * direction).sum() / 2e-5
            scale = np.linalg.norm(gradient) * np.linalg.norm(step)
            assert abs((gradient * step).sum() - slope) < 1e-5 * scale


@pytest.mark.parametrize(
    ("shape", "out", "side", "stride"),
    [
        ((2, 6, 9, 12), 16, 3, 1),
        ((1, 32, 16, 16), 3, 3, 1),
        ((3, 5, 7, 10), 8, 1, 1),
        ((2, 16, 8, 9), 24, 3, 2),
        ((1, 3, 1, 1), 4, 3, 1),
        ((1, 3, 1, 7), 4, 3, 2),
        ((2, 4, 5, 2), 3, 3, 2),
        ((4, 64, 16, 16), 64, 3, 1),
    ],
)
def test_convolution(shape, out, side, stride):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(size) for size in (shape, (out, shape[1], side, side), (out,))]
    arrays[1] /= np.sqrt(shape[1] * side**2)
    found, gradients, direction = answers(kernels.convolution(stride), arrays)
    np.testing.assert_allclose(found, convolved(*arrays, stride), atol=1e-5)
    assert_gradients(lambda x, w, b: convolved(x, w, b, stride), arrays, gradients, direction)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 8, 3, 5), 2), ((1, 4, 64, 33), 1), ((3, 12, 1, 5), 6)]
)
def test_normalization(shape, groups, silu):
    rng = np.random.default_rng(0)
    columns = (shape[0], groups, shape[1] // groups)
    arrays = [
        rng.standard_normal(shape) * 3 + 5,
        rng.standard_normal(columns),
        rng.standard_normal(columns),
    ]
    found, gradients, direction = answers(kernels.normalization(silu), arrays)
    np.testing.assert_allclose(found, normalized(*arrays, silu), atol=1e-5)
    assert_gradients(lambda x, a, b: normalized(x, a, b, silu), arrays, gradients, direction)


@pytest.mark.parametrize("shape", [(2, 3, 5, 33), (1, 1, 1, 3), (3, 2, 7, 100)])
def test_softmax(shape):
    """Of scores and a bias of each image, a part of which is masked; the bias gets no gradient."""
    rng = np.random.default_rng(0)
    x, b = 3 * rng.standard_normal(shape), rng.standard_normal((shape[0], shape[3]))
    b[:, 1::3] = -1e4

    def softmax(x):
        u = np.exp(x + b[:, None, None] - (x + b[:, None, None]).max(-1, keepdims=True))
        return u / u.sum(-1, keepdims=True)

    found, gradients, direction = answers(kernels.softmax(), [x, b])
    np.testing.assert_allclose(found, softmax(x), atol=1e-6)
    assert_gradients(softmax, [x], gradients[:1], direction)
    assert not gradients[1].any()


def test_silu_from_end_to_end():
    """Of -100 to 100: where the factor is 0, SiLU of the offset is what remains."""
    u = np.linspace(-100, 100, 4001).astype(np.float32)
    zeros = np.zeros((1, u.size, 1), np.float32)
    found = kernels.normalization(True)(
        Tensor(zeros[..., None]), Tensor(zeros), Tensor(u.reshape(zeros.shape))
    )
    exact = u.astype(np.float64) / (1 + np.exp(-u.astype(np.float64)))
    np.testing.assert_allclose(found.asnumpy().reshape(-1), exact, rtol=1e-6, atol=1e-35)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(bad):
    """A step that goes wrong has to be seen as such."""
    x = np.ones((1, 4, 6, 6), np.float32)
    x[0, 1, 2, 3] = bad
    ones = Tensor(np.ones((1, 2, 2), np.float32))
    assert np.isnan(kernels.normalization(True)(Tensor(x), ones, ones).asnumpy()).any()
    assert np.isnan(
        kernels.softmax()(Tensor(x), Tensor(np.zeros((1, 6), np.float32))).asnumpy()[0, 1, 2]
    ).all()
    rows = Tensor(np.concatenate((x, 2 * np.ones_like(x))).reshape(2, -1))
    found = kernels.quantile()(rows, Tensor(np.array([0, x.size - 1, 0], np.float32))).asnumpy()
    np.testing.assert_array_equal(found, [[bad], [2]])
    weight, bias = Tensor(np.ones((4, 4, 3, 3), np.float32)), Tensor(np.zeros(4, np.float32))
    assert not np.isfinite(
        kernels.convolution(1)(Tensor(x), weight, bias).asnumpy()[0, :, 2, 3]
    ).any()


def test_the_same_bits_every_time():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(size) for size in ((3, 20, 17, 13), (24, 20, 3, 3), (24,))]
    first, second = (answers(kernels.convolution(1), arrays) for _ in range(2))
    for one, other in zip([first[0], *first[1]], [second[0], *second[1]], strict=True):
        np.testing.assert_array_equal(one, other)


def test_built_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = kernels.library.__wrapped__()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [built]
    before = built.stat().st_mtime_ns
    monkeypatch.setenv("PATH", "")  # a second time needs no compiler
    assert kernels.library.__wrapped__() == built
    assert built.stat().st_mtime_ns == before


def test_one_that_cannot_be_loaded_is_built_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built = tmp_path / "imagen-cascade" / kernels.library().name
    built.parent.mkdir()
    built.touch()
    assert kernels.library.__wrapped__() == built
    assert built.stat().st_size == kernels.library().stat().st_size


def test_other_strides_are_refused():
    with pytest.raises(ValueError, match="stride 3: 1 and 2 are known"):
        kernels.convolution(3)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(kernels, "mkdtemp", lambda prefix: str(tmp_path))
    assert kernels.library.__wrapped__().parent == tmp_path
    assert not caplog.text


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ("compiler", "install g\\+\\+"),
        ("library", "cannot open"),
        ("version", "is oneDNN 3.10, not"),
    ],
)
def test_without_them_it_is_said_and_the_answer_is_none(
    lacking, said, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "mkdtemp", lambda prefix: str(tmp_path / "own"))
    if lacking == "compiler":
        monkeypatch.setenv("PATH", "")
    if lacking == "library":
        monkeypatch.setattr(
            kernels.mindspore, "__file__", str(tmp_path / "mindspore" / "__init__.py")
        )
    if lacking == "version":
        monkeypatch.setattr(kernels, "ONEDNN", (3, 9))
    with caplog.at_level(logging.WARNING, "cascade"):
        assert kernels.library.__wrapped__() is None
    assert re.search(rf"kernels not built \(.*{said}", caplog.text)
    assert not list(tmp_path.rglob("*.so"))
