"""Collectives of a rank whose network is simulated: what the other ranks send is given."""

import struct
from collections.abc import Callable

import numpy as np
import pytest
from mindspore import Tensor
from mindspore import dtype as mstype

from pipeline.errors import JobError
from pipeline.train.process_group import ProcessGroup, decode_bytes, encode_bytes
from tests.helpers.groups import EchoGroup


class SimulatedGroup(ProcessGroup):
    """Rank `rank`; `others` is what the other ranks send, in order of rank, in every call."""

    def __init__(self, rank: int, others: list[np.ndarray]) -> None:
        super().__init__(rank, len(others) + 1)
        self.others = others

    def sent(self, mine: Tensor) -> list[np.ndarray]:
        """What all ranks send, in order of rank."""
        return [*self.others[: self.rank], mine.asnumpy(), *self.others[self.rank :]]

    def all_reduce(self, vector: Tensor) -> Tensor:
        return Tensor(np.sum(self.sent(vector), axis=0))

    def all_gather(self, vector: Tensor) -> Tensor:
        return Tensor(np.concatenate(self.sent(vector)))

    def broadcast_tensor(self, vector: Tensor) -> Tensor:
        return Tensor(self.sent(vector)[0])


def vectors(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=length).astype(np.float32) for length in (12, 1, 5)]


def test_a_sum_of_vectors_and_scalars() -> None:
    """One call a vector; the scalars follow the last one."""
    mine, theirs = vectors(0), vectors(1)
    sent = iter([*theirs[:2], np.append(theirs[2], np.float32([0.5, 1.0]))])

    class OneOther(SimulatedGroup):
        def sent(self, mine: Tensor) -> list[np.ndarray]:
            return [next(sent), mine.asnumpy()]

    group = OneOther(1, [np.empty(0)])
    sums, scalars = group.all_reduce_sum(list(map(Tensor, mine)), (0.25, False))
    assert scalars == [0.75, 1.0]
    assert list(sent) == []
    for total, a, b in zip(sums, mine, theirs, strict=True):
        np.testing.assert_array_equal(total.asnumpy(), a + b)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_on_one_rank_is_not_finite_in_the_sum(bad: float) -> None:
    mine, theirs = vectors(0)[0], vectors(1)[0]
    theirs[3] = bad
    group = SimulatedGroup(0, [np.append(theirs, np.float32(0))])
    sums, _ = group.all_reduce_sum([Tensor(mine)], (1.0,))
    assert np.flatnonzero(~np.isfinite(sums[0].asnumpy())).tolist() == [3]


def odd_floats() -> np.ndarray:
    """A NaN with a payload, a negative zero, a subnormal number and infinity."""
    array = np.array([[np.nan, -0.0], [1e-45, np.inf]], np.float32)
    array.view(np.uint32)[0, 0] |= 0x123
    return array


@pytest.mark.parametrize(
    ("theirs", "dtype"),
    [
        (odd_floats(), mstype.float32),
        (np.array(7, np.int32), mstype.int32),
        (np.arange(3, dtype=np.float16), mstype.float16),
    ],
)
def test_an_array_of_rank_0_is_received_bit_for_bit(theirs: np.ndarray, dtype: object) -> None:
    group = SimulatedGroup(1, [encode_bytes(theirs.tobytes()).asnumpy()])
    received = group.broadcast_array(None, theirs.shape, dtype)
    assert received.tobytes() == theirs.tobytes()
    assert (received.dtype, received.shape) == (theirs.dtype, theirs.shape)


def test_a_long_array_is_sent_in_chunks() -> None:
    array = np.arange(7, dtype=np.float32)

    class Counting(EchoGroup):
        calls = 0

        def broadcast_tensor(self, vector: Tensor) -> Tensor:
            self.calls += 1
            return vector

    group = Counting(0, 2)
    received = group.broadcast_array(array, (7,), mstype.float32, chunk_bytes=12)
    np.testing.assert_array_equal(received, array)
    assert group.calls == 3


@pytest.mark.parametrize("length", [0, 1, 2, 8, 255])
def test_bytes_survive_encoding(length: int) -> None:
    data = bytes(np.random.default_rng(length).integers(0, 256, length, np.uint8))
    vector = encode_bytes(data)
    assert vector.dtype == mstype.float32
    assert decode_bytes(vector, length) == data


def test_integers_of_rank_0_are_received() -> None:
    theirs = encode_bytes(struct.pack("<2q", 2**40 + 1, -1)).asnumpy()
    assert SimulatedGroup(1, [theirs]).broadcast_ints(0, 0) == (2**40 + 1, -1)
    assert SimulatedGroup(0, [theirs]).broadcast_ints(5, 6) == (5, 6)


@pytest.mark.parametrize(
    ("digests", "mismatching"),
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
def test_ranks_that_mismatch_are_named(digests: str, mismatching: list[int]) -> None:
    of_ranks = [letter.encode() * 8 for letter in digests]
    for rank, mine in enumerate(of_ranks):
        others = of_ranks[:rank] + of_ranks[rank + 1 :]
        group = SimulatedGroup(rank, [encode_bytes(digest).asnumpy() for digest in others])
        assert group.mismatching_ranks(mine) == mismatching


def test_a_lost_rank_is_reported_in_one_line() -> None:
    class Broken(ProcessGroup):
        def all_reduce(self, vector: Tensor) -> Tensor:
            raise RuntimeError("Connection reset\n\n----- and a page of it")

    with pytest.raises(JobError) as error:
        Broken(2, 4).all_reduce_sum([Tensor(vectors(0)[0])], ())
    assert str(error.value) == (
        "rank 2 of 4 has lost the other ranks (Connection reset): look in their logs for the one "
        "that ended first; the same command resumes from the last checkpoint"
    )


VECTOR = Tensor(np.ones(3, np.float32))
COLLECTIVES: list[tuple[str, Callable[[ProcessGroup], object], object]] = [
    ("sum", lambda group: group.all_reduce_sum([VECTOR], (1.0,)), ([VECTOR], [1.0])),
    ("gather", lambda group: group.gather(VECTOR), VECTOR),
    (
        "array",
        lambda group: group.broadcast_array(np.ones(2), (2,), mstype.float32).tolist(),
        [1, 1],
    ),
    ("bytes", lambda group: group.broadcast_bytes(b"x"), b"x"),
    ("ints", lambda group: group.broadcast_ints(1, 2), (1, 2)),
    ("mismatching", lambda group: group.mismatching_ranks(b"12345678"), []),
]


@pytest.mark.parametrize(
    ("collective", "expected"),
    [row[1:] for row in COLLECTIVES],
    ids=[row[0] for row in COLLECTIVES],
)
def test_one_rank_needs_no_communication(
    collective: Callable[[ProcessGroup], object], expected: object
) -> None:
    """Nothing is initialized here, so any collective would fail."""
    result = collective(ProcessGroup())
    assert result is expected or result == expected
