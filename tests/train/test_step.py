"""The training step on a quadratic, whose gradient is known, against the papers' algorithms in
NumPy float64.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from pipeline import runtime
from pipeline.config import ConfigError
from pipeline.errors import JobError, UserError
from pipeline.train.memory import factored
from pipeline.train.optimizer import OptimizerConfig
from pipeline.train.precision import LossScale
from pipeline.train.process_group import ProcessGroup
from pipeline.train.state import TrainState
from pipeline.train.step import StepResult, TrainStep

STEPS, HALF, BATCH, DECAY = 12, 6, 4, 0.45
SHAPES = {"matrix": (4, 3), "vector": (5,), "kernel": (2, 3, 3, 2)}
# The gradient's norm is 2 to 15 here, so that some steps are clipped and some are not.
CONFIGS = {
    "adamw": OptimizerConfig(
        lr=0.05, warmup_steps=4, betas=(0.9, 0.99), weight_decay=0.1, max_grad_norm=8.0
    ),
    "adafactor": OptimizerConfig(kind="adafactor", lr=0.05, warmup_steps=4, max_grad_norm=8.0),
}

Weights = dict[str, np.ndarray]


class Quadratic(nn.Cell):
    """The loss of an image is half the squared distance of the parameters from where the image
    wants them.
    """

    def __init__(self) -> None:
        super().__init__()
        first = {
            name: Parameter(Tensor(array.astype(np.float32)), name=name)
            for name, array in start().items()
        }
        self.matrix, self.vector, self.kernel = first.values()

    def construct(self, matrix: Tensor, vector: Tensor, kernel: Tensor) -> Tensor:
        one = ((self.matrix - matrix) ** 2).sum((1, 2))
        two = ((self.vector - vector) ** 2).sum(1)
        return (one + two + ((self.kernel - kernel) ** 2).sum((1, 2, 3, 4))) / 2


def start() -> Weights:
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape).astype(np.float32).astype(float)
        for name, shape in SHAPES.items()
    }


def batch(step: int) -> tuple[np.ndarray, ...]:
    """Where the images of a step want the parameters."""
    rng = np.random.default_rng([1, step])
    return tuple(
        rng.normal(size=(BATCH, *shape)).astype(np.float32) * (1 + step % 3)
        for shape in SHAPES.values()
    )


def losses(weights: Weights, targets: Iterable[np.ndarray]) -> np.ndarray:
    """The loss of each image."""
    parts = [
        ((weights[name] - wanted) ** 2).reshape(BATCH, -1)
        for name, wanted in zip(SHAPES, targets, strict=True)
    ]
    return np.concatenate(parts, 1).sum(1) / 2


def make(
    kind: str,
    grad_accum_steps: int = 1,
    ranks: ProcessGroup | None = None,
    shard: bool = False,
    scale: LossScale | None = None,
) -> tuple[Quadratic, TrainStep]:
    network, config = Quadratic(), CONFIGS[kind]
    state = TrainState(network, config, STEPS, DECAY, ranks, shard)
    return network, TrainStep(network, state, config.max_grad_norm, grad_accum_steps, scale)


def snapshot(step: TrainStep) -> dict[str, Weights]:
    return {
        file: {name: a.copy() for name, a in arrays.items()}
        for file, arrays in step.state.files().items()
    }


@dataclass
class History:
    """What was seen, step by step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    states: list[dict[str, Weights]] = field(default_factory=list)


def train(step: TrainStep, first: int = 0) -> History:
    seen = History()
    for number in range(first, STEPS):
        loss, norm, *_ = step(step.parts(batch(number)))
        seen.losses.append(loss)
        seen.norms.append(norm)
        seen.states.append(snapshot(step))
    return seen


def assert_same_bits(a: dict[str, Weights], b: dict[str, Weights]) -> None:
    flat_a, flat_b = (
        {(f, name): x for f, arrays in s.items() for name, x in arrays.items()} for s in (a, b)
    )
    assert flat_a.keys() == flat_b.keys()
    for name, array in flat_a.items():
        np.testing.assert_array_equal(array, flat_b[name], err_msg=str(name))


