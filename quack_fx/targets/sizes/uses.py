"""How source uses parameters and config fields: as a flag, as a string to compare with, as a list.

In: syntax trees of the user's files. Out: `Uses`, by name; equal names in different places count as one.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator

from quack_fx.targets.source import assignments_in, read_name


class Uses:
    """What the code of some files does with names.

    Attributes:
        words: The strings that a name is compared with, or the keys of a dict that it indexes, in order.
        flags: Names that are conditions.
        lists: Names that are iterated over, or whose length is taken.
        needed: Names that are asserted not to be None.
        attributes, keys: The attributes of a name that are read, and the strings that it is indexed with.
        unpacked: The functions that are called with `**name`.
    """

    def __init__(self, trees: Iterable[ast.Module]) -> None:
        self.words: dict[str, dict[str, None]] = defaultdict(dict)
        self.flags: set[str] = set()
        self.lists: set[str] = set()
        self.needed: set[str] = set()
        self.attributes: dict[str, set[str]] = defaultdict(set)
        self.keys: dict[str, set[str]] = defaultdict(set)
        self.unpacked: dict[str, list[str]] = defaultdict(list)
        for tree in trees:
            tables = {read_name(name): value for name, value in assignments_in(tree) if isinstance(value, ast.Dict)}
            for node in ast.walk(tree):
                self._look_at(node, tables)

    def _look_at(self, node: ast.AST, tables: dict[str, ast.Dict]) -> None:
        if isinstance(node, ast.Attribute | ast.Subscript) and (field := read_name(node)):
            read = self.attributes if isinstance(node, ast.Attribute) else self.keys
            read[read_name(node.value)].add(field)
        if isinstance(node, ast.Call):
            for given in (keyword.value for keyword in node.keywords if keyword.arg is None):
                self.unpacked[read_name(given)].append(read_name(node.func))
        if isinstance(node, ast.Compare):
            self._compare(node)
        elif isinstance(node, ast.Subscript):
            table = tables.get(node.value.id) if isinstance(node.value, ast.Name) else node.value
            name = read_name(node.slice)
            if name and isinstance(table, ast.Dict):
                self._add(name, table.keys)
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            self.flags.update(filter(None, map(read_name, _tested(node.test))))
        elif isinstance(node, ast.For | ast.comprehension):
            self.lists.update(filter(None, [read_name(node.iter)]))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("len", "sum", "zip"):
            self.lists.update(filter(None, map(read_name, node.args)))
        elif isinstance(node, ast.Assert):
            self.needed |= set(asserted(node))

    def _compare(self, node: ast.Compare) -> None:
        for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            if isinstance(operator, ast.Eq | ast.NotEq):
                for one, other in ((left, right), (right, left)):
                    if name := read_name(one):
                        self._add(name, [other])
            elif isinstance(operator, ast.In | ast.NotIn) and (name := read_name(left)):
                self._add(name, right.elts if isinstance(right, ast.List | ast.Tuple | ast.Set) else [])
            if isinstance(operator, ast.In | ast.NotIn) and not isinstance(left, ast.Constant):
                self.lists.update(filter(None, [read_name(right)]))

    def _add(self, name: str, values: Iterable[ast.AST | None]) -> None:
        for value in values:
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                self.words[name].setdefault(value.value)


def asserted(tree: ast.AST) -> list[str]:
    """Names that the code asserts not to be None, in order."""
    found = []
    for test in (node.test for node in ast.walk(tree) if isinstance(node, ast.Assert)):
        for part in _tested(test):
            match part:
                case ast.Compare(left=left, ops=[ast.IsNot()], comparators=[ast.Constant(value=None)]):
                    found.append(read_name(left))
    return [name for name in found if name]


def _tested(test: ast.expr) -> Iterator[ast.expr]:
    if isinstance(test, ast.BoolOp):
        for value in test.values:
            yield from _tested(value)
    elif isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        yield from _tested(test.operand)
    else:
        yield test
