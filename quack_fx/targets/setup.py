"""Calls the methods that a model needs between its constructor and its forward.

In: a model as its constructor left it. Out: the calls that were made, as text. Where the forward asserts that an
attribute of the model is not None and it still is, the method that sets it is called first, such as
`setup_caches(max_batch_size, max_seq_length)`, with arguments made up from their names.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from torch import nn

from quack_fx.targets.sizes.made_up import made_up
from quack_fx.targets.sizes.signatures import hints_of, own_methods, required
from quack_fx.targets.sizes.uses import asserted
from quack_fx.targets.source import tree_of_function


def set_up(model: nn.Module) -> list[str]:
    """Call the methods that the forward of a model depends on; returns the calls as text."""
    done: list[str] = []
    for name in asserted(tree_of_function(model.forward)):
        if getattr(model, name, 0) is None and (method := _setter(model, name)) is not None:
            hints = hints_of(method)
            given = {n: made_up(n, hints.get(n)) for n in required(method)}
            method(**given)
            done.append(f"{method.__name__}({', '.join(f'{n}={v!r}' for n, v in given.items())})")
    return done


def _setter(model: nn.Module, attribute: str) -> Callable[..., Any] | None:
    """The method of a model, other than its constructor and forward, that sets an attribute."""
    for name, function in own_methods(model).items():
        for node in ast.walk(tree_of_function(function)):
            targets = node.targets if isinstance(node, ast.Assign) else []
            if any(isinstance(t, ast.Attribute) and t.attr == attribute for t in targets):
                return getattr(model, name)  # type: ignore[no-any-return]
    return None
