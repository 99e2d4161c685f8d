"""Reference text out of the code, so that it cannot fall behind.

In: the typer app of the command line, and the sources of `quack_fx`. Out: Markdown for the pages that ask for it: every
command with its options, and every code of a refusal with the sentences that come with it.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

import typer

from quack_fx.cli.app import app
from quack_fx.layout.sites import SIDES

ROOT = Path(__file__).resolve().parents[2]


def commands() -> str:
    """Every command of the program: how it is called, what it does, its options with their defaults."""
    program: Any = typer.main.get_command(app)  # its class has another home in each version of typer
    registered = zip(program.commands.values(), app.registered_commands, strict=True)
    return "\n\n".join(_command(command, info.callback) for command, info in registered)


def _command(command: Any, callback: Callable[..., Any] | None) -> str:
    hints = get_type_hints(callback)
    rows = [_row(parameter, hints[parameter.name]) for parameter in command.params]
    table = "\n".join(["| option | what it does | default |", "|---|---|---|", *rows])
    words = [parameter.metavar for parameter in command.params if parameter.param_type_name == "argument"]
    usage = f"    quack-fx {' '.join([command.name, *words])} [OPTIONS]"
    return "\n\n".join([f"## quack-fx {command.name}", inspect.cleandoc(command.help), usage, table])


def _row(parameter: Any, kind: Any) -> str:
    """A row of the table of options; one that is on or off takes no value, and has no default worth a word."""
    if parameter.param_type_name == "argument":
        return f"| `{parameter.metavar}` | {_cell(parameter.help)} | required |"
    value = "" if kind is bool else f" {parameter.metavar or _choices(kind)}"
    names = ", ".join(f"`{name}{value}`" for name in parameter.opts)  # code may hold a bar
    default = parameter.default.value if isinstance(parameter.default, Enum) else parameter.default
    return f"| {names} | {_cell(parameter.help)} | {'' if default is None or kind is bool else f'`{default}`'} |"


def _choices(kind: Any) -> str:
    """The words that an option takes, or that it takes a number."""
    return "|".join(member.value for member in kind) if issubclass(kind, Enum) else "NUMBER"


def _cell(text: str | None) -> str:
    """Text that a table's cell can hold."""
    return (text or "").replace("|", "\\|")


def codes() -> str:
    """Every code of a refusal, with the sentences that the report prints for it."""
    rows = [f"| `{code}` | {'<br>'.join(map(_cell, said))} |" for code, said in sentences().items()]
    return "\n".join(["| code | what the report says |", "|---|---|", *rows])


def sentences() -> dict[str, list[str]]:
    """For each code of a refusal the sentences that come with it, read off the sources.

    Codes are the first argument of `Refused(code, reason)` and the second of `NearMiss(node, code, reason)` and
    `Skipped(name, code, reason)`.

    Raises:
        ValueError: A code or a sentence stands there in a form that is not read here.
    """
    found: dict[str, list[str]] = {}
    for file in sorted((ROOT / "quack_fx").rglob("*.py")):
        for code, said in _in_file(file):
            known = found.setdefault(code, [])
            known += [said] if said not in known else []
    return dict(sorted(found.items()))


def _in_file(file: Path) -> Iterator[tuple[str, str]]:
    tree = ast.parse(file.read_text("utf-8"))
    texts = sorted(
        (node.lineno, node.targets[0].id, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    )
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            continue
        if call.func.id not in ("Refused", "NearMiss", "Skipped"):
            continue
        code, said = call.args[:2] if call.func.id == "Refused" else call.args[-2:]
        if isinstance(code, ast.Attribute):  # a refusal that was caught, told as it is
            continue
        if isinstance(said, ast.Name):  # the sentence has a name: the last text that was given it above
            said = [value for line, name, value in texts if name == said.id and line < call.lineno][-1]
        # What depends on the side has the side's name in it.
        for side in SIDES if isinstance(code, ast.JoinedStr) else SIDES[:1]:
            yield _text(code, side, file), _text(said, side, file)


def _text(node: ast.expr, side: str, file: Path) -> str:
    """The text of a string or an f-string; what is filled in later is an ellipsis, the name of a side is given."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [
            part.value if isinstance(part, ast.Constant) else side if _unparsed(part) == "name" else "…"
            for part in node.values
        ]
        return "".join(map(str, parts))
    raise ValueError(f"{file}:{node.lineno}: {ast.unparse(node)} is no text; write the code or sentence as a string")


def _unparsed(part: ast.expr) -> str:
    """The expression in the braces of an f-string."""
    return ast.unparse(part.value) if isinstance(part, ast.FormattedValue) else ""
