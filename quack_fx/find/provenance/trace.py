"""From an operand of a logit product back to the projections that it is made of.

In: some nodes of a graph. Out: the `Flow` of each: labels that say which projection features every element holds, and
what happened on the way (norms, plain factors, functions that bend). The slice behind the nodes is walked back to the
nearest projections and then run forwards on labels, each movement by its own op.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from quack_fx.find.provenance.basis import Basis
from quack_fx.find.provenance.labels import NOTHING, UNKNOWN, Labels, compact, constant_along, reshape, shrink
from quack_fx.find.provenance.movement import move
from quack_fx.find.provenance.projections import Projections
from quack_fx.graph.dataflow import Dataflow, factors_of, is_depthwise
from quack_fx.graph.ops import SOFTMAX, pooled_axes
from quack_fx.layout import NormKind


@dataclass(frozen=True)
class NormOp:
    """A node that a norm consists of, and the node whose features it normalises: what would stand there without it.

    `x` is None where the features come from more than one node.
    """

    node: Node
    x: Node | None


@dataclass(frozen=True)
class NormTag:
    """A norm seen on the way.

    Attributes:
        kind: Which one.
        width: Number of features that share a statistic.
        module: Module that computes it and nothing else.
        weight: Its gain.
        features: What it normalises.
        ops: Nodes by which the features pass it, without its gain and its bias.
        gains: Nodes that apply its gain and its bias.
    """

    kind: NormKind
    width: int
    module: str | None
    weight: str | None = None
    features: frozenset[int] = frozenset()
    ops: tuple[NormOp, ...] = ()
    gains: tuple[NormOp, ...] = ()


@dataclass(frozen=True)
class Statistic:
    """A number computed from whole groups of features: from which ones, by which ops, over how many elements."""

    features: frozenset[int]
    ops: frozenset[str]
    width: int


@dataclass(frozen=True)
class Flow:
    """What is known of one tensor.

    Attributes:
        label: Labels of its elements.
        scale: Product of the plain numbers it was multiplied with since the projection; None where not a plain number.
        norms: Norms since the projection.
        ops: Functions that bend (not linear) since the projection.
        statistic: Set where the tensor may be used as a statistic of features. Its label is UNKNOWN then, but for sums,
            which are features, too.
        centring: Where a mean of them was taken away, for the norm that is to follow.
    """

    label: Tensor
    scale: float | None = 1.0
    norms: tuple[NormTag, ...] = ()
    ops: frozenset[str] = frozenset()
    statistic: Statistic | None = None
    centring: tuple[NormOp, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether it holds neither features nor unknown data."""
        return self.statistic is None and not bool(compact(self.label).any())


LINEAR = frozenset(
    "add sub neg mul div rsub where masked_fill dropout native_dropout lerp addcmul addcdiv positive clone".split()
)
_NORM_INDEX = {"layer_norm": "layer", "rms_norm": "rms", "group_norm": "layer", "batch_norm": "batch"}
_SUMS = frozenset("sum mean nansum".split())
_PICKS = frozenset("amax amin max min cumsum cumprod".split())
"""Reductions whose result, the first if there are several, is made of some of the elements alone."""

_ADDING = frozenset("add sub rsub cat stack where lerp addcmul copy index_put".split())
_BOUNDS = frozenset("clamp clamp_min clamp_max minimum maximum".split())
_BOUNDED = SOFTMAX | frozenset("sin cos polar".split())
"""Ops that make shares, or rotations, of whatever they are given."""
_OF_SIZE = frozenset("pow abs square exp".split())
"""Ops whose mean is a statistic of features and not their average."""

_LARGEST_SLICE = 3000
"""Nodes walked behind one attention before the rest is given up: without projections the walk would not end."""


