"""Checks the claims of a site against the evidence.

In: the evidence about a site on one of its softmaxes. Out: the number of checks that held; `VerifyError` for the first
that did not; `CannotTell` if gradients cannot decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from quack_fx.layout import SIDES, Side, merged
from quack_fx.prove.evidence import CannotTell, Evidence, Part, Rows, indices
from quack_fx.prove.heads import head_labels
from quack_fx.prove.norms import check_norms
from quack_fx.prove.tape import Value
from quack_fx.prove.terms import check_terms


def check_site(evidence: Evidence) -> int:
    """Check a site against the evidence.

    Returns:
        Number of comparisons.

    Raises:
        VerifyError: The claim is wrong.
        CannotTell: The claim can be neither proved nor refuted.
    """
    return _check_rows(evidence) + _check_head_dim(evidence) + check_norms(evidence) + check_terms(evidence)


Heads = list[dict[Side, dict[str, Rows]]]
"""For each query head the rows of each parameter, by side."""


# ---- rows ------------------------------------------------------------------------------------------------------------


def _check_rows(evidence: Evidence) -> int:
    """Check that each head's logits depend on exactly the claimed rows of each side."""
    checks = 0
    claimed = _claimed_heads(evidence)
    for head, found in enumerate(_find_heads(evidence, claimed)):
        for side in SIDES:
            for name, want, have in _side_by_side(claimed[head][side], found[side]):
                checks += 1
                if want == have or (not want and _is_foreign_bias(evidence, side, name, head, have)):
                    continue
                if name in evidence.unnamed[side]:
                    raise evidence.error(f"{side} side: {name!r} is added to a claimed product, but no block names it")
                raise evidence.error(
                    f"head {head}, {side} side: {name!r} receives a gradient in {_spell(have)}, "
                    f"the layout claims {_spell(want)}"
                )
    return checks


def _side_by_side(claimed: Mapping[str, Rows], found: Mapping[str, Rows]) -> Iterator[tuple[str, Rows, Rows]]:
    """Each parameter with its claimed rows and the rows that were found."""
    for name in sorted(claimed.keys() | found.keys()):
        yield name, claimed.get(name, frozenset()), found.get(name, frozenset())


def _is_foreign_bias(evidence: Evidence, side: Side, name: str, head: int, rows: Rows) -> bool:
    """Whether a parameter is a bias of other blocks, added here at entries that are not numbered like the rows.

    A block cannot name such a bias: MultiheadAttention with `kdim` adds bias entries 16.. to the features of key rows
    0.., and concatenated weights may have one bias for all.
    """
    index = head if side == "query" else evidence.site.head_map[head]
    forgotten = [b for b in evidence.blocks[side] if b.bias is None and name in evidence.added[side][b.param]]
    return (
        name not in evidence.unnamed[side]
        and name not in evidence.claimed[side]
        and any(name == block.bias for _, block in evidence.site.blocks())
        and not any(b.heads[index] and indices(b.heads[index]) <= rows for b in forgotten)
    )


def _claimed_heads(evidence: Evidence) -> Heads:
    return [
        {"query": _claimed_rows(evidence, "query", head), "key": _claimed_rows(evidence, "key", key_head)}
        for head, key_head in enumerate(evidence.site.head_map)
    ]


def _claimed_rows(evidence: Evidence, side: Side, *heads: int) -> dict[str, Rows]:
    """Rows of each parameter and bias that the site claims for some heads together."""
    claimed: dict[str, Rows] = {}
    for block in evidence.blocks[side]:
        for name in (block.param, block.bias):
            rows = frozenset(i for head in heads for i in indices(block.heads[head]))
            if name is not None and rows:
                claimed[name] = claimed.get(name, frozenset()) | rows
    return claimed


def _find_heads(evidence: Evidence, claimed: Heads) -> Heads:
    """Rows that receive a gradient, by head and side, for a division of the logits that separates the heads.

    If two divisions do (key heads on one axis and their query heads on another, in either order), the one that fits the
    claim is used: in both, a head's queries and keys are those of one slice of the logits.
    """
    heads, softmax = evidence.site.query_heads, evidence.softmax
    best: Heads = []
    most, split = 0, False
    for cut in evidence.upper.cuts:
        for labels in head_labels(cut, heads, softmax.dim if cut is softmax.logits else None):
            found = [evidence.rows_of_head(cut, labels, head) for head in range(heads)]
            distinct = len({tuple(tuple(sorted(rows[side].items())) for side in SIDES) for rows in found})
            if distinct > most or (distinct == most == heads and found == claimed):
                finest, channels = _is_finest(evidence, cut, labels, found[0])
                split |= not finest
                if finest:
                    best, most = found, distinct
                    evidence.reading = cut, labels
                    evidence.channels = channels
                if found == claimed and finest:
                    return best
        if most == heads:
            return best
    shape = "x".join(map(str, softmax.shape))
    if split and not best:
        raise evidence.error(f"its {shape} logits fall into more than the {heads} heads claimed")
    if most <= 1 < heads:
        _check_together(evidence)
        raise CannotTell(f"no axis of its {shape} logits tells {heads} heads apart")
    return best


