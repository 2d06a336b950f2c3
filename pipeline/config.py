"""YAML and dotted overrides to frozen dataclasses, strictly: a typing error must not silently
become a default.

    raw = apply_overrides(read_yaml("configs/base64.yaml"), ["train.steps=100"])
    config = build(StageConfig, raw)

Configs are frozen keyword-only dataclasses, each next to the code that it configures. Their type
hints are the schema: bool, int, float, str, `X | None`, `tuple[X, ...]`, `tuple[X, Y]`,
`Literal[...]`, `dict[str, X]`, nested dataclasses, and unions of scalars, a tuple and a dict, among
which the form of the value decides. `__post_init__` checks the rest and raises
`ConfigError("size: 48 is not a multiple of 32; ...")`; `build` puts the dotted path of the section
before that.

Every error is one line: dotted path, the value, the fix. Errors name the traps of YAML 1.1: `3e-5`
is text (a number needs the point, 3.0e-5), `off` is false, and a repeated key silently replaces the
first one.
"""

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import yaml

from pipeline.errors import UserError

T = TypeVar("T")

ABSENT = "(absent)"  # stands in a `Difference` for the value of a key that one side lacks
MAX_SHOWN = 80  # characters of a value that an error message shows

_NUMBER = re.compile(r"([-+]?\d+)(\.\d*)?(?:e([-+]?)(\d+))?")
_TYPE_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a section",
}


class ConfigError(UserError):
    """An invalid config: `path.to.field: what is wrong with which value; the fix`."""


# Reading YAML.


class _Loader(yaml.SafeLoader):
    """A safe YAML loader that rejects repeated keys and says where an invalid scalar is."""

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
        except ValueError as error:
            # A scalar that has the form of a date or number and is none, such as 2024-13-01.
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from None


def _parse(text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"control character {error.character:#x}"
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = str(error.problem)

    raise ConfigError(f"{line}: {problem}; check keys, indentation, brackets and quotes there")


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The mapping in the file. Only repeated keys are checked here; `build` checks the rest."""
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
            f"{path}:1: expected `name: value` lines, got {_show(raw)}; start from one of configs/"
        )
    return raw


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `raw` with each `section.key=value` applied.

    Values are YAML. Sections that are missing are created.
    """
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise ConfigError(
                f"{override}: is not an override; write section.key=value, like data.global_batch=8"
            )

        try:
            raw = _with_value(raw, keys, _parse(text))
        except ConfigError as error:
            raise ConfigError(f"{override}: {error}") from None

    return raw


def _with_value(raw: Any, keys: Sequence[str], value: Any, path: str = "") -> dict[str, Any]:
    """A copy of the section `raw`, at `path`, with the value at `keys` below it replaced.

    The sections along the way are copied, as sections that share an anchor in the YAML are one
    object and must not change together.
    """
    if raw is not None and not isinstance(raw, dict):
        raise ConfigError(
            f"{path} is {_show(raw)}, not a section; set {path} itself or correct the path"
        )

    section = raw or {}
    key, *rest = keys
    if rest:
        value = _with_value(section.get(key), rest, value, _join(path, key))

    return {**section, key: value}


# Building dataclasses.


def build(cls: type[T], raw: Any, path: str = "") -> T:
    """The dataclass `cls` from plain values; `path` is its dotted path, for error messages."""
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path or cls.__name__}: expected a section, got {_show(raw)}; "
            "write `name: value` lines"
        )

    _check_names(cls, raw, path)

    hints = get_type_hints(cls)
    values = {name: _convert(hints[name], value, _join(path, name)) for name, value in raw.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(_join(path, error)) from None


def _check_names(cls: type, raw: dict[Any, Any], path: str) -> None:
    """Raises for keys that are no fields of `cls`, and for missing fields that have no default."""
    fields_by_name = {field.name: field for field in fields(cls) if field.init}

    for key in raw:
        if key not in fields_by_name:
            fix = _suggest(key, fields_by_name) or f"its fields are {', '.join(fields_by_name)}"
            raise ConfigError(f"{_join(path, key)}: no such field in {cls.__name__}; {fix}")

    for name, field in fields_by_name.items():
        if name not in raw and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(
                f"{_join(path, name)}: missing, and {cls.__name__} has no default for it; "
                "give a value"
            )


def _convert(hint: Any, raw: Any, path: str) -> Any:
    """The plain value `raw` as the type of `hint`; ConfigError if it is of another type."""
    origin = get_origin(hint)
    args = get_args(hint)

    if origin in (Union, UnionType):
        return _convert_union(args, raw, path)
    if origin is tuple:
        return _convert_tuple(args, raw, path)
    if origin is Literal:
        return _convert_literal(args, raw, path)
    if is_dataclass(hint):
        return build(cast(type, hint), raw, path)

    # `dict[str, Any]` is free content, such as another file's configuration.
    if origin is dict and isinstance(raw, dict) and args[1] is not Any:
        return _convert_dict(args[1], raw, path)

    return _convert_scalar(dict if origin is dict else hint, raw, path)


def _convert_union(args: tuple[Any, ...], raw: Any, path: str) -> Any:
    if raw is None and NoneType in args:
        return None

    # A list is converted as the union's tuple, a section as its dict and text as text, if it has
    # one. All else is converted as its first type.
    choices = [arg for arg in args if arg is not NoneType]
    kind = {list: tuple, dict: dict, str: str}.get(type(raw))  # type: ignore[call-overload]
    matching = [arg for arg in choices if kind and (get_origin(arg) or arg) is kind]

    # 1e-2 is text to YAML 1.1: its error says how the number that it is meant to be is written.
    if float in choices and isinstance(raw, str) and _NUMBER.fullmatch(raw.lower()):
        matching = [float]

    return _convert((matching or choices)[0], raw, path)


def _convert_tuple(args: tuple[Any, ...], raw: Any, path: str) -> tuple[Any, ...]:
    if not isinstance(raw, list | tuple):
        fix = f"write [{raw}]" if isinstance(raw, str | int | float) else "write it as [a, b]"
        raise ConfigError(f"{path}: expected a list, got {_show(raw)}; {fix}")

    hints = args[:1] * len(raw) if args[-1] is Ellipsis else args
    if len(raw) != len(hints):
        raise ConfigError(
            f"{path}: expected {len(hints)} values, got {_show(raw)}; give {len(hints)}"
        )

    return tuple(_convert(hints[i], item, f"{path}[{i}]") for i, item in enumerate(raw))


def _convert_dict(hint: Any, raw: dict[Any, Any], path: str) -> dict[str, Any]:
    for key in raw:
        if not isinstance(key, str):
            raise ConfigError(f"{_join(path, key)}: the name is {_show(key)}; {_fix(str, key)}")

    return {key: _convert(hint, value, _join(path, key)) for key, value in raw.items()}


def _convert_literal(choices: tuple[Any, ...], raw: Any, path: str) -> Any:
    # By type too, as True == 1.
    if any(type(raw) is type(choice) and raw == choice for choice in choices):
        return raw

    if isinstance(raw, bool):
        fix = _fix(type(choices[0]), raw)
    else:
        fix = _suggest(raw, choices) or "choose one of them"
    raise ConfigError(f"{path}: {_show(raw)} is not one of {', '.join(map(repr, choices))}; {fix}")


def _convert_scalar(hint: Any, raw: Any, path: str) -> Any:
    # Exact types, as bool is a subclass of int.
    if hint is float and type(raw) is int:
        raw = float(raw)

    if type(raw) is not hint:
        raise ConfigError(
            f"{path}: expected {_TYPE_NAMES[hint]}, got {_show(raw)}; {_fix(hint, raw)}"
        )
    if hint is float and not math.isfinite(raw):
        raise ConfigError(f"{path}: {raw} is not a finite number; give a finite one")

    return raw


# Back to plain values.


def to_dict(config: Any) -> Any:
    """Plain values, tuples as lists: `build(type(config), to_dict(config)) == config`."""
    if is_dataclass(config):
        names = [field.name for field in fields(config) if field.init]
        return {name: to_dict(getattr(config, name)) for name in names}

    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}

    return [to_dict(item) for item in config] if isinstance(config, tuple) else config


