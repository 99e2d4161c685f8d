"""Softmax over groups of entries, as in graph neural networks that attend over edges.

In: an exponential in a graph. Out: its groups, if it is divided by sums over groups of its entries: the edges that end
in the same node. Queries are gathered from the node where an edge ends, keys from the node where it starts.

    weights = exp(logits)                                        # [edges, heads]
    weights / zeros(nodes, heads).index_add(0, target, weights)[target]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from quack_fx.graph.dataflow import Dataflow
from quack_fx.graph.walk import walk

_SCATTERS = frozenset("scatter_add scatter_reduce index_add index_reduce".split())


@dataclass(frozen=True)
class Groups:
    """Groups of entries along `axis`; `index` holds, for each entry, the index of the sum it is scattered to."""

    axis: int
    index: Node

    def numbers(self, df: Dataflow) -> Tensor | None:
        """Group of each entry, int64 [entries]; None if the values are unknown or vary along other axes."""
        index = df.constant(self.index)
        return None if index is None else _along(index, self.axis)


def scatters(df: Dataflow, node: Node) -> bool:
    """Whether a node sums groups of entries."""
    return df.op[node].name in _SCATTERS


def groups_of(df: Dataflow, exponential: Node) -> Groups | None:
    """Return the groups over which an exponential is normalized; None if that is over an axis, or not at all."""
    if not any(df.op[user].name in ("div", "mul") for user in exponential.users):
        return None
    for user in exponential.users:
        if scatters(df, user) and user.args[3] is exponential:
            axis, index = user.args[1:3]
            if isinstance(axis, int) and isinstance(index, Node):
                return Groups(axis % len(df.shape(exponential)), index)
    return None


def scattered(df: Dataflow, node: Node) -> Node | None:
    """Return the sum over groups that reads a node, directly or through view ops, or None."""
    for user in node.users:
        if scatters(df, user) and len(user.args) > 3 and user.args[3] is node:
            return user
        if df.op[user].kind == "view" and (found := scattered(df, user)) is not None:
            return found
    return None


def is_gathered_by(df: Dataflow, operand: Node, groups: Groups) -> bool:
    """Whether an operand gathers the same entry for all of a group, which makes it the queries."""
    target = groups.numbers(df)
    return target is not None and any(
        index is not None and index.shape == target.shape and torch.equal(index, target)
        for index in (_gathers(df, node) for node in _back_to_products(df, operand))
    )


def _gathers(df: Dataflow, node: Node) -> Tensor | None:
    """Indices that a gather picks; None if the node is no gather or its indices are not constant."""
    name, args = df.op[node].name, node.args
    if name == "index" and isinstance(args[1], list | tuple):
        given = [i for i in args[1] if i is not None]
        numbers = df.constant(given[0]) if len(given) == 1 and isinstance(given[0], Node) else None
        return numbers if numbers is not None and numbers.dim() == 1 else None
    if name not in ("index_select", "gather") or not isinstance(args[2], Node) or not isinstance(args[1], int):
        return None
    numbers = df.constant(args[2])
    return None if numbers is None else _along(numbers, args[1] if numbers.dim() > 1 else 0)


def _back_to_products(df: Dataflow, operand: Node) -> list[Node]:
    """Walk back from an operand to the nearest products."""

    def before(node: Node) -> Iterator[Node]:
        if df.op[df.open(node)].kind not in ("contraction", "convolution", "attention", "lookup", "input"):
            yield from (n for n in df.reads(node) if n in df.activation)

    return list(walk(df.activation & {operand}, before))


def _along(index: Tensor, axis: int) -> Tensor | None:
    """Reduce a broadcast index to one dimension; None if it also varies along other axes."""
    lines = index.movedim(axis, 0).flatten(1) if index.dim() > 1 else index[:, None]
    return lines[:, 0] if bool((lines == lines[:, :1]).all()) else None
