"""YAML and dotted overrides -> frozen dataclasses, strictly: a typing error must not become a
silent default.

    config = build(StageConfig, apply_overrides(read_yaml("configs/base64.yaml"), ["train.steps=100"]))

Configs are frozen keyword-only dataclasses, each beside what it configures. Type hints are the
grammar: bool, int, float, str, `X | None`, `tuple[X, ...]`, `Literal[...]`, `dict[str, X]`, nested
dataclasses, and unions of a plain type, a tuple and a dict, among which the value's form decides.
`__post_init__` checks the rest and raises `ConfigError("size: 48 is not a multiple of 32; ...")`;
`build` puts the section's path before that.

Every error is one line: dotted path, value received, fix. It names the traps of YAML 1.1: `3e-5` is
text (a number needs the dot, 3.0e-5), `off` is false, and of two equal keys the last would win in
silence.
"""

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import yaml

from pipeline.errors import UserError

T = TypeVar("T")
ABSENT = "(absent)"  # stands in `differences` where one side lacks the key
_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a section",
}


class ConfigError(UserError):
    """A config that cannot be: `path.to.field: what is wrong with which value; the fix`."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            if key.value in lines:
                problem = f"repeated key '{key.value}', first on line {lines[key.value]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # what looks like a date or a number and is none: 2024-13-01
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from None


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        line, problem = (
            text.count("\n", 0, error.position) + 1,
            f"control character {error.character:#x}",
        )
    except yaml.MarkedYAMLError as error:
        line, problem = error.problem_mark.line + 1 if error.problem_mark else 1, str(error.problem)
    raise ConfigError(f"{line}: {problem}; check keys, indentation, brackets and quotes there")


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The file's mapping, as yet unchecked but for repeated keys."""
    try:
        raw = _parse(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}; give the path of a YAML file"
        ) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8; save the file as UTF-8 text") from None
    except ConfigError as error:
        raise ConfigError(f"{path}:{error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}:1: expected `name: value` lines, got {_got(raw)}; start from one of configs/"
        )
    return raw


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`raw` with each `section.key=value` set, as a new dict. Values are YAML; sections that are
    not there appear.
    """
    for item in overrides:
        path, equals, text = item.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise ConfigError(
                f"{item}: is not an override; write section.key=value, like data.global_batch=8"
            )
        try:
            raw = _with(raw, keys, _parse(text))
        except ConfigError as error:
            raise ConfigError(f"{item}: {error}") from None
    return raw


def _with(raw: Any, keys: Sequence[str], value: Any, where: str = "") -> dict[str, Any]:
    # Copies along the path: sections that share an anchor in the YAML must not change together.
    if raw is not None and not isinstance(raw, dict):
        raise ConfigError(
            f"{where} is {_got(raw)}, not a section; set {where} itself or correct the path"
        )
    section, (key, *rest) = raw or {}, keys
    return {
        **section,
        key: _with(section.get(key), rest, value, _join(where, key)) if rest else value,
    }


def build(cls: type[T], raw: Any, where: str = "") -> T:
    """The dataclass `cls` from plain values; `where` is its dotted path, for errors."""
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{where or cls.__name__}: expected a section, got {_got(raw)}; write `name: value` lines"
        )
    known = {field.name: field for field in fields(cls) if field.init}  # type: ignore[arg-type]
    for key in [key for key in raw if key not in known]:
        fix = _closest(key, known) or f"its fields are {', '.join(known)}"
        raise ConfigError(f"{_join(where, key)}: no such field in {cls.__name__}; {fix}")
    for name, field in known.items():
        if name not in raw and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(
                f"{_join(where, name)}: missing, and {cls.__name__} has no default for it; give a value"
            )
    hints = get_type_hints(cls)
    values = {name: _convert(hints[name], value, _join(where, name)) for name, value in raw.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(_join(where, error)) from None


def _convert(hint: Any, raw: Any, where: str) -> Any:
    kind, args = get_origin(hint), get_args(hint)
    if kind in (Union, UnionType):
        if raw is None and NoneType in args:
            return None
        inner = [arg for arg in args if arg is not NoneType]
        form = (
            tuple if isinstance(raw, list) else dict if isinstance(raw, dict) else None
        )  # the others are plain
        return _convert(
            next((arg for arg in inner if form and get_origin(arg) is form), inner[0]), raw, where
        )
    if kind is tuple:
        if not isinstance(raw, list | tuple):
            fix = f"write [{raw}]" if isinstance(raw, str | int | float) else "write it as [a, b]"
            raise ConfigError(f"{where}: expected a list, got {_got(raw)}; {fix}")
        hints = args[:1] * len(raw) if args[-1] is Ellipsis else args
        if len(raw) != len(hints):
            raise ConfigError(
                f"{where}: expected {len(hints)} values, got {_got(raw)}; give {len(hints)}"
            )
        return tuple(
            _convert(hints[number], item, f"{where}[{number}]") for number, item in enumerate(raw)
        )
    if is_dataclass(hint):
        return build(cast(type, hint), raw, where)
    if kind is dict and isinstance(raw, dict) and args[1] is not Any:
        for key in [key for key in raw if not isinstance(key, str)]:
            raise ConfigError(f"{_join(where, key)}: the name is {_got(key)}; {_fix(str, key)}")
        return {key: _convert(args[1], value, _join(where, key)) for key, value in raw.items()}
    hint = (
        dict if kind is dict else hint
    )  # `dict[str, Any]`: free content, such as another file's configuration
    if kind is Literal:
        if any(type(raw) is type(choice) and raw == choice for choice in args):
            return raw
        fix = (
            _fix(type(args[0]), raw)
            if isinstance(raw, bool)
            else _closest(raw, args) or "choose one of them"
        )
        raise ConfigError(f"{where}: {_got(raw)} is not one of {', '.join(map(repr, args))}; {fix}")
    raw = float(raw) if hint is float and type(raw) is int else raw
    if type(raw) is not hint:
        raise ConfigError(f"{where}: expected {_NAMES[hint]}, got {_got(raw)}; {_fix(hint, raw)}")
    if hint is float and not math.isfinite(raw):
        raise ConfigError(f"{where}: {raw} is not a finite number; give a finite one")
    return raw


def to_dict(config: Any) -> Any:
    """Plain values, tuples as lists: `build(type(config), to_dict(config)) == config`."""
    if is_dataclass(config):
        return {
            field.name: to_dict(getattr(config, field.name))
            for field in fields(config)
            if field.init
        }
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    return [to_dict(item) for item in config] if isinstance(config, tuple) else config


def dump(config: object) -> str:
    """YAML that `read_yaml` and `build` turn back into an equal config, to the last digit."""
    return yaml.safe_dump(
        to_dict(config), sort_keys=False, width=120
    )  # ASCII: else it loses U+0085


def differences(
    a: dict[str, Any], b: dict[str, Any], where: str = ""
) -> list[tuple[str, Any, Any]]:
    """(dotted path, value in a, value in b) wherever two trees of `to_dict` differ."""
    found: list[tuple[str, Any, Any]] = []
    for key in {**a, **b}:
        path, mine, theirs = _join(where, key), a.get(key, ABSENT), b.get(key, ABSENT)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            found += differences(mine, theirs, path)
        elif mine != theirs:
            found.append((path, mine, theirs))
    return found


def _join(where: str, name: object) -> str:
    return f"{where}.{name}" if where else str(name)


def _got(value: Any) -> str:
    kind = {str: "text ", list: "the list ", dict: "the section "}.get(type(value), "")  # type: ignore[call-overload]
    text = (
        str(value).lower()
        if isinstance(value, bool)
        else "nothing"
        if value is None
        else repr(value)
    )
    return kind + (text if len(text) <= 80 else text[:77] + "...")


def _closest(word: Any, words: Iterable[Any]) -> str:
    close = difflib.get_close_matches(str(word), map(str, words), n=1)
    return f"did you mean '{close[0]}'?" if close else ""


def _fix(hint: type, raw: Any) -> str:
    """What to write instead of `raw` where `hint` is expected."""
    if raw is None:
        return "give a value or remove the line"
    if hint is str and not isinstance(raw, list | dict):
        return "put it in quotes" + (
            ", as YAML reads a bare yes or off as true or false" if type(raw) is bool else ""
        )
    number = re.fullmatch(r"([-+]?\d+)(\.\d*)?(?:e([-+]?)(\d+))?", str(raw).lower())
    if hint in (bool, dict) or not number or (hint is int and not float(raw).is_integer()):
        return f"give {_NAMES[hint]}" + (" without quotes" if isinstance(raw, str) else "")
    if hint is int:
        return f"write {int(float(raw))}"
    whole, fraction, sign, power = number.groups()
    spelled = f"{whole}{fraction or '.0'}" + (f"e{sign or '+'}{power}" if power else "")
    return f"write {spelled} without quotes (YAML reads a bare 3e-5 as text, 3.0e-5 as a number)"
