"""Why an attention is not in the layout."""

from __future__ import annotations


class Refused(Exception):
    """An attention whose rows cannot be told: a code and a sentence."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class NotOneAttention(Exception):
    """The turns of a loop are no heads of one attention: some are alike (a loop over pieces of the sequence)."""
