"""The training step on a quadratic, whose gradient is known, against the papers' algorithms in
NumPy float64.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from pipeline import runtime
from pipeline.config import ConfigError
from pipeline.errors import JobError, UserError
from pipeline.train.config import TrainConfig
from pipeline.train.memory import num_factored
from pipeline.train.optimizer import OptimizerConfig
from pipeline.train.precision import Precision
from pipeline.train.process_group import ProcessGroup
from pipeline.train.state import TrainState
from pipeline.train.step import StepResult, TrainStep, prefetch, split
from tests.helpers.groups import EchoGroup

STEPS = 12
HALF = 6
BATCH = 4
EMA_DECAY = 0.45
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
    """The loss of an image is half the squared distance of the parameters from its targets."""

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
    """The targets of the images of a step."""
    rng = np.random.default_rng([1, step])
    return tuple(
        rng.normal(size=(BATCH, *shape)).astype(np.float32) * (1 + step % 3)
        for shape in SHAPES.values()
    )


def losses(weights: Weights, targets: Iterable[np.ndarray]) -> np.ndarray:
    """The loss of each image."""
    parts = [
        ((weights[name] - target) ** 2).reshape(BATCH, -1)
        for name, target in zip(SHAPES, targets, strict=True)
    ]
    return np.concatenate(parts, 1).sum(1) / 2


def make(
    kind: str,
    grad_accum_steps: int = 1,
    group: ProcessGroup | None = None,
    shard: bool = False,
    precision: Precision = "float32",
) -> tuple[Quadratic, TrainStep]:
    network = Quadratic()
    config = TrainConfig(
        steps=STEPS,
        grad_accum_steps=grad_accum_steps,
        precision=precision,
        shard_optimizer=shard,
        ema_decay=EMA_DECAY,
    )
    state = TrainState(network, CONFIGS[kind], config, group)
    return network, TrainStep(network, state, CONFIGS[kind], config)


def snapshot(step: TrainStep) -> dict[str, Weights]:
    return {
        file: {name: a.copy() for name, a in arrays.items()}
        for file, arrays in step.state.files().items()
    }


@dataclass
class History:
    """Losses, gradient norms and states, step by step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    states: list[dict[str, Weights]] = field(default_factory=list)


def train(step: TrainStep, first: int = 0) -> History:
    history = History()
    for number in range(first, STEPS):
        result = step(step.micro_batches(batch(number)))
        history.losses.append(result.loss)
        history.norms.append(result.grad_norm)
        history.states.append(snapshot(step))
    return history


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
def uninterrupted(trainer: TrainStep) -> History:
    return train(trainer)


@pytest.fixture(scope="module")
def resumed(kind: str, uninterrupted: History) -> tuple[Quadratic, TrainStep, History]:
    """A run from the middle, in a process that already took a step of its own."""
    network, step = make(kind)
    step(step.micro_batches(batch(STEPS)))
    load(step, uninterrupted.states[HALF - 1])
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
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        direction = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + config.eps)
        return p - rate(config, t - 1) * (direction + config.weight_decay * p)

    return update


def adafactor(config: OptimizerConfig) -> Callable[[int, np.ndarray, np.ndarray], np.ndarray]:
    """arXiv 1804.04235, algorithms 4 and 5, with an external learning rate; of a kernel, each last
    pair of axes.
    """
    rows: Any = 0.0
    columns: Any = 0.0
    v: Any = 0.0

    def update(t: int, p: np.ndarray, g: np.ndarray) -> np.ndarray:
        nonlocal rows, columns, v
        beta = 1 - t**-0.8
        square = g**2 + 1e-30
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
    history = History()
    for step in range(STEPS):
        targets = {
            name: array.astype(float) for name, array in zip(SHAPES, batch(step), strict=True)
        }
        history.losses.append(losses(weights, targets.values()).mean())

        gradients = {n: weights[n] - targets[n].mean(0) for n in SHAPES}
        history.norms.append(float(np.sqrt(sum((g**2).sum() for g in gradients.values()))))
        clip = min(1.0, config.max_grad_norm / history.norms[-1])
        weights = {n: updates[n](step + 1, weights[n], clip * gradients[n]) for n in SHAPES}

        decay = min((1 + step) / (10 + step), EMA_DECAY)
        average = {n: decay * average[n] + (1 - decay) * weights[n] for n in SHAPES}
        history.states.append({"model": weights, "ema": average})
    return history


