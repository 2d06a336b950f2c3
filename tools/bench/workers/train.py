"""`IMPLEMENTATION CASE`: training steps of an implementation; CASE is a JSON file of `bench train`.

The implementations in PyTorch run under the interpreter of the peers.
"""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tools.bench.workers.timing import print_answer, time_calls

Case = dict[str, Any]
Answer = dict[str, Any]

LEARNING_RATE = 1e-4
EMA_DECAY = 0.9999
MAX_GRAD_NORM = 1.0
MATMUL_SIDE = 2048  # of the products that stand for the machine's peak


def arrays(case: Case) -> dict[str, np.ndarray]:
    """The network's inputs and its target, the same for all implementations."""
    rng = np.random.default_rng(0)
    batch = case["batch"]
    size = case["size"]
    return {
        "x": rng.standard_normal((batch, case["channels_in"], size, size), np.float32),
        "logsnr": rng.standard_normal((batch, case["num_levels"]), np.float32),
        "text": rng.standard_normal((batch, case["length"], case["text_width"]), np.float32),
        "mask": np.ones((batch, case["length"]), np.float32),
        "eps": rng.standard_normal((batch, 3, size, size), np.float32),
    }


def is_super_resolution(case: Case) -> bool:
    # Its own noise level, and that of the low-resolution image.
    return bool(case["num_levels"] == 2)


# Implementations.


def ours(case: Case) -> Answer:
    from mindspore import Tensor

    from pipeline.config import build
    from pipeline.nn.parameters import initialize, num_parameters
    from pipeline.nn.unet import UNet, UNetConfig
    from pipeline.train.compile_cache import CompileCache
    from pipeline.train.config import TrainConfig
    from pipeline.train.optimizer import OptimizerConfig
    from pipeline.train.state import TrainState
    from pipeline.train.step import TrainStep

    config = build(UNetConfig, case["unet"])
    network = UNet(config, case["channels_in"], case["num_levels"], case["text_width"])
    initialize(network, 0)

    def loss(x: Tensor, logsnr: Tensor, text: Tensor, mask: Tensor, eps: Tensor) -> Tensor:
        difference = network(x, logsnr, text, mask) - eps
        return (difference * difference).mean((1, 2, 3))

    cache = CompileCache(Path(case["graphs"]), 0, network) if "graphs" in case else CompileCache()
    optimizer = OptimizerConfig(warmup_steps=1, max_grad_norm=MAX_GRAD_NORM)
    training = TrainConfig(steps=1000, ema_decay=EMA_DECAY)
    state = TrainState(network, optimizer, training, compile_cache=cache)
    step = TrainStep(loss, state, optimizer, training, compile_cache=cache)
    batch = step.micro_batches(tuple(arrays(case).values()))

    timing = time_calls(lambda: step(batch), case["steps"])
    # Only now have all graphs run, and so been compiled and written.
    cache.commit()
    return {"parameters": num_parameters(network), **timing, "versions": {}}


def twin(case: Case) -> Answer:
    """The same arithmetic in PyTorch's own operators."""
    from tools.twin import UNet

    # A namespace, as in the peers' environment `UNetConfig` cannot be imported.
    config: Any = SimpleNamespace(**{"patch": 1, **case["unet"]})
    network = UNet(config, case["channels_in"], case["num_levels"], case["text_width"])
    return measure_torch(case, network, network)


def imagen_pytorch(case: Case) -> Answer:
    """imagen-pytorch's `Unet`."""
    stub_imagen_pytorch_imports()
    from imagen_pytorch import Unet

    unet = case["unet"]
    low_res = is_super_resolution(case)
    attends = tuple(kind != "none" for kind in unet["attention"])
    sizes = {
        "num_resnet_blocks": 1,
        "dim_mults": tuple(unet["channel_mults"]),
        **case["imagen_pytorch"],
    }
    network = Unet(
        **sizes,
        layer_attns=attends,
        layer_cross_attns=attends,
        text_embed_dim=case["text_width"],
        max_text_len=case["length"],
        lowres_cond=low_res,
        memory_efficient=low_res,
    )

    def forward(x: Any, logsnr: Any, text: Any, mask: Any) -> Any:
        conditions = {"text_embeds": text, "text_mask": mask > 0}
        if low_res:
            conditions |= {"lowres_cond_img": x[:, 3:], "lowres_noise_times": logsnr[:, 1]}
        return network(x[:, :3], logsnr[:, 0], **conditions)

    return measure_torch(case, network, forward, "imagen-pytorch")