@pytest.fixture(scope="module", params=CONFIGS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def trainer(kind: str) -> TrainStep:
    return make(kind)[1]


@pytest.fixture(scope="module")
def seen(trainer: TrainStep) -> History:
    """An uninterrupted run."""
    return train(trainer)


@pytest.fixture(scope="module")
def resumed(kind: str, seen: History) -> tuple[Quadratic, TrainStep, History]:
    """A run from the middle, in a process that already took a step of its own."""
    network, step = make(kind)
    step(step.parts(batch(STEPS)))
    load(step, seen.states[HALF - 1])
    return network, step, train(step, HALF)


def load(step: TrainStep, state: dict[str, Weights]) -> None:
    step.state.load(state, "step_6")


# The same in NumPy.


def rate(config: OptimizerConfig, step: int) -> float:
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    done = (step - config.warmup_steps) / (STEPS - config.warmup_steps)
    return float(config.lr * (1 + np.cos(np.pi * done)) / 2)


def adamw(config: OptimizerConfig) -> Callable[[int, np.ndarray, np.ndarray], np.ndarray]:
    """arXiv 1711.05101, algorithm 2: (t from 1, parameter, gradient) -> parameter."""
    m: Any = 0.0
    v: Any = 0.0
    beta1, beta2 = config.betas

    def update(t: int, p: np.ndarray, g: np.ndarray) -> np.ndarray:
        nonlocal m, v
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        direction = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + config.eps)
        return p - rate(config, t - 1) * (direction + config.weight_decay * p)

    return update


def adafactor(config: OptimizerConfig) -> Callable[[int, np.ndarray, np.ndarray], np.ndarray]:
    """arXiv 1804.04235, algorithms 4 and 5, with a learning rate from outside. Of a kernel, each
    last pair of axes.
    """
    rows: Any = 0.0
    columns: Any = 0.0
    v: Any = 0.0

    def update(t: int, p: np.ndarray, g: np.ndarray) -> np.ndarray:
        nonlocal rows, columns, v
        beta, square = 1 - t**-0.8, g**2 + 1e-30
        if g.ndim == 1:
            v = beta * v + (1 - beta) * square
        else:
            rows = beta * rows + (1 - beta) * square.sum(-1, keepdims=True)
            columns = beta * columns + (1 - beta) * square.sum(-2, keepdims=True)
            v = rows * columns / rows.sum(-2, keepdims=True)
        u = g / np.sqrt(v)
        return p - rate(config, t - 1) * u / max(1.0, np.sqrt((u**2).mean()))

    return update


@pytest.fixture(scope="module")
def reference(kind: str) -> History:
    config = CONFIGS[kind]
    weights = start()
    average = start()
    rule = {"adamw": adamw, "adafactor": adafactor}[kind]
    updates = {name: rule(config) for name in SHAPES}
    seen = History()
    for step in range(STEPS):
        wanted = {
            name: targets.astype(float) for name, targets in zip(SHAPES, batch(step), strict=True)
        }
        seen.losses.append(losses(weights, wanted.values()).mean())
        gradients = {n: weights[n] - wanted[n].mean(0) for n in SHAPES}
        seen.norms.append(float(np.sqrt(sum((g**2).sum() for g in gradients.values()))))
        shrink = min(1.0, config.max_grad_norm / seen.norms[-1])
        weights = {n: updates[n](step + 1, weights[n], shrink * gradients[n]) for n in SHAPES}
        keep = min((1 + step) / (10 + step), DECAY)
        average = {n: keep * average[n] + (1 - keep) * weights[n] for n in SHAPES}
        seen.states.append({"model": weights, "ema": average})
    return seen


