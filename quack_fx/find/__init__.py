"""Find every query/key pair of a model by the structure of its graph, never by names.

In: a model and example inputs, or an ATen graph of it. Out: a `QKLayout` and, for graph rewrites, the nodes and heads
of each attention.

    search.py       entry points: a model, a recording or a graph -> a layout
    dumps.py        optional files of intermediate results
    attention.py    where a graph computes attention logits
    explanation.py  how one attention was traced, node by node
    grouped.py      softmax over groups of entries, as in attention over the edges of a graph
    provenance/     which weight rows produce each operand of the logits

Code outside this folder imports the names below from `quack_fx.find`, and nothing from its files.
"""

from __future__ import annotations

from quack_fx.find.attention import Logits, Product, fused_scale
from quack_fx.find.dumps import dump
from quack_fx.find.provenance.flow import NormOp, NormTag
from quack_fx.find.provenance.heads import Heads
from quack_fx.find.provenance.projections import Projection
from quack_fx.find.provenance.vectors import Vector
from quack_fx.find.search import (
    Attentions,
    Finding,
    Found,
    Pairs,
    attentions_of,
    explain,
    find,
    find_each,
    find_in_graph,
    find_qk_pairs,
    indices_of_sites,
    own_parameters,
    pairs_of,
    parameters_in,
)

__all__ = [
    "Attentions",
    "Finding",
    "Found",
    "Heads",
    "Logits",
    "NormOp",
    "NormTag",
    "Pairs",
    "Product",
    "Projection",
    "Vector",
    "attentions_of",
    "dump",
    "explain",
    "find",
    "find_each",
    "find_in_graph",
    "find_qk_pairs",
    "fused_scale",
    "indices_of_sites",
    "own_parameters",
    "pairs_of",
    "parameters_in",
]
