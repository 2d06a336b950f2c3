"""`IMPLEMENTATION FOLDER CAPTIONS LENGTH`: encodes the captions of a file with the T5 of FOLDER.

`transformers` runs under the interpreter of the peers.
"""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tools.bench.workers.timing import print_answer, timed

# Of `transformers`: of 8, 16, 32 and 64 the fastest on two cores, as it pads least.
BATCH = 8


def ours(folder: str, captions: list[str], length: int) -> dict[str, Any]:
    from pipeline.text.encoder import TextEncoder

    encoder = TextEncoder.load(folder, folder, length)
    encoder.encode_ragged(captions)  # compiles every shape
    seconds, (_, counts_N) = timed(lambda: encoder.encode_ragged(captions))
    return {"seconds": {"ours": seconds}, "tokens": int(counts_N.sum()), "versions": {}}


def transformers(folder: str, captions: list[str], length: int) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = T5EncoderModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    model.eval()

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
                # The mask is 0 at padding, which does not count.
                tokens += int(inputs["attention_mask"].sum())
        return tokens

    encode(True)  # warm-up
    to_longest, tokens = timed(lambda: encode(True))
    to_length, _ = timed(lambda: encode("max_length"))
    return {
        "seconds": {"transformers": to_longest, "transformers_padded": to_length},
        "tokens": tokens,
        "versions": {name: version(name) for name in ("transformers", "torch")},
    }


IMPLEMENTATIONS = {"ours": ours, "transformers": transformers}

if __name__ == "__main__":
    implementation, folder, path, length = sys.argv[1:]
    captions = Path(path).read_text().splitlines()
    print_answer(IMPLEMENTATIONS[implementation](folder, captions, int(length)))
