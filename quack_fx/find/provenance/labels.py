"""Labels: for every element of a tensor, the set of projection features that it depends on.

A label is an int64: 0 for none (a constant, padding), `UNKNOWN` for data whose rows are unknown, a small number for one
feature, a large number for a set of features. A label tensor has the shape of the tensor it describes, but is
*expanded* (stride 0) along axes on which the labels are constant, such as batch and tokens, so it needs memory only for
its features. `reshape` keeps tensors expanded where torch would copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

NOTHING = 0
UNKNOWN = 1
_FIRST_FEATURE = 2
_FIRST_SET = 1 << 40


class Labels:
    """Registry of the feature labels of one graph, and of labels for sets of them."""

    def __init__(self) -> None:
        self._next = _FIRST_FEATURE
        self._sets: list[frozenset[int]] = []
        self._ids: dict[frozenset[int], int] = {}

    def new_features(self, count: int) -> int:
        """Reserve `count` consecutive labels and return the first."""
        first = self._next
        self._next += count
        return first

    def members(self, label: int) -> frozenset[int]:
        """Features, possibly with UNKNOWN, that a label stands for."""
        if label >= _FIRST_SET:
            return self._sets[label - _FIRST_SET]
        return frozenset((label,)) if label != NOTHING else frozenset()

    def of(self, members: Iterable[int]) -> int:
        """Label of a set of features."""
        content = frozenset(members) - {NOTHING}
        if len(content) < 2:
            return next(iter(content), NOTHING)
        if content not in self._ids:
            self._ids[content] = _FIRST_SET + len(self._sets)
            self._sets.append(content)
        return self._ids[content]

    def union(self, tensors: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """Elementwise union of label tensors that broadcast to `shape`."""
        result = tensors[0].expand(shape)
        for other in tensors[1:]:
            result = self._union2(result, other.expand(shape))
        return result

    def _union2(self, a: Tensor, b: Tensor) -> Tensor:
        shape = a.shape
        a, b = torch.broadcast_tensors(compact(a), compact(b))
        if torch.equal(a, b) or not b.any():
            return a.expand(shape)
        if not a.any():
            return b.expand(shape)
        pairs, where = torch.unique(torch.stack((a.flatten(), b.flatten())), dim=1, return_inverse=True)
        merged = [
            x if x == y else self.of(self.members(x) | self.members(y)) for x, y in zip(*pairs.tolist(), strict=True)
        ]
        return torch.tensor(merged, dtype=torch.int64)[where].view(a.shape).expand(shape)

    def union_along(self, label: Tensor, dims: Sequence[int]) -> Tensor:
        """Union over whole axes, which are kept with size 1."""
        dims = sorted(d % label.dim() for d in dims)
        rest = [d for d in range(label.dim()) if d not in dims]
        small = compact(label)
        flat = small.permute(*rest, *dims).reshape(*(small.shape[d] for d in rest), -1)
        rows, where = torch.unique(flat.reshape(-1, flat.shape[-1]), dim=0, return_inverse=True)
        merged = [self.of(f for x in set(row) for f in self.members(x)) for row in rows.tolist()]
        result = torch.tensor(merged, dtype=torch.int64)[where].view(flat.shape[:-1])
        for d in dims:
            result = result.unsqueeze(d)
        return result.expand([1 if d in dims else n for d, n in enumerate(label.shape)])

    def features(self, label: Tensor) -> set[int]:
        """All features, possibly with UNKNOWN, in a label tensor."""
        found: set[int] = set()
        for x in torch.unique(compact(label)).tolist():
            found |= self.members(x)
        return found


def compact(label: Tensor) -> Tensor:
    """Narrow every expanded axis to size 1."""
    for d, (n, stride) in enumerate(zip(label.shape, label.stride(), strict=True)):
        if stride == 0 and n > 1:
            label = label.narrow(d, 0, 1)
    return label


def constant_along(label: Tensor, dim: int) -> bool:
    """Whether labels are constant along an axis."""
    if label.numel() == 0 or label.shape[dim] == 1 or label.stride(dim) == 0:
        return True
    label = compact(label)
    return bool((label == label.narrow(dim, 0, 1)).all())


def shrink(label: Tensor) -> Tensor:
    """Return the same labels, expanded along every axis on which they are constant."""
    shape = label.shape
    for d in range(label.dim()):
        if label.shape[d] > 1 and label.stride(d) != 0 and constant_along(label, d):
            label = label.narrow(d, 0, 1)
    return label.expand(shape)


def reshape(label: Tensor, shape: Sequence[int]) -> Tensor:
    """Reshape without materializing expanded axes.

    Old and new shape are split into the smallest groups of axes with equal products. Groups whose axes are all expanded
    stay expanded; only the others are reshaped.
    """
    new = list(shape)
    if label.numel() == 0 or 0 in new:
        return label.reshape(new)
    groups = _matching_groups(list(label.shape), new)
    small = label
    target: list[int] = []
    for old_axes, new_axes in groups:
        if all(label.stride(d) == 0 or label.shape[d] == 1 for d in old_axes):
            for d in old_axes:
                small = small.narrow(d, 0, 1)
            target += [1] * len(new_axes)
        else:
            target += [new[d] for d in new_axes]
    return small.reshape(target).expand(new)


def _matching_groups(old: list[int], new: list[int]) -> list[tuple[list[int], list[int]]]:
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        olds, news, a, b = [], [], 1, 1
        if i < len(old):
            olds, a, i = [i], old[i], i + 1
        if j < len(new):
            news, b, j = [j], new[j], j + 1
        while a != b:
            if a < b:
                olds, a, i = [*olds, i], a * old[i], i + 1
            else:
                news, b, j = [*news, j], b * new[j], j + 1
        groups.append((olds, news))
    return groups
