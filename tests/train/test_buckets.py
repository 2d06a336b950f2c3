"""Parameters as vectors: no value is lost or moved, however they are grouped and divided."""

import numpy as np
import pytest
from mindspore import Parameter, Tensor

from pipeline.train.buckets import make_buckets

SHAPES = [(3, 4), (), (5,), (1, 2, 2), (20,)]


def parameters(seed: int) -> list[Parameter]:
    rng = np.random.default_rng(seed)
    return [
        Parameter(Tensor(rng.normal(size=shape).astype(np.float32)), name=f"p{index}")
        for index, shape in enumerate(SHAPES)
    ]


@pytest.mark.parametrize(
    ("capacity", "groups"),
    [
        (13, [["p0", "p1"], ["p2", "p3"], ["p4"]]),
        (4, [["p0"], ["p1"], ["p2"], ["p3"], ["p4"]]),
        (10**6, [["p0", "p1", "p2", "p3", "p4"]]),
    ],
)
def test_neighbours_share_a_bucket_up_to_its_capacity(
    capacity: int, groups: list[list[str]]
) -> None:
    buckets = make_buckets(parameters(0), 1, capacity)
    assert [[parameter.name for parameter in bucket.parameters] for bucket in buckets] == groups


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
def test_a_bucket_can_be_divided_equally(num_shards: int) -> None:
    for bucket in make_buckets(parameters(0), num_shards, 13):
        num_elements = sum(parameter.size for parameter in bucket.parameters)
        assert bucket.size % num_shards == 0
        assert 0 <= bucket.padding < num_shards
        assert bucket.size - bucket.padding == num_elements


@pytest.mark.parametrize("num_shards", [1, 3])
def test_what_is_written_is_what_was_read(num_shards: int) -> None:
    source, target = parameters(0), parameters(1)
    (a,) = make_buckets(source, num_shards)
    (b,) = make_buckets(target, num_shards)
    vector = a.read()
    assert not vector[a.size - a.padding :].any()
    np.testing.assert_array_equal(a.join(a.views(vector)), vector)

    b.write(vector)
    for p, q in zip(source, target, strict=True):
        np.testing.assert_array_equal(p.asnumpy(), q.asnumpy())
        np.testing.assert_array_equal(p.asnumpy(), a.views(vector)[p.name])
