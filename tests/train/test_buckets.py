"""Parameters as vectors: nothing is lost or moved, however they are grouped and cut."""

import numpy as np
import pytest
from mindspore import Parameter, Tensor

from pipeline.train.buckets import buckets

SHAPES = [(3, 4), (), (5,), (1, 2, 2), (20,)]


def parameters(seed: int) -> list[Parameter]:
    rng = np.random.default_rng(seed)
    return [
        Parameter(Tensor(rng.normal(size=s).astype(np.float32)), name=f"p{n}")
        for n, s in enumerate(SHAPES)
    ]


@pytest.mark.parametrize(
    ("largest", "groups"),
    [
        (13, [["p0", "p1"], ["p2", "p3"], ["p4"]]),
        (4, [["p0"], ["p1"], ["p2"], ["p3"], ["p4"]]),
        (10**6, [["p0", "p1", "p2", "p3", "p4"]]),
    ],
)
def test_neighbours_are_together_up_to_a_size(largest: int, groups: list[list[str]]) -> None:
    found = buckets(parameters(0), 1, largest)
    assert [[parameter.name for parameter in bucket.parameters] for bucket in found] == groups


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_rank_can_have_an_equal_share(world: int) -> None:
    for bucket in buckets(parameters(0), world, 13):
        assert bucket.size % world == 0
        assert 0 <= bucket.padding < world
        assert bucket.size - bucket.padding == sum(
            parameter.size for parameter in bucket.parameters
        )


@pytest.mark.parametrize("world", [1, 3])
def test_what_is_written_is_what_was_read(world: int) -> None:
    mine, other = parameters(0), parameters(1)
    for a, b in zip(buckets(mine, world), buckets(other, world), strict=True):
        vector = a.read()
        assert not vector[a.size - a.padding :].any()
        arrays = a.views(vector)
        np.testing.assert_array_equal(a.join(arrays), vector)
        b.write(vector)
    for p, q in zip(mine, other, strict=True):
        np.testing.assert_array_equal(p.asnumpy(), q.asnumpy())
        np.testing.assert_array_equal(p.asnumpy(), arrays[p.name])
