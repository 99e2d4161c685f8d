"""A walk through any graph.

In: where it begins, and what follows each node. Out: all nodes that it reaches, each once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T", bound=Hashable)


def walk(start: Iterable[_T], following: Callable[[_T], Iterable[_T]]) -> Iterator[_T]:
    """Every node that is reached, once; what follows a node is asked for after it has been yielded.

    Example:
        >>> list(walk([12], lambda n: [n // 2] if n > 1 else []))
        [12, 6, 3, 1]
    """
    todo, seen = list(start), set[_T]()
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            yield node
            todo.extend(following(node))
