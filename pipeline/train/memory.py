"""How much memory a rank of a training needs, foretold by shapes alone: nothing is allocated,
nothing runs.

What is there all the time are weights, optimizer and average. On top comes the worse of two
moments: the gradient's begin, when the activations of one part of the batch are there
(`UNet.kept`), and its end, when the gradients are. MindSpore frees what a layer kept as the
gradient passes it, and never gives memory back to the system: the worst moment counts for good.

Three numbers are not shapes, PROGRAM, GRAPH and LOOSE. They were fitted on a CPU with MindSpore
2.9.0, to base64 (batch 8) and sr256 (batch 2) of `tools.bench train`; `tools.bench memory` measures
other configurations, to one of which each Adafactor's results on the way and what float16 keeps
were fitted. On Ascend nothing was measured. What pictures that are sampled meanwhile take is not
counted, nor the compiler, which runs once.
"""

import math
from collections.abc import Sequence
from typing import Any

from pipeline import device
from pipeline.data.loader import PREFETCH
from pipeline.nn.blocks import ActivationFootprint
from pipeline.nn.unet import UNet
from pipeline.train.buckets import NUMBER, SMALLEST

PROGRAM = 620 * 2**20  # bytes of Python, MindSpore and MindFormers before any network
GRAPH = (
    0.7 * 2**20
)  # bytes of compiled graphs for each parameter of a network, its operators' among them
LOOSE = 1.1  # what MindSpore's pool of memory takes for each byte in it that is used, as gaps stay between tensors
BATCHES = (
    PREFETCH + 3
)  # batches that are there at once: ahead, being joined, being brought to the device, trained on
PASSES = 18  # tensors of a picture's size that the graph makes: noisy ones, patches and back, what the loss compares


def predict(network: UNet, config: Any, side: int, world: int) -> dict[str, int]:
    """Bytes that a rank of `world` holds at most, by what they are for, and their total.

    Args:
        network: which may have shapes alone.
        config: a stage's.
        side: pixels of what the network sees in training.
    """
    shapes = [tuple(parameter.shape) for parameter in network.trainable_params()]
    number, adamw = sum(map(math.prod, shapes)), config.optimizer.kind == "adamw"
    share = number // (world if config.train.shard_optimizer else 1)
    batch = config.data.global_batch / (world * config.train.grad_accum_steps)
    layers = network.footprint(side, config.text.length if config.text else 0)
    seen = (
        network.stem.in_channels // network.patch**2 // 3
    )  # pictures, each there with another: a noise, or a mask
    pictures = (2 * seen * BATCHES + PASSES) * 3 * side**2
    kept = batch * (activations(layers, config.unet.recompute) * size(config) / 4 + pictures)
    backward = batch * max(layer.largest for layer in layers) * size(config) / 4
    gradients = number * (
        3 if config.train.grad_accum_steps > 1 else 2
    )  # this step's, the last one's, the sum of the parts
    largest = max(map(math.prod, shapes))
    bucket = min(number, max(number // NUMBER, SMALLEST, largest))
    update = number + 6 * (bucket if adamw else largest)  # scaled gradients, and results on the way
    moments = 2 * share if adamw else sum(map(factored, shapes))
    needed = {
        "weights": number,
        "optimizer": moments + (share if adamw else 0),  # AdamW works on weights of its own
        "ema": share,
        "gradients": LOOSE * gradients,
        "activations": LOOSE * kept,
        # Beside those of the gradient, of which half and all of the network's own end are free when
        # it is done.
        "temporaries": LOOSE * max(backward - number, update - kept, 0),
        "checkpoint": number + share + moments,  # a copy, as it is written while training goes on
    }
    found = {
        "program": PROGRAM + GRAPH * len(shapes),
        **{name: 4 * count for name, count in needed.items()},
    }
    return {name: round(count) for name, count in {**found, "total": sum(found.values())}.items()}


def activations(layers: Sequence[ActivationFootprint], recompute: bool) -> int:
    """Numbers that are kept of one image: all, or with `recompute` the layers' inputs and the
    inside of one.
    """
    inside = [layer.inside for layer in layers]
    return sum(layer.input for layer in layers) + (max(inside) if recompute else sum(inside))


def size(config: Any) -> int:
    """Bytes of an activation. With 16 bits a CPU keeps each number three times: as it came,
    rounded, and this once more as float32, which is all that its kernels know.
    """
    if config.train.precision == "float32":
        return 4
    return 2 if device.on_ascend() else 4 + 2 + 4


def factored(shape: tuple[int, ...]) -> int:
    """How many numbers MindSpore's Adafactor keeps of a parameter: a row and a column of each last
    pair of axes.

    Of a matrix that is next to nothing, of a 3 x 3 convolution two thirds of the weights.
    """
    return (
        math.prod(shape[:-1]) + math.prod(shape[:-2] + shape[-1:])
        if len(shape) > 1
        else math.prod(shape)
    )
