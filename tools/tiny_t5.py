"""A T5 small enough for a laptop, with a tokenizer of its own.

    python -m tools.tiny_t5 OUT --captions SHARDS...

The demo and the tests need a text encoder that runs in milliseconds and needs no network. Its
tokenizer is trained on the captions: SentencePiece's unigram model with T5's conventions (0 pads, 1
ends, 2 is unknown). Its encoder, a T5 v1.1, has random weights, scaled so that a token's own
embedding dominates its hidden state while attention adds its position and neighbours. A stage
learns from such embeddings as it would from T5-XXL's. OUT is a Hugging Face folder of both encoder
and tokenizer.
"""

import io
import json
import secrets
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np

from pipeline.errors import UserError
from pipeline.rng import generator
from pipeline.terminal import Parser, positive, run
from tools.dataset import add_options

MAX_TOKEN_LENGTH = 16  # characters
MAX_CANDIDATES = 100_000  # candidate tokens with which the tokenizer's training starts
SUBLAYER_STD = 0.5  # standard deviation of a sublayer's output, where a token's embedding has 1
SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def main(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="python -m tools.tiny_t5", description="Make a T5 small enough for a laptop."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--captions",
        nargs="+",
        required=True,
        type=Path,
        metavar="FILE",
        help="the tokenizer's training data: tars with .txt members, or text files of one caption "
        "per line",
    )
    parser.add_argument(
        "--width", type=positive, default=64, help="width of the embeddings (%(default)s)"
    )
    parser.add_argument("--layers", type=positive, default=2, help="encoder layers (%(default)s)")
    parser.add_argument("--heads", type=positive, default=4, help="attention heads (%(default)s)")
    parser.add_argument(
        "--vocab", type=positive, default=256, help="largest number of tokens (%(default)s)"
    )
    add_options(parser, seed=0)

    options = vars(parser.parse_args(argv))
    print(make(options.pop("out"), options.pop("captions"), **options))


def make(
    out: Path,
    captions: list[Path],
    *,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    vocab: int = 256,
    seed: int = 0,
) -> str:
    """Writes the folder `out`, whole or not at all; a line that describes it.

    The same arguments give the same bytes.

    Raises:
        UserError: the sizes do not fit together, the captions cannot be read, or `out` exists.
    """
    if width % heads:
        raise UserError(f"width: {width} is not a multiple of heads, {heads}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; remove it or name another folder")

    from safetensors.numpy import save_file

    texts = [caption for path in captions for caption in read_captions(path)]
    spiece_model, vocab_size = train_tokenizer(texts, vocab)
    config = encoder_config(width=width, layers=layers, heads=heads, vocab_size=vocab_size)

    with _new_folder(out) as folder:
        _write_json(folder / "config.json", config)
        _write_json(folder / "tokenizer_config.json", tokenizer_config())
        _write_json(folder / "special_tokens_map.json", SPECIAL_TOKENS)
        (folder / "spiece.model").write_bytes(spiece_model)

        weights = folder / "model.safetensors"
        # `transformers` reads from the metadata which framework wrote the file.
        save_file(random_weights(config, seed), weights, metadata={"format": "pt"})
        weights.chmod(0o644)  # save_file lets only the owner read

    return f"{out}: {vocab_size} tokens, {layers} layers of width {width}"


