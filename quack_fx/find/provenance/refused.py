"""Why an attention is not in the layout."""

from __future__ import annotations

from torch.fx import Node


class Refused(Exception):
    """An attention whose rows cannot be told.

    Attributes:
        code: Short machine-readable reason.
        reason: One sentence that a user understands.
        node: The node at which it showed.
    """

    def __init__(self, code: str, reason: str, node: Node) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.node = node


class NotOneAttention(Exception):
    """The turns of a loop are no heads of one attention: some are alike (a loop over pieces of the sequence)."""
