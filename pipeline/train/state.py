"""What a run changes: a network's parameters, their optimizer and their exponential moving average.

AdamW works on the parameters as vectors (`buckets`), of which a rank has all or, with `shard`, an
equal share; what it makes of them is then put into the network. Adafactor works on the network's
own parameters, whose matrices it factors.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype

from pipeline import device
from pipeline.config import ConfigError
from pipeline.errors import JobError, UserError
from pipeline.nn.parameters import put
from pipeline.train.buckets import Bucket, buckets
from pipeline.train.compile_cache import CompileCache
from pipeline.train.optimizer import OptimizerConfig, learning_rate, optimizer
from pipeline.train.process_group import ProcessGroup

FILES = ("model", "ema", "optimizer")  # of a checkpoint

Arrays = dict[str, np.ndarray]


class TrainState:
    """Parameters in training with their optimizer and their average.

    Args:
        network: whose parameters are trained.
        config, steps: the optimizer, and the length of its learning-rate schedule.
        ema_decay: share of the average that stays, each step. It grows from 0.1 to this as (1 +
            step) / (10 + step), so that the average of a young run is not its initial weights.
        ranks: all of which have the same network.
        shard: whether optimizer and average are divided among them, ZeRO's first stage (Rajbhandari
            et al., arXiv 1910.02054): each keeps an equal share, makes the step of that share, and
            all gather the weights.
        graphs: what compiles.
    """

    def __init__(
        self,
        network: nn.Cell,
        config: OptimizerConfig,
        steps: int,
        ema_decay: float,
        ranks: ProcessGroup | None = None,
        shard: bool = False,
        graphs: CompileCache | None = None,
    ) -> None:
        if shard and config.kind != "adamw":
            raise ConfigError(
                f"train.shard_optimizer: {config.kind} factors whole matrices, which are not cut; take "
                "optimizer.kind=adamw, or leave it out"
            )
        self.ranks, self.flat = ranks or ProcessGroup(), config.kind == "adamw"
        self.shards, self.shard = (self.ranks.world, self.ranks.rank) if shard else (1, 0)
        self.parameters = ParameterTuple(network.trainable_params())
        self.buckets = buckets(self.parameters, self.shards)
        if self.flat:
            vectors = [Tensor(bucket.read()[self.share(bucket)]) for bucket in self.buckets]
            self.weights = ParameterTuple(
                Parameter(v, name=f"bucket_{n}") for n, v in enumerate(vectors)
            )
        else:
            self.weights = self.parameters
        self.rate = learning_rate(config, steps)
        self.optimizer = optimizer(config, list(self.weights), self.rate)
        self.ema = self.weights.clone("ema", init="same")
        self.ema_step = Parameter(Tensor(0.0, mstype.float32), name="ema_step", requires_grad=False)
        own = {p.name for p in self.weights}
        self.moments = [
            *(p for p in self.optimizer.get_parameters() if p.name not in own),
            self.ema_step,
        ]
        graphs, changed = graphs or CompileCache(), [*self.weights, *self.ema, *self.moments]
        self._apply_update = graphs.compile(self.apply_update(ema_decay), changed)
        self._scatter = graphs.compile(self.scatter(), self.parameters)

    def update(self, sums: Sequence[Tensor], factor: float) -> None:
        """A step of the optimizer along `factor` times the gradient `sums`, a vector for each
        bucket.
        """
        self._apply_update(Tensor(factor, mstype.float32), *sums).asnumpy()
        if self.flat:
            self.sync_weights(self.weights)

    def lr(self, step: int) -> float:
        """The learning rate of step `step`, from 0."""
        return float(np.squeeze(self.rate(Tensor(step, mstype.int32)).asnumpy()))

    def average(self) -> Arrays:
        """The EMA weights under the names of the network's parameters; for all ranks to call."""
        return self.files("ema")["ema"]

    def files(self, *names: str) -> dict[str, Arrays]:
        """What a checkpoint holds: `model`, `ema` and `optimizer`, or those of `names`, each name
        -> array.

        For all ranks to call, as each gives its share; rank 0 gets the arrays, the others nothing.
        On a CPU they are the parameters' own memory: save or copy them before the next step.
        """
        found: dict[str, Arrays] = {file: {} for file in names or FILES}
        for file, name, parameter, bucket in self.entries():
            if file in found:
                array = self.whole(parameter, bucket).asnumpy()
                if self.ranks.rank == 0:
                    views = {"": array} if bucket is None else bucket.views(array)
                    found[file] |= {name + key: view for key, view in views.items()}
        return found

    def load(self, state: dict[str, Arrays], where: str) -> None:
        """Gives all ranks what `files` gave, which rank 0 has. UserError where something is
        missing.
        """
        for file, name, parameter, bucket in self.entries():
            array = None
            if self.ranks.rank == 0:
                names = [""] if bucket is None else [p.name for p in bucket.parameters]
                shapes = (
                    [parameter.shape] if bucket is None else [p.shape for p in bucket.parameters]
                )
                for key, shape in zip(names, shapes, strict=True):
                    array = state[file].get(name + key)
                    if array is None or array.shape != tuple(shape):
                        raise UserError(
                            f"{where}/{file}.safetensors: '{name + key}' is "
                            f"{'missing' if array is None else list(array.shape)} and this run wants {list(shape)}; it "
                            "was made by another configuration"
                        )
                if bucket:
                    array = bucket.join({key: state[file][name + key] for key in names})
            whole = self.ranks.broadcast(
                array, parameter.shape if bucket is None else (bucket.size,), parameter.dtype
            )
            put(parameter, whole if bucket is None else whole[self.share(bucket)])
        for weight, bucket in zip(self.weights, self.buckets, strict=True) if self.flat else ():
            put(weight, bucket.read()[self.share(bucket)])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network has its EMA weights inside, its own again after. For all ranks to enter."""
        own = [p.asnumpy().copy() for p in self.parameters]
        self.sync_weights(self.ema)
        try:
            yield
        finally:
            for p, array in zip(self.parameters, own, strict=True):
                put(p, array)

    def check_alike(self, step: int) -> None:
        """JobError unless all ranks have the same parameters, bit for bit."""
        if self.ranks.world == 1:
            return
        digest = blake2b(digest_size=8)
        for parameter in self.parameters:
            digest.update(np.ascontiguousarray(parameter.asnumpy()).data)
        if others := self.ranks.mismatching_ranks(digest.digest()):
            raise JobError(
                f"step {step}: the weights of rank {', '.join(map(str, others))} are no longer those of the other "
                "ranks: suspect its memory or device; the same command goes on from the last checkpoint"
            )

    # Where things are.

    def share(self, bucket: Bucket) -> slice:
        """This rank's, of the bucket's vector."""
        length = bucket.size // self.shards
        return slice(self.shard * length, (self.shard + 1) * length)

    def pieces(self) -> list[tuple[int, int, int, Parameter]]:
        """(number of a bucket, start, stop, parameter) of each of the network's."""
        return [
            (number, start, stop, parameter)
            for number, bucket in enumerate(self.buckets)
            for parameter, (start, stop) in zip(bucket.parameters, bucket.spans, strict=True)
        ]

    def grad_slices(self) -> list[tuple[int, int, int, Parameter]]:
        """The same of each of `weights`, whose gradients these are."""
        if not self.flat:
            return self.pieces()
        shares = zip(map(self.share, self.buckets), self.weights, strict=True)
        return [
            (number, share.start, share.stop, weight)
            for number, (share, weight) in enumerate(shares)
        ]

    def entries(self) -> Iterator[tuple[str, str, Parameter, Bucket | None]]:
        """(file of a checkpoint, name in it, parameter, None), or, of what holds a share of a
        bucket, (file, what goes before the names in it, parameter, bucket).
        """
        yield from (("model", p.name, p, None) for p in self.parameters)
        if not self.flat:
            yield from (
                ("ema", p.name, mean, None)
                for p, mean in zip(self.parameters, self.ema, strict=True)
            )
            yield from (("optimizer", p.name, p, None) for p in self.moments)
            return
        yield from (
            ("ema", "", mean, bucket) for mean, bucket in zip(self.ema, self.buckets, strict=True)
        )
        named = dict(zip((p.name for p in self.weights), self.buckets, strict=True))
        for p in self.moments:
            moment, _, name = p.name.partition(".")
            yield (
                ("optimizer", f"{moment}.", p, named[name])
                if name in named
                else ("optimizer", p.name, p, None)
            )

    def whole(self, parameter: Parameter, bucket: Bucket | None) -> Tensor:
        """All of what the ranks hold shares of."""
        return parameter if bucket is None or self.shards == 1 else self.ranks.gather(parameter)

    def sync_weights(self, weights: ParameterTuple) -> None:
        """Puts `weights`, the optimizer's or their average, into the network."""
        if not self.flat:
            for parameter, weight in zip(self.parameters, weights, strict=True):
                put(parameter, weight.asnumpy())
            return
        vectors = [
            self.whole(weight, bucket) for weight, bucket in zip(weights, self.buckets, strict=True)
        ]
        if device.on_ascend():
            self._scatter(*vectors).asnumpy()
            return
        for bucket, vector in zip(self.buckets, vectors, strict=True):
            bucket.write(vector.asnumpy())

    # The compiled functions.

    def apply_update(self, ema_decay: float) -> Callable[..., Tensor]:
        """(factor, sums) -> the decay that was used: a step along `factor` times the sums, and of
        the average.
        """
        weights, average, ema_step, update = self.weights, self.ema, self.ema_step, self.optimizer
        grad_slices, piece = self.grad_slices(), whole if self.flat and self.shards == 1 else cut

        def finish(factor: Tensor, *sums: Tensor) -> Tensor:
            gradients: tuple[Tensor, ...] = ()
            for number, start, stop, weight in grad_slices:
                gradients = (
                    *gradients,
                    piece(sums[number], start, stop).reshape(weight.shape) * factor,
                )
            done = update(gradients)
            decay = ops.minimum((1.0 + ema_step) / (10.0 + ema_step), ema_decay)
            for mean, weight in zip(average, weights):  # noqa: B905
                before, now = (
                    ops.depend(mean, done),
                    ops.depend(weight, done),
                )  # in turn: one's memory is the next's
                done = ops.assign(mean, before * decay + now * (1.0 - decay))
            ops.assign(ema_step, ema_step + 1.0)
            return ops.depend(decay, done)

        return finish

    def scatter(self) -> Callable[..., Tensor]:
        """(vectors) -> one of them: puts them into the parameters, on a device whose memory the
        host does not share.
        """
        pieces = self.pieces()

        def spread(*vectors: Tensor) -> Tensor:
            for number, start, stop, parameter in pieces:
                ops.assign(
                    parameter,
                    ops.narrow(vectors[number], 0, start, stop - start).reshape(parameter.shape),
                )
            return vectors[0]

        return spread


def whole(vector: Tensor, start: int, stop: int) -> Tensor:
    """`vector`, of which nothing is cut off: there is no copy."""
    return vector


def cut(vector: Tensor, start: int, stop: int) -> Tensor:
    """`vector[start:stop]`, by a slice that does not take 25 ns a number on a CPU."""
    return ops.narrow(vector, 0, start, stop - start)
