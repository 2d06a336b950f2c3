"""Both U-Nets and their PyTorch twins, live; test_unet.py compares with stored references, without
PyTorch.
"""

import json
from typing import Any

import pytest

from pipeline.nn.unet import UNet, UNetConfig
from tests.helpers.compare import assert_close, assign_random, differentiate, reference
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
    """Output and gradients by the image and every parameter; the twin computes in float64."""
    from tools.twin import twin

    changes, sizes = CASES[kind]
    config = UNetConfig(channels=24, head_channels=12, text_channels=20, **changes)
    net = UNet(config, **sizes)
    weights = assign_random(net, seed)
    inputs = references.unet_inputs(seed, **sizes)
    network = twin(config, **sizes, weights=weights)
    expected = references.differentiate(network, inputs, seed)
    outputs = differentiate(net)(expected.pop("cotangent"), *inputs.values())
    assert outputs.keys() == expected.keys()
    assert_close(outputs, expected)


def test_a_twin_is_strict() -> None:
    from tools.twin import twin

    changes, sizes = CASES["adm"]
    with pytest.raises(RuntimeError, match="Missing key"):
        twin(UNetConfig(channels=24, head_channels=12, **changes), **sizes, weights={})


@pytest.mark.parametrize("name", [*references.LAYERS, *references.UNETS])
def test_stored_references_are_current(name: str) -> None:
    arrays, config = references.REFERENCES[name]()
    inputs, outputs, stored_config = reference(name)
    assert stored_config == json.loads(json.dumps(config))
    stored = {f"inputs.{key}": value for key, value in inputs.items()} | outputs
    assert stored.keys() == arrays.keys()
    assert_close(stored, arrays, tolerance=1e-6)
