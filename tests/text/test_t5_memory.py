"""A T5 in half precision takes the memory of its files: 9.4 GB for T5-XXL's encoder."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from pipeline.text.t5_folder import T5Config, encoder_shapes, hugging_face_names

LARGE = {
    "vocab_size": 1000,
    "d_model": 640,
    "d_kv": 64,
    "d_ff": 1600,
    "num_layers": 24,
    "num_heads": 10,
}
SMALL = {
    "vocab_size": 1000,
    "d_model": 64,
    "d_kv": 64,
    "d_ff": 160,
    "num_layers": 1,
    "num_heads": 1,
}

# The small encoder comes first, so that MindSpore's own memory is not counted.
MEASURE = """
import sys
import numpy as np
from pipeline.text.t5 import T5Encoder

def peak():  # getrusage would count the memory of the parent process
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

ids_BL = np.arange(2, 66, dtype=np.int32).reshape(4, 16)
T5Encoder.load(sys.argv[1])(ids_BL, ids_BL > 0)
before = peak()
out_BLD = T5Encoder.load(sys.argv[2])(ids_BL, ids_BL > 0)
assert np.isfinite(out_BLD).all()
print(peak() - before)
"""


def write(folder: Path, sizes: dict[str, Any], shards: int) -> int:
    """Random float16 weights, a shard at a time; returns their size in bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "t5", "feed_forward_proj": "gated-gelu", **sizes})
    )
    rng = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    size = 0
    shapes = encoder_shapes(T5Config.read(folder))
    for shard in range(shards):
        weights = {}
        for name in list(shapes)[shard::shards]:
            values = 0.04 * rng.random(shapes[name], np.float32) - 0.02
            weights[hugging_face_names(name)[0]] = values.astype(np.float16)
        size += sum(array.nbytes for array in weights.values())
        save_file(weights, folder / f"{shard}.safetensors")
        weight_map |= dict.fromkeys(weights, f"{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return size


def test_loading_and_encoding_take_the_size_of_the_files(tmp_path: Path) -> None:
    write(tmp_path / "small", SMALL, shards=1)
    size = write(tmp_path / "large", LARGE, shards=4)
    assert size > 200e6
    argv = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")]
    process = subprocess.run(argv, capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == 0, process.stderr
    assert 0.9 * size < int(process.stdout) <= 1.2 * size
