"""Build hooks of the documentation site: reference tables from the source, and no foreign requests.

A page asks for a table by a comment on a line of its own:

    <!-- config: DataConfig data. -->     keys of a configuration dataclass, `data.` before each
    <!-- config: BaseConfig own -->       without the keys of the classes that it extends
    <!-- commands -->                     every command of `cascade`, with its arguments

Configuration is read statically (type, default, and the comment beside the field), so that
MindSpore is not imported. Commands are read from the argument parser, which does not import it.
"""

import argparse
import ast
import io
import re
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("pipeline", "stages", "launch")  # where configuration dataclasses live

# Tags and attributes by which a browser fetches something when a page is opened.
FETCHES = {
    "script": "src",
    "link": "href",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "object": "data",
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    markdown = re.sub(
        r"^<!-- config: (\w+) ?(\S*) -->$",
        lambda match: config_table(match[1], match[2]),
        markdown,
        flags=re.MULTILINE,
    )
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", commands())
    return markdown


def on_post_build(config: Any, **_: Any) -> None:
    """Fails the build if a page would fetch anything from another host."""
    foreign = []
    for path in sorted(Path(config.site_dir).rglob("*.html")):
        finder = _Fetches()
        finder.feed(path.read_text(encoding="utf-8"))
        foreign += [f"{path.name}: {url}" for url in finder.urls if is_foreign(url)]
    for path in sorted(Path(config.site_dir).rglob("*.css")):
        urls = re.findall(r"(?:url\(|@import\s+)[\"']?([^\"')\s]+)", path.read_text("utf-8"))
        foreign += [f"{path.name}: {url}" for url in urls if is_foreign(url)]

    if foreign:
        raise PluginError(f"pages fetch from other hosts: {', '.join(foreign)}")


def is_foreign(url: str) -> bool:
    return bool(re.match(r"(https?:)?//", url))


class _Fetches(HTMLParser):
    """Collects what a page fetches."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        url = dict(attrs).get(FETCHES.get(tag, ""))
        if url:
            self.urls.append(url)


# Configuration.


class Source:
    """The classes and simple constants of all rooms, by name."""

    def __init__(self) -> None:
        self.classes: dict[str, tuple[ast.ClassDef, list[str]]] = {}
        self.constants: dict[str, str] = {}
        for room in ROOMS:
            for path in sorted((ROOT / room).rglob("*.py")):
                self.add(path.read_text(encoding="utf-8"))

    def add(self, text: str) -> None:
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef):
                self.classes[node.name] = node, text.splitlines()
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                value = ast.unparse(node.value)
                if isinstance(node.value, ast.Constant | ast.Tuple) or value.startswith("Literal["):
                    self.constants[node.targets[0].id] = value

    def fields(self, name: str, own: bool) -> Iterator[tuple[str, str, str, str]]:
        """(key, type, default, meaning) of each field, a base class's first."""
        if name not in self.classes:
            raise PluginError(f"<!-- config: {name} -->: no such class in {', '.join(ROOMS)}")
        node, lines = self.classes[name]
        for base in [] if own else node.bases:
            if isinstance(base, ast.Name) and base.id in self.classes:
                yield from self.fields(base.id, own)

        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                yield (
                    statement.target.id,
                    self.resolved(ast.unparse(statement.annotation)),
                    self.default(statement.value),
                    comment(lines, statement),
                )

    def default(self, value: ast.expr | None) -> str:
        if isinstance(value, ast.Call):
            factory = {each.arg: each.value for each in value.keywords}.get("default_factory")
            if ast.unparse(value.func) == "field":
                if isinstance(factory, ast.Lambda):
                    return ast.unparse(factory.body)
                return "{}" if factory else ""  # no factory: the field must be given
            return ""  # a section, whose defaults are its own
        return "" if value is None else self.resolved(ast.unparse(value))

    def resolved(self, text: str) -> str:
        """`text` with the constants and aliases that it names written out."""
        return re.sub(r"\b\w+\b", lambda match: self.constants.get(match[0], match[0]), text)


def comment(lines: list[str], node: ast.AnnAssign) -> str:
    """The comments on a field's own lines, or else those right above it."""
    assert node.end_lineno
    found = comments(lines[node.lineno - 1 : node.end_lineno])
    above = node.lineno - 2
    while not found and above >= 0 and lines[above].lstrip().startswith("#"):
        start = above
        while lines[start - 1].lstrip().startswith("#"):
            start -= 1
        found = comments(lines[start : above + 1])
    return " ".join(found)


def comments(lines: list[str]) -> list[str]:
    """The words of the comments in some lines, formatters' directives aside."""
    text = "\n".join(line.strip() for line in lines) + "\n"
    found = [
        token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    ]
    return [each for each in found if not each.startswith(("fmt:", "type:", "noqa"))]


def config_table(name: str, option: str) -> str:
    source = Source()
    own = option == "own"
    prefix = "" if own else option

    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key, kind, default, meaning in source.fields(name, own):
        kind = cell(type_name(ast.parse(kind, mode="eval").body))
        rows.append(f"| `{prefix}{key}` | {kind} | {code(in_yaml(default))} | {cell(meaning)} |")
    return "\n".join(rows)


def type_name(node: ast.expr) -> str:
    """A type hint as one writes it in YAML."""
    match node:
        case ast.Constant(value=None):
            return "null"
        case ast.Name(id=name):
            return "section" if name.endswith(("Config", "Entry")) else name
        case ast.BinOp(left=left, right=right):
            return f"{type_name(left)} or {type_name(right)}"
        case ast.Subscript(value=ast.Name(id="Literal"), slice=values):
            return ", ".join(f"`{value}`" for value in literals(values))
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=[item, last])):
            several = isinstance(last, ast.Constant) and last.value is ...
            return f"list of {type_name(item)}" if several else f"list of 2 {type_name(item)}"
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=items)):
            return f"list of {len(items)} {type_name(items[0])}"
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[_, item])):
            return f"map of name to {type_name(item)}"
    return ast.unparse(node)


