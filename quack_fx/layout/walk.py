"""How one attention was traced back to its weights, or why that failed: frozen dataclasses.

The finder fills in an `Explanation`; it is shown as a tree, as JSON and in dumped files. It lists the graph nodes
from the logits back to the weights, each with the weight rows behind its tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from quack_fx.layout.sites import AttentionSite, NormKind, Ranges


@dataclass(frozen=True)
class RowsOf:
    """Rows of one parameter: half-open ranges along `axis`."""

    param: str
    axis: int
    rows: Ranges

    def text(self, home: str) -> str:
        """Return a short text with names relative to the module `home`."""
        rows = ", ".join(f"{a}:{b}" for a, b in self.rows[:4]) + (", …" if len(self.rows) > 4 else "")
        return f"{_local(self.param, home)} {rows}" + (f" (axis {self.axis})" if self.axis else "")


@dataclass(frozen=True)
class Held:
    """The weight rows behind one tensor.

    Attributes:
        rows: All of these rows.
        unknown: Whether some elements come from unknown rows.
        statistic: Whether the tensor is a statistic, such as a mean square, over the features of these rows.
        features: Last axis along which the rows differ: the head dimension, once heads are split.
        vectors: Number of distinct vectors along that axis: the number of heads, once heads are split.
        axes: Axes along which these vectors differ.
        first: Rows of the first vector.
        norms: Norms between the projections and this tensor, each as (kind, width, module, gain).
        scale: Product of the scalar factors since the projections; None if one of them is not a known constant.
    """

    rows: tuple[RowsOf, ...] = ()
    unknown: bool = False
    statistic: bool = False
    features: int | None = None
    vectors: int = 1
    axes: tuple[int, ...] = ()
    first: tuple[RowsOf, ...] = ()
    norms: tuple[tuple[NormKind, int, str | None, str | None], ...] = ()
    scale: float | None = 1.0

    def text(self, home: str) -> str:
        """Return a short text with names relative to the module `home`."""
        rows, first = (", ".join(of.text(home) for of in some) for some in (self.rows, self.first))
        parts = [f"a statistic of {rows}" if self.statistic else rows] if rows else []
        parts += ["data of unknown rows"] if self.unknown else []
        if not parts:
            return "no weight rows"
        if self.axes:
            axes = " and ".join(map(str, self.axes))
            parts.append(f"{self.vectors} vectors along axis {axes}, the first {first or 'without rows'}")
        for kind, width, module, gain in self.norms:
            where = f" in {_local(module, home)}" if module else ""
            parts.append(f"after {kind} norm over {width}{where}{f', gain {_local(gain, home)}' if gain else ''}")
        parts += (
            [] if self.scale == 1.0 else ["times a learned factor" if self.scale is None else f"* {self.scale:.6g}"]
        )
        return "; ".join(parts)


@dataclass(frozen=True)
class WalkedNode:
    """One node of the graph.

    Attributes:
        name: Its name in the graph.
        op: Name of its op, for example "view" or "mm".
        shape: Shape of its result.
        module: Innermost module whose forward was running; "" for the root.
        source: The line of Python that ran it, for example "model.py:12: q = self.q(x)", if recorded.
        held: The weight rows behind its tensor, if it was visited.
        weight: For a product with a weight, the parameters whose rows produce the features.
    """

    name: str
    op: str
    shape: tuple[int, ...]
    module: str
    source: str | None = None
    held: Held | None = None
    weight: tuple[str, ...] = ()

    def text(self, home: str, before: Held | None = None) -> str:
        """Return one line of text, with "the same" instead of the rows if `before` has the same rows."""
        made = f" by {', '.join(_local(name, home) for name in self.weight)}" if self.weight else ""
        line = f"{self.name}  {self.op}{made} {list(self.shape)}"
        if self.held is None:
            return line
        return f"{line}  {'the same' if self.held == before else self.held.text(home)}"


@dataclass(frozen=True)
class Walk:
    """The backward walk from one operand of a product to the weights.

    Attributes:
        operand: "query" or "key"; "left" or "right" if it was not yet known which is which.
        product: Name of the product's node.
        nodes: The nodes, from the operand to those nearest to the model's inputs.
    """

    operand: Literal["query", "key", "left", "right"]
    product: str
    nodes: tuple[WalkedNode, ...]


@dataclass(frozen=True)
class Explanation:
    """How one attention was traced.

    Attributes:
        name: Module whose forward computes the logits; "" for the root.
        logits: Nodes from the query-key products to the softmax, in execution order.
        output: Product of the attention weights and the values.
        walks: One backward walk for each operand of a query-key product.
        site: The site that was found; None for a skipped attention.
        code: Code of the reason, for a skipped attention.
        reason: The reason as a sentence.
        stopped: Node at which the walk stopped.
        reads: Inputs of that node that were visited.
    """

    name: str
    logits: tuple[WalkedNode, ...] = ()
    output: WalkedNode | None = None
    walks: tuple[Walk, ...] = ()
    site: AttentionSite | None = None
    code: str | None = None
    reason: str | None = None
    stopped: WalkedNode | None = None
    reads: tuple[WalkedNode, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form; `site` is in the layout's JSON form."""
        plain = asdict(replace(self, site=None))
        return {
            "name": self.name,
            "outcome": "skipped" if self.site is None else "found",
            **{name: plain[name] for name in ("code", "reason", "stopped", "reads", "logits", "output", "walks")},
            "site": None if self.site is None else self.site.to_dict(),
        }

    def outline(self) -> Iterator[tuple[int, str]]:
        """Yield the lines that the terminal and dumped files show, each with its indentation depth."""
        yield 0, f"{self.name or '(root)'}  {self._outcome()}"
        for title, nodes in (
            ("stopped at", () if self.stopped is None else (self.stopped,)),
            ("which reads", self.reads),
            ("logits, from the product to the softmax", self.logits),
            ("attention weights times values", () if self.output is None else (self.output,)),
            *((f"{walk.operand} of {walk.product}, back to the weights", walk.nodes) for walk in self.walks),
        ):
            if nodes:
                yield 1, title
                yield from self._listed(nodes)

    def text(self) -> str:
        """Return the outline as indented text."""
        return "".join(f"{'  ' * depth}{line}\n" for depth, line in self.outline())

    def _outcome(self) -> str:
        if self.site is None:
            return f"skipped: {self.reason} [{self.code}]"
        one = self.site
        return f"found: {one.kind}, {one.query_heads} query heads, {one.key_heads} key heads, head dim {one.head_dim}"

    def _listed(self, nodes: Sequence[WalkedNode]) -> Iterator[tuple[int, str]]:
        """List nodes under the module and the line of Python that ran them."""
        place, held = "", None
        for node in nodes:
            where = f"in {node.module or 'the model itself'}" + (f", {node.source}" if node.source else "")
            if where != place:
                yield 2, where
            yield 3, node.text(self.name, held)
            place, held = where, node.held


def _local(name: str, home: str) -> str:
    return name.removeprefix(f"{home}.")
