"""Strips the QK norms of every model of the installed packages that has them, in both ways, and checks the results.

    python -m benchmarks.strip                          the models whose row in .sweep/rows.jsonl has a QK norm
    python -m benchmarks.strip --only swin --markdown docs/qk_norm.md

For each model, the norms are removed from its modules in place, and from an executable graph of it. After either, find
must report the same rows and no QK norm at the stripped sites. The output of the stripped modules must be bitwise that
of the original model with a hook on each removed norm that returns its input. If both ways removed the same norms, the
outputs of graph and modules must agree to 1e-5 of the largest output. A model that does not fit into one graph and
keeps a norm in its modules is compiled with the backend quack_fx: the graphs from Dynamo must contain all of its
attentions, none with a QK norm.

Then RMS norms are inserted at the stripped sites, by module or, if that is impossible, by graph; "normed again" counts
the sites at which find reports them. After these are removed, the output must be bitwise what it was before.

Exit status 1 if any of these checks fails. Norms that stay are listed with the reason.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_flatten

from benchmarks.sweep import candidates, key_of
from benchmarks.sweeping.candidate import Candidate
from benchmarks.sweeping.processes import Tell, run_apart
from quack_fx.errors import CaptureError
from quack_fx.find import find_in_graph, find_qk_pairs
from quack_fx.graph.capture import capture
from quack_fx.layout import AttentionSite, QKLayout
from quack_fx.qk_norm.dynamo import quack_fx
from quack_fx.qk_norm.insert import insert_qk_norm
from quack_fx.qk_norm.strip import StripReport, strip_qk_norm

Row = dict[str, Any]
SECONDS, BYTES = 240, 6 << 30


def main() -> int:
    """Strip all models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path(".sweep/rows.jsonl"), help="rows of the sweep")
    parser.add_argument("--only", default="", help="regular expression that family/name must contain")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (default: 2)")
    parser.add_argument("--json", type=Path, default=Path(".sweep/strip.jsonl"), help="where the rows go")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    normed = {key_of(row) for row in map(json.loads, options.rows.read_text().splitlines()) if row.get("qk_norm")}
    todo = [one for one in candidates(options.only) if (one.package, one.family, one.name) in normed]
    rows: list[Row] = []
    with options.json.open("w") as out:
        for ended in run_apart(judge, todo, options.jobs, SECONDS, BYTES):
            row = ended.told or {"wrong": []}
            row |= {"wrong": [*row["wrong"], ended.reason]} if ended.reason else {}
            rows.append(row | {k: getattr(ended.item, k) for k in ("package", "family", "name")})
            out.write(json.dumps(rows[-1]) + "\n")
            out.flush()
            print(f"{len(rows)}/{len(todo)} {ended.item.name} {'; '.join(row['wrong']) or 'right'}", file=sys.stderr)
    if options.markdown:
        options.markdown.write_text(markdown(rows))
    return 1 if any(row["wrong"] for row in rows) else 0


# ---- one model -------------------------------------------------------------------------------------------------------


