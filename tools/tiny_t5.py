"""A T5 small enough for a laptop, with a tokenizer of its own: `python -m tools.tiny_t5 OUT
--captions SHARDS...`.

The demo and the tests need a text encoder that runs in milliseconds and never touches the network.
Its tokenizer is trained on the captions (SentencePiece's unigram model with T5's conventions: 0
pads, 1 ends, 2 is unknown). Its encoder, a v1.1, is not trained: random weights at a scale where a
token's own embedding dominates its hidden state and attention mixes in where it stands and what
stands around it. A stage learns such embeddings as it would T5-XXL's. OUT is a Hugging Face folder,
encoder and tokenizer in one.
"""

import json
import secrets
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.terminal import Parser, positive, run

if TYPE_CHECKING:
    import numpy as np

LONGEST, CANDIDATES = (
    16,
    100_000,
)  # letters of a token, and tokens that the tokenizer's training starts from
MIXING = 0.5  # standard deviation of what a sub-layer adds, where a token's embedding has 1


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
        help="what the tokenizer learns from: tars with .txt members, or text files with a caption a line",
    )
    parser.add_argument(
        "--width", type=positive, default=64, help="of the embeddings (%(default)s)"
    )
    parser.add_argument("--layers", type=positive, default=2, help="of the encoder (%(default)s)")
    parser.add_argument("--heads", type=positive, default=4, help="of its attention (%(default)s)")
    parser.add_argument("--vocab", type=positive, default=256, help="tokens at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (%(default)s)")
    print(make(**vars(parser.parse_args(argv))))


def make(
    out: Path,
    captions: list[Path],
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    vocab: int = 256,
    seed: int = 0,
) -> str:
    """Writes the folder `out` whole or not at all, and says what it is; the same arguments give the
    same bytes.
    """
    if width % heads:
        raise UserError(f"--width {width}: not a multiple of --heads {heads}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; remove it or name another folder")
    from safetensors.numpy import save_file

    vocabulary, vocab_size = train_tokenizer(
        [caption for path in captions for caption in read_captions(path)], vocab
    )
    config = {
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
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": 0,
        "legacy": True,
        "model_max_length": 512,
        **special,
    }

    out.parent.mkdir(parents=True, exist_ok=True)
    side = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    side.mkdir()
    try:
        for name, content in {
            "config": config,
            "tokenizer_config": tokenizer,
            "special_tokens_map": special,
        }.items():
            (side / f"{name}.json").write_text(
                json.dumps(content, indent=2) + "\n", encoding="utf-8"
            )
        (side / "spiece.model").write_bytes(vocabulary)
        save_file(
            random_weights(config, seed), side / "model.safetensors", metadata={"format": "pt"}
        )
        (side / "model.safetensors").chmod(0o644)
        side.rename(out)
    finally:
        shutil.rmtree(side, ignore_errors=True)
    return f"{out}: {vocab_size} tokens, {layers} layers of width {width}"


def read_captions(path: Path) -> Iterator[str]:
    """The .txt members of a tar, or the lines of another file."""
    try:
        if path.suffix != ".tar":
            yield from (
                line.strip()
                for line in path.read_text(encoding="utf-8").splitlines()
                if line.strip()
            )
            return
        with tarfile.open(path, "r|") as tar:
            for member in tar:
                if member.name.endswith(".txt") and (file := tar.extractfile(member)):
                    yield file.read().decode("utf-8", errors="replace").strip()
    except (OSError, ValueError, tarfile.TarError) as error:
        raise UserError(
            f"{path}: captions cannot be read ({error}); give tars with .txt members or a text"
        ) from error


def train_tokenizer(captions: list[str], vocab: int) -> tuple[bytes, int]:
    """spiece.model and its number of tokens, which is below `vocab` where the captions have no more
    to tell apart.

    SentencePiece looks for candidate tokens in the list of different words, so that in captions of
    few words, each of them in every second caption, it finds letters only. The candidates are
    therefore counted here: all parts of words.
    """
    import io
    from collections import Counter
    from tempfile import NamedTemporaryFile

    import sentencepiece
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    words = Counter(f"\u2581{word}" for caption in captions for word in caption.split())
    parts: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for stop in range(start + 2, min(len(word), start + LONGEST) + 1):
                parts[word[start:stop]] += count
    if not words:
        raise UserError(
            "--captions: no caption in what is given; give tars with .txt members or a text file"
        )
    model = io.BytesIO()
    with NamedTemporaryFile("w", suffix=".tsv", encoding="utf-8") as seeds:
        seeds.writelines(f"{part}\t{count}\n" for part, count in parts.most_common(CANDIDATES))
        seeds.flush()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(caption for caption in captions if caption),
                seed_sentencepieces_file=seeds.name,
                model_writer=model,
                model_type="unigram",
                vocab_size=vocab,
                hard_vocab_limit=False,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                num_threads=1,  # the order of sums, and so the model, depends on it
                minloglevel=2,
            )
        except RuntimeError as error:  # for one, fewer tokens than letters
            reason = str(error).rsplit("] ", 1)[-1]
            raise UserError(
                f"--vocab {vocab}: SentencePiece answers '{reason}'; give another number"
            ) from error
    trained = ModelProto.FromString(model.getvalue())
    trained.trainer_spec.ClearField("seed_sentencepieces_file")  # a path, different at every run
    return trained.SerializeToString(deterministic=True), len(trained.pieces)


def random_weights(config: dict[str, Any], seed: int) -> "dict[str, np.ndarray]":
    """The encoder's parameters under their Hugging Face names; each layer keeps the variance of
    what it reads.
    """
    import numpy as np

    from pipeline.rng import generator

    rng = generator(seed, "init")
    width, head, hidden, heads = (
        config["d_model"],
        config["d_kv"],
        config["d_ff"],
        config["num_heads"],
    )
    inner = heads * head

    def dense(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return (gain * columns**-0.5 * rng.standard_normal((rows, columns))).astype(np.float32)

    weights = {
        "shared.weight": rng.standard_normal((config["vocab_size"], width)).astype(np.float32)
    }
    for block in range(config["num_layers"]):
        attention, ff = (f"encoder.block.{block}.layer.{layer}" for layer in (0, 1))
        weights |= {
            f"{attention}.SelfAttention.q.weight": dense(inner, width, head**-0.5),
            f"{attention}.SelfAttention.k.weight": dense(inner, width),
            f"{attention}.SelfAttention.v.weight": dense(inner, width),
            f"{attention}.SelfAttention.o.weight": dense(width, inner, MIXING),
            f"{attention}.layer_norm.weight": np.ones(width, np.float32),
            f"{ff}.DenseReluDense.wi_0.weight": dense(hidden, width),
            f"{ff}.DenseReluDense.wi_1.weight": dense(hidden, width),
            f"{ff}.DenseReluDense.wo.weight": dense(width, hidden, MIXING),
            f"{ff}.layer_norm.weight": np.ones(width, np.float32),
        }
    bias = rng.standard_normal((config["relative_attention_num_buckets"], heads)).astype(np.float32)
    weights["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = bias
    weights["encoder.final_layer_norm.weight"] = np.ones(width, np.float32)
    return weights


if __name__ == "__main__":
    run(main)
