"""YAML and overrides to frozen dataclasses: round trips, and the full text of each error."""

import math
import string
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pytest

from pipeline.config import (
    ABSENT,
    ConfigError,
    apply_overrides,
    build,
    differences,
    dump,
    read_yaml,
    to_dict,
)

Launcher = Literal["none", "msrun", "mpirun"]


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)


@dataclass(frozen=True, kw_only=True)
class LowResConfig:
    size: int
    levels: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if self.size % 32:
            raise ConfigError(
                f"size: {self.size} is not a multiple of 32; write {self.size // 32 * 32}"
            )


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    run: str
    seed: int = 0
    launcher: Launcher = "none"
    workers: Literal[1, 2] = 1
    shuffle: bool = True
    clip: float | None = None
    name: str | None = None
    mults: tuple[int, ...] = (1, 2)
    shards: str | tuple[str, ...] | dict[str, float] = ""
    captions: dict[str, float] = field(default_factory=dict)
    adam: AdamConfig = field(default_factory=AdamConfig)
    low_res: LowResConfig | None = None
    derived: int = field(init=False, default=3)


FIELDS = "run, seed, launcher, workers, shuffle, clip, name, mults, shards, captions, adam, low_res"


def message(raw: Any) -> str:
    with pytest.raises(ConfigError) as error:
        build(StageConfig, raw)
    return str(error.value)


# Text that YAML would read as something else, if it were not quoted.
YAML_TRAPS = ("3e-5", "no", "null", "1:30", "2024-01-01", "", "~", "010", "{a", "- b", "'")


def random_config(rng: np.random.Generator) -> StageConfig:
    alphabet = [*string.printable, "é", "雪", "🙂", "\x85", "\u2028", "\ufeff"]

    def text() -> str:
        return "".join(rng.choice(alphabet, rng.integers(0, 12)))

    def number() -> float:
        return float(
            rng.choice(
                [0.0, -0.0, 1e16, 5e-324, 1.7e308, rng.normal() * 10.0 ** rng.integers(-30, 30)]
            )
        )

    levels = tuple((int(rng.integers(-9, 9)), number()) for _ in range(rng.integers(0, 3)))
    shards = [text(), tuple(text() for _ in range(rng.integers(0, 3))), {text(): number()}]

    return StageConfig(
        run=str(rng.choice([text(), *YAML_TRAPS])),
        seed=int(rng.integers(0, 2**63)),
        launcher=get_args(Launcher)[rng.integers(3)],
        shuffle=bool(rng.integers(2)),
        clip=None if rng.integers(2) else number(),
        name=None if rng.integers(2) else text(),
        mults=tuple(int(n) for n in rng.integers(1, 9, rng.integers(0, 4))),
        shards=shards[rng.integers(3)],
        captions={text(): number() for _ in range(rng.integers(0, 3))},
        adam=AdamConfig(lr=number(), betas=(number(), number())),
        low_res=LowResConfig(size=64, levels=levels) if rng.integers(2) else None,
    )


