"""The memory that a rank needs for a training, estimated from shapes alone: nothing is allocated,
nothing runs.

Weights, optimizer and EMA are resident. On top of them comes the larger of two peaks: the start of
the backward pass, when the activations of one micro-batch are there (`UNet.footprint`), and its
end, when the gradients are. MindSpore frees the activations of a layer as the gradient passes it,
and never returns memory to the system, so the peak counts permanently.

Three constants do not follow from shapes: PROGRAM_BYTES, GRAPH_BYTES and FRAGMENTATION. They were
fitted on a CPU with MindSpore 2.9.0 to base64 (batch 8) and sr256 (batch 2) of `tools.bench train`;
`tools.bench memory` measures other configurations. Adafactor's temporaries and the copies that
float16 keeps were each fitted to one of those. Nothing was measured on Ascend. Not counted are
images that are sampled during training, and the compiler, which runs once.
"""

import math
from collections.abc import Sequence
from typing import Any

from pipeline import device
from pipeline.data.loader import PREFETCH
from pipeline.nn.blocks import ActivationFootprint
from pipeline.nn.unet import UNet
from pipeline.train.buckets import MIN_CAPACITY, NUM_BUCKETS

# Bytes of Python, MindSpore and MindFormers before any network.
PROGRAM_BYTES = 620 * 2**20

# Bytes of compiled graphs for each parameter tensor of a network, operators included.
GRAPH_BYTES = 0.7 * 2**20

# What MindSpore's memory pool takes for each byte in use, because of gaps between tensors.
FRAGMENTATION = 1.1

# Batches in memory at once: loaded ahead, being joined, being copied to the device, trained on.
NUM_BATCHES = PREFETCH + 3

# Tensors of the image's size within the graph: noisy images, patches and back, inputs of the loss.
NUM_IMAGE_TENSORS = 18


def estimate_memory(network: UNet, config: Any, side: int, world: int) -> dict[str, int]:
    """Bytes that a rank holds at most: purpose -> bytes, and their `total`.

    Args:
        network: its parameters may have shapes without memory.
        config: a stage's.
        side: of the images that the network is trained on, in pixels.
        world: number of ranks.
    """
    shapes = [tuple(parameter.shape) for parameter in network.trainable_params()]
    num_elements = sum(map(math.prod, shapes))
    largest = max(map(math.prod, shapes))
    is_adamw = config.optimizer.kind == "adamw"
    accumulates = config.train.grad_accum_steps > 1

    # Activations of one micro-batch, in elements of 4 bytes.
    micro_batch = config.data.global_batch / (world * config.train.grad_accum_steps)
    layers = network.footprint(side, config.text.length if config.text else 0)
    width = activation_bytes(config) / 4
    images = image_elements(network, side)
    retained = micro_batch * (num_activations(layers, config.unet.recompute) * width + images)
    backward = micro_batch * max(layer.largest for layer in layers) * width

    # Gradients of this step and of the last one, and the sum over micro-batches.
    gradients = num_elements * (3 if accumulates else 2)

    # The update has scaled gradients, and temporaries of one bucket or of one parameter.
    bucket = min(num_elements, max(num_elements // NUM_BUCKETS, MIN_CAPACITY, largest))
    update = num_elements + 6 * (bucket if is_adamw else largest)

    shard = num_elements // (world if config.train.shard_optimizer else 1)
    moments = 2 * shard if is_adamw else sum(map(num_factored, shapes))
    elements = {
        "weights": num_elements,
        # AdamW works on a copy of the weights.
        "optimizer": moments + (shard if is_adamw else 0),
        "ema": shard,
        "gradients": FRAGMENTATION * gradients,
        "activations": FRAGMENTATION * retained,
        # The backward pass reuses the memory of gradients that are not there yet, and the update
        # that of the activations, which are free by then.
        "temporaries": FRAGMENTATION * max(backward - num_elements, update - retained, 0),
        # A copy, which is written while training goes on.
        "checkpoint": num_elements + shard + moments,
    }
    sizes: dict[str, float] = {
        "program": PROGRAM_BYTES + GRAPH_BYTES * len(shapes),
        **{purpose: 4 * count for purpose, count in elements.items()},
    }
    sizes["total"] = sum(sizes.values())
    return {purpose: round(size) for purpose, size in sizes.items()}


def image_elements(network: UNet, side: int) -> int:
    """Elements of tensors of the image's size, for each image of a micro-batch."""
    # Each input image has a second one beside it: its noise, or a mask.
    num_inputs = network.stem.in_channels // network.patch**2 // 3
    return (2 * num_inputs * NUM_BATCHES + NUM_IMAGE_TENSORS) * 3 * side**2


def num_activations(layers: Sequence[ActivationFootprint], recompute: bool) -> int:
    """Elements retained for the gradient of one image: all of them, or with `recompute` the inputs
    of the layers and the inside of the largest one.
    """
    inside = [layer.inside for layer in layers]
    return sum(layer.input for layer in layers) + (max(inside) if recompute else sum(inside))


def activation_bytes(config: Any) -> int:
    """Bytes of an element of an activation.

    With 16 bits a CPU keeps each one three times: as it came, rounded, and converted back to
    float32, which is all that its kernels support.
    """
    if config.train.precision == "float32":
        return 4
    return 2 if device.on_ascend() else 4 + 2 + 4


def num_factored(shape: tuple[int, ...]) -> int:
    """Elements that MindSpore's Adafactor keeps of a parameter: a row and a column for each last
    pair of axes.

    Of a matrix that is next to nothing; of a 3 x 3 convolution it is two thirds of the weights.
    """
    if len(shape) < 2:
        return math.prod(shape)
    return math.prod(shape[:-1]) + math.prod(shape[:-2] + shape[-1:])
