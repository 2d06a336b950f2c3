"""What text embeddings depend on, as one number: the sha256 of a T5's content, without loading it.

It covers the configuration's fields that matter to the encoder, every tensor of the encoder as it
is stored, and the tokenizer. It does not depend on where the folders are, on how the weights are
spread over files, on a decoder beside the encoder, or on who wrote the JSON files. The tokenizer
counts by its spiece.model and by what `transformers` makes of the files around it (added tokens
with their rules, `legacy` and the like), as these say the same thing in several ways.
Half-precision weights are not those that they were rounded from.

T5-XXL's encoder is 9.4 GB or 18.8 GB to read, so the answer is remembered in the encoder's folder,
as `.fingerprint.json`, and holds as long as every file has its size and its time of change.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.files import sha256_file, write_atomically
from pipeline.text.hugging_face import stored_files
from pipeline.text.t5_folder import T5Config, encoder_tensors, load_tokenizer

REMEMBERED = ".fingerprint.json"
FORMAT = 1  # of the fingerprint and of the file
SETTLED = 2_000_000_000  # ns; a file changed twice within a tick of its file system's clock looks unchanged
TOKENIZER_FILES = (
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)
TOKENIZER_FACTS = ("legacy", "add_prefix_space", "sp_model_kwargs", "split_special_tokens")
TOKEN_RULES = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def fingerprint(encoder_folder: str | Path, tokenizer_folder: str | Path) -> str:
    """64 hexadecimal digits; `UserError` if a folder is not a T5's."""
    encoder_folder, tokenizer_folder = Path(encoder_folder), Path(tokenizer_folder)
    config = T5Config.read(encoder_folder)
    before = state(encoder_folder, tokenizer_folder)
    if (known := remembered(encoder_folder, before)) is not None:
        return known
    facts = {
        "format": FORMAT,
        "config": asdict(config),
        "tokenizer": tokenizer_facts(tokenizer_folder),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(encoder_tensors(encoder_folder, config).items()):
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        for piece in tensor.pieces():
            digest.update(piece)
    now = state(encoder_folder, tokenizer_folder)
    if now == before and all(time.time_ns() - changed > SETTLED for _, changed in now.values()):
        content = {"format": FORMAT, "files": now, "fingerprint": digest.hexdigest()}
        with contextlib.suppress(
            OSError
        ):  # a folder that cannot be written is read again each time
            write_atomically(
                encoder_folder / REMEMBERED, json.dumps(content, indent=2).encode() + b"\n"
            )
    return digest.hexdigest()


def state(encoder_folder: Path, tokenizer_folder: Path) -> dict[str, list[int]]:
    """Size and time of change, in ns, of every file that the fingerprint is made from."""

    def files() -> Iterator[tuple[str, Path]]:
        for path in (encoder_folder / "config.json", *stored_files(encoder_folder)):
            yield f"encoder/{path.name}", path
        for path in (tokenizer_folder / name for name in TOKENIZER_FILES):
            yield f"tokenizer/{path.name}", path

    stats = {name: path.stat() for name, path in files() if path.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def remembered(encoder_folder: Path, files: dict[str, list[int]]) -> str | None:
    """The answer of an earlier call if all its files are as they were."""
    try:
        content = json.loads((encoder_folder / REMEMBERED).read_bytes())
        return (
            str(content["fingerprint"])
            if (content["format"], content["files"]) == (FORMAT, files)
            else None
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def tokenizer_facts(folder: Path) -> dict[str, Any]:
    """All that a caption's tokens depend on."""
    tokenizer = load_tokenizer(folder)
    return {
        "vocabulary": sha256_file(folder / "spiece.model"),
        "ends": [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id],
        "added": {
            id: [getattr(token, rule) for rule in TOKEN_RULES]
            for id, token in sorted(tokenizer.added_tokens_decoder.items())
        },
        **{name: getattr(tokenizer, name) for name in TOKENIZER_FACTS},
    }
