import numpy as np
import pytest

from pipeline.data.order import permutation, replacement, sample_ids


def row(seed, batch, num_samples, places):
    """The first `places` of the endless row of samples, put together from batches."""
    steps = -(-places // batch)
    return np.concatenate([sample_ids(seed, step, batch, num_samples) for step in range(steps)])[:places]


@pytest.mark.parametrize("num_samples", [1, 2, 7, 24])
@pytest.mark.parametrize("batch", [1, 5, 8, 64])
def test_every_epoch_is_a_permutation(num_samples, batch):
    epochs = row(3, batch, num_samples, 4 * num_samples).reshape(4, num_samples)
    assert (np.sort(epochs, axis=1) == np.arange(num_samples)).all()


def test_the_row_does_not_depend_on_the_batch():
    rows = [row(3, batch, 23, 200) for batch in (1, 4, 23, 50, 200)]
    assert all((other == rows[0]).all() for other in rows)


def test_a_step_is_the_same_whatever_was_asked_before():
    wanted = sample_ids(0, 1_000_000, 32, 1000)
    permutation.cache_clear()
    for step in (5, 1_000_000, 3):
        again = sample_ids(0, step, 32, 1000)
        assert again.dtype == np.int64
        assert again.shape == (32,)
        if step == 1_000_000:
            assert (again == wanted).all()


def test_the_result_belongs_to_the_caller():
    sample_ids(0, 0, 10, 10)[:] = 0
    assert (np.sort(sample_ids(0, 0, 10, 10)) == np.arange(10)).all()


def test_seeds_and_epochs_differ():
    orders = {tuple(permutation(seed, epoch, 50)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_the_order_is_part_of_a_runs_identity():
    assert permutation(0, 0, 8).tolist() == [2, 0, 4, 1, 7, 5, 3, 6]


def test_replacements_are_drawn_for_each_place():
    draws = [
        replacement(1, step, place, attempt, 10**9) for step in range(4) for place in range(4) for attempt in range(4)
    ]
    assert len(set(draws)) == 64
    assert draws[-1] == replacement(1, 3, 3, 3, 10**9)
    assert {replacement(1, step, 0, 0, 3) for step in range(50)} == {0, 1, 2}
