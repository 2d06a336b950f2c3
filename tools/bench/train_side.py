"""One side of `python -m tools.bench train`: what it took, as JSON on the last line of stdout.

The twin's side does not import `pipeline`: its environment is MindSpore's, and would bind PyTorch's oneDNN to AVX2.
"""

import json
import sys
import time
from collections.abc import Callable
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
    from pipeline.train.optimizer import OptimizerConfig
    from pipeline.train.state import State
    from pipeline.train.step import TrainStep

    config = build(UNetConfig, case["unet"])
    network = UNet(config, case["channels_in"], case["num_levels"], case["text_width"])
    initialize(network, 0)

    def loss(x: Tensor, logsnr: Tensor, text: Tensor, mask: Tensor, eps: Tensor) -> Tensor:
        difference = network(x, logsnr, text, mask) - eps
        return (difference * difference).mean((1, 2, 3))

    step = TrainStep(loss, State(network, OptimizerConfig(warmup_steps=1), 1000, 0.9999), clip=1.0)
    batch = step.parts(tuple(arrays(case).values()))
    return {"parameters": num_parameters(network), **timed(lambda: step(batch), case["steps"])}


def twin(case: dict[str, Any]) -> Answer:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tools.twin import UNet

    config: Any = SimpleNamespace(**{"patch": 1, **case["unet"]})
    network = UNet(config, case["channels_in"], case["num_levels"], case["text_width"])
    average = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0)
    x, logsnr, text, mask, eps = map(torch.from_numpy, arrays(case).values())

    def step() -> None:
        optimizer.zero_grad()
        ((network(x, logsnr, text, mask) - eps) ** 2).mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [parameter.detach() for parameter in network.parameters()], 1e-4)

    answer = timed(step, case["steps"])
    with FlopCounterMode(display=False) as counter:
        step()
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        **answer,
        "flops": counter.get_total_flops(),
        "matmul": products(torch),
    }


def products(torch: Any, side: int = 2048) -> float:
    """Operations a second of a product of two large matrices, the best of a few."""
    a, b = torch.ones(side, side), torch.ones(side, side)
    taken = timed(lambda: a @ b, 8)["seconds"]
    return float(2 * side**3 / min(taken))


def timed(run: Callable[[], object], number: int) -> Answer:
    """Seconds to the end of the first run, and of each of `number` more; the process's peak memory in bytes."""
    start = time.perf_counter()
    run()
    first, seconds = time.perf_counter() - start, []
    for _ in range(number):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {"first": first, "seconds": seconds, "peak": 1024 * int(lines["VmHWM"].split()[0])}


if __name__ == "__main__":
    side, file = sys.argv[1:]
    print(json.dumps({"ours": ours, "twin": twin}[side](json.loads(Path(file).read_text()))))
