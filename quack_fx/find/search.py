"""From a model and example inputs to its `QKLayout`: capture the graph, find the attention logits, trace their rows.

`find_qk_pairs` is the public entry point. `find` also reports how the layout was found, and `explain` how one attention
was traced. `find_in_graph` takes any ATen graph (torch.export, make_fx); `find_each` also returns the logits, site and
heads of each attention in it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn
from torch.fx import GraphModule, Node

from quack_fx.find.attention import Logits, NearMiss, NotOneAttention, Refused, find_logits
from quack_fx.find.dumps import dump, dumping
from quack_fx.find.explanation import explain_miss, explain_refusal, explain_site
from quack_fx.find.provenance.basis import Basis
from quack_fx.find.provenance.blocks import make_site, merge_calls
from quack_fx.find.provenance.flow import NormTag
from quack_fx.find.provenance.heads import Heads, find_heads
from quack_fx.find.provenance.left_out import LeftOut
from quack_fx.find.provenance.repeat import Repeats
from quack_fx.find.provenance.trace import Tracer
from quack_fx.find.provenance.trail import Trail
from quack_fx.find.provenance.uses import Uses
from quack_fx.find.provenance.values import values_of
from quack_fx.graph.capture import Capture, RepeatedLayer, capture, captured_otherwise, unwrapped
from quack_fx.graph.dataflow import BehindLayer, Dataflow
from quack_fx.graph.forward.machine import without_collecting
from quack_fx.layout import AttentionSite, LogitTerm, QKLayout, Skipped, WeightBlock
from quack_fx.layout.walk import Explanation

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A layout and how it was found.

    Attributes:
        layout: The layout.
        way: How the forward was recorded: "hybrid" (fake weights, so the size of the model does not matter) or "real".
        nodes: Number of nodes of the recorded graph.
        seconds: Seconds spent on each stage.
        canned: Ops that need the values of fake tensors and returned a made-up result (mostly routing).
        fallback_reason: Why the hybrid recording failed, or None.
    """

    layout: QKLayout
    way: Literal["hybrid", "real"]
    nodes: int
    seconds: dict[str, float] = field(default_factory=dict)
    canned: tuple[str, ...] = ()
    fallback_reason: str | None = None


def find_qk_pairs(model: nn.Module, *args: Any, **kwargs: Any) -> QKLayout:
    """Find every query/key pair of a model: the exact weight rows of every head, by structure and never by name.

    Arguments:
        model: Any module, on any device; on the meta device its size does not matter. It is left unchanged. It may be
            wrapped (DistributedDataParallel, torch.compile, activation checkpointing, AveragedModel) or sharded (FSDP,
            tensor parallel), as a whole or in some layers: names and rows are those of the model inside, and no rank
            waits for another.
        *args: Positional arguments of one forward call; a few tokens are enough.
        **kwargs: Keyword arguments of that call.

    Returns:
        The layout. Every attention is in `sites`, or in `skipped` with a reason. Parameters that the example inputs
        never reached are in `untouched`.

    Raises:
        CaptureError: The forward fails on these inputs.

    Example:
        >>> import torch
        >>> layer = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        >>> x = torch.zeros(1, 3, 8)
        >>> site = find_qk_pairs(layer, x, x, x).sites[0]
        >>> site.kind, site.query[0].param, site.query[0].heads, site.key[0].heads
        ('mha', 'in_proj_weight', (((0, 4),), ((4, 8),)), (((8, 12),), ((12, 16),)))
    """
    return find(model, args, kwargs).layout


