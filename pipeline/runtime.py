"""What depends on device and machine: the only file that touches the environment and MindSpore's context.

`prepare_environment` runs when `pipeline` is imported, before MindSpore can be: some of its libraries read their
environment only once. It sets defaults; what the user has set stands.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path


def prepare_environment() -> None:
    """Defaults that have to stand before `import mindspore`."""
    defaults = {
        "GLOG_v": "3",  # MindSpore's log: errors only
        "LOCAL_DEFAULT_PATH": str(Path(tempfile.gettempdir()) / "mindformers"),  # else it makes ./output at import
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",  # transformers announces that PyTorch is missing; we do not use it
    }
    if not on_ascend():
        # oneDNN 3.10 runs 3x3 convolutions in its reference code on machines with AVX-512: 70 times slower.
        defaults["ONEDNN_MAX_CPU_ISA"] = "AVX2"
        if "mindspore" in sys.modules and "ONEDNN_MAX_CPU_ISA" not in os.environ:
            warnings.warn(
                "mindspore was imported before pipeline, so ONEDNN_MAX_CPU_ISA=AVX2 comes too late and convolutions "
                "may be many times slower; import pipeline first or set it in the environment",
                stacklevel=3,
            )
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def on_ascend() -> bool:
    """Whether this machine has an Ascend device (its driver's device file)."""
    return Path("/dev/davinci_manager").exists()


def to_device(array):  # type: ignore[no-untyped-def]
    """A tensor of `array`, which must not change any more; to an Ascend the copy goes on behind (never run there)."""
    import mindspore as ms

    tensor = ms.Tensor.from_numpy(array)
    return tensor.move_to("Ascend", blocking=False) if on_ascend() else tensor


def compile(function):  # type: ignore[no-untyped-def]
    """`function` of tensors, given positionally, as one compiled graph."""
    import mindspore as ms

    return ms.jit(function)
