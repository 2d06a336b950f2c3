"""The C++ kernels against their definitions in float64, at sizes that blocks and threads do not
divide.
"""

import logging
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor, value_and_grad

from pipeline import kernels, runtime
from pipeline.kernels.build import build_library, onednn_library

pytestmark = pytest.mark.skipif(
    kernels.library() is None, reason="the kernels are not built here: no C++ compiler"
)


def convolved(x: np.ndarray, w: np.ndarray, b: np.ndarray, stride: int) -> np.ndarray:
    """The definition: a sum of shifted images, zero-padded, over the positions of the kernel."""
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


def normalized(x: np.ndarray, a: np.ndarray, b: np.ndarray, silu: bool) -> np.ndarray:
    grouped = x.reshape(*a.shape[:2], -1)
    z = (grouped - grouped.mean(2, keepdims=True)) / np.sqrt(
        grouped.var(2, keepdims=True) + kernels.EPSILON
    )
    u = z.reshape(*a.shape, -1) * a[..., None] + b[..., None]
    return (u / (1 + np.exp(-u)) if silu else u).reshape(x.shape)


def run(
    operator: Callable[..., Tensor], arrays: Sequence[np.ndarray]
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """The output, the gradients of its product with a random direction, and that direction."""
    tensors = [Tensor(array.astype(np.float32)) for array in arrays]
    direction = np.random.default_rng(1).standard_normal(operator(*tensors).shape)

    def along(*inputs: Tensor) -> Tensor:
        return (operator(*inputs) * Tensor(direction.astype(np.float32))).sum()

    _, gradients = runtime.jit(value_and_grad(along, tuple(range(len(tensors)))))(*tensors)
    return operator(*tensors).asnumpy(), [gradient.asnumpy() for gradient in gradients], direction


def assert_gradients(
    definition: Callable[..., np.ndarray],
    arrays: Sequence[np.ndarray],
    gradients: Sequence[np.ndarray],
    direction: np.ndarray,
) -> None:
    """Each gradient against finite differences of the definition, in a few random directions."""
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
def test_convolution(shape: tuple[int, ...], out: int, side: int, stride: int) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(size) for size in (shape, (out, shape[1], side, side), (out,))]
    arrays[1] /= np.sqrt(shape[1] * side**2)
    output, gradients, direction = run(kernels.convolution(stride), arrays)
    np.testing.assert_allclose(output, convolved(*arrays, stride), atol=1e-5)
    assert_gradients(lambda x, w, b: convolved(x, w, b, stride), arrays, gradients, direction)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 8, 3, 5), 2), ((1, 4, 64, 33), 1), ((3, 12, 1, 5), 6)]
)
def test_normalization(shape: tuple[int, ...], groups: int, silu: bool) -> None:
    rng = np.random.default_rng(0)
    columns = (shape[0], groups, shape[1] // groups)
    arrays = [
        rng.standard_normal(shape) * 3 + 5,
        rng.standard_normal(columns),
        rng.standard_normal(columns),
    ]
    output, gradients, direction = run(kernels.normalization(silu), arrays)
    np.testing.assert_allclose(output, normalized(*arrays, silu), atol=1e-5)
    assert_gradients(lambda x, a, b: normalized(x, a, b, silu), arrays, gradients, direction)


@pytest.mark.parametrize("shape", [(2, 3, 5, 33), (1, 1, 1, 3), (3, 2, 7, 100)])
def test_softmax(shape: tuple[int, ...]) -> None:
    """With a bias per image that masks a part; the bias has no gradient."""
    rng = np.random.default_rng(0)
    x = 3 * rng.standard_normal(shape)
    b = rng.standard_normal((shape[0], shape[3]))
    b[:, 1::3] = -1e4

    def softmax(x: np.ndarray) -> np.ndarray:
        u = np.exp(x + b[:, None, None] - (x + b[:, None, None]).max(-1, keepdims=True))
        return u / u.sum(-1, keepdims=True)

    output, gradients, direction = run(kernels.softmax(), [x, b])
    np.testing.assert_allclose(output, softmax(x), atol=1e-6)
    assert_gradients(softmax, [x], gradients[:1], direction)
    assert not gradients[1].any()


def test_silu_over_its_whole_range() -> None:
    """From -100 to 100: with a factor of 0 the output is SiLU of the offset."""
    u = np.linspace(-100, 100, 4001).astype(np.float32)
    zeros = np.zeros((1, u.size, 1), np.float32)
    output = kernels.normalization(True)(
        Tensor(zeros[..., None]), Tensor(zeros), Tensor(u.reshape(zeros.shape))
    )
    exact = u.astype(np.float64) / (1 + np.exp(-u.astype(np.float64)))
    np.testing.assert_allclose(output.asnumpy().reshape(-1), exact, rtol=1e-6, atol=1e-35)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_reach_the_output(bad: float) -> None:
    """So that a diverged step is seen as such."""
    x = np.ones((1, 4, 6, 6), np.float32)
    x[0, 1, 2, 3] = bad
    ones = Tensor(np.ones((1, 2, 2), np.float32))
    assert np.isnan(kernels.normalization(True)(Tensor(x), ones, ones).asnumpy()).any()
    assert np.isnan(
        kernels.softmax()(Tensor(x), Tensor(np.zeros((1, 6), np.float32))).asnumpy()[0, 1, 2]
    ).all()
    rows = Tensor(np.concatenate((x, 2 * np.ones_like(x))).reshape(2, -1))
    output = kernels.quantile()(rows, Tensor(np.array([0, x.size - 1, 0], np.float32))).asnumpy()
    np.testing.assert_array_equal(output, [[bad], [2]])
    weight, bias = Tensor(np.ones((4, 4, 3, 3), np.float32)), Tensor(np.zeros(4, np.float32))
    assert not np.isfinite(
        kernels.convolution(1)(Tensor(x), weight, bias).asnumpy()[0, :, 2, 3]
    ).any()


def test_results_repeat_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(size) for size in ((3, 20, 17, 13), (24, 20, 3, 3), (24,))]
    first, second = (run(kernels.convolution(1), arrays) for _ in range(2))
    for one, other in zip([first[0], *first[1]], [second[0], *second[1]], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which the library is built."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A g++ that copies the library which `kernels.library` has compiled: the same, in no time."""
    script = tmp_path / "bin" / "g++"
    script.parent.mkdir()
    copy = f'cp "{kernels.library()}" "$2"'
    script.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n{copy}\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)


