"""Communication between the ranks of a data-parallel job: every collective of a training is here.

All ranks train the same weights, each on its share of the batch. They start equal
(`broadcast_array`), and each step sums their gradients (`all_reduce_sum`), so they make the same
update and stay equal, bit for bit; `mismatching_ranks` verifies that. If the optimizer is sharded,
`gather` collects the updated shards. There is no barrier: when rank 0 saves or samples, the others
wait for it in the next collective, for at most `runtime.COLLECTIVE_TIMEOUT` seconds.

Scalars that ranks have to agree on (the mean loss, the number of stop requests) are appended to the
last gradient vector, so they need no collective of their own. A value that is not finite on one
rank is not finite in the sum either, so all ranks see it.

On a CPU, AllReduce supports only sums of float32 and float16; Broadcast and AllGather move bytes.
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

CHUNK_BYTES = 2**26  # that one broadcast carries at most


def requires_all_ranks(method: Callable[P, T]) -> Callable[P, T]:
    """Decorates a collective method of `ProcessGroup`: if a rank is gone, it raises JobError
    instead of the communication library's own error.
    """

    @wraps(method)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except RuntimeError as error:
            # Further lines are MindSpore's stack of C++ calls.
            reason = str(error).strip().splitlines()[0]
            raise JobError(
                f"{args[0]} has lost the other ranks ({reason}): look in their logs for the one "
                "that ended first; the same command resumes from the last checkpoint"
            ) from error

    return guarded


class ProcessGroup:
    """The ranks of a job, as seen by rank `rank` of `world`. With one rank, every collective
    returns its input.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank = rank
        self.world = world

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world}"

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone reads and writes the run folder."""
        return self.rank == 0

    # The three primitives. GlobalComm is read when they are called: before `init` it names the
    # wrong group.

    def all_reduce(self, vector: Tensor) -> Tensor:
        """The sum of `vector` over all ranks."""
        return ops.AllReduce(ops.ReduceOp.SUM, GlobalComm.WORLD_COMM_GROUP)(vector)

    def all_gather(self, vector: Tensor) -> Tensor:
        """The vectors of all ranks, concatenated in order of rank."""
        return ops.AllGather(GlobalComm.WORLD_COMM_GROUP)(vector)

    def broadcast_tensor(self, vector: Tensor) -> Tensor:
        """Rank 0's `vector`."""
        return ops.Broadcast(0, GlobalComm.WORLD_COMM_GROUP)((vector,))[0]

    # What is composed of them.

    @requires_all_ranks
    def all_reduce_sum(
        self, vectors: Sequence[Tensor], scalars: Sequence[float]
    ) -> tuple[list[Tensor], list[float]]:
        """The sums over all ranks of each of the float32 `vectors` and of each of `scalars`."""
        if self.world == 1:
            return list(vectors), list(scalars)

        # Only float32 can be summed on every device, so the scalars become float32 too.
        *others, last = vectors
        sums = list(map(self.all_reduce, others))
        joined = self.all_reduce(ops.cat((last, Tensor(np.array(scalars, np.float32)))))
        return [*sums, joined[: last.size]], joined[last.size :].asnumpy().tolist()

    @requires_all_ranks
    def gather(self, shard: Tensor) -> Tensor:
        """The equally long shards of all ranks, concatenated in order of rank."""
        return shard if self.world == 1 else self.all_gather(shard)

    def broadcast_array(
        self,
        array: np.ndarray | None,
        shape: Sequence[int],
        dtype: Any,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> np.ndarray:
        """Rank 0's `array`, bit for bit, in chunks of at most `chunk_bytes`.

        Args:
            array: on the other ranks it is not read and may be None.
            shape, dtype: of the array, known to all ranks; `dtype` is MindSpore's.
        """
        np_dtype = dtype_to_nptype(dtype)
        if self.world == 1:
            return np.asarray(array, np_dtype)

        # In chunks, as a vector for communication is twice as long as the bytes it carries.
        data = bytearray(math.prod(shape) * np.dtype(np_dtype).itemsize)
        if self.is_main:
            data[:] = np.ascontiguousarray(array, np_dtype).tobytes()
        for start in range(0, len(data), chunk_bytes):
            chunk = slice(start, start + chunk_bytes)
            data[chunk] = self.broadcast_bytes(bytes(data[chunk]))
        return np.frombuffer(data, np_dtype).reshape(shape)

    @requires_all_ranks
    def broadcast_bytes(self, data: bytes) -> bytes:
        """Rank 0's `data`, which must have the same length on all ranks."""
        if self.world == 1:
            return data
        return decode_bytes(self.broadcast_tensor(encode_bytes(data)), len(data))

    def broadcast_ints(self, *values: int) -> tuple[int, ...]:
        """Rank 0's `values`, 64-bit integers."""
        layout = f"<{len(values)}q"
        return struct.unpack(layout, self.broadcast_bytes(struct.pack(layout, *values)))

    @requires_all_ranks
    def mismatching_ranks(self, digest: bytes) -> list[int]:
        """The ranks whose `digest` is not the most common one.

        Of two ranks that differ it is rank 1, as there is no telling which of them is right.
        """
        if self.world == 1:
            return []

        gathered = np.split(self.all_gather(encode_bytes(digest)).asnumpy(), self.world)
        digests = [part.tobytes() for part in gathered]

        # Of digests that are equally common, `max` returns the first.
        most_common = max(digests, key=digests.count)
        return [rank for rank, other in enumerate(digests) if other != most_common]


def encode_bytes(data: bytes) -> Tensor:
    """Bytes as a float32 vector, two of them in each element.

    Communication is in float32, and a small integer is exact in it. The bytes must not be
    reinterpreted as float32: devices may alter NaNs and flush subnormal numbers to zero.
    """
    padded = data + b"\0" * (len(data) % 2)
    return Tensor(np.frombuffer(padded, "<u2").astype(np.float32))


def decode_bytes(vector: Tensor, length: int) -> bytes:
    """The inverse of `encode_bytes`; `length` is that of the data."""
    return vector.asnumpy().astype("<u2").tobytes()[:length]