class Tracer:
    """Follows labels through one graph."""

    def __init__(self, df: Dataflow) -> None:
        self.df = df
        self.labels = Labels()
        self.projections = Projections(df, self.labels)
        self.basis = Basis()
        """What the work so far rests on; a new one for each attention."""
        self._token_mixing: dict[Node, bool] = {}

    def trace(self, targets: Iterable[Node], outside: Callable[[Node], bool] | None = None) -> dict[Node, Flow]:
        """Flows of `targets` and of all nodes between them and the projections behind them.

        Arguments:
            targets: Nodes of interest.
            outside: Tells which nodes are not to be looked behind: they hold unknown data.

        Returns:
            Flow of every node that was run.
        """
        nodes, ends = self._slice(list(targets), outside)
        flows = {end: _unknown_flow(self.df, end) for end in ends}
        if outside is not None:
            # A floating-point input of the model that is added on the way is data like any other.
            reads = {n for node in nodes for n in node.all_input_nodes if self.df.is_given(n)}
            flows.update((n, _unknown_flow(self.df, n)) for n in reads if self._is_added(n))
        self.basis.ends.update(flows)
        return self._run(nodes, flows, UNKNOWN)

    def _is_added(self, node: Node) -> bool:
        return any(self.df.op[user].name in _ADDING for user in node.users)

    def carry(self, source: Node, label: Tensor, path: Iterable[Node]) -> dict[Node, Flow]:
        """Follow labels of our own from one node forwards.

        Arguments:
            source: Node whose result carries `label`.
            label: Label tensor of its shape.
            path: Nodes behind it through which the labels are to be carried; what comes in from elsewhere counts as
                nothing, and products on the path keep the labels of their data (heads mixed after the product).

        Returns:
            Flows of the nodes on the path.
        """
        path = sorted(set(path) - {source}, key=self.df.index.__getitem__)
        self.basis.inside.add(source)
        return self._run(path, {source: self._window(source, Flow(label))}, NOTHING)

    def where_unknown(self, flows: dict[Node, Flow], operands: Iterable[Node]) -> str:
        """Where on the way to some operands their features were lost: op, tensor and module, for people to read."""
        df, todo, seen = self.df, list(operands), set[Node]()
        lost: list[Node] = []
        while todo:
            node = todo.pop()
            flow = flows.get(node)
            if node in seen or flow is None:
                continue
            seen.add(node)
            several = isinstance(df.value(node), list | tuple)  # its parts are labelled, it is not
            if several or UNKNOWN in self.labels.features(flow.label):
                lost += [] if several else [node]
                todo.extend(df.reads(node))
        if not lost:
            return ""
        first = min(lost, key=df.index.__getitem__)
        what = df.describe(first)
        if df.op[first].kind in ("contraction", "convolution") and any(map(df.is_weight, first.all_input_nodes)):
            return f": the weight of {what} is computed from parameters, and none of its rows is one of theirs"
        return f": they are lost at {what}"

    def _run(self, nodes: list[Node], flows: dict[Node, Flow], outside: int) -> dict[Node, Flow]:
        self.basis.inside.update(nodes)
        for node in nodes:
            flow = _Step(self, node, flows, outside).run()
            if node in self.df.writes.get(self.df.group[node], ()):
                self._write(node, flow, flows)
            else:
                flows[node] = self._window(node, flow)
        return flows

    def _slice(self, targets: list[Node], outside: Callable[[Node], bool] | None) -> tuple[list[Node], list[Node]]:
        """Nodes to run, in order, back to the projections; and those behind which nobody looks."""
        df, todo = self.df, deque(targets)
        needed: set[Node] = set()
        ends: list[Node] = []
        while todo:
            node = todo.popleft()
            if node in needed:
                continue
            needed.add(df.open(node))
            if node not in df.activation or self._ends_here(node):
                continue
            if len(needed) > _LARGEST_SLICE or (outside is not None and outside(node)):
                ends.append(node)
            else:
                todo.extend(n for n in df.reads(node) if n in df.activation or df.group[n] in df.writes)
        return sorted(needed.difference(ends), key=df.index.__getitem__), ends

    def _ends_here(self, node: Node) -> bool:
        """Whether labels begin at this node: projections, table look-ups, and data that cannot be followed."""
        kind = self.df.op[node].kind
        if kind in ("lookup", "attention", "input"):
            return True
        if kind == "convolution":
            return not is_depthwise(self.df, node)
        if kind == "contraction":
            sides = factors_of(self.df, node)
            constant = sides is not None and any(self.df.is_constant(n) for n in sides[:2])
            return not constant and not self.mixes_tokens(node)
        return False

    def mixes_tokens(self, node: Node) -> bool:
        """Whether a product with a weight sums features of a projection over tokens, each by itself (Linformer).

        It makes no features of its own then: keys of fewer tokens are made of the same rows.
        """
        if node not in self._token_mixing:
            self._token_mixing[node] = self._finds_token_mixing(node)
        return self._token_mixing[node]

    def _finds_token_mixing(self, node: Node) -> bool:
        df = self.df
        operands = self.projections.operands(node) if df.op[node].kind == "contraction" else None
        if operands is None or operands[0] not in df.activation:
            return False
        x, _, on_left, _ = operands
        axis = -2 if on_left and len(df.shape(x)) > 1 else -1
        if df.shape(x)[axis] == 1 or not self._is_moved_projection(x):
            return False
        label = self.trace([x])[x].label
        others = [d for d in range(label.dim()) if d != axis % label.dim()]
        known = UNKNOWN not in self.labels.features(label)
        return known and constant_along(label, axis) and not all(constant_along(label, d) for d in others)

    def _is_moved_projection(self, node: Node) -> bool:
        """Whether a tensor is the result of a projection, biased and moved at most."""
        df = self.df
        while df.op[node].kind != "contraction":
            data = [n for n in node.all_input_nodes if n in df.activation]
            moved = df.op[node].kind in ("movement", "getitem") or df.op[node].name == "add"
            if len(data) != 1 or not moved or node in df.writes:
                return False
            node = data[0]
        return self.projections.operands(node) is not None

    def _window(self, node: Node, flow: Flow) -> Flow:
        """Labels of memory that something writes into later must be real windows on one tensor of labels."""
        df = self.df
        if df.group[node] is not node or node not in df.writes:
            return flow
        value = df.value(node)
        if not isinstance(value, Tensor):
            return flow
        whole = torch.empty_strided(value.shape, value.stride(), dtype=torch.int64).copy_(flow.label)
        return replace(flow, label=whole)

    def _write(self, node: Node, flow: Flow, flows: dict[Node, Flow]) -> None:
        target: Node = node.args[0]  # type: ignore[assignment]
        before = flows.get(target)
        if before is None:
            flows[node] = flow
            return
        if any(
            stride == 0 and size > 1 for size, stride in zip(before.label.shape, before.label.stride(), strict=True)
        ):
            # Memory whose labels are not windows on one tensor: nobody can tell what stands where from now on.
            for other in flows:
                if self.df.group[other] is self.df.group[node]:
                    flows[other] = _unknown_flow(self.df, other)
            flows[node] = _unknown_flow(self.df, node)
            return
        before.label.copy_(flow.label)
        flows[node] = replace(flow, label=before.label)
        # Whatever else looks at this memory now holds what was written, with its history.
        group = self.df.group[node]
        for other, old in flows.items():
            if other is not node and self.df.group[other] is group:
                ops = old.ops | flow.ops
                norms = old.norms + tuple(n for n in flow.norms if n not in old.norms)
                flows[other] = replace(old, ops=ops, norms=norms)


