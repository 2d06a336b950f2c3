"""The reports of `cascade check`: everything about a run or a cascade that is known before it runs.

`fit` says whether a training fits a device's memory, and otherwise which changes help. It proposes
first what changes no result and costs least: gradient accumulation, recomputed activations, 16-bit
precision, a sharded optimizer state. Then what makes another training (Adafactor) or needs another
machine (more ranks).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.jobs.plan import (
    LaunchConfig,
    node_processes,
    rank_program,
    read_launch,
    train_command,
)
from pipeline.config import ConfigError, build, read_yaml, to_dict
from pipeline.errors import JobError, UserError

GIB = 2**30
MAX_RANKS = 4096  # the most that are proposed

# Dotted key of the configuration -> value; "ranks" -> number of ranks in all.
Change = dict[str, Any]


def check(path: str, overrides: Sequence[str], memory: float | None = None) -> dict[str, Any]:
    """The report on a cascade folder, a cascade's file, or a stage's file.

    `memory` is that of a device in GiB; with it, the report says whether a training fits.
    """
    if Path(path).is_dir():
        if memory is not None:
            raise UserError(
                "--memory: a cascade folder is not trained; give the YAML file of a stage or of a "
                "cascade"
            )
        if overrides:
            raise UserError(
                f"{overrides[0]}: a cascade folder takes no overrides; give a YAML file"
            )
        return check_folder(Path(path))

    if "stages" in read_yaml(path):
        if overrides:
            raise UserError(
                f"{overrides[0]}: a cascade's file takes no overrides; check its stages one by one"
            )
        return check_cascade_config(path, memory)

    return check_stage(path, overrides, memory)


def check_stage(path: str, overrides: Sequence[str], memory: float | None = None) -> dict[str, Any]:
    """The resolved configuration, parameters, memory in bytes, data and argv of a stage's run."""
    from mindspore.nn.utils import no_init_parameters

    from pipeline.nn.parameters import num_parameters
    from pipeline.stage.registry import read_stage_config, stage_class
    from pipeline.train.loop import positions_of_rank
    from pipeline.train.memory import estimate_memory

    config, raw_launch = read_stage_config(path, overrides)
    launch = read_launch(raw_launch)
    positions_of_rank(config, world=launch.size)  # raises if the global batch cannot be divided

    # Parameters without memory: the base of 2B parameters can be checked on a laptop.
    with no_init_parameters():
        stage = stage_class(config.kind)(config)
    # Training on windows holds the activations of a window only.
    size = stage.image_size.used

    report: dict[str, Any] = {
        "config": {**to_dict(config), "launch": to_dict(launch)},
        "parameters": num_parameters(stage.network),
        "memory": estimate_memory(stage.network, config, size, launch.size),
    }
    if memory is not None:
        device = round(memory * GIB)
        report["fit"] = fit(stage.network, config, size, world=launch.size, device=device)

    report |= {"data": check_data(config), "argv": train_command(path, overrides)}
    if launch.launcher != "none":
        report["nodes"] = check_nodes(launch, Path(config.run), rank_program(path, overrides))
    return report


def check_nodes(
    launch: LaunchConfig, run_dir: Path, program: Sequence[str]
) -> list[list[dict[str, Any]]]:
    """What each node starts in a job's first attempt; port 0 stands for a free one, found then."""
    attempt = run_dir / "logs" / "attempt-0"
    nodes = [replace(launch, node_rank=node_rank) for node_rank in range(launch.nodes)]
    return [
        [
            vars(process)
            for process in node_processes(node, program, attempt=attempt, port=launch.port or 0)
        ]
        for node in nodes
    ]


def check_data(config: Any) -> dict[str, Any]:
    """What the shards hold, or the error: a configuration may be checked away from its data."""
    from pipeline.data.shards import Shards

    try:
        shards = Shards.open(config.data)
        validation = shards.open_validation()
    except (UserError, JobError) as error:
        return {"error": str(error)}

    report = {
        "shards": len(shards.indexes),
        "samples": len(shards),
        "steps_per_epoch": len(shards) / config.data.global_batch,
        "removed": dict(shards.removed),
        "damaged": sum(1 for _ in shards.faults),
    }
    return report | ({"validation": len(validation)} if validation else {})


def check_folder(folder: Path) -> dict[str, Any]:
    """The manifests of a cascade folder. UserError if its stages do not fit together."""
    from pipeline.generate.cascade_folder import read_cascade

    manifests, text = read_cascade(folder)
    stages = {
        name: {key: value for key, value in to_dict(manifest).items() if key != "config"}
        for name, manifest in manifests.items()
    }
    return {"stages": stages, "text": to_dict(text)}


