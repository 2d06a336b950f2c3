"""The state of a training: parameters, optimizer and the exponential moving average (EMA).

AdamW works on the parameters as vectors (`buckets`). A rank holds them whole or, if the optimizer
is sharded, an equal shard of each; after an update they are copied into the network. Adafactor
works on the network's own parameters, as it factors their matrices.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype

from pipeline import device
from pipeline.config import ConfigError
from pipeline.errors import JobError, UserError
from pipeline.nn.parameters import put
from pipeline.train.buckets import Bucket, make_buckets
from pipeline.train.compile_cache import CompileCache
from pipeline.train.config import TrainConfig
from pipeline.train.optimizer import OptimizerConfig, learning_rate, optimizer
from pipeline.train.process_group import ProcessGroup

FILES = ("model", "ema", "optimizer")  # of a checkpoint


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A parameter of the state, and where a checkpoint has it."""

    file: str  # one of FILES
    name: str  # in the file; of a bucket, the prefix of the names
    parameter: Parameter  # with a bucket, this rank's shard of the bucket's vector
    bucket: Bucket | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter, or of the whole vector."""
        return tuple(self.parameter.shape) if self.bucket is None else (self.bucket.size,)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name in the file -> shape of the array."""
        if self.bucket is None:
            return {self.name: self.shape}
        return {self.name + p.name: tuple(p.shape) for p in self.bucket.parameters}

    def split(self, whole: np.ndarray) -> dict[str, np.ndarray]:
        """The whole parameter or vector as the arrays of the file, without a copy."""
        if self.bucket is None:
            return {self.name: whole}
        return {self.name + name: view for name, view in self.bucket.views(whole).items()}

    def join(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """The inverse of `split`; other arrays are ignored."""
        if self.bucket is None:
            return arrays[self.name]
        names = [p.name for p in self.bucket.parameters]
        return self.bucket.join({name: arrays[self.name + name] for name in names})


@dataclass(frozen=True, kw_only=True)
class VectorSlice:
    """The elements `start` to `stop` of the vector of bucket `bucket`, which belong to
    `parameter`.
    """

    bucket: int
    start: int
    stop: int
    parameter: Parameter


class TrainState:
    """Parameters in training, with their optimizer and EMA.

    With `train.shard_optimizer`, optimizer and EMA are sharded over the ranks, the first stage of
    ZeRO (Rajbhandari et al., arXiv 1910.02054): each rank updates its shard, and all gather the
    weights.

    Args:
        network: whose parameters are trained; the same on all ranks.
        optimizer_config: which optimizer.
        train_config: its `steps` are the length of the learning-rate schedule. The EMA's decay
            grows from 0.1 to `ema_decay` as (1 + step) / (10 + step), so that a young average is
            not dominated by the initial weights.
        group: the ranks that train it.
        compile_cache: compiles the update.
    """

    def __init__(
        self,
        network: nn.Cell,
        optimizer_config: OptimizerConfig,
        train_config: TrainConfig,
        group: ProcessGroup | None = None,
        compile_cache: CompileCache | None = None,
    ) -> None:
        if train_config.shard_optimizer and optimizer_config.kind != "adamw":
            raise ConfigError(
                f"train.shard_optimizer: {optimizer_config.kind} factors whole matrices, which "
                "cannot be sharded; take optimizer.kind=adamw, or leave it out"
            )
        self.group = group or ProcessGroup()
        self.num_shards = self.group.world if train_config.shard_optimizer else 1
        self.shard = self.group.rank if train_config.shard_optimizer else 0

        self.parameters = ParameterTuple(network.trainable_params())
        self.buckets = make_buckets(self.parameters, self.num_shards)
        self.uses_buckets = optimizer_config.kind == "adamw"
        self.weights = self.bucket_weights() if self.uses_buckets else self.parameters

        self.schedule = learning_rate(optimizer_config, train_config.steps)
        self.optimizer = optimizer(optimizer_config, list(self.weights), self.schedule)

        # Laid out as the weights are: the update is elementwise, so a shard suffices for a shard.
        self.ema = self.weights.clone("ema", init="same")
        self.ema_step = Parameter(Tensor(0.0, mstype.float32), name="ema_step", requires_grad=False)
        # All that the optimizer keeps besides the weights it updates: moments, its step, schedules.
        own = {p.name for p in self.weights}
        moments = [p for p in self.optimizer.get_parameters() if p.name not in own]
        self.moments = [*moments, self.ema_step]

        cache = compile_cache or CompileCache()
        changed = [*self.weights, *self.ema, *self.moments]
        self._apply_update = cache.compile(self.apply_update(train_config.ema_decay), changed)
        self._scatter = cache.compile(self.scatter(), self.parameters)

    def bucket_weights(self) -> ParameterTuple:
        """This rank's shard of each bucket's vector, as the parameters that AdamW updates."""
        shards = [Tensor(bucket.read()[self.shard_of(bucket)]) for bucket in self.buckets]
        return ParameterTuple(
            Parameter(shard, name=f"bucket_{index}") for index, shard in enumerate(shards)
        )

    def update(self, gradient_sums: Sequence[Tensor], factor: float) -> None:
        """One optimizer step along `factor` times `gradient_sums`, one vector per bucket."""
        # `asnumpy` waits until the graph has run.
        self._apply_update(Tensor(factor, mstype.float32), *gradient_sums).asnumpy()
        if self.uses_buckets:
            self.sync_weights(self.weights)

    def lr(self, step: int) -> float:
        """The learning rate of step `step`, from 0."""
        return float(np.squeeze(self.schedule(Tensor(step, mstype.int32)).asnumpy()))

    # Exchange with checkpoints. All ranks have to call these methods.

    def ema_weights(self) -> dict[str, np.ndarray]:
        """The EMA weights by the names of the network's parameters; empty on ranks other than 0."""
        return self.files("ema")["ema"]

    def files(self, *names: str) -> dict[str, dict[str, np.ndarray]]:
        """The content of a checkpoint: file -> name -> array, for `model`, `ema` and `optimizer`,
        or those of `names`.

        Rank 0 gets the arrays, other ranks get empty files. On a CPU the arrays are the parameters'
        own memory: save or copy them before the next step.
        """
        files: dict[str, dict[str, np.ndarray]] = {file: {} for file in names or FILES}
        for entry in self.entries():
            if entry.file not in files:
                continue
            # A collective where there are shards: every rank has to take part.
            whole = self.gathered(entry.parameter, entry.bucket).asnumpy()
            if self.group.is_main:
                files[entry.file] |= entry.split(whole)

        return files

    def load(self, files: dict[str, dict[str, np.ndarray]], where: str) -> None:
        """Restores on all ranks what `files` returned on rank 0; only rank 0 needs it.

        UserError if an array is missing or has another shape; `where` names the checkpoint.
        """
        for entry in self.entries():
            array = None
            if self.group.is_main:
                check_shapes(files[entry.file], entry, where)
                array = entry.join(files[entry.file])

            whole = self.group.broadcast_array(array, entry.shape, entry.parameter.dtype)
            put(entry.parameter, self.shard_from(whole, entry.bucket))

        # A checkpoint has the network's parameters; the optimizer's vectors follow from them.
        if self.uses_buckets:
            for weight, bucket in zip(self.weights, self.buckets, strict=True):
                put(weight, self.shard_from(bucket.read(), bucket))

    @contextmanager
    def ema_in_network(self) -> Iterator[None]:
        """Inside, the network has the EMA weights; afterwards its own again. For all ranks."""
        # Copies, as on a CPU `asnumpy` is the parameter's own memory.
        own = [p.asnumpy().copy() for p in self.parameters]
        self.sync_weights(self.ema)
        try:
            yield
        finally:
            for parameter, array in zip(self.parameters, own, strict=True):
                put(parameter, array)

    def check_weights_agree(self, step: int) -> None:
        """JobError unless all ranks have the same parameters, bit for bit. For all ranks."""
        if self.group.world == 1:
            return

        # A digest, not the weights: it is compared often, and the weights are gigabytes.
        digest = blake2b(digest_size=8)
        for parameter in self.parameters:
            digest.update(np.ascontiguousarray(parameter.asnumpy()).data)
        if mismatching := self.group.mismatching_ranks(digest.digest()):
            raise JobError(
                f"step {step}: the weights of rank {', '.join(map(str, mismatching))} are no "
                "longer those of the other ranks: suspect its memory or device; the same command "
                "resumes from the last checkpoint"
            )

    # Layout.

    def shard_of(self, bucket: Bucket) -> slice:
        """The slice of the bucket's vector that this rank holds."""
        length = bucket.size // self.num_shards
        return slice(self.shard * length, (self.shard + 1) * length)

    def shard_from(self, whole: np.ndarray, bucket: Bucket | None) -> np.ndarray:
        """What this rank holds of a whole vector, or of a parameter, which has no bucket."""
        return whole if bucket is None else whole[self.shard_of(bucket)]

    def gathered(self, parameter: Parameter, bucket: Bucket | None) -> Tensor:
        """The whole of what the ranks hold shards of."""
        if bucket is None or self.num_shards == 1:
            return parameter
        return self.group.gather(parameter)

    def parameter_slices(self) -> list[VectorSlice]:
        """Where each parameter of the network lies in the buckets."""
        return [
            VectorSlice(bucket=index, start=start, stop=stop, parameter=parameter)
            for index, bucket in enumerate(self.buckets)
            for parameter, (start, stop) in zip(bucket.parameters, bucket.spans, strict=True)
        ]

    def grad_slices(self) -> list[VectorSlice]:
        """Where the gradient of each of `weights` lies in the buckets."""
        if not self.uses_buckets:
            return self.parameter_slices()

        shards = [self.shard_of(bucket) for bucket in self.buckets]
        return [
            VectorSlice(bucket=index, start=shard.start, stop=shard.stop, parameter=weight)
            for index, (shard, weight) in enumerate(zip(shards, self.weights, strict=True))
        ]

    def entries(self) -> Iterator[Entry]:
        """All that a checkpoint holds, in a fixed order."""
        for p in self.parameters:
            yield Entry(file="model", name=p.name, parameter=p)

        # The EMA has the names of the parameters, alone or within the buckets.
        if self.uses_buckets:
            for mean, bucket in zip(self.ema, self.buckets, strict=True):
                yield Entry(file="ema", name="", parameter=mean, bucket=bucket)
        else:
            for p, mean in zip(self.parameters, self.ema, strict=True):
                yield Entry(file="ema", name=p.name, parameter=mean)

        # A moment of a bucket is named MOMENT.bucket_N by the optimizer, and MOMENT.PARAMETER in
        # the file; all else, such as the number of steps, has its own name.
        bucket_of: dict[str, Bucket] = {}
        if self.uses_buckets:
            names = [weight.name for weight in self.weights]
            bucket_of = dict(zip(names, self.buckets, strict=True))
        for p in self.moments:
            moment, _, name = p.name.partition(".")
            if name in bucket_of:
                yield Entry(
                    file="optimizer", name=f"{moment}.", parameter=p, bucket=bucket_of[name]
                )
            else:
                yield Entry(file="optimizer", name=p.name, parameter=p)

    def sync_weights(self, weights: ParameterTuple) -> None:
        """Copies `weights`, either the optimizer's or the EMA, into the network."""
        if not self.uses_buckets:
            for parameter, weight in zip(self.parameters, weights, strict=True):
                put(parameter, weight.asnumpy())
            return

        vectors = [
            self.gathered(weight, bucket)
            for weight, bucket in zip(weights, self.buckets, strict=True)
        ]

        # A CPU shares its memory with the host, which then copies without a graph.
        if device.on_ascend():
            self._scatter(*vectors).asnumpy()
            return
        for bucket, vector in zip(self.buckets, vectors, strict=True):
            bucket.write(vector.asnumpy())

    # The compiled functions. Inside them slices are tuples: the compiler takes no records.

    def apply_update(self, ema_decay: float) -> Callable[..., Tensor]:
        """(factor, *gradient sums) -> the EMA decay that was used: an optimizer step, then the
        EMA's.
        """
        weights = self.weights
        average = self.ema
        ema_step = self.ema_step
        update = self.optimizer
        slices = [(s.bucket, s.start, s.stop, s.parameter) for s in self.grad_slices()]
        take = whole if self.uses_buckets and self.num_shards == 1 else cut

        def apply(factor: Tensor, *sums: Tensor) -> Tensor:
            # A tuple, as the compiler falls back to Python for lists that change.
            gradients: tuple[Tensor, ...] = ()
            for bucket, start, stop, weight in slices:
                gradient = take(sums[bucket], start, stop).reshape(weight.shape) * factor
                gradients = (*gradients, gradient)
            done = update(gradients)

            # One weight after another: the next one's temporaries reuse the memory.
            decay = ops.minimum((1.0 + ema_step) / (10.0 + ema_step), ema_decay)
            for mean, weight in zip(average, weights):  # noqa: B905
                before = ops.depend(mean, done)
                now = ops.depend(weight, done)
                done = ops.assign(mean, before * decay + now * (1.0 - decay))
            ops.assign(ema_step, ema_step + 1.0)
            # The caller waits for the decay, and so for the last weight's average.
            return ops.depend(decay, done)

        return apply

    def scatter(self) -> Callable[..., Tensor]:
        """(*vectors) -> the first of them: copies the vectors of the buckets into the parameters,
        on a device whose memory the host does not share.
        """
        slices = [(s.bucket, s.start, s.stop, s.parameter) for s in self.parameter_slices()]

        def assign_slices(*vectors: Tensor) -> Tensor:
            for bucket, start, stop, parameter in slices:
                values = ops.narrow(vectors[bucket], 0, start, stop - start)
                ops.assign(parameter, values.reshape(parameter.shape))
            return vectors[0]

        return assign_slices


def check_shapes(arrays: dict[str, np.ndarray], entry: Entry, where: str) -> None:
    """UserError unless `arrays` has what `entry` needs."""
    for name, shape in entry.shapes.items():
        array = arrays.get(name)
        if array is None or array.shape != shape:
            actual = "missing" if array is None else list(array.shape)
            raise UserError(
                f"{where}/{entry.file}.safetensors: '{name}' is {actual} and this run needs "
                f"{list(shape)}; it was written by another configuration"
            )


def whole(vector: Tensor, start: int, stop: int) -> Tensor:
    """`vector` itself, where the slice is all of it: without a copy."""
    return vector


def cut(vector: Tensor, start: int, stop: int) -> Tensor:
    """`vector[start:stop]`, by the operator: indexing takes 25 ns an element on a CPU."""
    return ops.narrow(vector, 0, start, stop - start)
