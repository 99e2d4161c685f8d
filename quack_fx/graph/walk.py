"""Graph traversal.

In: start nodes, and a function from a node to its successors. Out: every node that is reached, once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

_T = TypeVar("_T", bound=Hashable)


def walk(start: Iterable[_T], following: Callable[[_T], Iterable[_T]]) -> Iterator[_T]:
    """Yield every reachable node once, depth first. A node's successors are computed after it has been yielded.

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
