"""The Hugging Face folder of a T5: configuration, tensors of the encoder, and tokenizer.

This module does not import MindSpore, so that a folder can be inspected without starting it. The
encoder's tensors get the short names that `T5Encoder` uses; the decoder of a whole T5 is ignored.
Hugging Face stores a dense layer as (out, in).
"""

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Self

from pipeline.errors import UserError
from pipeline.text.hugging_face import StoredTensor, read_json, stored_tensors


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """The fields of a Hugging Face config.json that matter to the encoder, by their names there."""

    vocab_size: int
    d_model: int
    d_kv: int  # width of a head; d_kv num_heads need not equal d_model
    d_ff: int  # hidden width of the feed-forward layers
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128  # tokens
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: Literal["relu", "gated-gelu"] = "relu"  # T5 v1.0, v1.1

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """The configuration in `folder`/config.json; `UserError` if it is not a T5's."""
        path = Path(folder) / "config.json"
        content = read_json(path)
        if content.get("model_type") != "t5":
            raise UserError(
                f"{path}: model_type is {content.get('model_type')!r}; give the folder of a T5 "
                "('t5')"
            )

        for field in fields(cls):
            if field.default is MISSING and field.name not in content:
                raise UserError(
                    f"{path}: {field.name} is missing; take config.json from the source of the "
                    "weights"
                )

        # Old checkpoints lack the fields that have defaults here.
        names = [field.name for field in fields(cls)]
        config = cls(**{name: content[name] for name in names if name in content})
        if config.feed_forward_proj not in ("relu", "gated-gelu"):
            raise UserError(
                f"{path}: feed_forward_proj is '{config.feed_forward_proj}'; use 'relu' or "
                "'gated-gelu'"
            )
        return config


def layer_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """The weights of one layer as stored, in the order of the layer's arguments."""
    width = config.d_model
    # All heads side by side; their width together need not be d_model.
    inner = config.num_heads * config.d_kv
    hidden = config.d_ff
    wi = ("wi",) if config.feed_forward_proj == "relu" else ("wi_0", "wi_1")
    return {
        "attention.norm": (width,),
        **{f"attention.{name}": (inner, width) for name in "qkv"},
        "attention.o": (width, inner),
        "ff.norm": (width,),
        **{f"ff.{name}": (hidden, width) for name in wi},
        "ff.wo": (width, hidden),
    }


def encoder_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """All weights of the encoder as stored, in the order of computation."""
    return {
        "embedding": (config.vocab_size, config.d_model),
        "position_bias": (config.relative_attention_num_buckets, config.num_heads),
        **{
            f"layers.{layer}.{name}": shape
            for layer in range(config.num_layers)
            for name, shape in layer_shapes(config).items()
        },
        "norm": (config.d_model,),
    }


def hugging_face_names(name: str) -> tuple[str, ...]:
    """The possible names of the encoder's weight `name` in a Hugging Face checkpoint, preferred
    first.
    """
    if name == "embedding":
        # One tensor under two names, of which a file may hold either.
        return "shared.weight", "encoder.embed_tokens.weight"
    if name == "position_bias":
        # Block 0 alone stores the table that all blocks use.
        return ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",)
    if name == "norm":
        return ("encoder.final_layer_norm.weight",)

    # layers.BLOCK.PART.WEIGHT
    _, block, part, weight = name.split(".")
    layer, cell = {"attention": (0, "SelfAttention"), "ff": (1, "DenseReluDense")}[part]
    path = "layer_norm" if weight == "norm" else f"{cell}.{weight}"
    return (f"encoder.block.{block}.layer.{layer}.{path}.weight",)


def encoder_tensors(folder: str | Path, config: T5Config) -> dict[str, StoredTensor]:
    """The encoder's tensors, not yet read; `UserError` if one is missing or has another shape than
    `config` requires.
    """
    stored = stored_tensors(Path(folder))
    tensors = {}
    for short_name, shape in encoder_shapes(config).items():
        names = hugging_face_names(short_name)
        name = next((name for name in names if name in stored), None)
        if name is None:
            raise UserError(
                f"{folder}: parameter {' or '.join(names)} is not among the {len(stored)} tensors; "
                "config.json requires it, so take config.json and weights from the same model"
            )

        if stored[name].shape != shape:
            raise UserError(
                f"{folder}: parameter {name} has shape {stored[name].shape} where config.json "
                f"requires {shape}; take config.json and weights from the same model"
            )
        tensors[short_name] = stored[name]
    return tensors


def load_tokenizer(folder: Path) -> Any:
    """The T5 tokenizer in `folder`."""
    path = folder / "spiece.model"
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; give the Hugging Face folder of T5's tokenizer, with its "
            "spiece.model"
        )

    # Imported here: it takes seconds.
    from transformers import T5Tokenizer

    try:
        tokenizer = T5Tokenizer.from_pretrained(folder, local_files_only=True)
        # It returns False for some damaged files.
        if not isinstance(tokenizer, T5Tokenizer):
            raise ValueError("transformers cannot read it")
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{path}: not a T5 tokenizer ({error}); copy or download the folder again"
        ) from error
    return tokenizer