def judge(candidate: Candidate, tell: Tell) -> None:
    """Strip a model both ways; report the norms removed, the norms kept, and errors."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    row: Row = {
        "wrong": [],
        "kinds": [],
        "sites": 0,
        "by_module": 0,
        "by_graph": 0,
        "left": [],
        "no_graph": "",
        "by_backend": 0,
        "again": 0,
    }
    tell(row)
    model, args, kwargs = candidate.build()
    layout = find_qk_pairs(model, *args, **kwargs)
    normed = [i for i, site in enumerate(layout.sites) if site.qk_norm]
    row |= {
        "sites": len(normed),
        "kinds": sorted({f"{n.kind} over {_width(n.width, s.head_dim)}" for s in layout.sites for n in s.qk_norm}),
    }
    twin = copy.deepcopy(model)
    report = strip_qk_norm(twin, layout, scale="keep")
    by_module = _stripped(layout, report)
    row |= {"by_module": len(by_module), "left": [left.reason for left in report.left]}
    found = find_qk_pairs(twin, *args, **kwargs)
    row["wrong"] += _differences("modules", layout, found, by_module)
    expected = outputs(_hooked(copy.deepcopy(model), report), args, kwargs)
    if not _equal(outputs(twin, args, kwargs), expected):
        row["wrong"].append("modules: not what hooks on the norms give")
    inputs = args if not kwargs else kwargs if not args else None  # few forwards are called with both
    inserted = insert_qk_norm(twin, report.layout, inputs=inputs)
    again = _normed_again(layout, find_qk_pairs(twin, *args, **kwargs), by_module)
    inserted.restore()
    if not _equal(outputs(twin, args, kwargs), expected):
        row["wrong"].append("modules: norms put in and stripped again leave something behind")
    row |= {"again": len(again)}
    tell(row)
    try:
        graph = capture(model, args, kwargs, executable=True).graph_module
    except CaptureError as error:
        row |= {"no_graph": str(error)}
        if len(by_module) < len(normed):
            row |= {"by_backend": _by_backend(model, args, kwargs, layout)}
        return tell(row)
    graph_layout = find_in_graph(graph)
    stripped = strip_qk_norm(graph, scale="keep")
    by_graph = _stripped(graph_layout, stripped)
    row |= {"by_graph": len(by_graph)}
    row["wrong"] += _differences("graph", graph_layout, stripped.layout, set())
    row["wrong"] += _differences("graph", graph_layout, find_in_graph(stripped.model), by_graph)  # type: ignore[arg-type]
    row["left"] += [f"in the graph: {left.reason}" for left in stripped.left]
    normed_graph = insert_qk_norm(stripped.model)
    again_in_graph = _normed_again(graph_layout, normed_graph.layout, by_graph)
    row |= {"again": max(row["again"], len(again_in_graph)), "put_in": [left.reason for left in normed_graph.left]}
    back = strip_qk_norm(normed_graph.model, scale="keep").model
    if again_in_graph == set(normed) and not _equal(*(outputs(g, args, kwargs) for g in (back, stripped.model))):
        row["wrong"].append("graph: norms put in and stripped again leave something behind")
    if len(by_graph) == len(by_module) == len(normed):
        # Restore the scales: the factors that an L2 norm module multiplies with stay in the graph.
        twin = copy.deepcopy(model)
        strip_qk_norm(twin, layout)
        ours = outputs(strip_qk_norm(graph).model, args, kwargs)
        if not all(map(_close, ours, outputs(twin, args, kwargs))):
            row["wrong"].append("the two ways compute different things")
    return tell(row)


def _by_backend(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], layout: QKLayout) -> int:
    """Number of attentions without their QK norms when the model is compiled; 0 unless all attentions are seen."""
    sites: list[AttentionSite] = []

    def look(graph: GraphModule, given: Sequence[Any], **_: Any) -> GraphModule:
        placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
        weights = {n: n.name for n, x in zip(placeholders, given, strict=True) if isinstance(x, nn.Parameter)}
        sites.extend(find_in_graph(graph, weights).sites)
        return graph

    compiled = torch.compile(model, backend=quack_fx, dynamic=False, options={"backend": look})
    with torch.no_grad():
        compiled(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    if len(sites) != len(layout.sites) or any(site.qk_norm for site in sites):
        return 0
    return sum(bool(site.qk_norm) for site in layout.sites)


def _width(width: int, head_dim: int) -> str:
    return "a head" if width == head_dim else "more than a head" if width > head_dim else "part of a head"


def _stripped(layout: QKLayout, report: StripReport) -> set[int]:
    pairs = enumerate(zip(layout.sites, report.layout.sites, strict=True))
    return {i for i, (before, after) in pairs if before.qk_norm and not after.qk_norm}


def _normed_again(before: QKLayout, after: QKLayout, stripped: set[int]) -> set[int]:
    """Stripped sites that now have an RMS norm on both sides."""
    if len(before.sites) != len(after.sites):
        return set()
    return {i for i in stripped if {n.side for n in after.sites[i].qk_norm if n.kind == "rms"} == {"query", "key"}}


def _differences(way: str, before: QKLayout, after: QKLayout, stripped: set[int]) -> list[str]:
    """Differences in the result of find after stripping, except the removed norms of stripped sites."""
    if len(before.sites) != len(after.sites):
        return [f"{way}: {len(after.sites)} sites and not {len(before.sites)}"]
    wrong = []
    for i, (old, new) in enumerate(zip(before.sites, after.sites, strict=True)):
        if (old.query, old.key, old.terms, old.head_map) != (new.query, new.key, new.terms, new.head_map):
            wrong.append(f"{way}: other rows at {old.name!r}")
        if i in stripped and new.qk_norm:
            wrong.append(f"{way}: a QK norm is left at {old.name!r}")
    return wrong


def _hooked(model: nn.Module, report: StripReport) -> nn.Module:
    """The model with a hook on each norm that returns the norm's input."""
    for norm in report.removed:
        model.get_submodule(str(norm.module)).register_forward_hook(_handed_on, with_kwargs=True)
    return model


