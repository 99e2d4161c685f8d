"""ATen ops, grouped into the few kinds that matter for tracing weight rows.

In: a graph node. Out: an `Op`: its base name (without overload and in-place underscore) and its kind. An op that is not
listed here counts as elementwise; the tracer checks that its shapes are consistent with that. The kind "view" covers
every op that only rearranges elements: true views, and also copies, concatenations and gathers.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from torch.fx import Node
from torch.utils._pytree import tree_leaves

Kind = Literal[
    "input", "getitem", "view", "contraction", "convolution", "lookup", "attention", "softmax", "reduction",
    "pooling", "norm", "factory", "elementwise", "layer",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Op:
    """Base name and kind of an op; `inplace` if it writes into its first argument."""

    name: str
    kind: Kind
    inplace: bool = False


FACTORY = frozenset(
    "empty zeros ones full arange eye scalar_tensor rand randn randint tril_indices triu_indices linspace "
    "empty_strided empty_permuted".split()
)
VALUE_FREE = frozenset(
    "zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones new_full new_empty "
    "new_empty_strided sym_size size".split()
)
VIEW = frozenset(
    "view _unsafe_view reshape _reshape_alias permute transpose t numpy_T mT slice select expand cat split "
    "split_with_sizes unsafe_split chunk unbind stack clone contiguous squeeze unsqueeze index_select gather repeat "
    "flip roll as_strided alias detach lift_fresh lift_fresh_copy unfold constant_pad_nd slice_scatter select_scatter "
    "diagonal narrow movedim view_copy slice_copy copy index take_along_dim _to_copy to expand_as view_as reshape_as "
    "flatten unflatten repeat_interleave pixel_shuffle pixel_unshuffle channel_shuffle rot90 tile hstack vstack concat "
    "view_as_complex view_as_real _conj conj resolve_conj resolve_neg real imag copy_ index_put index_put_ "
    "_index_put_impl_ scatter masked_scatter reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d "
    "im2col pad index_copy".split()
)
CONTRACTION = frozenset("mm bmm addmm baddbmm matmul linear mv addmv dot einsum _grouped_mm grouped_mm addbmm".split())
CONVOLUTION = frozenset(
    "convolution _convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d mkldnn_convolution "
    "convolution_overrideable".split()
)
LOOKUP = frozenset("embedding embedding_bag _embedding_bag".split())
SOFTMAX = frozenset("_softmax softmax _safe_softmax".split())
REDUCTION = frozenset(
    "sum mean amax amin max min var var_mean std std_mean norm linalg_vector_norm logsumexp prod argmax argmin topk "
    "sort any all cumsum cumprod median mode kthvalue count_nonzero nansum".split()
)
# Each result depends on a window over the last axes; the digit in the name is their number.
_POOLING = re.compile(r"_?(?:(?:adaptive_|fractional_)?(?:avg|max)_pool|upsample_\w+?|grid_sampler_)([123])d")
NORM = frozenset(
    "native_layer_norm layer_norm _fused_rms_norm rms_norm native_group_norm group_norm native_batch_norm batch_norm "
    "cudnn_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional "
    "_native_batch_norm_legit_no_training _batch_norm_with_update _batch_norm_with_update_functional "
    "instance_norm".split()
)
# Attention ops of torch, and flash kernels that are registered as ops. Their first arguments are q, k, v.
_ATTENTION_MARKS: tuple[str, ...] = ("scaled_dot_product", "flex_attention", "flash_attn", "_flash_attention_forward")
_ATTENTION_MARKS += ("_efficient_attention_forward", "memory_efficient_attention", "varlen_attn")


@lru_cache(maxsize=4096)
def _of_target(target: Any) -> Op:
    if target is operator.getitem or getattr(target, "__name__", "") == "_getitem":
        return Op("getitem", "getitem")
    if getattr(target, "__name__", "") == "equal_layer":
        return Op("equal_layer", "layer")
    full = target.name() if callable(getattr(target, "name", None)) else getattr(target, "__name__", str(target))
    name = full.split("::")[-1].split(".")[0]
    schema = getattr(target, "_schema", None)
    inplace = bool(schema is not None and schema.is_mutable and name.endswith("_") and not name.startswith("__"))
    bare = name.rstrip("_") if inplace else name
    kind: Kind = next((kind for names, kind in _TABLE if bare in names or name in names), "elementwise")
    if any(mark in name for mark in _ATTENTION_MARKS):
        kind = "attention"
    elif _POOLING.match(name):
        kind = "pooling"
    return Op(bare, kind, inplace)


_TABLE: tuple[tuple[frozenset[str], Kind], ...] = (
    (FACTORY | VALUE_FREE, "factory"),
    (VIEW, "view"),
    (CONTRACTION, "contraction"),
    (CONVOLUTION, "convolution"),
    (LOOKUP, "lookup"),
    (SOFTMAX, "softmax"),
    (REDUCTION, "reduction"),
    (NORM, "norm"),
)


def pooled_axes(op: Op) -> int:
    """Number of trailing axes that an op of kind "pooling" runs over."""
    found = _POOLING.match(op.name)
    assert found is not None
    return int(found[1])


def op_of(node: Node) -> Op:
    """Name and kind of a node's op."""
    return _of_target(node.target) if node.op == "call_function" else Op(node.op, "input")


def arguments_of(node: Node) -> dict[str, Any]:
    """Arguments of an ATen op by schema name."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def written_by(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Flat list of the arguments that an op writes into."""
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    given = [args[i] if i < len(args) else kwargs.get(a.name) for i, a in enumerate(schema.arguments)]
    return tree_leaves([x for x, a in zip(given, schema.arguments, strict=True) if a.is_write])


def channels_first(node: Node) -> bool:
    """Whether the gain of a norm op lies along axis 1 of its input instead of the last axes."""
    name = op_of(node).name
    return "batch" in name or "group" in name
