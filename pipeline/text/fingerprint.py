"""The fingerprint of a T5: the SHA-256 of all that text embeddings depend on, without loading it.

It covers the fields of the configuration that matter to the encoder, every tensor of the encoder as
stored, and the tokenizer. It does not depend on the location of the folders, on how the weights are
distributed over files, on a decoder next to the encoder, or on the program that wrote the JSON
files. The tokenizer is covered by its spiece.model and by what `transformers` makes of the files
around it (added tokens with their rules, `legacy` and the like), as these can express the same
thing in several ways. Half-precision weights have another fingerprint than the weights that they
were rounded from.

T5-XXL's encoder is 9.4 GB or 18.8 GB to read, so the result is cached in the encoder's folder, as
`.fingerprint.json`, and is valid while the size and the modification time of every file stay the
same.
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

CACHE_FILE = ".fingerprint.json"
FORMAT = 1  # of the fingerprint and of the cache file

# ns: a file that changes twice within a tick of its file system's clock looks unchanged, so recent
# changes are not cached.
MIN_AGE = 2_000_000_000

TOKENIZER_FILES = (
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)
TOKENIZER_OPTIONS = ("legacy", "add_prefix_space", "sp_model_kwargs", "split_special_tokens")
TOKEN_RULES = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")

FileStates = dict[str, list[int]]  # size in bytes and modification time in ns, by file


def fingerprint(encoder_folder: str | Path, tokenizer_folder: str | Path) -> str:
    """64 hexadecimal digits; `UserError` if a folder is not a T5's."""
    encoder_folder = Path(encoder_folder)
    tokenizer_folder = Path(tokenizer_folder)
    config = T5Config.read(encoder_folder)

    # Hashing reads all weights, so a valid result of an earlier call is worth a file.
    before = file_states(encoder_folder, tokenizer_folder)
    cached = read_cache(encoder_folder, before)
    if cached is not None:
        return cached

    result = compute(encoder_folder, tokenizer_folder, config)

    # A file that changed during hashing makes the result valid for neither content.
    after = file_states(encoder_folder, tokenizer_folder)
    now = time.time_ns()
    if after == before and all(now - modified > MIN_AGE for _, modified in after.values()):
        write_cache(encoder_folder, after, result)
    return result


def compute(encoder_folder: Path, tokenizer_folder: Path, config: T5Config) -> str:
    """The fingerprint from the files."""
    facts = {
        "format": FORMAT,
        "config": asdict(config),
        "tokenizer": tokenizer_facts(tokenizer_folder),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())

    # By their short names: the layout of the folder has no influence.
    for name, tensor in sorted(encoder_tensors(encoder_folder, config).items()):
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        for piece in tensor.pieces():
            digest.update(piece)
    return digest.hexdigest()


def file_states(encoder_folder: Path, tokenizer_folder: Path) -> FileStates:
    """Of every file that the fingerprint depends on."""

    def files() -> Iterator[tuple[str, Path]]:
        for path in (encoder_folder / "config.json", *stored_files(encoder_folder)):
            yield f"encoder/{path.name}", path
        for path in (tokenizer_folder / name for name in TOKENIZER_FILES):
            yield f"tokenizer/{path.name}", path

    # Some of the tokenizer's files are optional.
    stats = {name: path.stat() for name, path in files() if path.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def read_cache(encoder_folder: Path, files: FileStates) -> str | None:
    """The cached fingerprint if it is valid for these files."""
    try:
        content = json.loads((encoder_folder / CACHE_FILE).read_bytes())
        is_valid = (content["format"], content["files"]) == (FORMAT, files)
        return str(content["fingerprint"]) if is_valid else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_cache(encoder_folder: Path, files: FileStates, result: str) -> None:
    """Caches the fingerprint; in a folder that is not writable it is computed each time."""
    content = {"format": FORMAT, "files": files, "fingerprint": result}
    with contextlib.suppress(OSError):
        write_atomically(
            encoder_folder / CACHE_FILE, json.dumps(content, indent=2).encode() + b"\n"
        )


def tokenizer_facts(folder: Path) -> dict[str, Any]:
    """Everything that a caption's tokens depend on."""
    tokenizer = load_tokenizer(folder)
    return {
        "vocabulary": sha256_file(folder / "spiece.model"),
        "ends": [tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id],
        "added": {
            token_id: [getattr(token, rule) for rule in TOKEN_RULES]
            for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
        },
        **{name: getattr(tokenizer, name) for name in TOKENIZER_OPTIONS},
    }