@dataclass
class _Step:
    """One node, run on labels."""

    tracer: Tracer
    node: Node
    flows: dict[Node, Flow]
    outside: int

    def run(self) -> Flow:
        """Flow of the node."""
        df, node = self.tracer.df, self.node
        kind = df.op[node].kind
        if node not in df.activation and df.group[node] not in df.writes:
            return self._unknown() if df.is_given(node) and self.outside == UNKNOWN else self._nothing()
        if kind in ("contraction", "convolution"):
            return self._product() if self.outside == UNKNOWN else self._mixed_heads()
        if kind == "factory" or (kind == "lookup" and node not in df.from_input):
            return self._nothing()  # a table of positions is a parameter, whether it is sliced or looked up
        if node.op == "get_attr" and node not in df.weights:
            return self._nothing()  # a buffer before anything is written into it: a cache of keys
        if kind in ("lookup", "attention", "input"):
            return self._unknown()
        if kind == "getitem":
            return self._part()
        if kind == "movement":
            return self._movement()
        if kind == "reduction":
            return self._reduction(node, df.value(node))
        if kind == "pooling":
            return self._pooled(node)
        if kind == "norm":
            return self._native_norm()
        return self._elementwise()

    # ---- leaves --------------------------------------------------------------------------------------------------

    def _full(self, value: int) -> Tensor:
        return torch.tensor(value).expand(self.tracer.df.shape(self.node))

    def _nothing(self) -> Flow:
        return Flow(self._full(NOTHING))

    def _unknown(self) -> Flow:
        return Flow(self._full(UNKNOWN))

    def _input(self, node: Node) -> Flow:
        known = self.flows.get(node)
        if known is not None:
            return known
        value = self.outside if node in self.tracer.df.activation else NOTHING
        return Flow(torch.tensor(value).expand(self.tracer.df.shape(node)))

    # ---- products ------------------------------------------------------------------------------------------------

    def _product(self) -> Flow:
        df, node = self.tracer.df, self.node
        if is_depthwise(df, node):
            return self._depthwise()
        sides = factors_of(df, node)
        if sides is None:
            return self._unknown()
        left, right, bias = sides
        constants = [n for n in (left, right) if df.is_constant(n)]
        if any(map(df.is_zero, constants)):
            return self._nothing()
        if self.tracer.mixes_tokens(node):
            return self._by_matrix(left, right)
        if not constants or any(map(df.is_weight, (left, right))):
            # Positions projected by a weight are a projection like any other.
            made = self.tracer.projections.of(node)
            return self._unknown() if made is None else Flow(made[1])
        if bias is not None and bias in df.activation:
            return self._unknown()
        return self._by_matrix(left, right)

    def _by_matrix(self, left: Node, right: Node) -> Flow:
        """Data times a matrix that makes no features: numbers (rotation, pooling), or a weight that mixes tokens."""
        df, node = self.tracer.df, self.node
        data_left = left in df.activation
        flow = self._input(left if data_left else right)
        if df.op[node].kind == "convolution" or df.shape(node).numel() == 0 or flow.label.dim() < 2:
            return self._unknown()
        axis = -1 if data_left or df.op[node].name == "linear" else -2
        label = flow.label
        if constant_along(label, axis % label.dim()):
            label = label.narrow(axis, 0, 1)
        else:
            label = self.tracer.labels.union_along(label, [axis])
        return replace(flow, label=label.expand(df.shape(node)))

    def _mixed_heads(self) -> Flow:
        """A product with a weight that keeps the number of logits: heads mixed, each still where it was."""
        shape = self.tracer.df.shape(self.node)
        for argument in self.node.all_input_nodes:
            flow = self.flows.get(argument)
            if flow is not None and not flow.empty and flow.label.numel() == shape.numel():
                return replace(flow, label=reshape(flow.label, shape))
        return self._nothing()

    def _depthwise(self) -> Flow:
        """A convolution that keeps channels apart: a gain for each, where it is known what they are."""
        df, node = self.tracer.df, self.node
        x = self._input(node.args[0])  # type: ignore[arg-type]
        if UNKNOWN in self.tracer.labels.features(x.label) or x.empty:
            return self._unknown()
        label = self.tracer.labels.union_along(x.label, list(range(2, x.label.dim())))
        return replace(x, label=label.expand(df.shape(node)))

    # ---- movement ------------------------------------------------------------------------------------------------

    def _movement(self) -> Flow:
        df, node, labels = self.tracer.df, self.node, self.tracer.labels
        name = df.op[node].name
        given = node.all_input_nodes[:1] if name.endswith("_as") else node.all_input_nodes  # the other gives a shape
        sources = [self._input(n) for n in given if self._moves(n)]
        if name == "view_as_complex":
            label = self._input(node.args[0]).label  # type: ignore[arg-type]
            return replace(sources[0], label=labels.union_along(label, [-1]).squeeze(-1))
        if name == "view_as_real":
            label = self._input(node.args[0]).label  # type: ignore[arg-type]
            return replace(sources[0], label=label.unsqueeze(-1).expand(df.shape(node)))
        if name in ("real", "imag", "_conj", "conj"):
            return sources[0]
        if isinstance(df.value(node), list | tuple):
            return replace(_merged(sources), label=self._full(NOTHING))  # its parts are made by _part
        try:
            alias = df.group[node] in df.writes and df.group[node] is not node
            label = move(df, node, lambda n: self._input(n).label, UNKNOWN, alias)
        except (RuntimeError, TypeError, IndexError, ValueError):
            return self._unknown()
        if not isinstance(label, Tensor) or label.shape != df.shape(node):
            return self._unknown()
        if df.group[node] not in df.writes:
            label = shrink(label)
        return replace(_merged(sources), label=label)

    def _moves(self, node: Node) -> bool:
        """Whether an argument is data that is moved (and not an index)."""
        return node in self.tracer.df.activation or self.tracer.df.group[node] in self.tracer.df.writes

    def _part(self) -> Flow:
        df, node = self.tracer.df, self.node
        whole: Node = node.args[0]  # type: ignore[assignment]
        i: int = node.args[1]  # type: ignore[assignment]
        if df.op[whole].kind == "movement":
            parts = move(df, whole, lambda n: self._input(n).label, UNKNOWN, df.group[whole] in df.writes)
            return replace(self._input(whole), label=parts[i])
        if df.op[whole].kind == "norm" and i == 0:
            return self._input(whole)
        if df.op[whole].name in ("native_dropout", "_fused_dropout") and i == 0:
            return self._input(whole)
        if df.op[whole].kind == "reduction" and whole in self.flows:
            return self._reduction(whole, df.value(node), i)
        if df.op[whole].kind == "pooling" and i == 0:
            return self._pooled(whole)
        if df.op[whole].kind == "elementwise" and whole in self.flows:
            if self._input(whole).empty:
                return self._nothing()
            if i == 0 and self._input(whole).label.shape == df.shape(node):
                return self._input(whole)
        return self._unknown() if whole in self.flows else Flow(self._full(self.outside))

    # ---- statistics and norms ------------------------------------------------------------------------------------

    def _reduction(self, node: Node, value: object, part: int = 0) -> Flow:
        """A reduction, or one part of its results."""
        df = self.tracer.df
        source = node.args[0]
        x = self._input(source) if isinstance(source, Node) else self._unknown()
        if not isinstance(value, Tensor):
            return x  # its parts are made by _part
        if not value.is_floating_point():
            return self._nothing()  # where something stands, not what
        unknown = torch.tensor(UNKNOWN).expand(value.shape)
        features = self.tracer.labels.features(x.label)
        if x.statistic is not None and UNKNOWN in features:
            return replace(x, label=unknown)
        if UNKNOWN in features or not features or not x.label.numel():
            return Flow(unknown if features else torch.tensor(NOTHING).expand(value.shape))
        name = df.op[node].name
        dims = _reduced_dims(node, x.label.dim())
        label = None
        if dims is not None and not (x.ops & _OF_SIZE) and (name in _SUMS or (name in _PICKS and part == 0)):
            if all(constant_along(x.label, d) for d in dims):
                label = _without(x.label, dims, value.shape)
                if label is not None:
                    return replace(x, label=label)
            elif name in _SUMS:
                # The mean that a norm takes away, or what a rotation by small matrices makes: use will tell.
                label = _without(self.tracer.labels.union_along(x.label, dims), dims, value.shape)
        width = x.label.numel() // max(1, value.numel())
        statistic = Statistic(frozenset(features), x.ops | {name}, width)
        return replace(x, label=unknown if label is None else label, statistic=statistic)

    def _pooled(self, node: Node) -> Flow:
        """Windows on the last axes: what is the same all over them is so afterwards."""
        df = self.tracer.df
        x = self._input(node.args[0])  # type: ignore[arg-type]
        axes = range(x.label.dim() - pooled_axes(df.op[node]), x.label.dim())
        if isinstance(df.value(self.node), list | tuple):
            return x  # its parts are made by _part
        if x.statistic is not None or not all(constant_along(x.label, d) for d in axes):
            return self._unknown()
        for d in axes:
            x = replace(x, label=x.label.narrow(d, 0, 1))
        return replace(x, label=x.label.expand(df.shape(self.node)))

    def _native_norm(self) -> Flow:
        df, node = self.tracer.df, self.node
        x = self._input(node.args[0])  # type: ignore[arg-type]
        name = df.op[node].name
        kind: NormKind = next((k for mark, k in _NORM_INDEX.items() if mark in name), "other")  # type: ignore[misc]
        shape = x.label.shape
        if kind in ("layer", "rms") and "group" not in name:
            width = math.prod(node.args[1])  # type: ignore[arg-type]
        else:
            width = shape[1:].numel() if len(shape) > 1 else 1
        gain = next((n for n in node.args[1:] if isinstance(n, Node) and df.is_weight(n)), None)
        here = (*x.centring, NormOp(node, node.args[0]))  # type: ignore[arg-type]
        features = frozenset(self.tracer.labels.features(x.label))
        tag = NormTag(kind, int(width), self._norm_module(x), self._weight_name(gain), features, here)
        return replace(x, norms=(*x.norms, tag), statistic=None, centring=())

    def _norm_module(self, x: Flow) -> str | None:
        """Module that computes the norm and does not hold the projection: the deepest one that is only here."""
        df = self.tracer.df
        around: set[str] = set()
        for feature in self.tracer.labels.features(x.label) - {UNKNOWN}:
            if self.outside == UNKNOWN:
                around.update(df.modules(self.tracer.projections.by_feature(feature)[0].node))
            break
        own = [m for m in df.modules(self.node) if m not in around]
        return own[-1] if own else None

    def _weight_name(self, node: Node | None) -> str | None:
        names = self.tracer.projections.weight_names(node) if node is not None else ()
        return names[0] if len(names) == 1 else None

    # ---- elementwise ---------------------------------------------------------------------------------------------

    def _elementwise(self) -> Flow:
        df, node, labels = self.tracer.df, self.node, self.tracer.labels
        value = df.value(node)
        if isinstance(value, list | tuple):
            value = value[0]
        if not isinstance(value, Tensor) or value.dtype == torch.bool:
            return self._nothing()
        name = df.op[node].name
        inputs = [n for n in node.all_input_nodes if self._carries(n)]
        flows = [f for f in map(self._input, inputs) if not f.empty]
        flows = self._told_apart(self._weighed(name, flows))
        labelled = [f for f in flows if f.statistic is None]
        statistics = [f.statistic for f in flows if f.statistic is not None]
        if not labelled:
            return self._of_statistics(name, flows) if statistics else self._nothing()
        try:
            label = labels.union([f.label for f in labelled], value.shape)
        except RuntimeError:
            return self._unknown()  # not elementwise after all
        merged = _merged(labelled)
        features = [labels.features(f.label) for f in labelled]
        if name in ("mul", "div") and len(labelled) > 1 and any(f != features[0] for f in features):
            return self._unknown()  # one projection gates another: neither alone makes the result
        result = replace(merged, label=shrink(label))
        if name == "mul" and self._is_outer(inputs):
            return self._unknown()
        x = self._only_data(inputs)
        if statistics:
            result = self._with_statistics(name, result, statistics, frozenset().union(*features), x)
        if name not in LINEAR or (name in ("mul", "div") and len(inputs) > 1 and len(labelled) > 1):
            result = replace(result, ops=result.ops | {name})
        if name == "mul" and len(node.all_input_nodes) == 1 and len(node.args) > 1 and isinstance(node.args[1], Node):
            result = replace(result, ops=result.ops | {"pow"})  # x * x
        return self._with_weights(name, result, x)

    def _only_data(self, inputs: list[Node]) -> Node | None:
        """The one argument whose features are the result's; None where there are several."""
        holds = {n: flow for n in inputs if not (flow := self._input(n)).empty}
        data = [n for n, flow in holds.items() if flow.statistic is None]
        if not data:
            data = [n for n, flow in holds.items() if UNKNOWN not in self.tracer.labels.features(flow.label)]
        return data[0] if len(data) == 1 else None

    def _is_outer(self, inputs: list[Node]) -> bool:
        """Whether one feature is spread over many by a weight: a product with a factor of rank one."""
        df = self.tracer.df
        shapes = [df.shape(n) for n in inputs]
        for other in self.node.all_input_nodes:
            if other not in inputs and df.is_weight(other):
                for d, n in enumerate(reversed(df.shape(other))):
                    if n > 1 and all(len(shape) <= d or shape[-1 - d] == 1 for shape in shapes):
                        return True
        return False

    def _carries(self, node: Node) -> bool:
        return node in self.tracer.df.activation or node in self.flows

    def _weighed(self, name: str, flows: list[Flow]) -> list[Flow]:
        """Rotations turn the features that they are multiplied with, and shares pool them: both are no features."""
        others = [f for f in flows if not f.ops & _BOUNDED]
        return others if name == "mul" and others else flows

    def _told_apart(self, flows: list[Flow]) -> list[Flow]:
        """Sums that meet a statistic are features: nobody norms a statistic."""
        if all(f.statistic is not None for f in flows):
            known = [UNKNOWN not in self.tracer.labels.features(f.label) for f in flows]
            if any(known) and not all(known):
                return [replace(f, statistic=None) if k else f for f, k in zip(flows, known, strict=True)]
        return flows

    def _of_statistics(self, name: str, flows: list[Flow]) -> Flow:
        """Statistics computed with each other; sums stay features as well."""
        shape = self.tracer.df.shape(self.node)
        statistics = [f.statistic for f in flows if f.statistic is not None]
        joined = Statistic(
            frozenset().union(*(s.features for s in statistics)),
            frozenset({"clip" if self._clips(name) else name}).union(*(s.ops for s in statistics)),
            max(s.width for s in statistics),
        )
        apart = len(flows) == 1 or name in _ADDING
        label = self.tracer.labels.union([f.label for f in flows], shape) if apart else self._full(UNKNOWN)
        if UNKNOWN in self.tracer.labels.features(label):
            return Flow(self._full(UNKNOWN), statistic=joined)
        result = replace(_merged(flows), label=shrink(label), statistic=joined)
        return self._with_weights(name, result if name in LINEAR else replace(result, ops=result.ops | {name}), None)

    def _clips(self, name: str) -> bool:
        """Whether a statistic is bounded by more than an epsilon: what is short is left as it is then."""
        if name not in _BOUNDS:
            return False
        given = [*self.node.args[1:], *self.node.kwargs.values()]
        known = [self.tracer.df.constant(b) if isinstance(b, Node) else b for b in given]
        bounds = [float(b) for b in known if isinstance(b, int | float) or (isinstance(b, Tensor) and b.numel() == 1)]
        return any(1e-2 < abs(bound) < 1e2 for bound in bounds)

    def _with_statistics(
        self, name: str, flow: Flow, statistics: list[Statistic], features: frozenset[int], x: Node | None
    ) -> Flow:
        here = NormOp(self.node, x)
        for statistic in statistics:
            own = statistic.features <= features
            if name in ("add", "sub", "rsub") and statistic.ops & {"cumsum", "cumprod"}:
                flow = replace(flow, label=self._full(UNKNOWN))  # sums of other logits, and no maximum or mean
            elif name in ("add", "sub", "rsub"):
                if own:
                    flow = replace(flow, ops=flow.ops | {"centre"}, centring=(*flow.centring, here))
                else:
                    flow = replace(flow, label=self._full(UNKNOWN))
            elif own and name in ("mul", "div") and "clip" in statistic.ops:
                flow = replace(flow, scale=None, ops=flow.ops | {"clip"})
            elif own and name in ("mul", "div"):
                kind = _kind(statistic.ops, flow.ops)
                ops = (*flow.centring, here)
                tag = NormTag(kind, statistic.width, self._norm_module(flow), features=statistic.features, ops=ops)
                flow = replace(flow, norms=(*flow.norms, tag), ops=flow.ops - {"centre"}, centring=())
            else:
                flow = replace(flow, scale=None)
        return flow

    def _with_weights(self, name: str, flow: Flow, x: Node | None) -> Flow:
        """Plain factors, gains of norms and added biases; `x` holds the features."""
        df, node = self.tracer.df, self.node
        others = [a for a in node.args if not (isinstance(a, Node) and self._carries(a))]
        if name in ("mul", "div"):
            for other in others:
                if isinstance(other, bool | int | float):
                    flow = replace(flow, scale=_times(flow.scale, other, name))
                elif isinstance(other, Node):
                    flow = self._times_node(name, flow, other, x)
        elif name == "add":
            for other in others:
                if not isinstance(other, Node) or not df.is_weight(other):
                    continue
                if flow.norms and self._is_bias_of(flow.norms[-1], other, x):
                    flow = _with_gain(flow, flow.norms[-1].weight, NormOp(node, x))
                elif not flow.norms and self.outside == UNKNOWN:
                    self.tracer.projections.add_bias(flow.label, other)
        return flow

    def _is_bias_of(self, norm: NormTag, bias: Node, x: Node | None) -> bool:
        """Whether a weight that is added to a norm's result is its bias: in its module, or right after a gain."""
        df = self.tracer.df
        if norm.module is not None:
            return norm.module in df.modules(self.node)
        last = norm.gains[-1].node if norm.gains else None
        return last is not None and last is x and any(df.shape(n) == df.shape(bias) for n in last.all_input_nodes)

    def _times_node(self, name: str, flow: Flow, other: Node, x: Node | None) -> Flow:
        df = self.tracer.df
        if self._turns(other):
            return flow
        if df.is_weight(other):
            names = self._gain_names(other)
            if flow.norms and flow.norms[-1].weight is None and len(names) == 1:
                return _with_gain(flow, next(iter(names)), NormOp(self.node, x))
            return replace(flow, scale=None) if not flow.norms else flow
        if df.shape(other).numel() == 1:
            number = df.constant(other)
            return replace(flow, scale=None if number is None else _times(flow.scale, float(number), name))
        return flow

    def _turns(self, node: Node) -> bool:
        """Whether a node is the sine or cosine of angles, learned ones too: a rotation changes no size."""
        df = self.tracer.df
        while df.op[node].kind == "movement" and len(node.all_input_nodes) == 1:
            node = node.all_input_nodes[0]
        return df.op[node].name in ("sin", "cos", "polar")

    def _gain_names(self, node: Node) -> set[str]:
        """Parameters behind a gain, through (1 + gain) and casts."""
        df, found, todo = self.tracer.df, set[str](), [node]
        while todo:
            n = todo.pop()
            if n in df.weights:
                found.add(df.weights[n])
            todo.extend(i for i in n.all_input_nodes if i in df.from_weight)
        return found


