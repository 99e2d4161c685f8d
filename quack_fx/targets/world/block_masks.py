"""xformers' masks for packed sequences: a token attends to its own sequence only.

In: the lengths of the sequences, which are joined to one row. Out: the mask, true where a query sees a key.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class BlockDiagonalMask:
    """Each query sees all keys of its sequence."""

    causal = False

    def __init__(self, queries: Sequence[int], keys: Sequence[int]) -> None:
        self._queries, self._keys = list(map(int, queries)), list(map(int, keys))

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, **kwargs: object
    ) -> BlockDiagonalMask:
        """The mask for sequences of these lengths."""
        return cls(q_seqlen, q_seqlen if kv_seqlen is None else kv_seqlen)

    def make_causal(self) -> BlockDiagonalCausalMask:
        """The mask without later keys; the first query of a sequence is at its first key."""
        return BlockDiagonalCausalMask(self._queries, self._keys)

    def mask(self) -> Tensor:
        """True where a query sees a key."""
        blocks = [torch.ones(q, k, dtype=torch.bool) for q, k in zip(self._queries, self._keys, strict=True)]
        seen: Tensor = torch.block_diag(*(block.tril() if self.causal else block for block in blocks))
        return seen.bool()


class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Each query sees the keys of its sequence up to its own index."""

    causal = True
