"""The order of samples: epochs are permutations, a group of shards is read at a time, shares are
exact, and the samples of a step depend on the seed and the step alone.
"""

import numpy as np
import pytest

from pipeline.data.order import BLOCK, Order, quotas

SHARDS = [5, 3, 0, 7, 9]  # samples of each


def sequence(order: Order, batch: int, num: int) -> np.ndarray:
    """The first `num` samples, from batches."""
    return np.concatenate([order.ids(step, batch) for step in range(-(-num // batch))])[:num]


@pytest.mark.parametrize("sizes", [[1], [2], [0, 7, 0], SHARDS, [1] * 40, [100, 1, 1]])
@pytest.mark.parametrize("batch", [1, 5, 64])
@pytest.mark.parametrize("shuffle_shards", [1, 2, 100])
def test_every_epoch_is_a_permutation(sizes: list[int], batch: int, shuffle_shards: int) -> None:
    total = sum(sizes)
    epochs = sequence(Order(3, [sizes], [1], shuffle_shards), batch, 4 * total).reshape(4, total)
    assert (np.sort(epochs, axis=1) == np.arange(total)).all()


@pytest.mark.parametrize("sizes", [[SHARDS], [SHARDS, [4, 2], [50]]])
def test_the_sequence_does_not_depend_on_the_batch(sizes: list[list[int]]) -> None:
    order = Order(3, sizes, [1] * len(sizes), 2)
    sequences = [sequence(order, batch, 300) for batch in (1, 4, 24, 50, 300)]
    assert all((other == sequences[0]).all() for other in sequences)


@pytest.mark.parametrize("sizes", [[[100] * 10], [[100] * 10, [30] * 9]])
def test_a_step_does_not_depend_on_earlier_calls(sizes: list[list[int]]) -> None:
    expected = Order(0, sizes, [1] * len(sizes), 2).ids(1_000_000, 32)
    assert expected.dtype == np.int64
    assert expected.shape == (32,)
    order = Order(0, sizes, [1] * len(sizes), 2)
    for step in (5, 1_000_000, 3):
        ids = order.ids(step, 32)
        assert (ids == expected).all() == (step == 1_000_000)


def test_shards_are_shuffled_in_groups() -> None:
    """The samples of two shards at a time are mixed, and each shard is read once in an epoch."""
    order = Order(1, [[10] * 7], [1], shuffle_shards=2)
    for epoch in sequence(order, 7, 280).reshape(4, 70):
        groups = [set((part // 10).tolist()) for part in np.split(epoch, [20, 40, 60])]
        assert [len(shards) for shards in groups] == [2, 2, 2, 1]
        assert set.union(*groups) == set(range(7))
    first = sequence(order, 7, 20) // 10
    assert (np.diff(first) != 0).sum() > 3  # mixed, not one after the other


def test_the_result_belongs_to_the_caller() -> None:
    order = Order(0, [[10]], [1], 1)
    order.ids(0, 10)[:] = 0
    assert (np.sort(order.ids(0, 10)) == np.arange(10)).all()


def test_seeds_and_epochs_differ() -> None:
    orders = {
        tuple(epoch)
        for seed in range(5)
        for epoch in sequence(Order(seed, [[25, 25]], [1], 1), 50, 250).reshape(5, 50)
    }
    assert len(orders) == 25


def test_the_order_of_a_seed_is_fixed() -> None:
    assert Order(0, [[3, 3, 2]], [1], 2).ids(0, 8).tolist() == [6, 3, 5, 7, 4, 1, 0, 2]
    assert Order(0, [[3, 3, 2], [4]], [3, 1], 2).ids(0, 8).tolist() == [6, 3, 5, 7, 4, 8, 1, 0]


def test_every_block_has_exact_shares() -> None:
    """For all sizes; and the epochs of a set are those that it has alone."""
    sizes, shares = [[40, 20], [1000], [7]], [1, 2.5, 0.01]
    order = Order(5, sizes, shares, 1)
    ids = sequence(order, 1000, 3 * BLOCK)
    sets = np.searchsorted([60, 1060], ids, side="right")
    blocks = sets.reshape(3, BLOCK)
    for block in blocks:
        assert np.bincount(block).tolist() == quotas(shares)
    first_set = ids[sets == 0]
    assert (first_set[:600].reshape(10, 60).sum(axis=1) == sum(range(60))).all()
    assert (first_set == order.set_ids(0, np.arange(len(first_set)))).all()
    assert not (blocks[0] == blocks[1]).all()


@pytest.mark.parametrize("shares", [[1], [1, 1, 1], [0.7, 0.3], [1e-4, 1], [5, 3, 1, 1, 1, 1, 1]])
def test_quotas_are_the_shares_within_one_position(shares: list[float]) -> None:
    result = quotas(shares)
    assert sum(result) == BLOCK
    assert np.abs(np.array(result) - np.array(shares) / sum(shares) * BLOCK).max() < 1


@pytest.mark.parametrize(
    ("sizes", "shares"), [([[0]], [1]), ([[1], [0, 0]], [1, 1]), ([[1], [1]], [1, 1e-9])]
)
def test_a_set_without_samples_or_positions_is_refused(
    sizes: list[list[int]], shares: list[float]
) -> None:
    with pytest.raises(ValueError, match="data set"):
        Order(0, sizes, shares, 1)


def test_replacements_are_drawn_for_each_position() -> None:
    order = Order(1, [[10**9]], [1], 1)
    draws = [
        order.replacement(step, position, attempt)
        for step in range(4)
        for position in range(4)
        for attempt in range(4)
    ]
    assert len(set(draws)) == 64
    assert draws[-1] == order.replacement(3, 3, 3)
    small = Order(1, [[2], [1]], [1, 1], 1)
    assert {small.replacement(step, 0, 0) for step in range(50)} == {0, 1, 2}
