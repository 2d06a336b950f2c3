"""Both U-Nets beside their PyTorch twins, live; stored answers are compared without PyTorch in
test_unet.py.
"""

import json
from typing import Any

import pytest

from pipeline.nn.parameters import assign
from pipeline.nn.unet import UNet, UNetConfig
from tests.helpers.compare import assert_close, differentiate, reference
from tools import references

torch = pytest.importorskip("torch", reason="PyTorch is not installed: run `make test-parity`")
pytestmark = pytest.mark.parity

CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "adm": (
        {
            "kind": "adm",
            "num_blocks": (1, 2),
            "channel_mults": (1, 2),
            "attention": ("cross", "self"),
        },
        {"channels_in": 6, "num_levels": 2, "text_width": 10},
    ),
    "efficient": (
        {
            "kind": "efficient",
            "num_blocks": (1, 2, 1),
            "channel_mults": (1, 3, 2),
            "attention": ("none", "cross", "self"),
        },
        {"channels_in": 3, "num_levels": 1, "text_width": 10},
    ),
}


@pytest.mark.parametrize(("kind", "seed"), [("adm", 3), ("efficient", 4)])
def test_equals_the_twin(kind: str, seed: int) -> None:
    """Output, and gradients with respect to the picture and every parameter; twin in float64."""
    from tools.twin import twin

    changes, sizes = CASES[kind]
    config = UNetConfig(channels=24, head_channels=12, text_channels=20, **changes)
    net = UNet(config, **sizes)
    weights = references.random_weights({p.name: p.shape for p in net.trainable_params()}, seed)
    assign(net, weights, kind)
    inputs = references.unet_inputs(seed, **sizes)
    wanted = references.differentiate(twin(config, **sizes, weights=weights), inputs, seed)
    found = differentiate(net)(wanted.pop("cotangent"), *inputs.values())
    assert found.keys() == wanted.keys()
    assert_close(found, wanted)


def test_a_twin_is_strict() -> None:
    from tools.twin import twin

    changes, sizes = CASES["adm"]
    with pytest.raises(RuntimeError, match="Missing key"):
        twin(UNetConfig(channels=24, head_channels=12, **changes), **sizes, weights={})


@pytest.mark.parametrize("name", [*references.LAYERS, *references.UNETS])
def test_stored_references_are_current(name: str) -> None:
    arrays, config = references.REFERENCES[name]()
    inputs, answers, stored = reference(name)
    assert stored == json.loads(json.dumps(config))
    found = {**{f"inputs.{key}": value for key, value in inputs.items()}, **answers}
    assert found.keys() == arrays.keys()
    assert_close(found, arrays, tolerance=1e-6)
