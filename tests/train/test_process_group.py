"""What ranks broadcast_bytes each other, over a network of one process that holds what the others said."""

import struct
from collections.abc import Callable

import numpy as np
import pytest
from mindspore import Tensor
from mindspore import dtype as mstype

from pipeline.errors import JobError
from pipeline.train import process_group
from pipeline.train.process_group import ProcessGroup, as_bytes, as_numbers


class Wired(ProcessGroup):
    """Rank `rank`, whose network answers as `network` says: all that was sent, in order of rank ->
    what comes back.
    """

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

    def broadcast_tensor(self, flat: Tensor) -> Tensor:
        return Tensor(self.said(flat)[0])


def vectors(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=length).astype(np.float32) for length in (12, 1, 5)]


def test_a_sum_of_vectors_and_numbers() -> None:
    """A call for each vector; the numbers are behind the last one."""
    mine, theirs = vectors(0), vectors(1)

    class Both(Wired):
        def said(self, mine: Tensor) -> list[np.ndarray]:
            other = [*theirs[:2], np.append(theirs[2], np.float32([0.5, 1.0]))][self.calls]
            self.calls += 1
            return [other, mine.asnumpy()]

    ranks = Both(1, [np.empty(0)])
    sums, numbers = ranks.sum(list(map(Tensor, mine)), (0.25, False))
    assert numbers == [0.75, 1.0]
    assert ranks.calls == 3
    for total, a, b in zip(sums, mine, theirs, strict=True):
        np.testing.assert_array_equal(total.asnumpy(), a + b)


def test_what_is_not_finite_on_one_is_so_for_all() -> None:
    for bad in (np.nan, np.inf, -np.inf):
        (mine, *_), (theirs, *_) = vectors(0), vectors(1)
        theirs[3] = bad
        sums, _ = Wired(0, [np.append(theirs, np.float32(0))]).sum([Tensor(mine)], (1.0,))
        assert np.flatnonzero(~np.isfinite(sums[0].asnumpy())).tolist() == [3]


def test_rank_0_gives_all_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = np.array([[np.nan, -0.0], [1e-45, np.inf]], np.float32)
    odd.view(np.uint32)[0, 0] |= 0x123  # a NaN that carries something
    for theirs, kind in (
        (odd, mstype.float32),
        (np.array(7, np.int32), mstype.int32),
        (np.arange(3, dtype=np.float16), mstype.float16),
    ):
        told = Wired(1, [as_numbers(theirs.tobytes()).asnumpy()]).broadcast(
            None, theirs.shape, kind
        )
        assert (told.tobytes(), told.dtype, told.shape) == (
            theirs.tobytes(),
            theirs.dtype,
            theirs.shape,
        )


def test_what_is_long_is_told_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "PIECE", 12)
    long = np.arange(7, dtype=np.float32)

    class First(ProcessGroup):
        calls = 0

        def broadcast_tensor(self, flat: Tensor) -> Tensor:
            self.calls += 1
            return flat

    ranks = First(0, 2)
    np.testing.assert_array_equal(ranks.broadcast(long, (7,), mstype.float32), long)
    assert ranks.calls == 3


@pytest.mark.parametrize("length", [0, 1, 2, 8, 255])
def test_bytes_travel_as_small_whole_numbers(length: int) -> None:
    data = bytes(np.random.default_rng(length).integers(0, 256, length, np.uint8))
    numbers = as_numbers(data)
    assert numbers.dtype == mstype.float32
    assert as_bytes(numbers, length) == data


def test_numbers_of_rank_0_are_told() -> None:
    theirs = as_numbers(struct.pack("<2q", 2**40 + 1, -1)).asnumpy()
    assert Wired(1, [theirs]).broadcast_ints(0, 0) == (2**40 + 1, -1)
    assert Wired(0, [theirs]).broadcast_ints(5, 6) == (5, 6)


@pytest.mark.parametrize(
    ("digests", "odd"),
    [
        ("aa", []),
        ("ab", [1]),
        ("aaaa", []),
        ("abaa", [1]),
        ("baaa", [0]),
        ("abca", [1, 2]),
        ("abbb", [0]),
    ],
)
def test_ranks_that_differ_are_named(digests: str, odd: list[int]) -> None:
    every = [letter.encode() * 8 for letter in digests]
    for rank, mine in enumerate(every):
        others = [as_numbers(digest).asnumpy() for digest in every[:rank] + every[rank + 1 :]]
        assert Wired(rank, others).mismatching_ranks(mine) == odd


def test_a_rank_that_is_gone_is_said_in_one_line() -> None:
    class Alone(ProcessGroup):
        def all_reduce(self, flat: Tensor) -> Tensor:
            raise RuntimeError("Connection reset\n\n----- and a page of it")

    with pytest.raises(JobError) as error:
        Alone(2, 4).sum([Tensor(vectors(0)[0])], ())
    assert str(error.value) == (
        "rank 2 of 4 has lost the others (Connection reset): look in their logs for the one that ended first; the same "
        "command goes on from the last checkpoint"
    )


def silent(ranks: ProcessGroup) -> list[Callable[[], object]]:
    mine = Tensor(vectors(0)[0])
    return [
        lambda: ranks.sum([mine], (1.0,)) == ([mine], [1.0]),
        lambda: ranks.gather(mine) is mine,
        lambda: ranks.broadcast(np.ones(2), (2,), mstype.float32).tolist() == [1, 1],
        lambda: ranks.broadcast_bytes(b"x") == b"x",
        lambda: ranks.broadcast_ints(1, 2) == (1, 2),
        lambda: ranks.mismatching_ranks(b"12345678") == [],
    ]


def test_one_process_asks_nobody() -> None:
    """Nothing is initialized here, so that any collective would fail."""
    assert all(question() for question in silent(ProcessGroup()))
