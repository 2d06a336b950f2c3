"""Whether a training fits a device's memory, and what would make it fit, the gentlest first.

Gentlest is what changes no number and costs least: parts of a batch that are added up, activations
computed twice, 16 bits where the device has them, the optimizer's state divided among ranks. Then
what is another training (Adafactor) or another machine (more ranks).
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

GIB = 2**30
MOST = 4096  # ranks that are thought of

Change = dict[
    str, Any
]  # dotted key of the configuration -> value; "ranks" -> how many there are in all


def fit(network: Any, config: Any, side: int, world: int, device: int) -> dict[str, Any]:
    """`fits`: into `device` bytes; else `instead`: each change that helps, with the bytes that are
    then held; the last of them those that are needed together, where none is enough alone.
    """

    def total(change: Change) -> int:
        from pipeline.train.memory import estimate_memory

        own = {key: value for key, value in change.items() if key != "ranks"}
        return estimate_memory(network, changed(config, own), side, change.get("ranks", world))[
            "total"
        ]

    now = total({})
    if now <= device:
        return {"device": device, "fits": True, "instead": []}
    instead: list[dict[str, Any]] = []
    together: Change = {}
    for choices in changes(config, world):
        best = next((choice for choice in choices if total(choice) <= device), choices[-1])
        if total(best) < now:
            instead.append({"set": best, "total": total(best)})
    if all(each["total"] > device for each in instead):
        for choices in changes(config, world):
            before = total(together)
            if before > device:
                best = next(
                    (choice for choice in choices if total({**together, **choice}) <= device),
                    choices[-1],
                )
                if allowed({**together, **best}) and total({**together, **best}) < before:
                    together |= best
        if len(together) > 1:
            instead.append({"set": together, "total": total(together)})
    return {"device": device, "fits": False, "instead": instead}


def changes(config: Any, world: int) -> Iterator[Sequence[Change]]:
    """What may be set for this configuration: ways of one kind, each saving more than the one
    before it.
    """
    from pipeline import device

    train, batch = config.train, config.data.global_batch // world
    parts = [n for n in range(train.grad_accum_steps + 1, batch + 1) if batch % n == 0]
    if parts:
        yield [{"train.grad_accum_steps": n} for n in parts]
    if not config.unet.recompute:
        yield [{"unet.recompute": True}]
    if train.precision == "float32":
        yield [
            {"train.precision": name} for name in device.supported_precisions() if name != "float32"
        ][:1]
    adamw = config.optimizer.kind == "adamw"
    if adamw and world > 1 and not train.shard_optimizer:
        yield [{"train.shard_optimizer": True}]
    if adamw and not train.shard_optimizer:
        yield [{"optimizer.kind": "adafactor"}]
    ranks = [
        n
        for n in range(2 * world, MOST + 1, world)
        if config.data.global_batch % (n * train.grad_accum_steps) == 0
    ]
    if ranks:
        yield [{"ranks": n} for n in ranks]


def allowed(change: Change) -> bool:
    """Whether these go together: Adafactor's state is not divided, and more ranks leave less of a
    batch to cut.
    """
    return not (
        {"train.shard_optimizer", "optimizer.kind"} <= change.keys()
        or {"train.grad_accum_steps", "ranks"} <= change.keys()
    )


def changed(config: Any, change: Change) -> Any:
    """`config` with other values of these fields, each in a section of its own."""
    for key, value in change.items():
        section, _, name = key.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


def as_lines(found: dict[str, Any]) -> list[str]:
    """What `fit` found, for reading."""
    device = found["device"]
    if found["fits"]:
        return [f"yes, {device / GIB:.2f} GiB are enough"]
    lines = [
        f"no, {device / GIB:.2f} GiB are not enough"
        + ("; with" if found["instead"] else ", and nothing here helps")
    ]
    for each in found["instead"]:
        words = " ".join(
            f"{value} ranks" if key == "ranks" else f"{key}={str(value).lower()}"
            for key, value in each["set"].items()
        )
        lines.append(
            f"{words}: {each['total'] / GIB:.2f} GiB, {'enough' if each['total'] <= device else 'not enough'}"
        )
    return lines