def test_every_config_survives_dict_and_yaml(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        config = random_config(rng)
        assert build(StageConfig, to_dict(config)) == config
        (tmp_path / "config.yaml").write_text(dump(config), encoding="utf-8", newline="")
        assert build(StageConfig, read_yaml(tmp_path / "config.yaml")) == config


def test_a_dict_has_plain_values_and_no_derived_fields() -> None:
    low_res = LowResConfig(size=64, levels=((1, 0.5),))
    raw = to_dict(StageConfig(run="r", low_res=low_res))
    assert raw["low_res"] == {"size": 64, "levels": [[1, 0.5]]}
    assert raw["mults"] == [1, 2]
    assert "derived" not in raw


def test_dumped_floats_are_read_as_floats() -> None:
    assert "lr: 1.0e-05\n" in dump(AdamConfig(lr=1e-5))


def test_integers_are_converted_to_float_fields() -> None:
    config = build(StageConfig, {"run": "r", "clip": 1, "adam": {"betas": [0, 1]}})
    assert [type(x) for x in (config.clip, *config.adam.betas)] == [float] * 3


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (
            {"run": "r", "low_res": {"siz": 1}},
            "low_res.siz: no such field in LowResConfig; did you mean 'size'?",
        ),
        (
            {"run": "r", "adam": {"q": 1}},
            "adam.q: no such field in AdamConfig; its fields are lr, betas",
        ),
        ({"run": "r", 7: 1}, "7: no such field in StageConfig; its fields are " + FIELDS),
        (
            {"run": "r", "derived": 1},
            "derived: no such field in StageConfig; its fields are " + FIELDS,
        ),
        ({}, "run: missing, and StageConfig has no default for it; give a value"),
        (
            {"run": "r", "low_res": {}},
            "low_res.size: missing, and LowResConfig has no default for it; give a value",
        ),
        ([], "StageConfig: expected a section, got the list []; write `name: value` lines"),
        (
            {"run": "r", "adam": None},
            "adam: expected a section, got nothing; write `name: value` lines",
        ),
        ({"run": "r", "adam": 0.1}, "adam: expected a section, got 0.1; write `name: value` lines"),
        (
            {"run": "r", "low_res": {"size": 48}},
            "low_res.size: 48 is not a multiple of 32; write 32",
        ),
        # whole numbers
        (
            {"run": "r", "seed": True},
            "seed: expected a whole number, got true; give a whole number",
        ),
        ({"run": "r", "seed": 7.0}, "seed: expected a whole number, got 7.0; write 7"),
        ({"run": "r", "seed": 7.5}, "seed: expected a whole number, got 7.5; give a whole number"),
        (
            {"run": "r", "seed": math.inf},
            "seed: expected a whole number, got inf; give a whole number",
        ),
        (
            {"run": "r", "seed": "1e6"},
            "seed: expected a whole number, got text '1e6'; write 1000000",
        ),
        (
            {"run": "r", "seed": "x"},
            "seed: expected a whole number, got text 'x'; give a whole number without quotes",
        ),
        (
            {"run": "r", "seed": None},
            "seed: expected a whole number, got nothing; give a value or remove the line",
        ),
        (
            {"run": "r", "seed": [1]},
            "seed: expected a whole number, got the list [1]; give a whole number",
        ),
        (
            {"run": "r", "seed": {"a": 1}},
            "seed: expected a whole number, got the section {'a': 1}; give a whole number",
        ),
        # numbers
        (
            {"run": "r", "adam": {"lr": "3e-5"}},
            "adam.lr: expected a number, got text '3e-5'; "
            "write 3.0e-5 without quotes (YAML reads a bare 3e-5 as text, 3.0e-5 as a number)",
        ),
        (
            {"run": "r", "adam": {"lr": "-1.5E6"}},
            "adam.lr: expected a number, got text '-1.5E6'; "
            "write -1.5e+6 without quotes (YAML reads a bare 3e-5 as text, 3.0e-5 as a number)",
        ),
        (
            {"run": "r", "clip": "big"},
            "clip: expected a number, got text 'big'; give a number without quotes",
        ),
        ({"run": "r", "clip": False}, "clip: expected a number, got false; give a number"),
        ({"run": "r", "clip": math.nan}, "clip: nan is not a finite number; give a finite one"),
        (
            {"run": "r", "adam": {"betas": [0.9, -math.inf]}},
            "adam.betas[1]: -inf is not a finite number; give a finite one",
        ),
        # the other scalars
        ({"run": 7}, "run: expected text, got 7; put it in quotes"),
        (
            {"run": False},
            "run: expected text, got false; put it in quotes, "
            "as YAML reads a bare yes or off as true or false",
        ),
        ({"run": None}, "run: expected text, got nothing; give a value or remove the line"),
        ({"run": "r", "shuffle": 1}, "shuffle: expected true or false, got 1; give true or false"),
        (
            {"run": "r", "shuffle": "yes"},
            "shuffle: expected true or false, got text 'yes'; give true or false without quotes",
        ),
        (
            {"run": "r", "launcher": "msrn"},
            "launcher: text 'msrn' is not one of 'none', 'msrun', 'mpirun'; did you mean 'msrun'?",
        ),
        (
            {"run": "r", "launcher": "?"},
            "launcher: text '?' is not one of 'none', 'msrun', 'mpirun'; choose one of them",
        ),
        (
            {"run": "r", "launcher": False},
            "launcher: false is not one of 'none', 'msrun', 'mpirun'; "
            "put it in quotes, as YAML reads a bare yes or off as true or false",
        ),
        ({"run": "r", "workers": 3}, "workers: 3 is not one of 1, 2; choose one of them"),
        ({"run": "r", "workers": True}, "workers: true is not one of 1, 2; give a whole number"),
        # lists
        ({"run": "r", "mults": "1,2"}, "mults: expected a list, got text '1,2'; write [1,2]"),
        ({"run": "r", "mults": 4}, "mults: expected a list, got 4; write [4]"),
        ({"run": "r", "mults": None}, "mults: expected a list, got nothing; write it as [a, b]"),
        (
            {"run": "r", "mults": [1, "2"]},
            "mults[1]: expected a whole number, got text '2'; write 2",
        ),
        (
            {"run": "r", "adam": {"betas": [1]}},
            "adam.betas: expected 2 values, got the list [1]; give 2",
        ),
        (
            {"run": "r", "low_res": {"size": 64, "levels": [[1, 0.5], [2, True]]}},
            "low_res.levels[1][1]: expected a number, got true; give a number",
        ),
        ({"run": "r", "shards": 7}, "shards: expected text, got 7; put it in quotes"),
        ({"run": "r", "shards": ["a", 7]}, "shards[1]: expected text, got 7; put it in quotes"),
        (
            {"run": "r", "shards": {"a": "x"}},
            "shards.a: expected a number, got text 'x'; give a number without quotes",
        ),
        ({"run": "r", "captions": {3: 1}}, "captions.3: the name is 3; put it in quotes"),
        ({"run": ["x" * 200]}, "run: expected text, got the list ['" + "x" * 75 + "...; give text"),
    ],
)
def test_each_error_has_the_path_the_value_and_the_fix(raw: Any, expected: str) -> None:
    assert message(raw) == expected


