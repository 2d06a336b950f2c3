"""What ranks tell each other, over a network of one process that holds what the others said."""

import struct
from collections.abc import Callable

import numpy as np
import pytest
from mindspore import Parameter, Tensor
from mindspore import dtype as mstype

from pipeline.errors import JobError
from pipeline.train import collectives
from pipeline.train.collectives import Ranks, as_bytes, as_numbers, buckets


class Wired(Ranks):
    """Rank `rank`, whose network answers as `network` says: all that was sent, in order of rank -> what comes back."""

    def __init__(self, rank: int, others: list[np.ndarray]) -> None:
        super().__init__(rank, len(others) + 1)
        self.others, self.calls = others, 0

    def said(self, mine: Tensor) -> list[np.ndarray]:
        self.calls += 1
        return [*self.others[: self.rank], mine.asnumpy(), *self.others[self.rank :]]

    def all_reduce(self, flat: Tensor) -> Tensor:
        return Tensor(np.sum(self.said(flat), axis=0))

    def all_gather(self, flat: Tensor) -> Tensor:
        return Tensor(np.concatenate(self.said(flat)))

    def from_first(self, flat: Tensor) -> Tensor:
        return Tensor(self.said(flat)[0])


def gradients(seed: int) -> list[Parameter]:
    rng = np.random.default_rng(seed)
    return [
        Parameter(Tensor(rng.normal(size=shape).astype(np.float32)), name=f"g{number}")
        for number, shape in enumerate([(3, 4), (), (5,), (1, 2, 2)])
    ]


def flat(parameters: list[Parameter]) -> np.ndarray:
    return np.concatenate([parameter.asnumpy().reshape(-1) for parameter in parameters])


def test_a_sum_is_one_call_numbers_included() -> None:
    mine, theirs = gradients(0), gradients(1)
    expected = flat(mine) + flat(theirs)
    ranks = Wired(1, [np.append(flat(theirs), np.float32([0.5, 1.0]))])
    assert ranks.sum(mine, (0.25, False)) == [0.75, 1.0]
    np.testing.assert_array_equal(flat(mine), expected)
    assert ranks.calls == 1


def test_the_buckets_of_a_device_add_up_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "BUCKET", 13)
    mine = gradients(0)
    assert [[p.name for p in bucket] for bucket in buckets(mine)] == [["g0", "g1"], ["g2", "g3"]]
    expected = 2 * flat(mine)

    class Echo(Ranks):
        def all_reduce(self, flat: Tensor) -> Tensor:
            return flat * 2

    Echo(0, 2).sum_on_device(mine)
    np.testing.assert_array_equal(flat(mine), expected)


def test_what_is_not_finite_on_one_is_so_for_all() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        mine, theirs = gradients(0), flat(gradients(1))
        theirs[3] = bad
        Wired(0, [np.append(theirs, np.float32(0))]).sum(mine, (1.0,))
        assert np.flatnonzero(~np.isfinite(flat(mine))).tolist() == [3]


def test_rank_0_gives_all_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives, "BUCKET", 100)
    odd = np.array([np.nan, -0.0, 1e-45, np.inf], np.float32)
    odd.view(np.uint32)[0] |= 0x123  # a NaN that carries something
    theirs = [odd, np.array(7, np.int32), np.arange(3, dtype=np.float16)]
    mine = [Parameter(Tensor(np.zeros_like(array)), name=f"p{n}") for n, array in enumerate(theirs)]
    Wired(1, [as_numbers(b"".join(array.tobytes() for array in theirs)).asnumpy()]).broadcast(mine)
    for parameter, array in zip(mine, theirs, strict=True):
        assert parameter.asnumpy().tobytes() == array.tobytes()


@pytest.mark.parametrize("length", [0, 1, 2, 8, 255])
def test_bytes_travel_as_small_whole_numbers(length: int) -> None:
    data = bytes(np.random.default_rng(length).integers(0, 256, length, np.uint8))
    numbers = as_numbers(data)
    assert numbers.dtype == mstype.float32
    assert as_bytes(numbers, length) == data


def test_numbers_of_rank_0_are_told() -> None:
    theirs = as_numbers(struct.pack("<2q", 2**40 + 1, -1)).asnumpy()
    assert Wired(1, [theirs]).tell_numbers(0, 0) == (2**40 + 1, -1)
    assert Wired(0, [theirs]).tell_numbers(5, 6) == (5, 6)


@pytest.mark.parametrize(
    ("digests", "odd"),
    [("aa", []), ("ab", [1]), ("aaaa", []), ("abaa", [1]), ("baaa", [0]), ("abca", [1, 2]), ("abbb", [0])],
)
def test_ranks_that_differ_are_named(digests: str, odd: list[int]) -> None:
    every = [letter.encode() * 8 for letter in digests]
    for rank, mine in enumerate(every):
        others = [as_numbers(digest).asnumpy() for digest in every[:rank] + every[rank + 1 :]]
        assert Wired(rank, others).differing(mine) == odd


def test_a_rank_that_is_gone_is_said_in_one_line() -> None:
    class Alone(Ranks):
        def all_reduce(self, flat: Tensor) -> Tensor:
            raise RuntimeError("Connection reset\n\n----- and a page of it")

    with pytest.raises(JobError) as error:
        Alone(2, 4).sum(gradients(0), ())
    assert str(error.value) == (
        "rank 2 of 4 has lost the others (Connection reset): look in their logs for the one that ended first; the same "
        "command goes on from the last checkpoint"
    )


def silent(ranks: Ranks) -> list[Callable[[], object]]:
    mine = gradients(0)
    return [
        lambda: ranks.sum(mine, (1.0,)) == [1.0],
        lambda: ranks.broadcast(mine) is None,
        lambda: ranks.tell(b"x") == b"x",
        lambda: ranks.tell_numbers(1, 2) == (1, 2),
        lambda: ranks.differing(b"12345678") == [],
    ]


def test_one_process_asks_nobody() -> None:
    """Nothing is initialized here, so that any collective would fail."""
    assert all(question() for question in silent(Ranks()))