def test_the_optimizer_is_the_papers(seen: History, reference: History, kind: str) -> None:
    assert min(reference.norms) < CONFIGS[kind].max_grad_norm < max(reference.norms)
    np.testing.assert_allclose(seen.losses, reference.losses, rtol=1e-5)
    np.testing.assert_allclose(seen.norms, reference.norms, rtol=1e-5)
    for state, expected in zip(seen.states, reference.states, strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(
                state["model"][name], expected["model"][name], rtol=0, atol=5e-6
            )


def test_the_average_is_exponential_with_a_young_start(
    seen: History, reference: History, trainer: TrainStep
) -> None:
    shares = [(1 + step) / (10 + step) for step in range(STEPS)]
    assert shares[0] < shares[HALF] < DECAY < shares[-1]
    for state, expected in zip(seen.states, reference.states, strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(state["ema"][name], expected["ema"][name], rtol=0, atol=5e-6)
    for name, array in trainer.state.average().items():
        np.testing.assert_array_equal(array, seen.states[-1]["ema"][name])


def test_the_rate_told_is_the_schedules(trainer: TrainStep, kind: str) -> None:
    told = [trainer.state.lr(step) for step in range(STEPS + 1)]
    np.testing.assert_allclose(
        told, [rate(CONFIGS[kind], step) for step in range(STEPS + 1)], rtol=1e-5, atol=1e-9
    )
    assert told[0] == told[STEPS] == 0.0


def test_what_the_optimizer_keeps(kind: str, seen: History) -> None:
    """Of each last pair of axes: a 3 x 3 convolution keeps 6 numbers of 9, and a 1 x 1 convolution
    2 for each 1.
    """
    kept = {
        name: array.shape for name, array in seen.states[-1]["optimizer"].items() if array.size > 1
    }
    if kind == "adamw":
        assert kept == {
            f"adam_{moment}.{name}": shape for moment in "mv" for name, shape in SHAPES.items()
        }
        return
    assert kept == {
        "exp_avg_sq_row_matrix": (4,),
        "exp_avg_sq_col_matrix": (3,),
        "exp_avg_sq_row_kernel": (2, 3, 3),
        "exp_avg_sq_col_kernel": (2, 3, 2),
        "exp_avg_sq_vector": (5,),
    }
    assert sum(map(factored, SHAPES.values())) == sum(
        map(math.prod, kept.values())
    )  # what `cascade check` counts


def test_accumulated_gradients_are_the_batchs() -> None:
    whole, parts = (make("adamw", grad_accum_steps)[1] for grad_accum_steps in (1, 2))
    a, b = train(whole), train(parts)
    np.testing.assert_allclose(a.losses, b.losses, rtol=1e-6)
    np.testing.assert_allclose(a.norms, b.norms, rtol=1e-6)
    for file in ("model", "ema"):
        for name in SHAPES:
            np.testing.assert_allclose(
                a.states[-1][file][name], b.states[-1][file][name], rtol=0, atol=1e-6
            )


class Echo(ProcessGroup):
    """One of `world` ranks that all have the same to say."""

    def all_reduce(self, flat: Tensor) -> Tensor:
        return Tensor(flat.asnumpy() * self.world)


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_ranks_take_the_step_of_their_mean(grad_accum_steps: int, kind: str, seen: History) -> None:
    _, step = make(kind, grad_accum_steps, Echo(0, 4))
    again = train(step)
    np.testing.assert_allclose(again.losses, seen.losses, rtol=1e-6)
    np.testing.assert_allclose(again.norms, seen.norms, rtol=1e-6)
    for file in ("model", "ema"):
        for name in SHAPES:
            np.testing.assert_allclose(
                again.states[-1][file][name],
                seen.states[-1][file][name],
                rtol=0,
                atol=1e-5 if kind == "adamw" else 5e-6,
            )


def test_one_that_asks_to_stop_is_heard() -> None:
    _, step = make("adamw", 1, Echo(0, 4))
    assert step(step.parts(batch(0)), lambda: True).stops == 4
    assert step(step.parts(batch(1))).stops == 0


def test_ranks_whose_weights_drift_apart_are_named() -> None:
    class Watched(ProcessGroup):
        odd = [2]  # noqa: RUF012

        def mismatching_ranks(self, digest: bytes) -> list[int]:
            return self.odd

    _, step = make("adamw", 1, Watched(0, 4))
    with pytest.raises(JobError) as error:
        step.state.check_alike(7)
    assert str(error.value).startswith(
        "step 7: the weights of rank 2 are no longer those of the other ranks: "
    )
    Watched.odd = []
    step.state.check_alike(8)


class Share(Echo):
    """Rank 0, whose share of what is gathered stands for everyone's."""

    def all_gather(self, flat: Tensor) -> Tensor:
        return Tensor(np.tile(flat.asnumpy(), self.world))


def test_a_share_of_the_optimizer_makes_the_step_of_that_share(seen: History, kind: str) -> None:
    """Of the bucket's 53 numbers rank 0 of 3 has 18, the matrix and the vector; one is padding."""
    if kind == "adafactor":
        with pytest.raises(
            ConfigError, match=r"train\.shard_optimizer: adafactor factors whole matrices"
        ):
            make(kind, 1, Share(0, 3), shard=True)
        return
    _, step = make(kind, 1, Share(0, 3), shard=True)
    assert [bucket.size for bucket in step.state.buckets] == [54]
    assert {p.shape for p in step.state.moments if p.size > 1} == {(18,)}
    expected = make(kind)[1].state
    sums = [Tensor(np.random.default_rng(0).normal(size=54).astype(np.float32))]
    step.state.update(sums, 0.5)
    expected.update([sums[0][:53]], 0.5)
    for file in ("model", "ema"):
        for name in ("matrix", "vector"):
            mine, whole = (state.files(file)[file][name] for state in (step.state, expected))
            np.testing.assert_array_equal(mine, whole)


def test_weights_are_spread_alike_on_every_device() -> None:
    """The compiled branch that is an Ascend's, on a CPU."""
    network, step = make("adamw")
    vectors = [Tensor(np.arange(bucket.size, dtype=np.float32)) for bucket in step.state.buckets]
    step.state._scatter(*vectors).asnumpy()
    (views,) = [b.views(v.asnumpy()) for b, v in zip(step.state.buckets, vectors, strict=True)]
    for parameter in network.trainable_params():
        np.testing.assert_array_equal(parameter.asnumpy(), views[parameter.name])


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_a_loss_scale_changes_nothing_but_what_overflows(
    grad_accum_steps: int, seen: History, kind: str
) -> None:
    """Powers of two are exact; the first steps overflow, are not taken, and are no fault."""
    scale = LossScale("float16")
    scale.value = 2.0**125
    _, step = make(kind, grad_accum_steps, scale=scale)
    overflows = 0
    for number in range(STEPS):
        while (outcome := step(step.parts(batch(number)))).overflow:
            overflows += 1
            assert not outcome.taken
        np.testing.assert_allclose(
            outcome[:2], (seen.losses[number], seen.norms[number]), rtol=1e-5
        )
    assert overflows > 2


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_step_that_is_not_finite_is_not_taken(grad_accum_steps: int, bad: float) -> None:
    """Nothing tells later that it was there; 1e30 is a number whose square, the loss, is none."""
    _, step = make("adamw", grad_accum_steps)
    expected = train(make("adamw", grad_accum_steps)[1])
    for number in range(STEPS):
        before, spoiled = snapshot(step), batch(number)
        spoiled[1][0, 2] = bad
        outcome = step(step.parts(spoiled))
        assert not outcome.taken
        assert not np.isfinite(outcome.loss)
        assert_same_bits(snapshot(step), before)
        assert step(step.parts(batch(number))) == StepResult(
            expected.losses[number], expected.norms[number]
        )
        assert_same_bits(snapshot(step), expected.states[number])


def test_resumed_is_uninterrupted(
    seen: History, resumed: tuple[Quadratic, TrainStep, History]
) -> None:
    _, _, again = resumed
    assert again.losses == seen.losses[HALF:]
    assert again.norms == seen.norms[HALF:]
    for state, expected in zip(again.states, seen.states[HALF:], strict=True):
        assert_same_bits(state, expected)


def test_averaged_is_a_visit(seen: History, resumed: tuple[Quadratic, TrainStep, History]) -> None:
    """Inside, the network has the average; after it, and in all later steps, nothing tells that it
    was there.
    """
    network, step, _ = resumed
    load(step, seen.states[HALF - 1])
    targets = batch(0)
    look = runtime.jit(network.construct)
    for number in range(HALF, STEPS):
        before = snapshot(step)
        with step.state.averaged():
            assert_same_bits({"ema": snapshot(step)["model"]}, {"ema": before["ema"]})
            np.testing.assert_allclose(
                look(*map(Tensor, targets)).asnumpy(), losses(before["ema"], targets), rtol=1e-5
            )
        assert_same_bits(snapshot(step), before)
        np.testing.assert_allclose(
            look(*map(Tensor, targets)).asnumpy(), losses(before["model"], targets), rtol=1e-5
        )
        assert step(step.parts(batch(number)))[:2] == (seen.losses[number], seen.norms[number])
        assert_same_bits(snapshot(step), seen.states[number])
    with pytest.raises(KeyError, match="picture"), step.state.averaged():
        raise KeyError("picture")
    assert_same_bits(snapshot(step), seen.states[-1])


@pytest.mark.parametrize(
    ("file", "name", "found", "message"),
    [
        ("ema", "vector", None, "'vector' is missing and this run wants [5]"),
        ("ema", "matrix", (3, 4), "'matrix' is [3, 4] and this run wants [4, 3]"),
        ("optimizer", "ema_step", None, "'ema_step' is missing and this run wants []"),
        (
            "optimizer",
            "adam_v.kernel",
            (2, 3, 3),
            "'adam_v.kernel' is [2, 3, 3] and this run wants [2, 3, 3, 2]",
        ),
    ],
)
def test_a_checkpoint_of_another_configuration(
    file: str, name: str, found: tuple[int, ...] | None, message: str
) -> None:
    _, step = make("adamw")
    state = snapshot(step)
    if found is None:
        del state[file][name]
    else:
        state[file][name] = np.zeros(found, np.float32)
    with pytest.raises(UserError) as error:
        step.state.load(state, "runs/x/checkpoints/step_0000006")
    where = f"runs/x/checkpoints/step_0000006/{file}.safetensors"
    assert str(error.value) == f"{where}: {message}; it was made by another configuration"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, "lr: 0.0 is not positive; give a positive number"),
        ({"max_grad_norm": -1.0}, "max_grad_norm: -1.0 is not positive; give a positive number"),
        ({"eps": 0.0}, "eps: 0.0 is not positive; give a positive number"),
        ({"weight_decay": -0.1}, "weight_decay: -0.1 is negative; give 0 or more"),
        ({"warmup_steps": -1}, "warmup_steps: -1 is negative; give 0 or more"),
        (
            {"betas": (0.9, 1.0)},
            "betas: [0.9, 1.0] are not between 0 and 1; usual are [0.9, 0.999]",
        ),
        (
            {"betas": (0.0, 0.9)},
            "betas: [0.0, 0.9] are not between 0 and 1; usual are [0.9, 0.999]",
        ),
    ],
)
def test_optimizer_settings_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        OptimizerConfig(**values)
    assert str(error.value) == message


def test_the_next_batch_is_on_its_way_while_one_is_trained() -> None:
    asked: list[int] = []

    def batches() -> Iterator[tuple[np.ndarray, ...]]:
        for number in range(3):
            asked.append(number)
            yield (np.full(4, number, np.float32),)

    step = TrainStep.__new__(TrainStep)  # nothing of it but the number of parts
    step.grad_accum_steps = 2
    seen = []
    for number, parts in enumerate(step.ahead(batches())):
        assert asked == list(range(min(number + 2, 3)))
        seen.append([part[0].asnumpy().tolist() for part in parts])
    assert seen == [[[float(number)] * 2] * 2 for number in range(3)]
    assert list(step.ahead(iter(()))) == []
