"""Batches by step: sample ids, bytes, images, prompts and, from the stage, its named inputs.

A batch is a pure function of the configuration and the step, and each of its positions one of the
step and the position. So the work is cut into small pieces, in the order in which the samples lie
in their shards, for a pool of threads that runs ahead: reading, decoding and drawing noise release
Python's lock. (Threads rather than processes: nothing has to be copied between them, and there is
no worker whose death could be mistaken for a preemption. `tools.bench data` measures it.) An image
that cannot be used is listed in `quarantine.jsonl` and another takes its place, the same one in
every run.

Shapes: B positions of this process, S side of the images, or of the window that training sees.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.decode import BadImage
from pipeline.data.image import ImageSize, read_square
from pipeline.data.order import Order
from pipeline.data.quarantine import Quarantine
from pipeline.data.shards import DamagedSample, Shards
from pipeline.errors import UserError
from pipeline.rng import Draws, generator
from pipeline.stage.inputs import Arrays
from pipeline.text.prompts import Prompts

MAX_ATTEMPTS = 16  # samples tried for one position before the data set is called broken
PREFETCH = 2  # steps that are prepared while one is trained
PIECE = 16  # samples that a thread takes at a time, at most

# uint8 images (B, S, S, 3), their prompt, the draws of their positions -> one step's arrays
MakeInputs = Callable[[np.ndarray, Arrays, Draws], Arrays]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some samples of a step: their positions in the global batch, their ids and their images."""

    step: int
    positions: list[int]
    sample_ids: list[int]
    images: np.ndarray  # uint8 (B, S, S, 3)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some positions of a batch and their rows of its arrays."""

    positions: Sequence[int]
    arrays: Arrays


