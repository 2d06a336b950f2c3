"""The rules of the house, held over the source itself."""

import ast
import re
from pathlib import Path

import pytest
from launch.cli.report import check

from pipeline.config import build, read_yaml
from pipeline.generate.cascade_folder import CascadeConfig
from pipeline.imaging.degradations import TASKS
from pipeline.stage.registry import read_stage_config
from tests.helpers.jobs import ROOT

# Ground floor first. A file imports from its own floor and from the floors before it. A room is on
# one floor, unless files of it are listed apart: what a stage's configuration composes stands below
# `stage`, and the loop that trains a stage above it.
FLOORS = (
    ("pipeline.errors", "pipeline.device"),
    ("pipeline.config", "pipeline.files", "pipeline.rng", "pipeline.runtime", "pipeline.terminal"),
    ("pipeline.log", "pipeline.kernels", "pipeline.stage.inputs"),
    ("pipeline.diffusion", "pipeline.nn"),
    ("pipeline.text",),
    ("pipeline.data",),
    ("pipeline.text.store",),
    ("pipeline.text.caption_embeddings",),
    ("pipeline.text.prompts",),
    ("pipeline.data.loader", "pipeline.imaging"),
    ("pipeline.train.optimizer", "pipeline.train.precision"),
    ("pipeline.train.config",),
    ("pipeline.stage",),
    ("pipeline.generate.engine", "pipeline.train"),
    ("pipeline.generate",),
    ("pipeline",),  # the door: `from pipeline import Cascade`
    ("stages",),
    ("launch",),
    ("tools",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

SOURCES = [
    path
    for top in ("pipeline", "stages", "launch", "tools")
    for path in sorted((ROOT / top).rglob("*.py"))
]
each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def imports(tree: ast.AST) -> set[str]:
    """The modules that are imported anywhere, late imports in functions included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write the whole name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(name: str) -> str | None:
    """Where in the house a module, or a name in one, is at home: the longest beginning that is a
    room.
    """
    parts = name.split(".")
    beginnings = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((beginning for beginning in beginnings if beginning in FLOOR), None)


def home(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = room(".".join(part for part in parts if part != "__init__"))
    assert name is not None
    return name


@each_source
def test_imports_go_down(path: Path) -> None:
    mine = home(path)
    for name in imports(ast.parse(path.read_text())):
        theirs = room(name)
        assert theirs is None or theirs == mine or FLOOR[theirs] < FLOOR[mine], (
            f"{mine} imports {name}"
        )
        assert not name.startswith("tests")


def test_every_room_has_a_floor() -> None:
    """A new module of `pipeline` is given a floor, rather than pass as a part of the package."""
    assert [path.name for path in SOURCES if home(path) == "pipeline"] == ["__init__.py"]
    assert {home(path) for path in SOURCES} == FLOOR.keys()


def test_the_rule_finds_what_it_forbids() -> None:
    late = "def f():\n    from pipeline.train.loop import train\n    import stages.base as base\n"
    assert {room(name) for name in imports(ast.parse(late))} == {"pipeline.train", "stages"}
    assert {room(name) for name in imports(ast.parse("from pipeline import runtime, Cascade"))} == {
        "pipeline.runtime",
        "pipeline",
    }
    assert room("pipeline_of_others.x") is None


@each_source
def test_only_runtime_touches_the_environment_and_mindspores_context(path: Path) -> None:
    found = re.findall(
        r"environ\b|getenv|putenv|set_context|\b(?:ms|mindspore)\.(?:set_|runtime)",
        path.read_text(),
    )
    assert not found or home(path) == "pipeline.runtime"


@each_source
def test_no_stored_code_is_run(path: Path) -> None:
    """Neither pickles, in which MindSpore's and PyTorch's own checkpoints come, nor text."""
    tree = ast.parse(path.read_text())
    assert not {name.partition(".")[0] for name in imports(tree)} & {
        "pickle",
        "dill",
        "cloudpickle",
        "marshal",
        "shelve",
    }
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not {"eval", "exec", "__import__", "importlib.import_module"} & calls
    assert not [
        call
        for call in calls
        if call.endswith((".load_checkpoint", ".save_checkpoint", "torch.load"))
    ]
    assert "allow_pickle=True" not in path.read_text()


YAMLS = sorted((ROOT / "configs").rglob("*.yaml"))


def test_all_sets_of_configurations_are_whole() -> None:
    files = ["base64.yaml", "cascade.yaml", "sr1024.yaml", "sr256.yaml"]
    classic = ["classes64.yaml", "glyphs28.yaml", "shapes64.yaml"]
    assert sorted(str(path.relative_to(ROOT / "configs")) for path in YAMLS) == [
        *files[:2],
        *(f"classic/{name}" for name in classic),
        "palette256.yaml",
        *files[2:],
        *(f"tiny/{name}" for name in (*files[:2], "palette.yaml", *files[2:])),
    ]


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_configuration_loads(path: Path) -> None:
    if path.name == "cascade.yaml":
        config = build(CascadeConfig, read_yaml(path))
        assert [entry.name for entry in config.stages] == ["base", "sr256", "sr1024"]
        assert {(ROOT / entry.config).parent for entry in config.stages} == {path.parent}
    else:
        config, _ = read_stage_config(path)
        if path.stem.startswith("palette"):
            assert (config.kind, config.size) == (
                "image_to_image",
                64 if path.parent.name == "tiny" else 256,
            )
            assert list(config.tasks) == list(TASKS)
            return
        if path.parent.name == "classic":  # named after what it is trained on
            assert path.stem.endswith(str(config.size))
            assert config.kind == "base"
            assert config.conditioning == ("class" if path.stem == "classes64" else "none")
            return
        assert (
            f"{config.kind.removesuffix('_resolution').replace('super', 'sr')}{config.size}"
            == path.stem
        )


def test_a_set_is_a_cascade_of_the_papers_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imagen's base has 2B parameters and its super-resolutions 600M and 400M (arXiv 2205.11487,
    section 4.1).
    """
    monkeypatch.chdir(ROOT)
    stages = check("configs/cascade.yaml", ())["stages"]
    for name, expected in {"base": 2.0e9, "sr256": 600e6, "sr1024": 400e6}.items():
        assert stages[name]["parameters"] == pytest.approx(expected, rel=0.1), name
