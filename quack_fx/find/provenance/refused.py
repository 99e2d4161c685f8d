"""Why an attention is not in the layout."""

from __future__ import annotations

from torch.fx import Node


class Refused(Exception):
    """An attention whose weight rows cannot be determined.

    Attributes:
        code: Short machine-readable reason.
        reason: One sentence that a user understands.
        node: The node at which that showed.
    """

    def __init__(self, code: str, reason: str, node: Node) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.node = node


class NotOneAttention(Exception):
    """The iterations of a Python loop are not heads of one attention (a loop over chunks of the sequence, say)."""