def dump(config: object) -> str:
    """YAML from which `read_yaml` and `build` make an equal config, floats in full precision."""
    # ASCII only, PyYAML's default: with allow_unicode it would lose U+0085.
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=120)


class Difference(NamedTuple):
    """A key whose values differ."""

    path: str  # dotted
    before: Any  # plain value, or ABSENT
    now: Any  # plain value, or ABSENT


def differences(before: dict[str, Any], now: dict[str, Any], path: str = "") -> list[Difference]:
    """The keys in which two trees of `to_dict` differ; `path` is their own dotted path."""
    result: list[Difference] = []

    # Both sides' keys in a fixed order, which a set would not have.
    for key in {**before, **now}:
        key_path = _join(path, key)
        old = before.get(key, ABSENT)
        new = now.get(key, ABSENT)

        if isinstance(old, dict) and isinstance(new, dict):
            result += differences(old, new, key_path)
        elif old != new:
            result.append(Difference(key_path, old, new))

    return result


# Parts of error messages.


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def _show(value: Any) -> str:
    """The value as a user wrote it in YAML, with its kind, cut to `MAX_SHOWN` characters."""
    if value is None:
        return "nothing"

    kind = {str: "text ", list: "the list ", dict: "the section "}.get(type(value), "")  # type: ignore[call-overload]
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return kind + (text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "...")


def _suggest(word: Any, choices: Iterable[Any]) -> str:
    """Names the choice that `word` is probably a typing error of; empty if none is close."""
    close = difflib.get_close_matches(str(word), map(str, choices), n=1)
    return f"did you mean '{close[0]}'?" if close else ""


def _fix(hint: type, raw: Any) -> str:
    """What to write instead of `raw` where `hint` is expected."""
    if raw is None:
        return "give a value or remove the line"

    if hint is str and not isinstance(raw, list | dict):
        reason = ", as YAML reads a bare yes or off as true or false" if type(raw) is bool else ""
        return "put it in quotes" + reason

    number = _NUMBER.fullmatch(str(raw).lower())
    # What is no number, or no whole one, has no other spelling to offer.
    if hint in (bool, dict) or not number or (hint is int and not float(raw).is_integer()):
        return f"give {_TYPE_NAMES[hint]}" + (" without quotes" if isinstance(raw, str) else "")

    if hint is int:
        return f"write {int(float(raw))}"

    # A number that YAML 1.1 reads as text: spell it with a point and a signed exponent.
    whole, fraction, sign, power = number.groups()
    spelled = f"{whole}{fraction or '.0'}" + (f"e{sign or '+'}{power}" if power else "")
    return f"write {spelled} without quotes (YAML reads a bare 3e-5 as text, 3.0e-5 as a number)"
