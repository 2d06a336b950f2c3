"""One side of `python -m tools.bench text`: seconds to encode the captions, as JSON on the last
line of stdout.

PyTorch's side runs where this project is not installed, see peers.py.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

BATCH = 8  # of `transformers`: of 8, 16, 32 and 64 the fastest on two cores, as it has the least padding


def ours(folder: str, captions: list[str], length: int) -> dict[str, Any]:
    from pipeline.text.encoder import TextEncoder

    encoder = TextEncoder.load(folder, folder, length)
    encoder.encode_ragged(captions)  # compiles every shape
    seconds, (_, counts_N) = timed(lambda: encoder.encode_ragged(captions))
    return {"seconds": {"ours": seconds}, "tokens": int(counts_N.sum()), "versions": {}}


def theirs(folder: str, captions: list[str], length: int) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = T5EncoderModel.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    ).eval()

    def encode(padding: str | bool) -> int:
        tokens = 0
        with torch.inference_mode():
            for start in range(0, len(captions), BATCH):
                inputs = tokenizer(
                    captions[start : start + BATCH],
                    padding=padding,
                    max_length=length,
                    truncation=True,
                    return_tensors="pt",
                )
                model(**inputs).last_hidden_state.numpy()
                tokens += int(inputs["attention_mask"].sum())
        return tokens

    encode(True)
    longest, tokens = timed(lambda: encode(True))
    whole, _ = timed(lambda: encode("max_length"))
    return {
        "seconds": {"transformers": longest, "transformers_padded": whole},
        "tokens": tokens,
        "versions": {name: version(name) for name in ("transformers", "torch")},
    }


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    answer = run()
    return time.perf_counter() - start, answer


if __name__ == "__main__":
    side, folder, words, length = sys.argv[1:]
    run = {"ours": ours, "transformers": theirs}[side]
    print(json.dumps(run(folder, Path(words).read_text().splitlines(), int(length))))