def literals(node: ast.expr) -> list[Any]:
    value = ast.literal_eval(node)
    return list(value) if isinstance(value, tuple) else [value]


def in_yaml(text: str) -> str:
    """A Python default as one writes it in YAML."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False).split("\n")[
        0
    ]


# Commands.


def commands() -> str:
    """A section for each command: its summary, its usage, its arguments."""
    sys.path.insert(0, str(ROOT))
    from launch.cli.main import build_parser

    (subparsers,) = (
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    summaries = {action.dest: action.help or "" for action in subparsers._choices_actions}

    parts = []
    for name, command in subparsers.choices.items():
        usage = command.format_usage().removeprefix("usage: ").replace(" [-h]", "")
        usage = textwrap.fill(" ".join(usage.split()), 96, subsequent_indent=" " * 4)
        summary = summaries.get(name, "")
        parts += [f"## {name}", "", f"{summary[:1].upper()}{summary[1:]}.", ""]
        parts += ["```", usage, "```", ""]
        parts += ["| argument | meaning |", "|---|---|"]
        parts += [
            f"| {code(invocation(action))} | {cell(meaning(action))} |"
            for action in command._actions
            if action.help is not argparse.SUPPRESS and action.dest != "help"
        ]
        parts.append("")
    return "\n".join(parts)


def invocation(action: argparse.Action) -> str:
    """How an argument is written: `--steps S ...`."""
    several = " ..." if action.nargs in ("*", "+") else ""
    metavar = action.metavar or action.dest.upper()
    if not action.option_strings:
        return f"{metavar}{several}"
    if action.nargs == 0:
        return ", ".join(action.option_strings)
    if isinstance(action.nargs, int):
        several = f" {metavar}" * (action.nargs - 1)
    return f"{', '.join(action.option_strings)} {metavar}{several}"


def meaning(action: argparse.Action) -> str:
    text = action.help or ""
    if "%(" in text:
        text %= vars(action)
    return text + (" (required)" if action.required and action.option_strings else "")


# Markdown.


def code(text: str) -> str:
    return f"`{cell(text)}`" if text else ""


def cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")
