"""Proves a layout by gradients on real numbers.

In: a model, a layout, example inputs. Out: a `VerifyReport`, or `VerifyError` for the first wrong claim.

The proof is independent of the finder: they share only the layout and helpers in `graph/` that know nothing about
weight rows. A copy of the model with random weights runs once, and every op is recorded on a tape. The logits of a
softmax are a product of queries and keys; the slice of the tape that computes one operand of this product from the
attention's input is replayed with gradients. A gradient seeded on one head of the query operand must reach exactly
the claimed query rows, and one seeded on the key operand exactly the claimed key rows. A site that gradients cannot
decide, for example because a fused kernel hides its logits, is reported as not proved.

    copy.py       a copy of the model with random weights
    tape.py       a record of every op that ran
    opaque.py     fused attention as plain ops
    ops.py        which ops are products, softmaxes, norms
    graph.py      the products before each softmax, and the projections upstream of their operands
    owners.py     which softmaxes belong to a site
    replay.py     a slice of the tape run again with gradients
    heads.py      the head of each logit; the query and key operand of a product
    loops.py      Python loops over heads, with one softmax per iteration
    evidence.py   gradient seeds and the rows they reach
    compare.py    checks a site against the evidence: rows and heads ...
    norms.py      ... norms ...
    terms.py      ... and terms
    report.py     what was proved
    form.py       what a proof on a small copy implies for a large model
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_map

from quack_fx.errors import VerifyError, first_line
from quack_fx.graph.capture import unwrapped
from quack_fx.layout import AttentionSite, QKLayout
from quack_fx.layout.fit import check_layout
from quack_fx.prove.compare import check_site
from quack_fx.prove.copy import CannotRun, TooLarge, as_float32, random_copy
from quack_fx.prove.evidence import CannotTell, Evidence, NothingWeighed
from quack_fx.prove.form import carried_over
from quack_fx.prove.graph import Graph
from quack_fx.prove.loops import heads_behind, with_heads
from quack_fx.prove.ops import Softmax
from quack_fx.prove.owners import check_complete, is_told_of, softmaxes_of
from quack_fx.prove.report import NotProved, SiteProof, VerifyReport
from quack_fx.prove.tape import record

__all__ = ["CannotRun", "NotProved", "SiteProof", "TooLarge", "VerifyReport", "carried_over", "verify_qk_pairs"]


def verify_qk_pairs(model: nn.Module, layout: QKLayout, *args: Any, **kwargs: Any) -> VerifyReport:
    """Prove a layout by gradients: each head's logits depend on exactly the rows that the layout claims.

    A copy of the model runs once, in evaluation mode and with random weights: zero-initialised or trained weights could
    hide a dependence. A model in training mode that attends more often there is run in training mode, without dropout.
    The model itself is unchanged. A small model on meta is filled with random numbers. For a wrapped or sharded model,
    the inner module is proved, on this process alone: no rank waits for another.

    Arguments:
        model: Model the layout belongs to, plain, wrapped or sharded.
        layout: Claims to check, from `find_qk_pairs` or from JSON.
        *args: Positional arguments of the model's forward, real tensors; two sequences of a few positions suffice.
        **kwargs: Keyword arguments of the forward.

    Returns:
        The sites that were proved, and those that could not be decided, with reasons. Check `complete`.

    Raises:
        LayoutError: The layout does not fit the model.
        VerifyError: A claim is wrong (the message names site, head, side, parameter and rows), or the model is too
            large or cannot run.

    Example:
        >>> import torch
        >>> from quack_fx.layout import AttentionSite, LogitTerm, WeightBlock
        >>> model = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        >>> def rows(start):
        ...     return tuple(((start + 4 * h, start + 4 * h + 4),) for h in range(2))
        >>> query = WeightBlock("in_proj_weight", "q", 0, rows(0), "in_proj_bias")
        >>> key = WeightBlock("in_proj_weight", "k", 0, rows(8), "in_proj_bias")
        >>> site = AttentionSite("", "mha", False, 1, 2, 2, 4, (0, 1), (query,), (key,), (LogitTerm((0,), (0,)),))
        >>> x = torch.randn(2, 5, 8)
        >>> verify_qk_pairs(model, QKLayout((site,)), x, x, x).complete
        True
    """
    with alone(), unwrapped(model) as inner:
        _check_names(inner, layout)
        try:
            return prove(layout, run_copy(inner, args, kwargs))
        except VerifyError:
            # Some forwards attend more often in training than in evaluation.
            if inner.training and any(site.calls > 1 for site in layout.sites):
                with suppress(VerifyError):
                    return prove(layout, run_copy(inner, args, kwargs, training=True))
            raise


def run_copy(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, training: bool = False) -> Graph:
    """Record a forward of a copy of the model with random weights, in evaluation mode.

    With `training`, it runs in the model's own mode, except for dropout and batch norms.

    Raises:
        CannotRun: The model cannot be copied or run.
    """
    copy = random_copy(model, torch.Generator().manual_seed(0))
    if training:
        for module, original in zip(copy.modules(), model.modules(), strict=True):
            module.training = original.training and not isinstance(module, (_DropoutNd, _BatchNorm))
    args, kwargs = tree_map(as_float32, (args, dict(kwargs)))
    try:
        return Graph(record(copy, args, kwargs))
    except Exception as error:
        raise CannotRun(
            f"the forward of {type(model).__name__} fails on random weights: {first_line(error)}; "
            "give the inputs that find_qk_pairs was given"
        ) from error


def prove(layout: QKLayout, graph: Graph) -> VerifyReport:
    """Check every site of a layout on a recorded run.

    Raises:
        VerifyError: A claim is wrong.
    """
    claims = softmaxes_of(layout, graph)
    check_complete(layout, graph, claims)
    generator = torch.Generator().manual_seed(0)
    proved: list[SiteProof] = []
    open_sites: list[NotProved] = []
    settled: set[Softmax] = set()
    refuted: dict[Softmax, VerifyError] = {}
    claimed = Counter(softmax for softmaxes in claims.values() for softmax in softmaxes)
    for site, softmaxes in claims.items():
        attention = graph.attention_ops(softmaxes)
        looped = len(softmaxes) > site.calls and site.query_heads > 1
        runs: Counter[int] = Counter()
        checks: dict[Softmax, int] = {}
        wrong: dict[Softmax, VerifyError] = {}
        idle: dict[Softmax, CannotTell] = {}
        try:
            for softmax in softmaxes:
                heads = heads_behind(graph, site, softmax, attention, generator) if looped else ()
                try:
                    shown = with_heads(site, heads) if heads else site
                    checks[softmax] = check_site(Evidence(graph, shown, softmax, attention, generator))
                except CannotTell as reason:
                    if not isinstance(reason, NothingWeighed) and softmax.shape[softmax.dim] > 1:
                        raise
                    idle[softmax], checks[softmax] = reason, 0
                except VerifyError as error:
                    # One module may have two attentions: a site that is wrong for one may be right for the other.
                    if claimed[softmax] == 1 and not (len(softmaxes) > site.calls and is_told_of(layout, softmax)):
                        raise
                    if claimed[softmax] == 1:
                        continue  # an attention of this module that the layout skips; _check_calls counts the others
                    wrong[softmax] = error
                    refuted.setdefault(softmax, error)
                if softmax in checks:
                    runs.update(heads or range(site.query_heads))
            if idle and len(idle) == len(checks):
                raise next(iter(idle.values()))  # no other call proves the rows
            if taken := [s.modules[-1] for s in checks if s in settled]:
                raise VerifyError(f"site {site.name!r}: another site has the attention in module {taken[0]!r} already")
            settled |= checks.keys()
            _check_calls(graph, site, runs, [e for s, e in wrong.items() if s not in settled])
            proved.append(SiteProof(site.name, site.query_heads, len(checks), sum(checks.values())))
        except CannotTell as reason:
            settled.update(softmaxes)
            open_sites.append(NotProved(site.name, str(reason)))
    if nobodys := [error for softmax, error in refuted.items() if softmax not in settled]:
        raise nobodys[0]
    return VerifyReport(tuple(proved), tuple(open_sites))


def _check_calls(graph: Graph, site: AttentionSite, runs: Mapping[int, int], errors: Sequence[VerifyError]) -> None:
    """Check that every head of a site runs as often as the layout claims."""
    if all(runs.get(head, 0) == site.calls for head in range(site.query_heads)):
        return
    if not runs:
        if errors:
            raise errors[0]
        params = {block.param for _, block in site.blocks()}
        if opaque := graph.opaque_ops(params):
            raise CannotTell(f"its logits are made inside the op {opaque[0].func}, which cannot be written out")
        raise VerifyError(
            f"site {site.name!r}: no softmax runs there whose logits come out of {min(params, default='')!r}"
        )
    head = next(head for head in range(site.query_heads) if runs.get(head, 0) != site.calls)
    which = "it" if len(set(runs.values())) == 1 and len(runs) == site.query_heads else f"its head {head}"
    raise VerifyError(
        f"site {site.name!r}: {which} runs {runs.get(head, 0)} times in a forward pass, the layout claims {site.calls}"
    )


def _check_names(model: nn.Module, layout: QKLayout) -> None:
    """Check that the layout fits the model and uses its parameter names."""
    check_layout(layout, model)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for site in layout.sites:
        for _, block in site.blocks():
            if block.param not in names:
                raise VerifyError(
                    f"site {site.name!r} names {block.param!r} as a wrapper does; find the pairs on the model itself"
                )


@contextmanager
def alone() -> Iterator[None]:
    """Restore the process's random state and thread count at the end."""
    threads = torch.get_num_threads()
    # A second thread slows down hundreds of tiny backward passes.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        torch.set_num_threads(threads)
