"""Draws are a function of (seed, purpose, counters), and of nothing else."""

import itertools

import numpy as np
import pytest

from pipeline.rng import PURPOSES, generator

LARGEST = 2**64 - 1


def test_the_same_name_gives_the_same_draws() -> None:
    for counters in ((), (5,), (5, 6), (5, 6, 7)):
        a, b = (generator(1, "noise", *counters).standard_normal(100) for _ in range(2))
        np.testing.assert_array_equal(a, b)


def test_every_part_of_the_name_changes_the_draws() -> None:
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
    names = list(itertools.product(seeds, PURPOSES, counters))
    draws = {generator(seed, purpose, *words).bytes(16) for seed, purpose, words in names}
    assert len(draws) == len(names)


def test_counters_left_out_are_zero() -> None:
    assert generator(1, "crop", 4).bytes(16) == generator(1, "crop", 4, 0, 0).bytes(16)


def test_a_stream_does_not_run_into_its_neighbour() -> None:
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


def test_purposes_have_numbers_of_their_own() -> None:
    assert len(set(PURPOSES.values())) == len(PURPOSES)
    with pytest.raises(KeyError):
        generator(0, "nosie")