def encoder_config(*, width: int, layers: int, heads: int, vocab_size: int) -> dict[str, Any]:
    """config.json of a T5 v1.1 encoder."""
    return {
        "model_type": "t5",
        "architectures": ["T5EncoderModel"],
        "vocab_size": vocab_size,
        "d_model": width,
        "d_kv": width // heads,
        "d_ff": 2 * width,
        "num_layers": layers,
        "num_heads": heads,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
        "dropout_rate": 0.0,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def tokenizer_config() -> dict[str, Any]:
    """tokenizer_config.json."""
    return {
        "tokenizer_class": "T5Tokenizer",
        # None of the sentinels of T5's pre-training, which no caption has.
        "extra_ids": 0,
        "legacy": True,
        "model_max_length": 512,
        **SPECIAL_TOKENS,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` if the body succeeds, and is removed if not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        yield temporary
        # The last step: an interruption before it leaves no part of `out`.
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_captions(path: Path) -> Iterator[str]:
    """The .txt members of a tar, or the non-empty lines of another file."""
    try:
        if path.suffix != ".tar":
            lines = map(str.strip, path.read_text(encoding="utf-8").splitlines())
            yield from (line for line in lines if line)
            return

        # As a stream, since each member is read once and in order.
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                if member.name.endswith(".txt") and (file := tar.extractfile(member)):
                    yield file.read().decode("utf-8", errors="replace").strip()
    except (OSError, ValueError, tarfile.TarError) as error:
        raise UserError(
            f"{path}: captions cannot be read ({error}); give tars with .txt members or a text file"
        ) from error


def train_tokenizer(captions: list[str], vocab: int) -> tuple[bytes, int]:
    """spiece.model and its number of tokens, at most `vocab`: captions of few words give fewer.

    SentencePiece takes its candidate tokens from the list of distinct words. Captions of few words,
    each in every second caption, then give single letters only. So the candidates are counted here:
    all substrings of all words.
    """
    # Imported here because sentencepiece_model_pb2 must not be imported before MindSpore.
    import sentencepiece
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    candidates = count_substrings(captions)
    model = io.BytesIO()

    with NamedTemporaryFile("w", suffix=".tsv", encoding="utf-8") as seeds:
        most_common = candidates.most_common(MAX_CANDIDATES)
        seeds.writelines(f"{token}\t{count}\n" for token, count in most_common)
        seeds.flush()

        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(caption for caption in captions if caption),
                seed_sentencepieces_file=seeds.name,
                model_writer=model,
                model_type="unigram",
                vocab_size=vocab,
                # Captions of few words give fewer tokens, which is no error.
                hard_vocab_limit=False,
                # T5's numbers; it has no token that begins a text.
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                num_threads=1,  # the order of sums, and so the model, depends on it
                minloglevel=2,
            )
        except RuntimeError as error:  # for example, fewer tokens than letters
            reason = str(error).rsplit("] ", 1)[-1]
            raise UserError(f"vocab: {vocab} is refused by SentencePiece ({reason})") from error

    trained = ModelProto.FromString(model.getvalue())
    trained.trainer_spec.ClearField("seed_sentencepieces_file")  # a path, different in every run
    return trained.SerializeToString(deterministic=True), len(trained.pieces)


def count_substrings(captions: list[str]) -> Counter[str]:
    """How often each substring of 2 to MAX_TOKEN_LENGTH characters occurs within a word.

    A word starts with SentencePiece's mark for a space, U+2581.
    """
    # Each distinct word once, with its count: captions repeat few words.
    words = Counter(f"\u2581{word}" for caption in captions for word in caption.split())
    if not words:
        raise UserError("captions: all files are empty; give tars with .txt members or a text file")

    substrings: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for stop in range(start + 2, min(len(word), start + MAX_TOKEN_LENGTH) + 1):
                substrings[word[start:stop]] += count

    return substrings


def random_weights(config: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """The encoder's parameters under their Hugging Face names, float32.

    Each projection keeps the variance of its input.
    """
    rng = generator(seed, "init")
    width = config["d_model"]
    head_width = config["d_kv"]
    hidden = config["d_ff"]
    heads = config["num_heads"]
    inner = heads * head_width

    def dense(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        # Variance gain^2 / fan-in.
        return (gain * columns**-0.5 * rng.standard_normal((rows, columns))).astype(np.float32)

    embeddings = rng.standard_normal((config["vocab_size"], width)).astype(np.float32)
    weights = {"shared.weight": embeddings}

    for block in range(config["num_layers"]):
        attention, ff = (f"encoder.block.{block}.layer.{layer}" for layer in (0, 1))
        weights |= {
            # T5 does not divide scores by sqrt(d): the factor is in the weights of q.
            f"{attention}.SelfAttention.q.weight": dense(inner, width, head_width**-0.5),
            f"{attention}.SelfAttention.k.weight": dense(inner, width),
            f"{attention}.SelfAttention.v.weight": dense(inner, width),
            f"{attention}.SelfAttention.o.weight": dense(width, inner, SUBLAYER_STD),
            f"{attention}.layer_norm.weight": np.ones(width, np.float32),
            f"{ff}.DenseReluDense.wi_0.weight": dense(hidden, width),
            f"{ff}.DenseReluDense.wi_1.weight": dense(hidden, width),
            f"{ff}.DenseReluDense.wo.weight": dense(width, hidden, SUBLAYER_STD),
            f"{ff}.layer_norm.weight": np.ones(width, np.float32),
        }

    bias = rng.standard_normal((config["relative_attention_num_buckets"], heads)).astype(np.float32)
    # All blocks share this table, which T5 stores in the first.
    weights["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = bias
    weights["encoder.final_layer_norm.weight"] = np.ones(width, np.float32)
    return weights


if __name__ == "__main__":
    run(main)
