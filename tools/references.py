"""Writes the small files in tests/references that the networks are compared with: `python -m
tools.references [NAME ...]`.

A reference holds the outputs of another implementation (PyTorch's, through `transformers` or
tools/twin.py) for fixed inputs: inputs, weights and outputs as arrays in one safetensors file, the
configuration as JSON in its metadata. The tests then need no PyTorch. Writing one needs the
`parity` extra. The files are part of the repository, so this only has to run for a new or changed
reference.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.errors import UserError
from pipeline.terminal import Parser, run

FOLDER = Path(__file__).parent.parent / "tests" / "references"
Reference = tuple[dict[str, np.ndarray], dict[str, Any]]  # arrays, and configuration

T5_SIZES = {"vocab_size": 64, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 2}


def t5_model(kind: Literal["v1_0", "v1_1"], whole: bool = False, **changes: Any) -> Any:
    """A tiny T5 of `transformers` with random weights, including the gains of its norms.

    `whole`: encoder and decoder, instead of the encoder alone.
    """
    import torch
    from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {**T5_SIZES, "feed_forward_proj": "relu" if kind == "v1_0" else "gated-gelu", **changes}
    model_class = T5ForConditionalGeneration if whole else T5EncoderModel
    model = model_class(T5Config(**sizes)).eval()
    # As initialized, gains are 1 and biases of positions small: errors in them would not show.
    for name, parameter in model.named_parameters():
        if "layer_norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        if "relative_attention_bias" in name:
            torch.nn.init.normal_(parameter)
    return model


def t5_inputs(
    length: int = 150, vocab: int = T5_SIZES["vocab_size"]
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask, int32 (2, length), of a full and a padded row.

    The default length reaches the last bucket of relative positions.
    """
    # From 2 on: id 0 pads, and 1 ends a text.
    ids = np.random.default_rng(0).integers(2, vocab, (2, length), dtype=np.int32)
    mask = np.arange(length)[None] < np.array([[length], [length // 3]])
    return np.where(mask, ids, 0).astype(np.int32), mask.astype(np.int32)


def t5_output(model: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """last_hidden_state of the model's encoder."""
    import torch

    with torch.no_grad():
        inputs = {
            "input_ids": torch.from_numpy(ids).long(),
            "attention_mask": torch.from_numpy(mask).long(),
        }
        output: np.ndarray = model.get_encoder()(**inputs).last_hidden_state.numpy()
    return output


def t5_reference(kind: Literal["v1_0", "v1_1"]) -> Reference:
    """A T5 encoder's weights, by Hugging Face name, and last_hidden_state of two captions."""
    model = t5_model(kind)
    ids, mask = t5_inputs()
    weights = {
        f"weights.{name}": value.detach().numpy() for name, value in model.named_parameters()
    }
    config = json.loads(model.config.to_json_string())
    return {
        **weights,
        "ids": ids,
        "mask": mask,
        "last_hidden_state": t5_output(model, ids, mask),
    }, config


# Layers and U-Nets. Their weights are not stored: `random_weights` draws the same ones for PyTorch,
# here, and for MindSpore, in the tests.

LAYERS: dict[str, dict[str, Any]] = {
    "resblock": {"kind": "ResBlock", "width_in": 16, "width": 24, "emb": 20},
    "resblock_up": {"kind": "ResBlock", "width_in": 24, "width": 24, "emb": 20, "resample": "up"},
    "resblock_down": {
        "kind": "ResBlock",
        "width_in": 16,
        "width": 24,
        "emb": 20,
        "resample": "down",
    },
    "attention_self": {
        "kind": "Attention",
        "width": 32,
        "head": 16,
        "text_width": 12,
        "cross": False,
    },
    "attention_cross": {
        "kind": "Attention",
        "width": 32,
        "head": 16,
        "text_width": 12,
        "cross": True,
    },
}
TINY: dict[str, Any] = {
    "channels": 16,
    "channel_mults": (1, 2),
    "head_channels": 16,
    "text_channels": 16,
}
UNETS: dict[str, dict[str, Any]] = {
    "unet_adm": {
        "config": {**TINY, "kind": "adm", "num_blocks": (1, 1), "attention": ("none", "self")},
        "sizes": {"channels_in": 3, "num_levels": 1, "text_width": 12},
    },
    "unet_efficient": {
        "config": {
            **TINY,
            "kind": "efficient",
            "num_blocks": (2, 1),
            "attention": ("self", "cross"),
            "patch": 2,
        },
        "sizes": {"channels_in": 6, "num_levels": 2, "text_width": 12},
    },
}
MAX_STORED = 4000  # elements; gradients of larger parameters are not stored


def random_weights(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, np.ndarray]:
    """float32 arrays by name, drawn in the order of names: matrices with variance 1 / fan-in, gains
    near 1, biases near 0.

    None is zero, not even where training starts at zero: a factor of zero would hide errors.
    """
    stream = np.random.default_rng(seed)
    weights = {}
    for name, shape in sorted(shapes.items()):
        values = stream.standard_normal(tuple(shape))
        if len(shape) > 1:
            values /= np.sqrt(np.prod(shape[1:]))
        else:
            # True adds 1: gains lie near 1, biases near 0.
            values = 0.2 * values + name.endswith(("gain", "gamma"))
        weights[name] = values.astype(np.float32)
    return weights


def unet_inputs(
    seed: int, channels_in: int, num_levels: int, text_width: int
) -> dict[str, np.ndarray]:
    """Images that are not square, logsnr from -6 to 6, a full caption and one with padding."""
    stream = np.random.default_rng(seed)
    return {
        "x": stream.standard_normal((2, channels_in, 16, 8)).astype(np.float32),
        "logsnr": stream.uniform(-6, 6, (2, num_levels)).astype(np.float32),
        "text": stream.standard_normal((2, 5, text_width)).astype(np.float32),
        "mask": (np.arange(5) < np.array([[5], [3]])).astype(np.float32),
    }


def differentiate(
    module: Any, inputs: Mapping[str, np.ndarray], seed: int
) -> dict[str, np.ndarray]:
    """The outputs of a PyTorch module in float64: `output`, a random `cotangent`, and the gradients
    of their product.

    `gradients.x` is by the first input, `gradients.NAME` by a parameter. Returned as float32.
    """
    import torch

    # In float64, so that only the tested side rounds.
    tensors = [torch.tensor(value).double() for value in inputs.values()]
    tensors[0].requires_grad_()
    module.double()
    output = module(*tensors)

    # Rounded to float32 before its use, as the tests read it from the file.
    cotangent = torch.tensor(
        np.random.default_rng(seed).standard_normal(output.shape).astype(np.float32)
    )
    output.backward(cotangent.double())

    gradients = {
        "x": tensors[0].grad,
        **{name: parameter.grad for name, parameter in module.named_parameters()},
    }
    outputs = {"output": output.detach(), "cotangent": cotangent}
    outputs |= {f"gradients.{name}": gradient for name, gradient in gradients.items()}
    return {name: value.float().numpy() for name, value in outputs.items()}


def layer_reference(name: str) -> Reference:
    """A layer's inputs, `inputs.NAME` for x, emb, text and bias, and the results of
    `differentiate`.
    """
    import torch

    from tools import twin

    arguments = dict(LAYERS[name])
    layer = getattr(twin, arguments.pop("kind"))(**arguments)
    weights = random_weights({key: value.shape for key, value in layer.named_parameters()}, seed=0)
    layer.load_state_dict({key: torch.tensor(value) for key, value in weights.items()}, strict=True)

    # Another seed than the weights', whose draws the inputs would repeat.
    stream = np.random.default_rng(1)
    width_in = arguments.get("width_in", arguments["width"])
    shapes = {
        "x": (2, width_in, 6, 4),
        "emb": (2, arguments.get("emb", 1)),
        "text": (2, 5, arguments.get("text_width", 1)),
    }
    inputs = {
        key: stream.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()
    }
    # As the networks get it: 0 at tokens, a large negative score at padding.
    inputs["bias"] = np.where(np.arange(5) < [[5], [3]], 0, -1e4).astype(np.float32)
    arrays = {f"inputs.{key}": value for key, value in inputs.items()} | differentiate(
        layer, inputs, seed=2
    )
    return arrays, {**LAYERS[name], "seed": 0}


def unet_reference(name: str) -> Reference:
    """A U-Net's inputs, `inputs.NAME` for x, logsnr, text and mask, and the results of
    `differentiate` without the gradients of large parameters.
    """
    from pipeline.nn.unet import UNetConfig
    from tools.twin import UNet, twin

    config = UNetConfig(**UNETS[name]["config"])
    sizes = UNETS[name]["sizes"]
    shapes = {key: value.shape for key, value in UNet(config, **sizes).named_parameters()}
    network = twin(config, **sizes, weights=random_weights(shapes, seed=0))

    inputs = unet_inputs(1, **sizes)
    arrays = {f"inputs.{key}": value for key, value in inputs.items()} | differentiate(
        network, inputs, seed=2
    )
    # The files are part of the repository, so that they have to stay small.
    stored = {
        key: value
        for key, value in arrays.items()
        if not key.startswith("gradients.") or value.size <= MAX_STORED
    }
    return stored, {"config": asdict(config), "sizes": sizes, "seed": 0}


REFERENCES: dict[str, Callable[[], Reference]] = {
    "t5_v1_0": partial(t5_reference, "v1_0"),
    "t5_v1_1": partial(t5_reference, "v1_1"),
    **{name: partial(layer_reference, name) for name in LAYERS},
    **{name: partial(unet_reference, name) for name in UNETS},
}


def main(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="python -m tools.references",
        description="Write the references in tests/references again.",
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(REFERENCES)} (default: all)"
    )
    names = parser.parse_args(argv).names or list(REFERENCES)
    # All names before the first file is written.
    for name in names:
        if name not in REFERENCES:
            raise UserError(f"{name}: no such reference; give one of {', '.join(REFERENCES)}")
    for name in names:
        write(name)


def write(name: str) -> None:
    """Writes one reference. UserError if PyTorch or `transformers` is missing."""
    from safetensors.numpy import save_file

    try:
        arrays, config = REFERENCES[name]()
    except ImportError as error:
        raise UserError(
            f"{name}: {error}; install the extra, pip install -e '.[parity]'"
        ) from error

    path = FOLDER / f"{name}.safetensors"
    # save_file writes an array's memory as it lies, which is wrong for a view.
    arrays = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
    save_file(arrays, path, metadata={"config": json.dumps(config)})
    path.chmod(0o644)  # safetensors lets only the owner read it
    print(f"{path}: {path.stat().st_size // 1024} kB")


if __name__ == "__main__":
    run(main)
