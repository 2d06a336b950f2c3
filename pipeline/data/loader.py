"""Batches by step: sample numbers, bytes, pictures, prompts and, from the stage, the arrays that
its network takes.

A batch is a pure function of the configuration and the step, and each of its places one of the step
and the place. So the work is cut into small pieces, in the order in which the samples lie in their
shards, for a pool of threads that runs ahead: reading, decoding and drawing noise release Python's
lock. (Threads rather than processes: nothing has to be copied between them, and there is no worker
whose death could be taken for a preemption. Measured in tools/bench.) A picture that cannot be used
is written down in `quarantine.jsonl` and another one takes its place, the same one in every run.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data import image
from pipeline.data.decode import BadImage, decode
from pipeline.data.order import Order
from pipeline.data.quarantine import Quarantine
from pipeline.data.shards import Damaged, Shards
from pipeline.errors import UserError
from pipeline.rng import generator
from pipeline.text.prompts import Arrays, Prompts

ATTEMPTS = 16  # stand-ins tried for one place before the data set is called broken
AHEAD = 2  # steps that are prepared while one is trained
PIECE = 16  # samples a thread takes at a time, at most

Piece = tuple[list[int], Arrays]  # positions in the global batch, and their rows
Arrange = Callable[..., Arrays]


class Loader:
    """The batches of a stage's run.

    Args:
        shards, prompts: the samples and what conditions them.
        seed: of the run.
        size: side to which pictures are brought, in pixels.
        window: side S of the window of them that is wanted, drawn for each place; None: all, S is
            `size`.
        arrange: (step, positions in the global batch, uint8 (B, S, S, 3), *prompt) -> the arrays of
            one training step, whose rows must not depend on one another.
        quarantine: the file for what cannot be used.
        share: which slice of the global batch this process makes.
    """

    def __init__(
        self,
        shards: Shards,
        prompts: Prompts,
        seed: int,
        size: int,
        window: int | None,
        arrange: Arrange,
        quarantine: Path,
        share: range,
    ) -> None:
        self.config, self.seed, self.shards, self.prompts = shards.config, seed, shards, prompts
        self.size, self.window, self.arrange, self.share = size, window or size, arrange, share
        self.order = Order(seed, shards.sizes, shards.weights, self.config.shuffle_shards)
        self.quarantine = Quarantine(quarantine, len(shards), self.config.max_damage)
        for shard, fault in shards.faults:
            self.quarantine.write(shard, fault.key, fault.reason)

    def picture(self, number: int, step: int | None, position: int) -> np.ndarray:
        """Sample `number` as uint8 (S, S, 3), cut as `position` of `step` has it (None: in the
        middle).

        Raises BadImage or Damaged.
        """
        u = v = x = y = 0.5
        if step is not None and self.config.crop == "random":
            u, v = generator(self.seed, "crop", step, position).random(2)
        if step is not None and self.window < self.size:
            x, y = generator(self.seed, "window", step, position).random(2)
        square = image.crop_resize(decode(self.shards.image(number), self.size), self.size, u, v)
        return image.window(square, self.window, x, y)

    def usable(self, number: int, step: int | None, position: int) -> tuple[int, np.ndarray]:
        """Sample `number`, or the first stand-in that can be used, and its picture."""
        first = number
        for attempt in range(ATTEMPTS):
            try:
                return number, self.picture(number, step, position)
            except (BadImage, Damaged) as error:
                self.quarantine.add(*self.shards.name(number), str(error))
                number = self.order.replacement(step or 0, position, attempt)
        raise UserError(
            f"data.shards: {':'.join(self.shards.name(first))} and {ATTEMPTS} stand-ins cannot be used; the reasons "
            f"are in {self.quarantine.path}; repair or remove those shards"
        )

    def ids(self, step: int) -> np.ndarray:
        """The samples of this process's share of `step` (from 0), before any is replaced; int64."""
        return self.order.ids(step, self.config.global_batch)[self.share.start : self.share.stop]

    def pieces(self, step: int) -> list[list[tuple[int, int]]]:
        """(sample, position) of this process's share, cut into pieces in the order of the shards."""
        places = sorted(zip(self.ids(step).tolist(), self.share, strict=True))
        size = min(PIECE, math.ceil(len(places) / self.config.workers))
        return [places[start : start + size] for start in range(0, len(places), size)]

    def pictures(
        self, step: int | None, piece: Sequence[tuple[int, int]]
    ) -> tuple[list[int], list[int], np.ndarray]:
        """The samples that were used, their positions, and their pictures uint8 (B, S, S, 3)."""
        self.quarantine.look(len(piece))
        numbers, pictures = [], np.empty((len(piece), self.window, self.window, 3), np.uint8)
        for place, (number, position) in enumerate(
            piece
        ):  # copied at once: a window keeps its whole picture's memory
            number, pictures[place] = self.usable(number, step, position)
            numbers.append(number)
        return numbers, [position for _, position in piece], pictures

    def rows(
        self, step: int, numbers: list[int], positions: list[int], pictures: np.ndarray
    ) -> Piece:
        """These positions of the batch."""
        prompt = self.prompts.embed(numbers, self.seed, step, positions)
        return positions, self.arrange(step, positions, pictures, *prompt)

    def first(self, num: int) -> Arrays:
        """Pictures and prompt of samples 0 to `num` - 1 (again from 0 if there are fewer), to be
        looked at.
        """
        numbers, positions, pictures = self.pictures(
            None, [(i % len(self.shards), i) for i in range(num)]
        )
        return pictures, *self.prompts.embed(numbers, self.seed, 0, positions)

    def batches(self, start: int, stop: int) -> Iterator[Arrays]:
        """The batches of steps `start` to `stop` - 1, prepared ahead in threads."""
        # MindSpore compiles and runs in one thread: where captions are encoded now, that is left to
        # the caller's.
        whole = self.prompts.threadsafe

        def make(step: int, piece: list[tuple[int, int]]) -> Any:
            done = self.pictures(step, piece)
            return self.rows(step, *done) if whole else done

        def gather(pieces: list[Future]) -> Any:
            parts = [piece.result() for piece in pieces]
            return join(self.share, parts) if whole else parts

        with (
            ThreadPoolExecutor(1, "loader") as gatherer,
            ThreadPoolExecutor(self.config.workers, "loader") as threads,
        ):
            ahead: deque[Future] = deque()
            try:
                for step in range(start, stop):
                    for later in range(step + len(ahead), min(step + 1 + AHEAD, stop)):
                        pieces = [
                            threads.submit(make, later, piece) for piece in self.pieces(later)
                        ]
                        ahead.append(gatherer.submit(gather, pieces))
                    done = ahead.popleft().result()
                    yield (
                        done
                        if whole
                        else join(self.share, [self.rows(step, *part) for part in done])
                    )
            finally:
                gatherer.shutdown(wait=False, cancel_futures=True)
                threads.shutdown(wait=False, cancel_futures=True)


def join(share: range, parts: list[Piece]) -> Arrays:
    """Pieces of a batch, each with its positions, as one batch in order."""
    batch: Arrays = ()
    for positions, arrays in parts:
        batch = batch or tuple(
            np.empty((len(share), *array.shape[1:]), array.dtype) for array in arrays
        )
        for whole, part in zip(batch, arrays, strict=True):
            whole[np.subtract(positions, share.start)] = part
    return batch
