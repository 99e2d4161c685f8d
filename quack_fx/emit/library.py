"""USER: definitions of this library as text, for emitted files to carry.

In: a module's path and a name in it. Out: its source, with the docstrings of functions cut to their first paragraph.

What an emitted file computes is so the very code that the library runs: the arithmetic of the optimizers, and the way
in which weights are cut into heads. Sources are read, not imported, so this needs no torch.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files


def definition(module: str, name: str) -> str:
    """Source of a class, function or constant.

    Arguments:
        module: Its file, as a path within the package: "step/pieces.py".
        name: Its name; "Class.method" for a method, indented as it stands.

    Example:
        >>> print(definition("step/pieces.py", "_SPAN").splitlines()[0])
        _SPAN = 4096
    """
    owner, _, method = name.partition(".")
    if method:
        return "\n".join(_lines(module, *(part for part in _class(module, owner).body if _is(part, method))))
    return "\n".join(_lines(module, *_find(module, name)))


def flattened(name: str, chain: Sequence[tuple[str, str]], members: Sequence[str]) -> str:
    """Source of a class with all that it inherits in one body.

    Arguments:
        name: What to call it.
        chain: The class and its ancestors, as module and name, in the order in which they are asked for a member.
        members: Methods to carry, in order; properties of the class itself go along.
    """
    bodies = [(module, _class(module, cls).body) for module, cls in chain]
    module, own = bodies[0]
    lines = [f"class {name}:"]
    for part in (part for part in own if not isinstance(part, ast.FunctionDef)):
        lines += _lines(module, part)
        lines += [""] * (part is own[0])
    for member in members:
        module, found = next((module, part) for module, body in bodies for part in body if _is(part, member))
        lines += ["", *_lines(module, found)]
    return "\n".join(lines)


@cache
def _source(module: str) -> tuple[list[str], ast.Module]:
    text = files("quack_fx").joinpath(module).read_text("utf-8")
    return text.splitlines(), ast.parse(text)


def _find(module: str, name: str) -> Iterator[ast.stmt]:
    """The statement that defines a name, and the string below a constant that says what it is."""
    body = _source(module)[1].body
    for i, statement in enumerate(body):
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef)) and statement.name == name:
            return iter([statement])
        if isinstance(statement, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == name for t in statement.targets
        ):
            return iter(part for part in body[i : i + 2] if part is statement or isinstance(part, ast.Expr))
    raise LookupError(f"{module} has no {name}")


def _is(part: ast.stmt, method: str) -> bool:
    return isinstance(part, ast.FunctionDef) and part.name == method


def _class(module: str, name: str) -> ast.ClassDef:
    (found,) = _find(module, name)
    assert isinstance(found, ast.ClassDef)
    return found


def _lines(module: str, *statements: ast.stmt) -> list[str]:
    """The lines of statements, with the docstrings of functions cut short."""
    source, _ = _source(module)
    lines: list[str] = []
    for statement in statements:
        first = min([statement.lineno, *(d.lineno for d in getattr(statement, "decorator_list", []))])
        text = dict(enumerate(source[first - 1 : statement.end_lineno], first))
        for node in ast.walk(statement):
            if isinstance(node, ast.FunctionDef):
                _cut_docstring(node.body[0], text)
        lines += text.values()
    return lines


def _cut_docstring(docstring: ast.stmt, text: dict[int, str]) -> None:
    """Leave the first paragraph of a docstring, in lines by number."""
    numbers = range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1)
    blank = next((n for n in numbers if not text[n].strip()), None)
    if blank is None:
        return
    one_line = blank == docstring.lineno + 1
    if one_line:
        text[docstring.lineno] += '"""'
    for n in range(blank, numbers[-1] + one_line):
        del text[n]