def stub_imagen_pytorch_imports() -> None:
    """Its import downloads an encoder's configuration and imports torchvision; `Unet` needs
    neither.
    """
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    import transformers

    transformers.T5Config.from_pretrained = lambda name: transformers.T5Config()
    for name in ("torchvision", "torchvision.transforms"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)


def deep_floyd_if(case: Case) -> Answer:
    """diffusers' `UNet2DConditionModel`, as the first or second stage of DeepFloyd IF has it."""
    from diffusers import UNet2DConditionModel

    unet = case["unet"]
    low_res = is_super_resolution(case)
    attends = [kind != "none" for kind in unet["attention"]]
    sizes = {"mults": unet["channel_mults"], **case["if"]}
    widths = [sizes["channels"] * mult for mult in sizes["mults"]]

    down = {True: "SimpleCrossAttnDownBlock2D", False: "ResnetDownsampleBlock2D"}
    up = {True: "SimpleCrossAttnUpBlock2D", False: "ResnetUpsampleBlock2D"}
    second_stage = {
        "class_embed_type": "timestep",
        "mid_block_scale_factor": 2**0.5,
        "only_cross_attention": True,
        "resnet_out_scale_factor": 2**0.5,
        "time_embedding_dim": widths[-1],
    }
    network = UNet2DConditionModel(
        **(second_stage if low_res else {}),
        act_fn="gelu",
        addition_embed_type="text",
        attention_head_dim=unet["head_channels"],
        block_out_channels=widths,
        cross_attention_dim=unet["text_channels"],
        cross_attention_norm="group_norm",
        down_block_types=[down[attention] for attention in attends],
        encoder_hid_dim=case["text_width"],
        in_channels=case["channels_in"],
        layers_per_block=1,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        norm_num_groups=8,
        out_channels=3,
        resnet_skip_time_act=True,
        resnet_time_scale_shift="scale_shift",
        sample_size=case["size"],
        time_embedding_act_fn="gelu",
        up_block_types=[up[attention] for attention in reversed(attends)],
    )

    def forward(x: Any, logsnr: Any, text: Any, mask: Any) -> Any:
        # IF's pipelines pass no mask either.
        conditions = {"class_labels": logsnr[:, 1]} if low_res else {}
        return network(x, logsnr[:, 0], text, **conditions).sample

    return measure_torch(case, network, forward, "diffusers")


IMPLEMENTATIONS = {
    "ours": ours,
    "twin": twin,
    "imagen_pytorch": imagen_pytorch,
    "if": deep_floyd_if,
}


# Measurement in PyTorch.


def measure_torch(case: Case, network: Any, forward: Callable[..., Any], *packages: str) -> Answer:
    """Steps of `forward`; `flops` of a step, as PyTorch counts them; `matmul`, the machine's peak
    in operations per second; and versions of the packages.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    parameters = list(network.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    x, logsnr, text, mask, eps = map(torch.from_numpy, arrays(case).values())

    def step() -> None:
        optimizer.zero_grad()
        ((forward(x, logsnr, text, mask) - eps) ** 2).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        detached = [parameter.detach() for parameter in parameters]
        # average + (1 - decay) (parameter - average), as our EMA.
        torch._foreach_lerp_(average, detached, 1 - EMA_DECAY)

    timing = time_calls(step, case["steps"])
    # In a step of its own, as counting takes time.
    with FlopCounterMode(display=False) as counter:
        step()

    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        **timing,
        "flops": counter.get_total_flops(),
        "matmul": matmul_rate(torch),
        "versions": {"torch": torch.__version__, **{name: version(name) for name in packages}},
    }


def matmul_rate(torch: Any) -> float:
    """Operations per second of a product of two large matrices, the best of a few.

    By MKL, or as a 1x1 convolution by oneDNN, which is faster where MKL does not use AVX-512.
    """
    side = MATMUL_SIDE
    a = torch.ones(side, side)
    b = torch.ones(side, side)
    # 8 x 16 x side / 128 = side positions: as many operations as the matrix product.
    x_BCHW = torch.ones(8, side, 16, side // 128)
    weight = torch.ones(side, side, 1, 1)

    with torch.inference_mode():
        products = (lambda: a @ b, lambda: torch.nn.functional.conv2d(x_BCHW, weight))
        fastest = min(min(time_calls(product, 8)["seconds"]) for product in products)
    # side^3 multiplications and as many additions.
    return float(2 * side**3 / fastest)


if __name__ == "__main__":
    implementation, path = sys.argv[1:]
    print_answer(IMPLEMENTATIONS[implementation](json.loads(Path(path).read_text())))
