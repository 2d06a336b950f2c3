"""Draws depend on seed, purpose and counters only."""

import itertools

import numpy as np
import pytest

from pipeline.rng import (
    PURPOSES,
    Draws,
    generator,
    sampling_noise,
    unit_noise,
)

LARGEST = 2**64 - 1


def test_equal_keys_give_equal_draws() -> None:
    for counters in ((), (5,), (5, 6), (5, 6, 7)):
        a, b = (generator(1, "noise", *counters).standard_normal(100) for _ in range(2))
        np.testing.assert_array_equal(a, b)


def test_every_part_of_the_key_changes_the_draws() -> None:
    seeds = (0, 1, 2**32, 2**63, 2**63 + 1, LARGEST - 1, LARGEST)
    counters = (
        (),
        (1,),
        (0, 1),
        (0, 0, 1),
        (2**32,),
        (2**63,),
        (2**63 + 1,),
        (LARGEST,),
        (LARGEST, LARGEST, LARGEST),
    )
    keys = list(itertools.product(seeds, PURPOSES, counters))
    draws = {generator(seed, purpose, *words).bytes(16) for seed, purpose, words in keys}
    assert len(draws) == len(keys)


def test_counters_left_out_are_zero() -> None:
    assert generator(1, "crop", 4).bytes(16) == generator(1, "crop", 4, 0, 0).bytes(16)


def test_adjacent_streams_do_not_overlap() -> None:
    first = generator(0, "noise", 0).integers(0, 2**63, 100_000)
    second = generator(0, "noise", 1).integers(0, 2**63, 100_000)
    assert np.intersect1d(first, second).size == 0


def test_draws_do_not_depend_on_other_draws() -> None:
    alone = generator(3, "time", 10).random(4)
    other = generator(3, "noise", 10)
    other.random(1000)
    np.random.default_rng().random(10)
    again = generator(3, "time", 10)
    generator(3, "time", 9).random(7)
    np.testing.assert_array_equal(again.random(4), alone)


def test_purposes_have_distinct_numbers() -> None:
    assert len(set(PURPOSES.values())) == len(PURPOSES)
    with pytest.raises(KeyError):
        generator(0, "nosie")


def test_noise_of_an_image_does_not_depend_on_its_batch() -> None:
    batch = sampling_noise(3, [4, 9], (3, 8, 8), 0)
    assert batch.dtype == np.float32
    assert batch.shape == (2, 3, 8, 8)
    np.testing.assert_array_equal(sampling_noise(3, [9], (3, 8, 8), 0)[0], batch[1])


def test_threads_do_not_change_the_noise() -> None:
    streams = [generator(0, "noise", 0, i) for i in range(8)]
    expected = [generator(0, "noise", 0, i).standard_normal((3, 4), np.float32) for i in range(8)]
    np.testing.assert_array_equal(unit_noise(streams, (3, 4)), np.stack(expected))


def test_a_level_and_its_noise_share_a_stream() -> None:
    draws = Draws(seed=3, step=7, positions=[0, 5])
    uniform, noise = draws.uniform_and_noise("augment", (2, 3))
    streams = draws.streams("augment")
    assert uniform.tolist() == [stream.random() for stream in streams]
    np.testing.assert_array_equal(noise, unit_noise(streams, (2, 3)))