def _with_gain(flow: Flow, weight: str | None, op: NormOp) -> Flow:
    """A flow whose last norm has a gain, or a bias, that one more node applies."""
    last = flow.norms[-1]
    return replace(flow, norms=(*flow.norms[:-1], replace(last, weight=weight, gains=(*last.gains, op))))


def _unknown_flow(df: Dataflow, node: Node) -> Flow:
    return Flow(torch.tensor(UNKNOWN).expand(df.shape(node)))


def _merged(flows: list[Flow]) -> Flow:
    """What several tensors have in common, their norms and functions taken together."""
    flows = [f for f in flows if not f.empty] or flows
    if len(flows) == 1:
        return flows[0]
    scales = {f.scale for f in flows}
    norms: dict[NormTag, None] = {}
    for f in flows:
        norms.update(dict.fromkeys(f.norms))
    statistics = [f.statistic for f in flows]
    return Flow(
        label=flows[0].label if flows else torch.zeros(1, dtype=torch.int64),
        scale=scales.pop() if len(scales) == 1 else None,
        norms=tuple(norms),
        ops=frozenset().union(*(f.ops for f in flows)),
        centring=tuple(dict.fromkeys(op for f in flows for op in f.centring)),
        statistic=statistics[0] if statistics and all(s is not None for s in statistics) else None,
    )


