"""A graph of a model -> its layout: every query/key pair, by structure and never by name.

In: a model and example inputs, or an ATen graph of it. Out: a `QKLayout`, and for those who rewrite graphs what was
understood of each attention.

    search.py       the calls: a model, a recording or a graph in, a layout out
    dumps.py        files of what was made on the way, where they are asked for
    attention.py    where a graph makes attention logits
    explanation.py  how one attention was understood, node by node
    grouped.py      softmaxes over groups of entries, as attention over the edges of a graph has them
    provenance/     which weight rows each operand of the logits is made of

Code outside this folder imports the names below, and nothing from its files.
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
