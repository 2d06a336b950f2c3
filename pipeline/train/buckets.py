"""A network's parameters as a few long vectors, its buckets: what is exchanged, and what the
optimizer works on.

One sum of a long vector costs a network a fraction of hundreds of short ones, and one AdamW of it a
processor likewise: of hundreds of kernels most of the time goes into starting them. They are
several, since what an optimizer makes on its way is as long as the vector it works on. Vectors are
also cut evenly among ranks, wherever the parameters begin.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from mindspore import Parameter

NUMBER = 32  # of buckets, about, in a large network
SMALLEST = 2**20  # numbers that a bucket may have in any network: 4 MiB of float32


class Bucket:
    """Parameters that lie one after another in a vector of `size` numbers, the last few of them
    padding.

    Args:
        parameters: in their order, float32.
        world: ranks that may share the vector, in equal parts.
    """

    def __init__(self, parameters: Sequence[Parameter], world: int) -> None:
        self.parameters = list(parameters)
        ends = np.cumsum([0, *(parameter.size for parameter in parameters)]).tolist()
        self.spans = list(pairwise(ends))
        self.padding = -ends[-1] % world
        self.size = ends[-1] + self.padding

    def views(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """Name -> its part of `vector`, in its shape, without a copy."""
        return {
            parameter.name: vector[start:stop].reshape(parameter.shape)
            for parameter, (start, stop) in zip(self.parameters, self.spans, strict=True)
        }

    def join(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """The inverse of `views`; float32 (size,)."""
        vector = np.zeros(self.size, np.float32)
        for name, view in self.views(vector).items():
            view[...] = arrays[name]
        return vector

    def read(self) -> np.ndarray:
        """The parameters' values, as `join` puts them."""
        return self.join({parameter.name: parameter.asnumpy() for parameter in self.parameters})

    def write(self, vector: np.ndarray) -> None:
        """Puts `vector` into the parameters. For a CPU, where an array of a parameter is its
        memory.
        """
        for parameter, view in zip(self.parameters, self.views(vector).values(), strict=True):
            parameter.asnumpy()[...] = view


def buckets(parameters: Sequence[Parameter], world: int, smallest: int = SMALLEST) -> list[Bucket]:
    """Neighbours together, up to `smallest` numbers or a share of all; a larger parameter has a
    bucket of its own.
    """
    largest = max(smallest, sum(parameter.size for parameter in parameters) // NUMBER)
    groups: list[list[Parameter]] = [[]]
    for parameter in parameters:
        if groups[-1] and sum(other.size for other in groups[-1]) + parameter.size > largest:
            groups.append([])
        groups[-1].append(parameter)
    return [Bucket(group, world) for group in groups]