def test_the_optimizer_is_the_papers(uninterrupted: History, reference: History, kind: str) -> None:
    assert min(reference.norms) < CONFIGS[kind].max_grad_norm < max(reference.norms)
    np.testing.assert_allclose(uninterrupted.losses, reference.losses, rtol=1e-5)
    np.testing.assert_allclose(uninterrupted.norms, reference.norms, rtol=1e-5)
    for state, expected in zip(uninterrupted.states, reference.states, strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(
                state["model"][name], expected["model"][name], rtol=0, atol=5e-6
            )


def test_the_ema_has_a_smaller_decay_at_first(
    uninterrupted: History, reference: History, trainer: TrainStep
) -> None:
    decays = [(1 + step) / (10 + step) for step in range(STEPS)]
    assert decays[0] < decays[HALF] < EMA_DECAY < decays[-1]
    for state, expected in zip(uninterrupted.states, reference.states, strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(state["ema"][name], expected["ema"][name], rtol=0, atol=5e-6)
    for name, array in trainer.state.ema_weights().items():
        np.testing.assert_array_equal(array, uninterrupted.states[-1]["ema"][name])


def test_the_reported_learning_rate_is_the_schedules(trainer: TrainStep, kind: str) -> None:
    reported = [trainer.state.lr(step) for step in range(STEPS + 1)]
    expected = [rate(CONFIGS[kind], step) for step in range(STEPS + 1)]
    np.testing.assert_allclose(reported, expected, rtol=1e-5, atol=1e-9)
    assert reported[0] == reported[STEPS] == 0.0


def test_the_shapes_of_the_optimizers_state(kind: str, uninterrupted: History) -> None:
    """Adafactor factors the last pair of axes: of a 3 x 3 convolution it keeps 6 elements of 9, of
    a 1 x 1 convolution 2 for each 1.
    """
    state = uninterrupted.states[-1]["optimizer"]
    shapes = {name: array.shape for name, array in state.items() if array.size > 1}
    if kind == "adamw":
        assert shapes == {
            f"adam_{moment}.{name}": shape for moment in "mv" for name, shape in SHAPES.items()
        }
        return

    assert shapes == {
        "exp_avg_sq_row_matrix": (4,),
        "exp_avg_sq_col_matrix": (3,),
        "exp_avg_sq_row_kernel": (2, 3, 3),
        "exp_avg_sq_col_kernel": (2, 3, 2),
        "exp_avg_sq_vector": (5,),
    }
    # The number that `cascade check` counts.
    assert sum(map(num_factored, SHAPES.values())) == sum(map(math.prod, shapes.values()))


def assert_close_runs(a: History, b: History, tolerance: float) -> None:
    np.testing.assert_allclose(a.losses, b.losses, rtol=1e-6)
    np.testing.assert_allclose(a.norms, b.norms, rtol=1e-6)
    for file in ("model", "ema"):
        for name in SHAPES:
            np.testing.assert_allclose(
                a.states[-1][file][name], b.states[-1][file][name], rtol=0, atol=tolerance
            )


def test_accumulated_gradients_are_those_of_the_batch() -> None:
    whole, parts = (train(make("adamw", grad_accum_steps)[1]) for grad_accum_steps in (1, 2))
    assert_close_runs(whole, parts, 1e-6)


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_ranks_apply_their_mean_gradient(
    grad_accum_steps: int, kind: str, uninterrupted: History
) -> None:
    _, step = make(kind, grad_accum_steps, EchoGroup(0, 4))
    assert_close_runs(train(step), uninterrupted, 1e-5 if kind == "adamw" else 5e-6)


def test_the_ranks_that_ask_to_stop_are_counted() -> None:
    _, step = make("adamw", 1, EchoGroup(0, 4))
    assert step(step.micro_batches(batch(0)), lambda: True).num_stop_requests == 4
    assert step(step.micro_batches(batch(1))).num_stop_requests == 0


def test_ranks_whose_weights_diverge_are_named() -> None:
    group = EchoGroup(0, 4)
    _, step = make("adamw", 1, group)
    group.mismatching = [2]
    with pytest.raises(JobError) as error:
        step.state.check_weights_agree(7)
    assert str(error.value).startswith(
        "step 7: the weights of rank 2 are no longer those of the other ranks: "
    )
    group.mismatching = []
    step.state.check_weights_agree(8)


def test_adafactor_is_not_sharded() -> None:
    with pytest.raises(
        ConfigError, match=r"train\.shard_optimizer: adafactor factors whole matrices"
    ):
        make("adafactor", 1, EchoGroup(0, 3), shard=True)


def test_a_sharded_optimizer_updates_its_shard_like_a_whole_one() -> None:
    """Of the bucket's 53 elements rank 0 of 3 has 18, the matrix and the vector; one is padding."""
    _, step = make("adamw", 1, EchoGroup(0, 3), shard=True)
    assert [bucket.size for bucket in step.state.buckets] == [54]
    assert {p.shape for p in step.state.moments if p.size > 1} == {(18,)}

    whole = make("adamw")[1].state
    sums = [Tensor(np.random.default_rng(0).normal(size=54).astype(np.float32))]
    step.state.update(sums, 0.5)
    whole.update([sums[0][:53]], 0.5)
    for file in ("model", "ema"):
        actual = step.state.files(file)[file]
        expected = whole.files(file)[file]
        for name in ("matrix", "vector"):
            np.testing.assert_array_equal(actual[name], expected[name])


def test_vectors_are_scattered_alike_on_every_device() -> None:
    """The compiled function that an Ascend uses, on a CPU."""
    network, step = make("adamw")
    (bucket,) = step.state.buckets
    vector = np.arange(bucket.size, dtype=np.float32)
    runtime.jit(step.state.scatter())(Tensor(vector)).asnumpy()
    for parameter in network.trainable_params():
        np.testing.assert_array_equal(parameter.asnumpy(), bucket.views(vector)[parameter.name])


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_a_loss_scale_changes_nothing_but_what_overflows(
    grad_accum_steps: int, uninterrupted: History, kind: str
) -> None:
    """Powers of two are exact; the first steps overflow and are skipped."""
    _, step = make(kind, grad_accum_steps, precision="float16")
    step.loss_scale.value = 2.0**125
    num_overflows = 0
    for number in range(STEPS):
        while (result := step(step.micro_batches(batch(number)))).loss_scale_overflow:
            num_overflows += 1
            assert not result.applied
        np.testing.assert_allclose(result.loss, uninterrupted.losses[number], rtol=1e-5)
        np.testing.assert_allclose(result.grad_norm, uninterrupted.norms[number], rtol=1e-5)
    assert num_overflows > 2


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_a_step_that_is_not_finite_is_skipped_without_a_trace(grad_accum_steps: int) -> None:
    """1e30 is finite, but its square, the loss, is not."""
    _, step = make("adamw", grad_accum_steps)
    expected = train(make("adamw", grad_accum_steps)[1])
    for number in range(STEPS):
        before = snapshot(step)
        spoiled = batch(number)
        spoiled[1][0, 2] = (np.nan, np.inf, 1e30)[number % 3]
        result = step(step.micro_batches(spoiled))
        assert not result.applied
        assert not np.isfinite(result.loss)
        assert_same_bits(snapshot(step), before)

        assert step(step.micro_batches(batch(number))) == StepResult(
            loss=expected.losses[number], grad_norm=expected.norms[number]
        )
        assert_same_bits(snapshot(step), expected.states[number])


def test_resumed_is_uninterrupted(
    uninterrupted: History, resumed: tuple[Quadratic, TrainStep, History]
) -> None:
    _, _, again = resumed
    assert again.losses == uninterrupted.losses[HALF:]
    assert again.norms == uninterrupted.norms[HALF:]
    for state, expected in zip(again.states, uninterrupted.states[HALF:], strict=True):
        assert_same_bits(state, expected)


def test_the_ema_is_in_the_network_only_inside(
    uninterrupted: History, resumed: tuple[Quadratic, TrainStep, History]
) -> None:
    """Afterwards, the weights and all later steps are as if it had not been there."""
    network, step, _ = resumed
    load(step, uninterrupted.states[HALF - 1])
    targets = batch(0)
    compiled = runtime.jit(network.construct)

    def assert_network_has(weights: Weights) -> None:
        assert_same_bits({"": snapshot(step)["model"]}, {"": weights})
        actual = compiled(*map(Tensor, targets)).asnumpy()
        np.testing.assert_allclose(actual, losses(weights, targets), rtol=1e-5)

    for number in range(HALF, STEPS):
        before = snapshot(step)
        with step.state.ema_in_network():
            assert_network_has(before["ema"])
        assert_network_has(before["model"])
        assert_same_bits(snapshot(step), before)

        assert step(step.micro_batches(batch(number))) == StepResult(
            loss=uninterrupted.losses[number], grad_norm=uninterrupted.norms[number]
        )
        assert_same_bits(snapshot(step), uninterrupted.states[number])

    with pytest.raises(KeyError, match="sampling"), step.state.ema_in_network():
        raise KeyError("sampling")
    assert_same_bits(snapshot(step), uninterrupted.states[-1])


@pytest.fixture(scope="module")
def another() -> TrainStep:
    """A run whose state no test looks at."""
    return make("adamw")[1]


@pytest.mark.parametrize(
    ("file", "name", "shape", "problem"),
    [
        ("ema", "vector", None, "'vector' is missing and this run needs [5]"),
        ("ema", "matrix", (3, 4), "'matrix' is [3, 4] and this run needs [4, 3]"),
        ("optimizer", "ema_step", None, "'ema_step' is missing and this run needs []"),
        (
            "optimizer",
            "adam_v.kernel",
            (2, 3, 3),
            "'adam_v.kernel' is [2, 3, 3] and this run needs [2, 3, 3, 2]",
        ),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(
    another: TrainStep, file: str, name: str, shape: tuple[int, ...] | None, problem: str
) -> None:
    state = snapshot(another)
    if shape is None:
        del state[file][name]
    else:
        state[file][name] = np.zeros(shape, np.float32)
    with pytest.raises(UserError) as error:
        another.state.load(state, "runs/x/checkpoints/step_0000006")
    where = f"runs/x/checkpoints/step_0000006/{file}.safetensors"
    assert str(error.value) == f"{where}: {problem}; it was written by another configuration"


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
def test_invalid_optimizer_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        OptimizerConfig(**values)
    assert str(error.value) == message


def test_the_next_batch_is_prepared_before_one_is_trained() -> None:
    prepared: list[int] = []

    def prepare(number: int) -> str:
        prepared.append(number)
        return str(number)

    for number, ready in enumerate(prefetch(iter(range(3)), prepare)):
        assert ready == str(number)
        assert prepared == list(range(min(number + 2, 3)))
    assert prepared == [0, 1, 2]
    assert list(prefetch(iter(()), prepare)) == []


def test_micro_batches_are_consecutive_rows() -> None:
    arrays = (np.arange(4, dtype=np.float32), np.arange(8, dtype=np.int32).reshape(4, 2))
    first, second = split(arrays, 2)
    assert [array.asnumpy().tolist() for array in first] == [[0, 1], [[0, 1], [2, 3]]]
    assert [array.asnumpy().tolist() for array in second] == [[2, 3], [[4, 5], [6, 7]]]