class Loader:
    """The batches of a stage's run.

    Args:
        shards, prompts: the samples and what conditions them.
        seed: of the run.
        size: of the images; where there is a window, one is drawn for each position.
        make_inputs: the stage's `training_inputs`; its rows must not depend on one another.
        quarantine: the file for what cannot be used.
        share: which slice of the global batch this process loads.
    """

    def __init__(
        self,
        shards: Shards,
        prompts: Prompts,
        *,
        seed: int,
        size: ImageSize,
        make_inputs: MakeInputs,
        quarantine: Path,
        share: range,
    ) -> None:
        self.config = shards.config
        self.shards = shards
        self.prompts = prompts
        self.seed = seed
        self.size = size
        self.make_inputs = make_inputs
        self.share = share

        self.order = Order(seed, shards.sizes, shards.weights, self.config.shuffle_shards)
        self.quarantine = Quarantine(quarantine, len(shards), self.config.max_damage)

        # What the indexes know to be damaged is listed too: the file then has all that is left out.
        self.quarantine.write(*((shard, fault.key, fault.reason) for shard, fault in shards.faults))

    def sample_ids(self, step: int) -> np.ndarray:
        """The samples of this process's share of `step` (from 0), before any is replaced; int64."""
        # The order of the whole batch, then a slice of it: so the number of ranks has no influence.
        ids = self.order.ids(step, self.config.global_batch)
        return ids[self.share.start : self.share.stop]

    def image(self, sample_id: int, step: int | None, position: int) -> np.ndarray:
        """A sample as uint8 (S, S, 3), cropped as `position` of `step` has it (None: the middle).

        Raises:
            BadImage, DamagedSample: it cannot be used.
        """
        u, v = 0.5, 0.5  # of the square in the image
        x, y = 0.5, 0.5  # of the window in the square

        # A stream for each purpose: an option that is off draws nothing and moves no other draw.
        if step is not None and self.config.crop == "random":
            u, v = generator(self.seed, "crop", step, position).random(2)
        if step is not None and self.size.used < self.size.side:
            x, y = generator(self.seed, "window", step, position).random(2)

        return read_square(self.shards.image(sample_id), self.size, u=u, v=v, x=x, y=y)

    def usable_image(
        self, sample_id: int, step: int | None, position: int
    ) -> tuple[int, np.ndarray]:
        """The sample, or the first replacement that can be used, and its image.

        Raises:
            UserError: none can.
        """
        candidate = sample_id
        for attempt in range(MAX_ATTEMPTS):
            try:
                return candidate, self.image(candidate, step, position)
            except (BadImage, DamagedSample) as error:
                self.quarantine.add(*self.shards.name(candidate), str(error))
                # Named by position and attempt, so that every run finds the same one.
                candidate = self.order.replacement(step or 0, position, attempt)

        raise UserError(
            f"data.shards: {':'.join(self.shards.name(sample_id))} and {MAX_ATTEMPTS - 1} "
            f"replacements cannot be used; the reasons are in {self.quarantine.path}; repair or "
            "remove those shards"
        )

    def pieces(self, step: int) -> list[list[tuple[int, int]]]:
        """(sample id, position) of this process's share, cut into pieces in the shards' order."""
        # By sample id, which is the order within the shards: a thread reads one region of a file.
        samples = sorted(zip(self.sample_ids(step).tolist(), self.share, strict=True))
        # A small batch is still divided among all threads.
        size = min(PIECE, math.ceil(len(samples) / self.config.workers))
        return [samples[start : start + size] for start in range(0, len(samples), size)]

    def load_images(self, step: int | None, samples: Sequence[tuple[int, int]]) -> Piece:
        """The images of these samples, replaced where they cannot be used."""
        self.quarantine.count_drawn(len(samples))
        sample_ids = []
        batch = np.empty((len(samples), self.size.used, self.size.used, 3), np.uint8)

        for row, (sample_id, position) in enumerate(samples):
            used_id, image = self.usable_image(sample_id, step, position)
            sample_ids.append(used_id)
            batch[row] = image  # copied at once: a window keeps its whole image's memory

        positions = [position for _, position in samples]
        return Piece(step=step or 0, positions=positions, sample_ids=sample_ids, images=batch)

    def rows(self, piece: Piece) -> Rows:
        """A piece's rows of the batch, with its prompts and the stage's draws."""
        prompt = self.prompts.embed(piece.sample_ids, self.seed, piece.step, piece.positions)
        draws = Draws(seed=self.seed, step=piece.step, positions=piece.positions)
        arrays = self.make_inputs(piece.images, prompt, draws)
        return Rows(positions=piece.positions, arrays=arrays)

    def first(self, num_samples: int) -> tuple[np.ndarray, Arrays]:
        """Images and prompt of the first samples (again from the first if there are fewer), for
        sample grids.
        """
        # Without a step crops are central, and captions are those of step 0: all grids of a run
        # show the same samples.
        samples = [(i % len(self.shards), i) for i in range(num_samples)]
        piece = self.load_images(None, samples)
        prompt = self.prompts.embed(piece.sample_ids, self.seed, 0, piece.positions)
        return piece.images, prompt

    def batches(self, start: int, stop: int) -> Generator[Arrays, None, None]:
        """The batches of steps `start` to `stop` - 1, prepared ahead in threads."""
        # MindSpore compiles and runs in one thread: where captions are encoded during training,
        # the threads load images only, and the caller's thread does the rest.
        in_threads = self.prompts.threadsafe

        def load(step: int, samples: list[tuple[int, int]]) -> Piece | Rows:
            piece = self.load_images(step, samples)
            return self.rows(piece) if in_threads else piece

        def gather(pieces: list[Future[Piece | Rows]]) -> list[Piece | Rows] | Arrays:
            parts = [piece.result() for piece in pieces]
            return self.join(parts) if in_threads else parts

        # The gatherer waits for pieces, so it has a thread of its own: in the pool it would occupy
        # a worker, and with one worker wait for itself.
        with (
            ThreadPoolExecutor(1, "loader") as gatherer,
            ThreadPoolExecutor(self.config.workers, "loader") as threads,
        ):
            prefetched: deque[Future[list[Piece | Rows] | Arrays]] = deque()
            try:
                for step in range(start, stop):
                    first_missing = step + len(prefetched)
                    for later in range(first_missing, min(step + 1 + PREFETCH, stop)):
                        pieces = [
                            threads.submit(load, later, samples) for samples in self.pieces(later)
                        ]
                        prefetched.append(gatherer.submit(gather, pieces))

                    batch = prefetched.popleft().result()
                    yield batch if isinstance(batch, dict) else self.join(batch)
            finally:
                # The caller may stop early: what is not begun is dropped, not loaded.
                gatherer.shutdown(wait=False, cancel_futures=True)
                threads.shutdown(wait=False, cancel_futures=True)

    def join(self, parts: Sequence[Piece | Rows]) -> Arrays:
        """The pieces of a batch as one batch, in the order of its positions."""
        batch: Arrays = {}
        for part in parts:
            rows = self.rows(part) if isinstance(part, Piece) else part
            # Positions count in the global batch, rows in this process's share.
            places = np.subtract(rows.positions, self.share.start)
            for name, array in rows.arrays.items():
                if name not in batch:
                    batch[name] = np.empty((len(self.share), *array.shape[1:]), array.dtype)
                batch[name][places] = array
        return batch
