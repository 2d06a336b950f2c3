"""The row of samples: epochs are permutations, windows bound what is open, shares are kept, and
nothing but the step and the seed counts.
"""

import numpy as np
import pytest

from pipeline.data.order import BLOCK, Order, quotas

SHARDS = [5, 3, 0, 7, 9]  # samples of each


def row(order: Order, batch: int, places: int) -> np.ndarray:
    """The first `places` of the endless row, put together from batches."""
    return np.concatenate([order.ids(step, batch) for step in range(-(-places // batch))])[:places]


@pytest.mark.parametrize("sizes", [[1], [2], [0, 7, 0], SHARDS, [1] * 40, [100, 1, 1]])
@pytest.mark.parametrize("batch", [1, 5, 64])
@pytest.mark.parametrize("window", [1, 2, 100])
def test_every_epoch_is_a_permutation(sizes: list[int], batch: int, window: int) -> None:
    total = sum(sizes)
    epochs = row(Order(3, [sizes], [1], window), batch, 4 * total).reshape(4, total)
    assert (np.sort(epochs, axis=1) == np.arange(total)).all()


@pytest.mark.parametrize("sizes", [[SHARDS], [SHARDS, [4, 2], [50]]])
def test_the_row_does_not_depend_on_the_batch(sizes: list[list[int]]) -> None:
    order = Order(3, sizes, [1] * len(sizes), 2)
    rows = [row(order, batch, 300) for batch in (1, 4, 24, 50, 300)]
    assert all((other == rows[0]).all() for other in rows)


@pytest.mark.parametrize("sizes", [[[100] * 10], [[100] * 10, [30] * 9]])
def test_a_step_is_the_same_whatever_was_asked_before(sizes: list[list[int]]) -> None:
    wanted = Order(0, sizes, [1] * len(sizes), 2).ids(1_000_000, 32)
    assert wanted.dtype == np.int64
    assert wanted.shape == (32,)
    order = Order(0, sizes, [1] * len(sizes), 2)
    for step in (5, 1_000_000, 3):
        ids = order.ids(step, 32)
        assert (ids == wanted).all() == (step == 1_000_000)


def test_a_window_is_all_of_a_few_shards_and_then_the_next() -> None:
    """The samples of two shards at a time are mixed, and each shard is read in one stretch of the
    epoch.
    """
    order = Order(1, [[10] * 7], [1], window=2)
    for epoch in row(order, 7, 280).reshape(4, 70):
        windows = [set((part // 10).tolist()) for part in np.split(epoch, [20, 40, 60])]
        assert [len(shards) for shards in windows] == [2, 2, 2, 1]
        assert set.union(*windows) == set(range(7))
    first = row(order, 7, 20) // 10
    assert (np.diff(first) != 0).sum() > 3  # mixed, not one after the other


def test_the_result_belongs_to_the_caller() -> None:
    order = Order(0, [[10]], [1], 1)
    order.ids(0, 10)[:] = 0
    assert (np.sort(order.ids(0, 10)) == np.arange(10)).all()


def test_seeds_and_epochs_differ() -> None:
    orders = {
        tuple(epoch)
        for seed in range(5)
        for epoch in row(Order(seed, [[25, 25]], [1], 1), 50, 250).reshape(5, 50)
    }
    assert len(orders) == 25


def test_the_order_is_part_of_a_runs_identity() -> None:
    assert Order(0, [[3, 3, 2]], [1], 2).ids(0, 8).tolist() == [6, 3, 5, 7, 4, 1, 0, 2]
    assert Order(0, [[3, 3, 2], [4]], [3, 1], 2).ids(0, 8).tolist() == [6, 3, 5, 7, 4, 8, 1, 0]


def test_shares_are_kept_in_every_block() -> None:
    """Whatever the sizes; and within its share a set goes through its epochs as it would alone."""
    sizes, shares = [[40, 20], [1000], [7]], [1, 2.5, 0.01]
    order = Order(5, sizes, shares, 1)
    ids = row(order, 1000, 3 * BLOCK)
    which = np.searchsorted([60, 1060], ids, side="right")
    for block in which.reshape(3, BLOCK):
        assert np.bincount(block).tolist() == quotas(shares)
    assert (ids[which == 0][:600].reshape(10, 60).sum(axis=1) == sum(range(60))).all()
    assert (ids[which == 0] == order.of_set(0, np.arange((which == 0).sum()))).all()
    assert not (which.reshape(3, BLOCK)[0] == which.reshape(3, BLOCK)[1]).all()


@pytest.mark.parametrize("shares", [[1], [1, 1, 1], [0.7, 0.3], [1e-4, 1], [5, 3, 1, 1, 1, 1, 1]])
def test_quotas_are_the_shares_as_near_as_whole_numbers_get(shares: list[float]) -> None:
    found = quotas(shares)
    assert sum(found) == BLOCK
    assert np.abs(np.array(found) - np.array(shares) / sum(shares) * BLOCK).max() < 1


@pytest.mark.parametrize(
    ("sizes", "shares"), [([[0]], [1]), ([[1], [0, 0]], [1, 1]), ([[1], [1]], [1, 1e-9])]
)
def test_a_set_that_could_give_nothing(sizes: list[list[int]], shares: list[float]) -> None:
    with pytest.raises(ValueError, match="data set"):
        Order(0, sizes, shares, 1)


def test_replacements_are_drawn_for_each_place() -> None:
    order = Order(1, [[10**9]], [1], 1)
    draws = [
        order.replacement(step, place, attempt)
        for step in range(4)
        for place in range(4)
        for attempt in range(4)
    ]
    assert len(set(draws)) == 64
    assert draws[-1] == order.replacement(3, 3, 3)
    small = Order(1, [[2], [1]], [1, 1], 1)
    assert {small.replacement(step, 0, 0) for step in range(50)} == {0, 1, 2}
