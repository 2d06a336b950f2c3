"""One side of `python -m tools.bench train`: what it took, as JSON on the last line of stdout.

The sides in PyTorch run where this project is not installed, see peers.py.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

Answer = dict[str, Any]


def arrays(case: dict[str, Any]) -> dict[str, np.ndarray]:
    """What the network sees and has to say, the same on both sides."""
    rng = np.random.default_rng(0)
    batch, side = case["batch"], case["size"]
    return {
        "x": rng.standard_normal((batch, case["channels_in"], side, side), np.float32),
        "logsnr": rng.standard_normal((batch, case["num_levels"]), np.float32),
        "text": rng.standard_normal((batch, case["length"], case["text_width"]), np.float32),
        "mask": np.ones((batch, case["length"]), np.float32),
        "eps": rng.standard_normal((batch, 3, side, side), np.float32),
    }


def ours(case: dict[str, Any]) -> Answer:
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

    graphs = CompileCache(Path(case["graphs"]), 0, network) if "graphs" in case else CompileCache()
    optimizer, training = OptimizerConfig(warmup_steps=1), TrainConfig(steps=1000)
    state = TrainState(network, optimizer, training, compile_cache=graphs)
    step = TrainStep(loss, state, optimizer, training, compile_cache=graphs)
    batch = step.micro_batches(tuple(arrays(case).values()))
    taken = timed(lambda: step(batch), case["steps"])
    graphs.commit()
    return {"parameters": num_parameters(network), **taken, "versions": {}}


def twin(case: dict[str, Any]) -> Answer:
    """PyTorch's own operators with the same arithmetic."""
    sys.path.append(
        str(Path(__file__).parents[2])
    )  # last, as the peers' environment has packages of its own
    from tools.twin import UNet

    config: Any = SimpleNamespace(**{"patch": 1, **case["unet"]})
    network = UNet(config, case["channels_in"], case["num_levels"], case["text_width"])
    return trained(case, network, network)


def imagen_pytorch(case: dict[str, Any]) -> Answer:
    """imagen-pytorch's `Unet`. Its import wants an encoder's width from the web, and torchvision; a
    `Unet` neither.
    """
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    import transformers

    transformers.T5Config.from_pretrained = lambda name: transformers.T5Config()
    for name in ("torchvision", "torchvision.transforms"):
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)
    from imagen_pytorch import Unet

    unet, low_res = case["unet"], case["num_levels"] == 2
    attends = tuple(kind != "none" for kind in unet["attention"])
    network = Unet(
        **{
            "num_resnet_blocks": 1,
            "dim_mults": tuple(unet["channel_mults"]),
            **case["imagen_pytorch"],
        },
        layer_attns=attends,
        layer_cross_attns=attends,
        text_embed_dim=case["text_width"],
        max_text_len=case["length"],
        lowres_cond=low_res,
        memory_efficient=low_res,
    )

    def forward(x: Any, logsnr: Any, text: Any, mask: Any) -> Any:
        more = {"lowres_cond_img": x[:, 3:], "lowres_noise_times": logsnr[:, 1]} if low_res else {}
        return network(x[:, :3], logsnr[:, 0], text_embeds=text, text_mask=mask > 0, **more)

    return trained(case, network, forward, "imagen-pytorch")


def deep_floyd(case: dict[str, Any]) -> Answer:
    """diffusers' `UNet2DConditionModel` as DeepFloyd IF sets it for its first stage, or for its
    second.
    """
    from diffusers import UNet2DConditionModel

    unet, low_res = case["unet"], case["num_levels"] == 2
    attends = [kind != "none" for kind in unet["attention"]]
    mine = {"mults": unet["channel_mults"], **case["if"]}
    second = {
        "class_embed_type": "timestep",
        "mid_block_scale_factor": 2**0.5,
        "only_cross_attention": True,
        "resnet_out_scale_factor": 2**0.5,
        "time_embedding_dim": mine["channels"] * mine["mults"][-1],
    }
    network = UNet2DConditionModel(
        **(second if low_res else {}),
        act_fn="gelu",
        addition_embed_type="text",
        attention_head_dim=unet["head_channels"],
        block_out_channels=[mine["channels"] * mult for mult in mine["mults"]],
        cross_attention_dim=unet["text_channels"],
        cross_attention_norm="group_norm",
        down_block_types=[
            "SimpleCrossAttnDownBlock2D" if it else "ResnetDownsampleBlock2D" for it in attends
        ],
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
        up_block_types=[
            "SimpleCrossAttnUpBlock2D" if it else "ResnetUpsampleBlock2D"
            for it in reversed(attends)
        ],
    )

    def forward(x: Any, logsnr: Any, text: Any, mask: Any) -> Any:
        more = {"class_labels": logsnr[:, 1]} if low_res else {}
        return network(x, logsnr[:, 0], text, **more).sample  # IF's pipelines pass no mask either

    return trained(case, network, forward, "diffusers")


def trained(case: dict[str, Any], network: Any, forward: Any, *packages: str) -> Answer:
    """Steps in PyTorch; operations as it counts them, those of large matrix products a second, and
    versions.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    average = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0)
    x, logsnr, text, mask, eps = map(torch.from_numpy, arrays(case).values())

    def step() -> None:
        optimizer.zero_grad()
        ((forward(x, logsnr, text, mask) - eps) ** 2).mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        torch._foreach_lerp_(
            average, [parameter.detach() for parameter in network.parameters()], 1e-4
        )

    answer = timed(step, case["steps"])
    with FlopCounterMode(display=False) as counter:
        step()
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        **answer,
        "flops": counter.get_total_flops(),
        "matmul": products(torch),
        "versions": {"torch": torch.__version__, **{name: version(name) for name in packages}},
    }


def products(torch: Any, side: int = 2048) -> float:
    """Operations a second of a product of two large matrices, the best of a few: by MKL, or as a
    1x1 convolution by oneDNN, which is faster where MKL keeps from AVX-512.
    """
    a, b = torch.ones(side, side), torch.ones(side, side)
    x_BCHW, weight = torch.ones(8, side, 16, side // 128), torch.ones(side, side, 1, 1)
    with torch.inference_mode():
        ways = (lambda: a @ b, lambda: torch.nn.functional.conv2d(x_BCHW, weight))
        taken = min(min(timed(way, 8)["seconds"]) for way in ways)
    return float(2 * side**3 / taken)


def timed(run: Callable[[], object], number: int) -> Answer:
    """Seconds to the end of the first run, and of each of `number` more; the process's peak memory
    in bytes.
    """
    start = time.perf_counter()
    run()
    first, seconds = time.perf_counter() - start, []
    for _ in range(number):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return {"first": first, "seconds": seconds, "peak": peak()}


def peak() -> int:
    """Bytes that this process held at most."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines["VmHWM"].split()[0])


SIDES = {"ours": ours, "twin": twin, "imagen_pytorch": imagen_pytorch, "if": deep_floyd}

if __name__ == "__main__":
    side, file = sys.argv[1:]
    print(json.dumps(SIDES[side](json.loads(Path(file).read_text()))))