def find(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    progress: Callable[[str], None] | None = None,
    recording: Capture | None = None,
) -> Found:
    """Like `find_qk_pairs`, but also report how the layout was found.

    Arguments:
        model: The model.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        progress: Called with a short text when a new stage begins.
        recording: An existing recording of this call, to be reused.

    Returns:
        The layout, how the forward was recorded, the size of the graph, and timings.
    """
    tell = progress or (lambda text: None)
    tell("recording one forward pass")
    start = time.perf_counter()
    with without_collecting(), unwrapped(model) as inner:
        if recording is None or dumping():
            recorded = capture(inner, args, kwargs, layers_once=True, sources=dumping())
        else:
            recorded = recording
        captured = time.perf_counter()
        try:
            layout = _in_recording(inner, recorded, tell)
        except BehindLayer as behind:
            # The walk reached a layer that was left out of the recording, so record every layer.
            _log.info("recording once more, with every layer: %s", behind)
            tell("recording the forward pass with every layer")
            recorded = capture(inner, args, kwargs, sources=dumping())
            layout = _in_recording(inner, recorded, tell)
        found = Found(
            layout, recorded.way, len(recorded.graph_module.graph.nodes), {}, recorded.canned, recorded.fallback_reason
        )
        if recorded.computed:
            tell("recording again, since the forward reads numbers that it computes")
            del recorded  # one recording at a time is in memory
            others = captured_otherwise(inner, args, kwargs, found.way)
            found = replace(found, layout=_common(layout, [*map(lambda one: _in_recording(inner, one, tell), others)]))
    seconds = {"capture": captured - start, "find": time.perf_counter() - captured}
    return replace(found, seconds=seconds)


def _in_recording(model: nn.Module, recorded: Capture, tell: Callable[[str], None]) -> QKLayout:
    names = tuple(dict.fromkeys(name for name, _ in model.named_parameters()))
    weights = parameters_in(recorded.graph_module, model)
    tell(f"looking for attention in {len(recorded.graph_module.graph.nodes):,} ops")
    return find_in_graph(recorded.graph_module, weights, all_names=names, repeated=recorded.repeated, progress=tell)


def _common(layout: QKLayout, others: Sequence[QKLayout]) -> QKLayout:
    """What does not depend on numbers that the forward computes: the sites with the same rows in every layout.

    A layout without any site of a name says nothing about it: that recording skipped the layer. The logit scale is None
    where it does depend on the numbers, or where that is unknown.
    """
    sites, skipped = list[AttentionSite](), list(layout.skipped)
    for site in layout.sites:
        namesakes = [[one for one in other.sites if one.name == site.name] for other in others]
        counterparts = [same for same in namesakes if same]
        if all(pairs_of(site) in map(pairs_of, same) for same in counterparts):
            scales = {one.logit_scale for same in counterparts for one in same}
            sites.append(site if scales == {site.logit_scale} else replace(site, logit_scale=None))
        else:
            reason = (
                "which weights it reads depends on numbers that the model computes from its weights, or draws at random"
            )
            skipped.append(Skipped(site.name, "computed-route", reason))
    return replace(layout, sites=tuple(sites), skipped=tuple(dict.fromkeys(skipped)))


def find_in_graph(
    graph_module: GraphModule,
    weights: Mapping[Node, str] | None = None,
    *,
    all_names: Sequence[str] = (),
    repeated: Sequence[RepeatedLayer] = (),
    progress: Callable[[str], None] | None = None,
) -> QKLayout:
    """Find the layout of an ATen graph: one of our recordings, or one from torch.export or make_fx.

    Arguments:
        graph_module: The graph; its nodes carry `meta["val"]`.
        weights: Name of each node that is a parameter. Default: `get_attr` nodes that are parameters of `graph_module`.
        all_names: Names of all parameters of the model; those that no op reads are reported as untouched.
        repeated: Layers that are a single node of the graph; each gets the sites of the recorded layer that it equals.
        progress: Called with a short text as the search advances.

    Returns:
        The layout.
    """
    return Finding(graph_module, weights).layout(all_names, repeated, progress)