def test_errors_start_with_the_path_of_the_section() -> None:
    with pytest.raises(
        ConfigError, match=r"^stages\.sr256\.size: 48 is not a multiple of 32; write 32$"
    ):
        build(LowResConfig, {"size": 48}, path="stages.sr256")


def test_overrides_are_yaml_and_create_missing_sections() -> None:
    raw = {"run": "old", "adam": None}
    changed = apply_overrides(
        raw, ["run=a=b", "adam.lr=3.0e-5", "mults=[1,2]", "low_res.size=64", "clip=", "name='7'"]
    )
    assert changed == {
        "run": "a=b",
        "adam": {"lr": 3.0e-5},
        "mults": [1, 2],
        "low_res": {"size": 64},
        "clip": None,
        "name": "7",
    }
    assert raw == {"run": "old", "adam": None}


def test_an_override_does_not_change_another_section_of_the_same_anchor(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("a: &shared {x: 1}\nb: *shared\n")
    assert apply_overrides(read_yaml(tmp_path / "c.yaml"), ["a.x=2"]) == {
        "a": {"x": 2},
        "b": {"x": 1},
    }


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("seed", "seed: is not an override; write section.key=value, like data.global_batch=8"),
        ("=7", "=7: is not an override; write section.key=value, like data.global_batch=8"),
        ("a..b=7", "a..b=7: is not an override; write section.key=value, like data.global_batch=8"),
        ("seed.x=7", "seed.x=7: seed is 3, not a section; set seed itself or correct the path"),
        (
            "a.b.c.d=7",
            "a.b.c.d=7: a.b is the list [1], not a section; set a.b itself or correct the path",
        ),
        (
            "a=[1,",
            "a=[1,: 1: expected the node content, but found '<stream end>'; "
            "check keys, indentation, brackets and quotes there",
        ),
        (
            "a={x: 1, x: 2}",
            "a={x: 1, x: 2}: 1: repeated key 'x', first on line 1; "
            "check keys, indentation, brackets and quotes there",
        ),
    ],
)
def test_invalid_overrides(item: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        apply_overrides({"seed": 3, "a": {"b": [1]}}, [item])
    assert str(error.value) == expected


CHECK = "; check keys, indentation, brackets and quotes there"
NO_MAPPING = ":1: expected `name: value` lines, got {}; start from one of configs/"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a: 1\nb: {c: 1}\na: 2\n", ":3: repeated key 'a', first on line 1" + CHECK),
        (b"a:\n  b: 1\n  b: 1\n", ":3: repeated key 'b', first on line 2" + CHECK),
        (b"a: 1\nb: x: y\n", ":2: mapping values are not allowed here" + CHECK),
        (b"a: 1\n\tb: 2\n", ":2: found character '\\t' that cannot start any token" + CHECK),
        (
            b"a: 1\nb: !!python/name:os.system x\n",
            ":2: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/name:os.system'" + CHECK,
        ),
        (b"a: 1\n\nb: 2024-13-01\n", ":3: month must be in 1..12" + CHECK),
        (b"a: 1\nb: \x07\n", ":2: control character 0x7" + CHECK),
        (b"a: 1\nb: \xff\n", ":2: is not UTF-8; save the file as UTF-8 text"),
        (b"", NO_MAPPING.format("nothing")),
        (b"# only a comment\n", NO_MAPPING.format("nothing")),
        (b"- 1\n- 2\n", NO_MAPPING.format("the list [1, 2]")),
    ],
)
def test_invalid_files_are_reported_with_their_line(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_yaml(path)
    assert str(error.value) == f"{path}{expected}"


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    with pytest.raises(ConfigError) as error:
        read_yaml(path)

    assert str(error.value) == (
        f"{path}: cannot be read: No such file or directory; give the path of a YAML file"
    )


def test_a_merge_key_may_repeat_a_key(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, x: 4}\n"
    )
    assert read_yaml(tmp_path / "c.yaml")["c"] == {"x": 4, "y": 2}


def test_differences_are_listed_with_their_dotted_paths() -> None:
    one = StageConfig(run="r", adam=AdamConfig(lr=0.1), mults=(1,))
    two = replace(one, adam=AdamConfig(lr=0.2), mults=(1, 2), low_res=LowResConfig(size=64))
    assert differences(to_dict(one), to_dict(one)) == []
    assert differences(to_dict(one), to_dict(two)) == [
        ("mults", [1], [1, 2]),
        ("adam.lr", 0.1, 0.2),
        ("low_res", None, {"size": 64, "levels": []}),
    ]
    assert differences({"a": {"x": 1}}, {"a": {"y": None}}) == [
        ("a.x", 1, ABSENT),
        ("a.y", ABSENT, None),
    ]