@pytest.mark.usefixtures("compiler")
def test_the_library_is_built_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build_library(onednn_library())
    assert [file for file in cache.rglob("*") if file.is_file()] == [path]
    built_at = path.stat().st_mtime_ns

    monkeypatch.setenv("PATH", "")  # the second time needs no compiler
    assert build_library(onednn_library()) == path
    assert path.stat().st_mtime_ns == built_at


@pytest.mark.usefixtures("compiler")
def test_a_library_that_cannot_be_loaded_is_built_again(cache: Path) -> None:
    path = cache / "imagen-cascade" / kernels.library().name
    path.parent.mkdir(parents=True)
    path.touch()
    assert build_library(onednn_library()) == path
    assert path.stat().st_size == kernels.library().stat().st_size


def test_other_strides_are_refused() -> None:
    with pytest.raises(ValueError, match="stride: 3 is not supported; use 1 or 2"):
        kernels.convolution(3)


@pytest.mark.usefixtures("compiler")
def test_without_a_cache_the_library_is_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = build_library(onednn_library())
    assert path.is_relative_to(tmp_path)
    assert not caplog.text


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("compiler", "install g\\+\\+"),
        ("library", "cannot open"),
        ("version", "is oneDNN 3.10, not 3.9"),
    ],
)
def test_without_kernels_a_warning_says_why(
    missing: str,
    message: str,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if missing == "compiler":
        monkeypatch.setenv("PATH", "")
    onednn = tmp_path / "libdnnl.so.3" if missing == "library" else onednn_library()
    version = (3, 9) if missing == "version" else (3, 10)

    with caplog.at_level(logging.WARNING, "cascade"):
        assert build_library(onednn, version) is None
    assert re.search(rf"kernels not built \(.*{message}", caplog.text)
    assert not list(tmp_path.rglob("*.so"))