class Finding:
    """The search through one graph.

    Arguments:
        graph_module: The graph.
        weights: Name of each node that is a parameter. Default: `get_attr` nodes that are parameters of `graph_module`.
        each: Trace every attention, even one that equals another, so that `understood` holds the logits, site and
            heads of all of them.
    """

    def __init__(self, graph_module: GraphModule, weights: Mapping[Node, str] | None, *, each: bool = False) -> None:
        self._df = Dataflow(graph_module, own_parameters(graph_module) if weights is None else weights)
        self._each = each
        logits, self._misses = find_logits(self._df)
        _log.info("%d nodes, %d softmaxes that weigh products", len(self._df.nodes), len(logits))
        dump("graph", ".py", lambda: graph_module.print_readable(print_output=False))
        self.attentions = Attentions(self._df, logits, explaining=dumping())
        self.understood: list[tuple[Logits, AttentionSite, Heads]] = []

    def layout(
        self,
        all_names: Sequence[str] = (),
        repeated: Sequence[RepeatedLayer] = (),
        progress: Callable[[str], None] | None = None,
    ) -> QKLayout:
        """Return the layout; for the arguments see `find_in_graph`."""
        df, attentions, misses = self._df, self.attentions, self._misses
        sites: list[tuple[Node, AttentionSite]] = []
        layers, repeats = LeftOut(df, repeated), Repeats(df)
        for one in attentions:
            if progress is not None and len(sites) % 10 == 0:
                count = len(sites) + attentions.left + 1
                progress(f"following the weight rows of attention {len(sites) + 1} of {count}")
            known = None if self._each else repeats.find(one)
            if known is not None:
                _log.debug("%s: equal to an attention that is understood", known.name)
                sites.append((one.output, known))
                continue
            try:
                site, heads = attentions.look_at(one)
            except NotOneAttention:
                _log.debug("%s: no loop over heads; each iteration is an attention", df.home(one.output))
                continue
            except Refused as refusal:
                misses.append(NearMiss(one.products[-1].node, refusal.code, refusal.reason))
            else:
                sites.append((one.output, site))
                self.understood.append((one, site, heads))
                repeats.remember(one, site, attentions.tracer.basis)
            layers.check(one, attentions.tracer.basis.all_nodes())
        for explanation in attentions.explanations:
            dump(explanation.name, ".walk.txt", explanation.text)
        skipped = [(miss.node, Skipped(df.home(miss.node), miss.code, miss.reason)) for miss in misses]
        for _, entry in skipped:
            _log.debug("%s: skipped: %s [%s]", entry.name, entry.reason, entry.code)
        reached = layers.all_names({name for node, name in df.weights.items() if node.users})
        return QKLayout(
            sites=tuple(merge_calls(layers.all_sites(sites))),
            skipped=tuple(dict.fromkeys(layers.all_skipped(skipped))),
            untouched=tuple(name for name in all_names if name not in reached),
        )

    def explain(self, name: str) -> tuple[Explanation, ...]:
        """Explain the attentions of the module `name` (as in `sites` or `skipped`); identical ones appear once."""
        found: dict[object, Explanation] = {}
        for one in self.attentions:
            if self._df.home(one.products[-1].node) == name:
                with suppress(NotOneAttention, Refused):
                    self.attentions.look_at(one)
        misses = [explain_miss(self._df, miss) for miss in self._misses if self._df.home(miss.node) == name]
        for explanation in (*self.attentions.explanations, *misses):
            found.setdefault((explanation.site, explanation.code, explanation.reason), explanation)
        return tuple(found.values())


class Attentions:
    """Iterator over the attentions of a graph. If a Python loop turns out not to be over heads, its iterations follow
    as separate attentions."""

    def __init__(self, df: Dataflow, logits: Sequence[Logits], *, explaining: bool = False) -> None:
        self.tracer = Tracer(df)
        self.explaining = explaining
        self.explanations: list[Explanation] = []
        """Explanations of the attentions that `look_at` traced while `explaining` was set."""
        self.uses = Uses(self.tracer, logits)
        self._todo = [*reversed(logits)]

    def __iter__(self) -> Iterator[Logits]:
        while self._todo:
            yield self._todo.pop()

    @property
    def left(self) -> int:
        """Number of attentions still to come."""
        return len(self._todo)

    def look_at(self, one: Logits) -> tuple[AttentionSite, Heads]:
        """Return site and heads of one attention, and leave the nodes they were derived from in `tracer.basis`.

        Raises:
            NotOneAttention: It is several attentions, which the iteration yields next.
            Refused: Its weight rows cannot be determined.
        """
        tracer = self.tracer
        tracer.basis = Basis()
        tracer.trail = trail = Trail(tracer.labels, tracer.projections) if self.explaining else None
        try:
            heads = find_heads(tracer, one)
            site = make_site(tracer, one, heads, self.uses)
        except NotOneAttention:
            self._todo += one.parts[::-1]
            raise
        except Refused as refusal:
            if trail is not None:
                self.explanations.append(explain_refusal(tracer.df, trail, one, refusal))
            raise
        if trail is not None:
            self.explanations.append(explain_site(tracer.df, trail, one, site, heads))
        return site, heads

    def understood(self) -> Iterator[tuple[Logits, AttentionSite, Heads]]:
        """Yield the attentions whose weight rows can be determined, each with its site and heads."""
        for one in self:
            try:
                site, heads = self.look_at(one)
            except (NotOneAttention, Refused):
                continue
            yield one, site, heads

    def value_norms(self, one: Logits) -> list[NormTag]:
        """Norms between the value projections of an attention and the product with its attention weights."""
        values = values_of(self.tracer, one)
        flows = self.tracer.trace(values)
        return [tag for value in values if value in flows for tag in flows[value].norms]