def check_cascade_config(path: str, memory: float | None) -> dict[str, Any]:
    """The reports on all stages of a cascade's file. ConfigError if their sizes form no chain."""
    from pipeline.generate.cascade_folder import CascadeConfig

    config = build(CascadeConfig, read_yaml(path))
    reports = {entry.name: check_stage(entry.config, (), memory) for entry in config.stages}

    size_before = None
    # The first stage takes no image; each later one takes what the stage before gives.
    for name, report in reports.items():
        size_in = report["config"].get("low_res", {}).get("size")
        if size_in != size_before:
            takes = f"{size_in} px" if size_in else "no image"
            gives = f"{size_before} px" if size_before else "nothing"
            raise ConfigError(
                f"{path}: {name} takes {takes} and the stage before gives {gives}; chain stages "
                "whose sizes agree"
            )
        size_before = report["config"]["size"]

    return {"folder": config.folder, "stages": reports}


# Whether a training fits a device.


def fit(network: Any, config: Any, size: int, world: int, device: int) -> dict[str, Any]:
    """Whether a training of images of `size` px on `world` ranks fits `device` bytes per rank.

    `fits` says so. If not, `instead` lists each change that reduces the memory, with the total in
    bytes after it; where no change alone is enough, the last entry is several of them together.
    """

    def total(change: Change) -> int:
        from pipeline.train.memory import estimate_memory

        fields = {key: value for key, value in change.items() if key != "ranks"}
        ranks = change.get("ranks", world)
        return estimate_memory(network, changed(config, fields), size, ranks)["total"]

    now = total({})
    if now <= device:
        return {"device": device, "fits": True, "instead": []}

    instead: list[dict[str, Any]] = []
    for choices in changes(config, world):
        # The smallest change of a kind that is enough, or the one that saves most.
        best = next((choice for choice in choices if total(choice) <= device), choices[-1])
        if total(best) < now:
            instead.append({"set": best, "total": total(best)})

    if all(proposal["total"] > device for proposal in instead):
        # Greedy, in the order of `changes`: the cheapest kinds first, until it fits.
        combined: Change = {}
        for choices in changes(config, world):
            before = total(combined)
            if before <= device:
                break
            best = next(
                (choice for choice in choices if total(combined | choice) <= device), choices[-1]
            )
            if allowed(combined | best) and total(combined | best) < before:
                combined |= best
        # A single change is in the list already.
        if len(combined) > 1:
            instead.append({"set": combined, "total": total(combined)})

    return {"device": device, "fits": False, "instead": instead}


def changes(config: Any, world: int) -> Iterator[Sequence[Change]]:
    """The changes that are possible for this configuration, by kind.

    The changes of one kind are ordered: each saves more than the one before it.
    """
    from pipeline import device

    train = config.train
    global_batch = config.data.global_batch
    rank_batch = global_batch // world
    adamw = config.optimizer.kind == "adamw"

    accumulation = range(train.grad_accum_steps + 1, rank_batch + 1)
    # Micro-batches have equal sizes, so only divisors of a rank's batch.
    if parts := [steps for steps in accumulation if rank_batch % steps == 0]:
        yield [{"train.grad_accum_steps": steps} for steps in parts]

    if not config.unet.recompute:
        yield [{"unet.recompute": True}]

    if train.precision == "float32":
        # The first that the device has: bfloat16, which needs no loss scale, before float16.
        half = [name for name in device.supported_precisions() if name != "float32"]
        yield [{"train.precision": name} for name in half[:1]]

    if adamw and world > 1 and not train.shard_optimizer:
        yield [{"train.shard_optimizer": True}]
    if adamw and not train.shard_optimizer:
        yield [{"optimizer.kind": "adafactor"}]

    multiples = range(2 * world, MAX_RANKS + 1, world)
    # Each rank's batch has to remain a multiple of the accumulated steps.
    if ranks := [n for n in multiples if global_batch % (n * train.grad_accum_steps) == 0]:
        yield [{"ranks": n} for n in ranks]


def allowed(change: Mapping[str, Any]) -> bool:
    """Whether these settings can be combined.

    Adafactor's state is not sharded, and more ranks leave each a smaller batch to accumulate over.
    """
    sharded_adafactor = {"train.shard_optimizer", "optimizer.kind"} <= change.keys()
    accumulated_ranks = {"train.grad_accum_steps", "ranks"} <= change.keys()
    return not (sharded_adafactor or accumulated_ranks)


def changed(config: Any, change: Mapping[str, Any]) -> Any:
    """`config` with these values; each key is `section.field`."""
    for key, value in change.items():
        section, _, name = key.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config
