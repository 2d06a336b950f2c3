"""What `cascade check` says: everything that can be known of a run, or of a cascade, before it
costs anything.
"""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.cli.fit import as_lines, fit
from launch.jobs.plan import LaunchConfig, command, processes, rank_program, read_launch
from pipeline.config import ConfigError, build, dump, read_yaml, to_dict
from pipeline.errors import JobError, UserError

GIB = 2**30


def check(path: str, overrides: Sequence[str], memory: float | None = None) -> dict[str, Any]:
    """The report on a cascade folder, on configs/cascade.yaml, or on a stage's configuration.

    With `memory`, the GiB that a device has, also whether a training fits and what would make it
    fit.
    """
    if Path(path).is_dir():
        if memory is not None:
            raise UserError(
                "--memory: a cascade folder is not trained; give the YAML file of a stage or of a cascade"
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
    """The resolved configuration, parameters, memory, data and argv of a stage's run."""
    from mindspore.nn.utils import no_init_parameters

    from pipeline.nn.parameters import num_parameters
    from pipeline.stage.registry import read_stage_config, stage_class
    from pipeline.train.loop import positions_of_rank
    from pipeline.train.memory import estimate_memory

    config, raw_launch = read_stage_config(path, overrides)
    launch = read_launch(raw_launch)
    positions_of_rank(config, world=launch.size)  # the global batch can be divided
    with no_init_parameters():  # shapes without memory: the 2B base is counted on a laptop
        stage = stage_class(config.kind)(config)
    side, device = (
        stage.train_window or config.size,
        None if memory is None else round(memory * GIB),
    )
    return {
        "config": {**to_dict(config), "launch": to_dict(launch)},
        "parameters": num_parameters(stage.network),
        "memory": estimate_memory(stage.network, config, side, launch.size),
        **(
            {} if device is None else {"fit": fit(stage.network, config, side, launch.size, device)}
        ),
        "data": data(config),
        "argv": command(path, overrides),
        **(
            {"nodes": nodes(launch, config.run, path, overrides)}
            if launch.launcher != "none"
            else {}
        ),
    }


def nodes(
    launch: LaunchConfig, run: str, path: str, overrides: Sequence[str]
) -> list[list[dict[str, Any]]]:
    """What each node starts in a job's first attempt; a port of 0 is a free one, found then."""
    attempt, port = Path(run) / "logs" / "attempt-0", launch.port or 0
    every = (replace(launch, node_rank=number) for number in range(launch.nodes))
    program = rank_program(path, overrides)
    return [
        [vars(process) for process in processes(node, program, attempt, port)] for node in every
    ]


def data(config: Any) -> dict[str, Any]:
    """What the shards hold, or why they cannot be read: a configuration may be checked away from
    its data.
    """
    from pipeline.data.shards import Shards

    try:
        shards = Shards.open(config.data)
    except (UserError, JobError) as error:
        return {"error": str(error)}
    return {
        "shards": len(shards.indexes),
        "samples": len(shards),
        "steps_per_epoch": len(shards) / config.data.global_batch,
        "removed": dict(shards.removed),
        "damaged": sum(1 for _ in shards.faults),
    }


def check_folder(folder: Path) -> dict[str, Any]:
    """The manifests of a cascade that fits together."""
    from pipeline.generate.cascade_folder import read_cascade

    manifests, text = read_cascade(folder)
    stages = {
        name: {k: v for k, v in to_dict(m).items() if k != "config"}
        for name, m in manifests.items()
    }
    return {"stages": stages, "text": to_dict(text)}


def check_cascade_config(path: str, memory: float | None) -> dict[str, Any]:
    """The reports on all stages of a cascade's file, whose sizes must form a chain."""
    from pipeline.generate.cascade_folder import CascadeConfig

    config = build(CascadeConfig, read_yaml(path))
    reports = {entry.name: check_stage(entry.config, (), memory) for entry in config.stages}
    before = None
    for name, report in reports.items():
        takes = report["config"].get("low_res", {}).get("size")
        if takes != before:
            raise ConfigError(
                f"{path}: {name} takes {f'{takes} px' if takes else 'no picture'} and the stage before gives "
                f"{f'{before} px' if before else 'nothing'}; chain stages whose sizes agree"
            )
        before = report["config"]["size"]
    return {"folder": config.folder, "stages": reports}


def as_text(report: dict[str, Any]) -> str:
    """A report for reading."""
    if "parameters" not in report:
        parts = []
        for name, stage in report["stages"].items():
            parts.append(f"== {name}\n{as_text(stage) if 'parameters' in stage else _yaml(stage)}")
        return "\n".join(parts)
    held = ", ".join(f"{name} {size / GIB:.2f}" for name, size in report["memory"].items())
    fitting = (
        "".join(f"\nfits        {line}" for line in as_lines(report["fit"]))
        if "fit" in report
        else ""
    )
    found = ", ".join(f"{name} {value or 'none'}" for name, value in report["data"].items())
    started = "".join(
        f"\nnode {number:<6} {' '.join(f'{name}={value}' for name, value in process['environment'].items())} "
        f"{shlex.join(process['argv'])}"
        for number, node in enumerate(report.get("nodes", ()))
        for process in node
    )
    return (
        f"{_yaml(report['config'])}\n"
        f"parameters  {report['parameters']:,}\n"
        f"memory      GiB a process: {held}{fitting}\n"
        f"data        {found}\n"
        f"runs        {' '.join(report['argv'])}{started}"
    )


def _yaml(tree: dict[str, Any]) -> str:
    return dump(tree).rstrip()