def _times(scale: float | None, number: float, name: str) -> float | None:
    if scale is None or number == 0:
        return None
    return scale * number if name == "mul" else scale / number


def _kind(statistic: frozenset[str], ops: frozenset[str]) -> NormKind:
    """Which norm a division by a statistic is."""
    if statistic & {"var", "std", "var_mean", "std_mean"} or "centre" in ops or "centre" in statistic:
        return "layer"
    if statistic & {"linalg_vector_norm", "norm"}:
        return "l2"
    if "mean" in statistic:
        return "rms"
    return "l2" if "sum" in statistic else "other"


def _without(label: Tensor, dims: list[int], shape: torch.Size) -> Tensor | None:
    """Labels that vary along none of `dims`, in the shape of a reduction over them; None where it has another."""
    for d in sorted(dims, reverse=True):
        label = label.narrow(d, 0, 1)
        label = label if label.dim() == len(shape) else label.select(d, 0)
    return label.expand(shape) if label.dim() == len(shape) else None


def _reduced_dims(node: Node, rank: int) -> list[int] | None:
    """Axes that a reduction runs over; None where the op does not say so in its second argument."""
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if isinstance(dims, int):
        dims = [dims]
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return list(range(rank))
    if isinstance(dims, list | tuple) and all(isinstance(d, int) for d in dims):
        return [int(d) % rank for d in dims]
    return None