def _check_together(evidence: Evidence) -> None:
    """Check that all heads together read the rows claimed for all, however heads are arranged in the logits."""
    everything = torch.zeros([1] * len(evidence.softmax.shape), dtype=torch.long)
    found = evidence.rows_of_head(evidence.softmax.logits, everything, 0)
    for side in SIDES:
        count = evidence.site.query_heads if side == "query" else evidence.site.key_heads
        claimed = _claimed_rows(evidence, side, *range(count))
        for name, want, have in _side_by_side(claimed, found[side]):
            if want != have:
                raise evidence.error(
                    f"all heads, {side} side: {name!r} receives a gradient in {_spell(have)}, "
                    f"the layout claims {_spell(want)}"
                )


def _is_finest(
    evidence: Evidence, cut: Value, labels: Tensor, first: Mapping[Side, Mapping[str, Rows]]
) -> tuple[bool, bool]:
    """Whether no other axis splits the rows of head 0, which would mean that several heads were counted as one.

    Returns:
        That, and whether an axis splits the rows into channels, which are not heads.
    """
    channels = False
    for axis, length in enumerate(cut.tensor.shape):
        if cut is evidence.softmax.logits and axis == evidence.softmax.dim:
            continue
        part = _at_index(evidence, cut, labels, axis, 0)
        split = [side for side in SIDES if _is_less(part[side], first[side])]
        if split and not all(_is_channel(evidence, part, first, side) for side in split):
            # The sine of position 0 is 0, which hides features there; the last position reads all of them.
            last = _at_index(evidence, cut, labels, axis, length - 1)
            if any(_is_less(last[side], first[side]) for side in SIDES):
                return False, False
        else:
            channels |= bool(split)
    return True, channels


def _is_less(part: Mapping[str, Rows], whole: Mapping[str, Rows]) -> bool:
    """Whether some logits of a head read other rows of a parameter than all its logits do."""
    return any(whole.get(name) != rows for name, rows in part.items())


def _at_index(evidence: Evidence, cut: Value, labels: Tensor, axis: int, index: int) -> dict[Side, dict[str, Rows]]:
    """Rows that the logits of head 0 at one index of an axis read."""
    shape = cut.tensor.shape
    outside = torch.ones(shape[axis], dtype=torch.bool)
    outside[index] = False
    one = labels.masked_fill(outside.view([-1 if a == axis else 1 for a in range(len(shape))]), -1)
    return evidence.rows_of_head(cut, one, 0)


def _is_channel(
    evidence: Evidence,
    part: Mapping[Side, Mapping[str, Rows]],
    whole: Mapping[Side, Mapping[str, Rows]],
    side: Side,
) -> bool:
    """Whether some logits of a head read one row on a side, at many positions, and all rows of the other side.

    Such logits compare channels over tokens; a head is then all channels that its softmax compares.
    """
    other: Side = "key" if side == "query" else "query"
    wide = all(part.operand[side].width > 1 for part in evidence.parts)
    return wide and all(len(rows) == 1 for rows in part[side].values()) and part[other] == whole[other]


# ---- width of a head -------------------------------------------------------------------------------------------------


def _check_head_dim(evidence: Evidence) -> int:
    """Check that a head's queries and keys are contracted over as many features as claimed."""
    claimed = evidence.site.head_dim
    if evidence.channels:
        return _check_channels(evidence)
    widths = [part.operand["query"].width for part in evidence.parts]
    if claimed != sum(widths) and set(widths) != {claimed}:
        live = [_live_features(evidence, part) for part in evidence.parts]  # some may be padded with zeros
        if claimed != sum(live) and set(live) != {claimed}:
            raise evidence.error(f"its queries and keys meet in {sum(live)} features, the layout claims {claimed}")
    return 1


def _check_channels(evidence: Evidence) -> int:
    """Check that a head that compares channels has as many as claimed, and that its keys are channels as well."""
    cut, labels = evidence.reading
    whole = evidence.rows_of_head(cut, labels, 0)
    for side in SIDES:
        count = max(map(len, whole[side].values()))
        if count != evidence.site.head_dim:
            raise evidence.error(f"its heads compare {count} channels, the layout claims {evidence.site.head_dim}")
    key = _at_index(evidence, cut, labels, evidence.softmax.dim, 0) if cut is evidence.softmax.logits else whole
    if not _is_channel(evidence, key, whole, "key"):
        raise CannotTell("its queries are channels, its keys are not")
    return 1


def _live_features(evidence: Evidence, part: Part) -> int:
    """Number of contracted features of a product that depend on weights on both sides."""
    count = 0
    for feature in range(part.operand["query"].width):
        query, key = (evidence.rows_behind(part, side, range(feature, feature + 1)) for side in SIDES)
        count += bool(query and key)
    return count


def _spell(rows: Rows) -> str:
    """Rows as ranges: "rows 0-15, 32-47"."""
    if not rows:
        return "no row"
    ranges = merged((row, row + 1) for row in rows)
    return "rows " + ", ".join(f"{a}-{b - 1}" if b > a + 1 else str(a) for a, b in ranges)
