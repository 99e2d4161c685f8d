"""QK norms go out and in before a model is wrapped.

In: a model. Out: nothing, or one line that says what to do first.
"""

from __future__ import annotations

from torch import nn

from quack_fx.errors import StripError
from quack_fx.graph.capture import first_wrapped


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model that is wrapped or sharded: what holds its parameters would not see that they change.

    Raises:
        StripError: It is.
    """
    if where := first_wrapped(model):
        raise StripError(f"{where}; take QK norms out, or put them in, before the model is wrapped or sharded")
