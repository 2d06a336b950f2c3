"""What the ranks of a data-parallel job say to each other: all of it is here.

Every rank trains the same weights on its share of the batch. They begin alike (`broadcast`), and
each step adds up their gradients (`sum`), so that they take the same step and stay alike, bit for
bit: `mismatching_ranks` finds out whether they did. Where each keeps only a share of the optimizer they
`gather` what they made of it. There is no barrier and no clock. A rank that has something else to
do, rank 0 that saves or samples, is waited for in the next sum, for at most `runtime.COLLECTIVE_TIMEOUT`
seconds.

What else the ranks have to agree on (the mean loss; whether one of them was asked to stop) rides
along with the gradients as numbers of their own, so that a step is one collective. A number that is
not finite on one rank is not finite in the sum, on all of them: nobody has to be told.

On a CPU all AllReduce can do is to sum float32 and float16; Broadcast and AllGather move bytes.
"""

import math
import struct
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
from mindspore import Tensor, dtype_to_nptype, ops
from mindspore.communication import GlobalComm

from pipeline.errors import JobError

P = ParamSpec("P")
T = TypeVar("T")
PIECE = 2**26  # bytes that are told at a time


def requires_all_ranks(method: Callable[P, T]) -> Callable[P, T]:
    """A method of `ProcessGroup` that needs all of them: when one has gone, JobError rather than what the
    network says.
    """

    @wraps(method)
    def asked(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except RuntimeError as error:
            raise JobError(
                f"{args[0]} has lost the others ({str(error).strip().splitlines()[0]}): look in their logs for the one "
                "that ended first; the same command goes on from the last checkpoint"
            ) from error

    return asked


class ProcessGroup:
    """The ranks of a job, seen from one of them. Alone, it has nobody to ask and answers itself."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world}"

    # The three things that a network does. GlobalComm is asked late: before `init` it names the
    # wrong group.

    def all_reduce(self, flat: Tensor) -> Tensor:
        return ops.AllReduce(ops.ReduceOp.SUM, GlobalComm.WORLD_COMM_GROUP)(flat)

    def all_gather(self, flat: Tensor) -> Tensor:
        return ops.AllGather(GlobalComm.WORLD_COMM_GROUP)(flat)

    def broadcast_tensor(self, flat: Tensor) -> Tensor:
        return ops.Broadcast(0, GlobalComm.WORLD_COMM_GROUP)((flat,))[0]

    # What is made of them.

    @requires_all_ranks
    def sum(
        self, vectors: Sequence[Tensor], numbers: Sequence[float]
    ) -> tuple[list[Tensor], list[float]]:
        """The sums over the ranks of float32 `vectors` and of `numbers`."""
        if self.world == 1:
            return list(vectors), list(numbers)
        *others, last = vectors
        sums = list(map(self.all_reduce, others))
        joined = self.all_reduce(ops.cat((last, Tensor(np.array(numbers, np.float32)))))
        return [*sums, joined[: last.size]], joined[last.size :].asnumpy().tolist()

    @requires_all_ranks
    def gather(self, share: Tensor) -> Tensor:
        """The equal shares of all ranks, one after another."""
        return share if self.world == 1 else self.all_gather(share)

    def broadcast(self, array: np.ndarray | None, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """What rank 0 has for `array`, bit for bit; the others need none."""
        kind = dtype_to_nptype(dtype)
        if self.world == 1:
            return np.asarray(array, kind)
        data = bytearray(math.prod(shape) * np.dtype(kind).itemsize)
        if self.rank == 0:
            data[:] = np.ascontiguousarray(array, kind).tobytes()
        for start in range(0, len(data), PIECE):
            data[start : start + PIECE] = self.broadcast_bytes(bytes(data[start : start + PIECE]))
        return np.frombuffer(data, kind).reshape(shape)

    @requires_all_ranks
    def broadcast_bytes(self, data: bytes) -> bytes:
        """What rank 0 has for `data`, which must be equally long on all ranks."""
        return (
            data
            if self.world == 1
            else as_bytes(self.broadcast_tensor(as_numbers(data)), len(data))
        )

    def broadcast_ints(self, *numbers: int) -> tuple[int, ...]:
        """What rank 0 has for `numbers`, each of 64 bits."""
        form = f"<{len(numbers)}q"
        return struct.unpack(form, self.broadcast_bytes(struct.pack(form, *numbers)))

    @requires_all_ranks
    def mismatching_ranks(self, digest: bytes) -> list[int]:
        """The ranks whose `digest` is not the most common one (of two: rank 1's, as nobody can broadcast_bytes
        which is right).
        """
        if self.world == 1:
            return []
        found = np.split(self.all_gather(as_numbers(digest)).asnumpy(), self.world)
        digests = [pieces.tobytes() for pieces in found]
        usual = max(digests, key=digests.count)  # the first of those that are equally common
        return [rank for rank, other in enumerate(digests) if other != usual]


def as_numbers(data: bytes) -> Tensor:
    """Bytes as float32 numbers that each hold two of them exactly, as no device changes a small
    whole number on its way, while it may quieten a NaN or flush what is tiny.
    """
    return Tensor(np.frombuffer(data + b"\0" * (len(data) % 2), "<u2").astype(np.float32))


def as_bytes(numbers: Tensor, length: int) -> bytes:
    """The first `length` bytes of what `as_numbers` was given."""
    return numbers.asnumpy().astype("<u2").tobytes()[:length]
