"""The memory estimate against existing tensors, and what is proposed if a training does not fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.nn.utils import no_init_parameters

from launch.cli.check import fit_as_lines
from launch.cli.check_report import GIB, allowed, changed, changes, fit
from pipeline.config import build
from pipeline.nn.attention import Attention, ScaledDotProductAttention
from pipeline.nn.layers import Conv, Conv1x1, Norm
from pipeline.nn.unet import UNet, UNetConfig
from pipeline.stage.registry import stage_class
from pipeline.train.config import TrainConfig
from pipeline.train.memory import estimate_memory, num_activations
from pipeline.train.state import TrainState
from tests.conftest import stage_yaml


def stage(kind: str = "base", **sections: dict[str, Any]) -> Any:
    raw = stage_yaml(kind, Path("run"), Path("shards"), Path("t5"))
    cls = stage_class(raw["kind"])
    with no_init_parameters():
        return cls(
            build(
                cls.Config, raw | {name: raw[name] | section for name, section in sections.items()}
            )
        )


def estimated(world: int = 1, **sections: dict[str, Any]) -> dict[str, int]:
    base = stage(**sections)
    return estimate_memory(base.network, base.config, base.config.size, world)


@pytest.mark.parametrize("kind", ["adm", "efficient"])
def test_activations_are_the_inputs_of_the_layers(kind: Literal["adm", "efficient"]) -> None:
    """Every tensor once that is an input of a convolution, a normalization or an attention, and the
    attention's weights.
    """
    config = UNetConfig(
        kind=kind,
        channels=16,
        channel_mults=(1, 2, 3),
        num_blocks=(1, 2, 1),
        attention=("none", "cross", "self"),
        head_channels=16,
        text_channels=24,
        patch=2,
    )
    network = UNet(config, 3, 1, 8)
    retained: dict[int, Tensor] = {}
    attention_weights = 0

    def record(cell: nn.Cell, inputs: tuple[Tensor, ...]) -> None:
        nonlocal attention_weights
        num_retained = 3 if isinstance(cell, ScaledDotProductAttention) else 1
        retained.update({id(tensor): tensor for tensor in inputs[:num_retained]})
        if isinstance(cell, ScaledDotProductAttention):
            attention_weights += inputs[0].shape[1] * inputs[0].shape[3] * inputs[1].shape[3]

    for part in (network.down, network.middle, network.up, network.norm, network.head):
        for _, cell in part.cells_and_names():
            if isinstance(cell, Conv | Norm | Conv1x1 | ScaledDotProductAttention):
                cell.register_forward_pre_hook(record)
    x, text = np.zeros((1, 3, 32, 32), np.float32), np.zeros((1, 5, 8), np.float32)
    network(*map(Tensor, (x, np.zeros((1, 1), np.float32), text, np.ones((1, 5), np.float32))))
    assert any(isinstance(cell, Attention) for _, cell in network.cells_and_names())
    expected = sum(tensor.size for tensor in retained.values()) + attention_weights
    assert num_activations(network.footprint(32, 5), recompute=False) == expected


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_weights_optimizer_and_ema_are_those_of_a_state(kind: str) -> None:
    base = stage()
    estimate = estimated(optimizer={"kind": kind})
    config = replace(base.config.optimizer, kind=kind)
    network = UNet(base.config.unet, 3, 1, base.config.text.width)
    state = TrainState(network, config, TrainConfig(steps=10))

    def num_bytes(parameters: Any) -> int:
        return sum(4 * parameter.size for parameter in parameters if parameter.size > 1)

    own = num_bytes(state.weights) if state.uses_buckets else 0
    assert estimate["weights"] == num_bytes(state.parameters)
    assert estimate["ema"] == pytest.approx(num_bytes(state.ema), rel=1e-3)
    assert estimate["optimizer"] == pytest.approx(num_bytes(state.moments) + own, rel=0.03)


def test_activations_are_proportional_to_the_micro_batch() -> None:
    one, two = (estimated(data={"global_batch": batch}) for batch in (8, 16))
    assert two["activations"] == pytest.approx(2 * one["activations"])
    assert (
        estimated(data={"global_batch": 16}, train={"grad_accum_steps": 2})["activations"]
        == one["activations"]
    )
    assert estimated(2, data={"global_batch": 16})["activations"] == one["activations"]
    same = ("program", "weights", "optimizer", "ema", "checkpoint")
    assert {name: one[name] for name in same} == {name: two[name] for name in same}
    assert one["total"] == pytest.approx(
        sum(size for name, size in one.items() if name != "total"), abs=10
    )


def test_recomputation_and_sharding_need_less() -> None:
    assert estimated(unet={"recompute": True})["activations"] < estimated()["activations"]
    whole, sharded = estimated(4), estimated(4, train={"shard_optimizer": True})
    assert sharded["optimizer"] == pytest.approx(whole["optimizer"] / 4, rel=1e-3)
    assert sharded["ema"] == pytest.approx(whole["ema"] / 4, rel=1e-3)


def test_what_is_proposed_is_valid_and_helps() -> None:
    """Each builds a configuration, cuts the batch evenly and leaves what is said; the last one of a
    kind the least.
    """
    made = stage(data={"global_batch": 384})
    size, config = made.config.size, made.config
    now = estimate_memory(made.network, config, size, 2)["total"]
    found = fit(made.network, config, size, 2, now - 1)
    assert not found["fits"]
    assert found["instead"]
    assert list(found["instead"][0]["set"]) == ["train.grad_accum_steps"]
    for each in found["instead"]:
        change = {key: value for key, value in each["set"].items() if key != "ranks"}
        other, world = changed(config, change), each["set"].get("ranks", 2)
        assert other.data.global_batch % (world * other.train.grad_accum_steps) == 0
        assert estimate_memory(made.network, other, size, world)["total"] == each["total"] < now
    assert fit(made.network, config, size, 2, now) == {"device": now, "fits": True, "instead": []}


def test_what_cannot_be_is_not_proposed() -> None:
    def keys(made: Any, world: int) -> set[str]:
        return {
            key for choices in changes(made.config, world) for change in choices for key in change
        }

    assert "train.shard_optimizer" not in keys(stage(), 1)
    assert "train.shard_optimizer" in keys(stage(), 2)
    assert not {"train.shard_optimizer", "optimizer.kind"} & keys(
        stage(optimizer={"kind": "adafactor"}), 2
    )
    assert not {"train.grad_accum_steps", "ranks"} & keys(stage(train={"grad_accum_steps": 4}), 1)
    assert "unet.recompute" not in keys(stage(unet={"recompute": True}), 1)
    assert not allowed({"train.shard_optimizer": True, "optimizer.kind": "adafactor"})


def test_what_is_not_enough_alone_is_proposed_together() -> None:
    made = stage(data={"global_batch": 64})
    found = fit(made.network, made.config, made.config.size, 1, GIB // 100)
    assert all(each["total"] > GIB // 100 for each in found["instead"])
    *alone, together = found["instead"]
    assert len(together["set"]) > 1
    assert together["total"] < min(each["total"] for each in alone)
    assert fit_as_lines(found)[0] == "no, 0.01 GiB are not enough; with"
    assert fit_as_lines(found)[1].startswith("train.grad_accum_steps=64: ")
    assert fit_as_lines(found)[1].endswith(" GiB, not enough")
