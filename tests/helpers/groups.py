"""Process groups without processes: one rank whose peers behave as a test needs."""

import numpy as np
from mindspore import Tensor

from pipeline.train.process_group import ProcessGroup


class EchoGroup(ProcessGroup):
    """One of `world` ranks whose peers all send what it sends. `mismatching` is what it reports of
    weights and configurations that differ.
    """

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(rank, world)
        self.mismatching: list[int] = []

    def all_reduce(self, vector: Tensor) -> Tensor:
        return Tensor(vector.asnumpy() * self.world)

    def all_gather(self, vector: Tensor) -> Tensor:
        return Tensor(np.tile(vector.asnumpy(), self.world))

    def broadcast_tensor(self, vector: Tensor) -> Tensor:
        return vector

    def mismatching_ranks(self, digest: bytes) -> list[int]:
        return self.mismatching
