"""Proof of a layout by gradients on real numbers.

In: a model, a layout, example inputs. Out: a `VerifyReport`, or `VerifyError` for the first claim that is wrong.

The proof has nothing in common with the finder but the layout, and what lets a forward run on this machine
(`graph/forward`), which knows nothing about rows. A copy of the model runs once on random weights, and every op is
recorded on a tape. Before each softmax there is a product of queries and keys; the slice of the tape that computes its
operands from the input of the attention runs again with gradients. A gradient seeded on one head of the query operand
must reach exactly the claimed query rows, and one on the key operand exactly the claimed key rows. What cannot be
decided, for example because the logits are computed inside a fused kernel, is listed as not proved; it never passes
silently.

    copy.py       a copy of the model on random weights
    tape.py       a record of every op that runs
    opaque.py     fused attention as plain ops
    ops.py        which ops are products, softmaxes, norms
    graph.py      products before a softmax, products with weights before their operands
    owners.py     which softmaxes belong to a site
    replay.py     a slice of the tape run again, with gradients
    heads.py      heads in a tensor of logits; queries and keys
    loops.py      Python loops over heads, with a softmax for each
    evidence.py   seeds of gradients, and the rows they reach
    compare.py    a site against the evidence: rows and heads ...
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

    A copy of the model runs once, in evaluation mode and on random weights, so zero-initialised or trained weights
    hide nothing (a model in training mode that attends more often there runs in that, without dropout); the model
    itself is left as it is. A model on meta is filled with random numbers when it is small. Of a model that is wrapped
    or sharded the module inside is proved, on this process alone: no rank waits for another.

    Arguments:
        model: Model the layout belongs to, plain, wrapped or sharded.
        layout: Claims to check, from `find_qk_pairs` or from JSON.
        *args: Inputs of the model's forward, real tensors; a few positions and two sequences are enough.
        **kwargs: The same by keyword.

    Returns:
        The sites that were proved and those that could not be, with reasons. Look at `complete`.

    Raises:
        LayoutError: The layout does not fit the model.
        VerifyError: A claim is wrong (the message names site, head, side, parameter and rows), or the model is too
            large or cannot be run.

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
    """Run a copy of a model on random weights, in evaluation mode; with `training`, in its own mode except for dropout
    and batch norms.

    Raises:
        CannotRun: It cannot be copied or run.
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
    """Check every site of a layout on a given run; `verify_qk_pairs` without the run.

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
                        continue  # an attention of this module that the layout skips; calls are counted below
                    wrong[softmax] = error
                    refuted.setdefault(softmax, error)
                if softmax in checks:
                    runs.update(heads or range(site.query_heads))
            if idle and len(idle) == len(checks):
                raise next(iter(idle.values()))  # otherwise the other calls have proved the rows
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
    """Every head of a site runs as often as the site says, and at least once."""
    if all(runs.get(head, 0) == site.calls for head in range(site.query_heads)):
        return
    if not runs and errors:
        raise errors[0]
    if not runs:
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
    """Check that a model has the layout's parameters under the layout's names."""
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
    """Leave the process's random state and threads as they were."""
    threads = torch.get_num_threads()
    # A proof is hundreds of tiny backward passes, which a second thread makes slower.
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            yield
    finally:
        torch.set_num_threads(threads)