def _handed_on(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    given = (*args, *kwargs.values())
    return tuple(given[: len(output)]) if isinstance(output, tuple) else given[0]


@torch.no_grad()
def outputs(model: Any, args: Iterable[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors in a model's output."""
    torch.manual_seed(0)
    return [x for x in tree_flatten(model(*copy.deepcopy(args), **copy.deepcopy(kwargs)))[0] if isinstance(x, Tensor)]


def _equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) if a.is_floating_point() else torch.equal(a, b) for a, b in pairs
    )


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point() or not a.numel():
        return a.shape == b.shape
    a, b = a.nan_to_num(), b.nan_to_num()
    return bool((a - b).abs().max() <= 1e-5 * a.abs().max().clamp_min(1e-30))


# ---- the page --------------------------------------------------------------------------------------------------------


def markdown(rows: list[Row]) -> str:
    """The page: totals, the norms that stay and why, and a line for each family."""
    lines = [
        "# QK norms of other packages, taken out and put in again",
        "",
        *__doc__.split("\n\n", 2)[2].strip().splitlines(),
        "",
    ]
    lines += [
        "| package | models with QK norm | sites | by module | by graph | by one of all ways | normed again | "
        "no executable graph | wrong |"
    ]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for package in sorted({row["package"] for row in rows}):
        own = [row for row in rows if row["package"] == package]
        sums = [sum(row[key] for row in own) for key in ("sites", "by_module", "by_graph", "again")]
        sums.insert(3, sum(max(row["by_module"], row["by_graph"], row.get("by_backend", 0)) for row in own))
        lines.append(
            f"| {package} | {len(own)} | {' | '.join(map(str, sums))} | "
            f"{sum(bool(row['no_graph']) for row in own)} | {sum(bool(row['wrong']) for row in own)} |"
        )
    reasons = Counter(re.sub(r"'.*?'", "...", reason) for row in rows for reason in row["left"])
    reasons.update(f"no graph: {re.sub(r'[0-9]+', 'n', row['no_graph'])[:160]}" for row in rows if row["no_graph"])
    lines += ["", "## What stays", "", "| reason | times |", "| --- | --- |"]
    lines += [f"| {reason.replace('|', '/')} | {count} |" for reason, count in reasons.most_common()]
    reasons = Counter(reason for row in rows for reason in row.get("put_in", []))
    lines += ["", "## Where no norm is put into a graph", "", "| reason | times |", "| --- | --- |"]
    lines += [f"| {reason} | {count} |" for reason, count in reasons.most_common()]
    lines += ["", "## Families", "", "| package | family | models | kinds | by module | by graph | sites |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for key in sorted({(row["package"], row["family"]) for row in rows}):
        own = [row for row in rows if (row["package"], row["family"]) == key]
        kinds = ", ".join(sorted({kind for row in own for kind in row["kinds"]}))
        sums = [sum(row[name] for row in own) for name in ("by_module", "by_graph", "sites")]
        lines.append(f"| {key[0]} | {key[1]} | {len(own)} | {kinds} | {sums[0]} | {sums[1]} | {sums[2]} |")
    wrong = [f"- {row['package']} {row['name']}: {what}" for row in rows for what in row["wrong"]]
    return "\n".join([*lines, *(["", "## Wrong", "", *wrong] if wrong else []), ""])


if __name__ == "__main__":
    sys.exit(main())