def find_each(graph_module: GraphModule, weights: Mapping[Node, str] | None = None) -> tuple[Finding, QKLayout]:
    """Search any ATen graph and trace every attention in it; for the arguments see `find_in_graph`."""
    finding = Finding(graph_module, weights, each=True)
    return finding, finding.layout([name for name, _ in graph_module.named_parameters()])


def explain(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    name: str,
    progress: Callable[[str], None] | None = None,
) -> tuple[Explanation, ...]:
    """Explain how the attentions of one module were traced, or at which node the walk stopped.

    Arguments:
        model: The model.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        name: Name of the module in the layout's `sites` or `skipped`.
        progress: Called with a short text when a new stage begins.

    Returns:
        An explanation for each attention of that module; a shared one that runs several times is explained once.

    Example:
        >>> layer, x = torch.nn.MultiheadAttention(8, 2), torch.zeros(3, 1, 8)
        >>> [walk.operand for walk in explain(layer, (x, x, x), {}, "")[0].walks]
        ['query', 'key']
    """
    tell = progress or (lambda text: None)
    tell("recording one forward pass with its lines of Python")
    with without_collecting(), unwrapped(model) as inner:
        graph_module = capture(inner, args, kwargs, sources=True).graph_module
        finding = Finding(graph_module, parameters_in(graph_module, inner))
        finding.attentions.explaining = True
        tell(f"following the weight rows of {name or 'the model itself'}")
        return finding.explain(name)


def attentions_of(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, real: bool = False
) -> Attentions:
    """Attentions of one call of a model; with `real`, every node of its graph has a real value."""
    with unwrapped(model) as inner:
        graph_module = capture(inner, args, kwargs, real=real).graph_module
        df = Dataflow(graph_module, parameters_in(graph_module, inner))
    return Attentions(df, find_logits(df)[0])


Pairs = tuple[tuple[WeightBlock, ...], tuple[WeightBlock, ...], tuple[LogitTerm, ...]]
"""Identity of an attention: query blocks, key blocks and terms, but not norms, which may be removed."""


def pairs_of(site: AttentionSite) -> Pairs:
    """Identity of a site, independent of its norms."""
    return site.query, site.key, site.terms


def indices_of_sites(layout: QKLayout) -> dict[Pairs, int]:
    """Index of each attention in `layout.sites`."""
    return {pairs_of(site): i for i, site in enumerate(layout.sites)}


def parameters_in(graph_module: GraphModule, model: nn.Module) -> dict[Node, str]:
    """Name of each node of one of our recordings that is a parameter of the recorded model."""
    names = {name for name, _ in model.named_parameters()}
    return {n: str(n.target) for n in graph_module.graph.nodes if n.op == "get_attr" and str(n.target) in names}


def own_parameters(graph_module: GraphModule) -> dict[Node, str]:
    """Name of each node that is a parameter of its graph module; the first name of a tied parameter."""
    first = {id(p): name for name, p in graph_module.named_parameters()}
    named = dict(graph_module.named_parameters(remove_duplicate=False))
    return {
        n: first[id(named[str(n.target)])]
        for n in graph_module.graph.nodes
        if n.op == "get_attr" and str(n.target) in named
    }
