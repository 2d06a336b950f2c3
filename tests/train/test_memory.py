"""What a training will hold, by shapes: against the tensors that are there, and what is said when
it does not fit.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore.nn.utils import no_init_parameters

from launch.cli.fit import GIB, allowed, as_lines, changed, changes, fit
from pipeline.config import build
from pipeline.nn.attention import Attention, ScaledDotProductAttention
from pipeline.nn.layers import Conv, Conv1x1, Norm
from pipeline.nn.unet import UNet, UNetConfig
from pipeline.stage.registry import stage_class
from pipeline.train.memory import activations, predict
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


def foretold(world: int = 1, **sections: dict[str, Any]) -> dict[str, int]:
    made = stage(**sections)
    return predict(made.network, made.config, made.config.size, world)


@pytest.mark.parametrize("kind", ["adm", "efficient"])
def test_what_the_gradient_needs_is_what_goes_into_the_layers(kind: str) -> None:
    """Every tensor once that a convolution, a normalization or an attention is given, and the
    attention's weights.
    """
    config = UNetConfig(
        kind=kind, channels=16, channel_mults=(1, 2, 3), num_blocks=(1, 2, 1), attention=("none", "cross", "self"),
        head_channels=16, text_channels=24, patch=2,
    )  # fmt: skip
    network = UNet(config, 3, 1, 8)
    seen: dict[int, Tensor] = {}
    looks = 0

    def look(cell: nn.Cell, inputs: tuple[Tensor, ...]) -> None:
        nonlocal looks
        given = inputs[:3] if isinstance(cell, ScaledDotProductAttention) else inputs[:1]
        seen.update({id(tensor): tensor for tensor in given})
        if isinstance(cell, ScaledDotProductAttention):
            looks += inputs[0].shape[1] * inputs[0].shape[3] * inputs[1].shape[3]

    for part in (network.down, network.middle, network.up, network.norm, network.head):
        for _, cell in part.cells_and_names():
            if isinstance(cell, Conv | Norm | Conv1x1 | ScaledDotProductAttention):
                cell.register_forward_pre_hook(look)
    x, text = np.zeros((1, 3, 32, 32), np.float32), np.zeros((1, 5, 8), np.float32)
    network(*map(Tensor, (x, np.zeros((1, 1), np.float32), text, np.ones((1, 5), np.float32))))
    assert any(isinstance(cell, Attention) for _, cell in network.cells_and_names())
    wanted = sum(tensor.size for tensor in seen.values()) + looks
    assert activations(network.footprint(32, 5), recompute=False) == wanted


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_weights_optimizer_and_average_are_those_of_a_state(kind: str) -> None:
    made, told = stage(), foretold(optimizer={"kind": kind})
    config = replace(made.config.optimizer, kind=kind)
    network = UNet(made.config.unet, 3, 1, made.config.text.width)
    state = TrainState(network, config, 10, 0.9)

    def held(parameters: Any) -> int:
        return sum(4 * parameter.size for parameter in parameters if parameter.size > 1)

    own = held(state.weights) if state.flat else 0
    assert told["weights"] == held(state.parameters)
    assert told["ema"] == pytest.approx(held(state.ema), rel=1e-3)
    assert told["optimizer"] == pytest.approx(held(state.moments) + own, rel=0.03)


def test_activations_go_with_the_batch_and_the_parts() -> None:
    one, two = (foretold(data={"global_batch": batch}) for batch in (8, 16))
    assert two["activations"] == pytest.approx(2 * one["activations"])
    assert (
        foretold(data={"global_batch": 16}, train={"grad_accum_steps": 2})["activations"]
        == one["activations"]
    )
    assert foretold(2, data={"global_batch": 16})["activations"] == one["activations"]
    same = ("program", "weights", "optimizer", "ema", "checkpoint")
    assert {name: one[name] for name in same} == {name: two[name] for name in same}
    assert one["total"] == pytest.approx(
        sum(size for name, size in one.items() if name != "total"), abs=10
    )


def test_less_is_held_with_recomputation_and_with_shares() -> None:
    assert foretold(unet={"recompute": True})["activations"] < foretold()["activations"]
    whole, shared = foretold(4), foretold(4, train={"shard_optimizer": True})
    assert shared["optimizer"] == pytest.approx(whole["optimizer"] / 4, rel=1e-3)
    assert shared["ema"] == pytest.approx(whole["ema"] / 4, rel=1e-3)


def test_what_is_proposed_is_valid_and_helps() -> None:
    """Each builds a configuration, cuts the batch evenly and leaves what is said; the last one of a
    kind the least.
    """
    made = stage(data={"global_batch": 384})
    size, config = made.config.size, made.config
    now = predict(made.network, config, size, 2)["total"]
    found = fit(made.network, config, size, 2, now - 1)
    assert not found["fits"]
    assert found["instead"]
    assert list(found["instead"][0]["set"]) == ["train.grad_accum_steps"]
    for each in found["instead"]:
        change = {key: value for key, value in each["set"].items() if key != "ranks"}
        other, world = changed(config, change), each["set"].get("ranks", 2)
        assert other.data.global_batch % (world * other.train.grad_accum_steps) == 0
        assert predict(made.network, other, size, world)["total"] == each["total"] < now
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
    assert as_lines(found)[0] == "no, 0.01 GiB are not enough; with"
    assert as_lines(found)[1].startswith("train.grad_accum_steps=64: ")
    assert as_lines(found)[1].endswith(" GiB, not enough")
