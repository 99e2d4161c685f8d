"""Find where a graph computes attention logits.

In: the dataflow of a graph. Out: one `Logits` for each softmax (or fused attention op) that turns products of queries
and keys into attention weights, and a `NearMiss` with a reason for each node that looks like attention but is not
supported.

A product of two activations is attention logits if it reaches a softmax through elementwise and view ops, and the
softmax's result enters another product of two activations. This excludes routers (their logits are data times a weight)
and CLIP's similarity (its softmax multiplies no values).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor
from torch.fx import Node

from quack_fx.find.grouped import Groups, groups_of, scattered, scatters
from quack_fx.graph.dataflow import Dataflow, factors_of

_PASS_THROUGH = ("view", "elementwise", "getitem", "norm")


@dataclass(frozen=True)
class Product:
    """One product of queries and keys.

    Attributes:
        node: The product; its result is the logits, or part of them.
        left: Left operand, [..., M, K].
        right: Right operand, [..., K, N] for "matmul"; in the other forms it has the axis order of `left`.
        form: "matmul"; "bilinear" for an elementwise product summed over an axis; "fused" for an attention op on
            [..., tokens, K]; "fused-tokens-first" for one on [..., tokens, heads, K].
    """

    node: Node
    left: Node
    right: Node
    form: Literal["matmul", "bilinear", "fused", "fused-tokens-first"] = "matmul"


@dataclass(frozen=True)
class Logits:
    """The logits of one attention.

    Attributes:
        products: Products whose sum or concatenation is the logits.
        path: Nodes from the products to the softmax's input.
        end: The softmax's input; for a fused op, the op itself.
        axis: Axis of `end` that the softmax runs over: the keys.
        groups: Set if the softmax runs separately over groups of entries along that axis.
        output: Product of the attention weights and the values; for a fused op, the op itself.
        siblings: Outputs of attentions of the same form in the same module call.
        parts: The iterations of a Python loop over heads, each with its own logits and softmax; their outputs are
            concatenated. `products` and `path` combine those of all iterations.
    """

    products: tuple[Product, ...]
    path: tuple[Node, ...]
    end: Node
    axis: int
    output: Node
    siblings: tuple[Node, ...] = ()
    parts: tuple[Logits, ...] = ()
    groups: Groups | None = None


@dataclass(frozen=True)
class NearMiss:
    """A node that looks like attention but is not supported, with the code of the reason and a sentence."""

    node: Node
    code: str
    reason: str


class Refused(Exception):
    """An attention whose weight rows cannot be determined.

    Attributes:
        code: Machine-readable reason.
        reason: The reason as one sentence for users.
        node: Node at which the problem was detected.
    """

    def __init__(self, code: str, reason: str, node: Node) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.node = node


class NotOneAttention(Exception):
    """The iterations of a Python loop are not heads of one attention, but chunks of the sequence, for example."""


def find_logits(df: Dataflow) -> tuple[list[Logits], list[NearMiss]]:
    """Return all attention logits of a graph in execution order, and the near misses."""
    found: list[Logits] = []
    misses: list[NearMiss] = []
    soft = [softmax for node in df.nodes if (softmax := _softmax(df, node)) is not None]
    outputs: dict[Node, Node | None] = {}
    for softmax in soft:
        weighted = _multiplied_with_data if softmax.groups is None else _weighted_in_groups
        outputs[softmax.node] = weighted(df, softmax.node)
    value_products = {output for output in outputs.values() if output is not None}
    used: set[Node] = set()
    for softmax in soft:
        node, end, axis = softmax.node, softmax.source, softmax.axis
        output = outputs[node]
        if output is None and (df.shape(end)[axis] != 1 or not _is_read(df, node)):
            continue
        products, path, learned = _behind(df, softmax, value_products)
        if output is None:
            if products:
                text = "its softmax runs over a single key on these inputs, so nothing is weighed; give larger inputs"
                misses.append(NearMiss(node, "one-key", text))
            continue
        used.update(p.node for p in products)
        if products:
            content = tuple(_content(df, products))
            found.append(Logits(content, tuple(path), end, axis, output, groups=softmax.groups))
        elif learned is not None:
            text = "its queries or keys are a parameter itself, not the output of a projection"
            misses.append(NearMiss(learned, "learned-query", text))
        elif node in df.from_input:
            text = (
                "its softmax weighs values, but its logits are not a product of queries and keys (additive attention, "
                "attention pooling, or linear attention with a softmax of its own for the keys)"
            )
            misses.append(NearMiss(node, "additive-attention", text))
    for node in df.nodes:
        if df.op[node].kind == "attention" and node in df.activation:
            found.extend(_fused(df, node, misses))
    misses.extend(_without_softmax(df, used | value_products))
    found.sort(key=lambda logits: df.index[logits.output])
    return sorted(_with_siblings(df, found), key=lambda one: df.index[one.output]), misses


def _with_siblings(df: Dataflow, found: list[Logits]) -> list[Logits]:
    """Set the siblings of each attention, and merge the iterations of a Python loop over heads into one attention."""
    calls: dict[object, list[Node]] = {}
    loops: dict[object, list[Logits]] = {}
    for one in found:
        calls.setdefault(_call(df, one), []).append(one.output)
    for one in found:
        one = replace(one, siblings=tuple(n for n in calls[_call(df, one)] if n is not one.output))
        joined = _put_into(df, one.output)
        key = (df.modules(one.end), *_form(df, one), joined) if joined is not None else one.end
        loops.setdefault(key, []).append(one)
    return [parts[0] if len(parts) == 1 else _loop(parts) for parts in loops.values()]


def _call(df: Dataflow, one: Logits) -> tuple[object, ...]:
    # Our recordings create one nn_module_stack object per module call.
    return (id(one.end.meta.get("nn_module_stack")), *_form(df, one))


def _form(df: Dataflow, one: Logits) -> tuple[object, ...]:
    return df.shape(one.end), len(one.products)


def _loop(parts: list[Logits]) -> Logits:
    return replace(
        parts[-1],
        products=tuple(product for one in parts for product in one.products),
        path=tuple(dict.fromkeys(node for one in parts for node in one.path)),
        parts=tuple(parts),
    )


def _put_into(df: Dataflow, output: Node) -> Node | None:
    """Return the concatenation or buffer that an attention's output goes into through view ops alone, or None."""
    node = output
    while True:
        if df.op[node].name in ("cat", "stack"):
            return node
        if df.group[node] in df.writes and node is not output:
            return df.group[node]
        users = [user for user in node.users if user.op == "call_function"]
        if len(users) != 1 or df.op[users[0]].kind not in ("view", "getitem"):
            return None
        node = users[0]


# ---- softmax ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Softmax:
    """A softmax: its node (the exponential, if written out), its input, its axis, and groups along that axis."""

    node: Node
    source: Node
    axis: int
    groups: Groups | None = None


def _softmax(df: Dataflow, node: Node) -> _Softmax | None:
    """Match a node as a softmax: one op, exp(x) / sum(exp(x)), exp(x - logsumexp(x)), or exp over sums by group."""
    if node not in df.activation:
        return None
    if df.op[node].kind == "softmax":
        source, axis = node.args[0], node.args[1]
        known = isinstance(source, Node) and isinstance(axis, int)
        return _Softmax(node, source, axis % len(df.shape(source))) if known else None  # type: ignore[arg-type, operator]
    if df.op[node].name != "exp" or not isinstance(node.args[0], Node):
        return None
    source = node.args[0]
    for user in node.users:
        if df.op[user].name == "sum" and (axis := _axis(df, user, source)) is not None:
            return _Softmax(node, source, axis)
    for inner in source.all_input_nodes:
        if df.op[inner].name == "logsumexp" and (axis := _axis(df, inner, source)) is not None:
            return _Softmax(node, source, axis)
    groups = groups_of(df, node)
    return None if groups is None else _Softmax(node, source, groups.axis, groups)


def _is_read(df: Dataflow, node: Node) -> bool:
    """Whether an op other than a view op reads a node or a view of it."""
    return any(df.op[user].kind not in ("view", "getitem") or _is_read(df, user) for user in node.users)


def _axis(df: Dataflow, reduction: Node, source: Node) -> int | None:
    dims = reduction.args[1] if len(reduction.args) > 1 else None
    dims = [dims] if isinstance(dims, int) else dims
    one = isinstance(dims, list | tuple) and len(dims) == 1 and isinstance(dims[0], int)
    return int(dims[0]) % len(df.shape(source)) if one else None  # type: ignore[index, arg-type]


def _weighted_in_groups(df: Dataflow, exponential: Node) -> Node | None:
    """Return the elementwise product of attention weights with data that is then summed by group, or None."""
    seen: set[Node] = set()
    todo = [exponential]
    while todo:
        for user in todo.pop(0).users:
            if user in seen or user not in df.activation or df.op[user].kind not in _PASS_THROUGH:
                continue
            seen.add(df.open(user))
            both = len([n for n in user.all_input_nodes if n in df.activation]) == 2
            if df.op[user].name == "mul" and both and scattered(df, user) is not None:
                return user
            todo.append(user)
            todo.extend(df.writes.get(df.group[user], ()) if df.op[user].inplace else ())
    return None


def _multiplied_with_data(df: Dataflow, softmax: Node) -> Node | None:
    """Return the product of a node with data, reached through view, elementwise and norm ops, or None."""
    seen: set[Node] = set()
    mixed: set[Node] = set()  # results that combine the weights with other data: mostly in a router
    todo = [softmax]
    while todo:
        node = todo.pop(0)
        for user in node.users:
            if user in seen or user not in df.activation:
                continue
            seen.add(user)
            op = df.op[user]
            if node in mixed or sum(n in df.activation for n in user.all_input_nodes) > 1:
                mixed.add(user)
            elif df.op[softmax].kind != "contraction":
                df.open(user)
            if _is_product(df, user) or _is_bilinear(df, user):
                return user
            if op.kind in _PASS_THROUGH and not (op.name == "mul" and _summed(df, user)):
                todo.append(user)
                todo.extend(df.writes.get(df.group[user], ()) if op.inplace else ())
            elif op.name == "mul":
                return next(u for u in user.users if df.op[u].name in ("sum", "mean"))
            elif _keeps_logits(df, user) is not None:
                todo.append(user)
    return None


def _summed(df: Dataflow, mul: Node) -> bool:
    """Whether a product of two activations is then summed: attention weights times values, written elementwise."""
    both = [n for n in mul.all_input_nodes if n in df.activation]
    return len(both) == 2 and any(df.op[u].name == "sum" for u in mul.users)


# ---- products --------------------------------------------------------------------------------------------------------


def _is_product(df: Dataflow, node: Node) -> bool:
    """Whether a node is a contraction of data with data: activations, or tensors for which `is_given` is true."""
    if df.op[node].kind != "contraction":
        return False
    sides = factors_of(df, node)
    return sides is not None and all(n in df.activation or df.is_given(n) for n in sides[:2])


def _is_bilinear(df: Dataflow, node: Node) -> bool:
    """Whether a node sums an elementwise product of two activations."""
    source = node.args[0] if node.args else None
    if df.op[node].name != "sum" or not isinstance(source, Node) or df.op[source].name != "mul":
        return False
    factors = [n for n in source.all_input_nodes if n in df.activation]
    return len(factors) == 2 and all(len(df.shape(n)) == len(df.shape(source)) for n in factors)


def _keeps_logits(df: Dataflow, node: Node) -> Node | None:
    """Return the data operand of a product with a square weight that mixes heads (talking heads), or None."""
    if df.op[node].kind not in ("contraction", "convolution"):
        return None
    sides = factors_of(df, node)
    if sides is None:
        return None
    x, weight = (sides[0], sides[1]) if df.is_weight(sides[1]) else (sides[1], sides[0])
    if not df.is_weight(weight) or x not in df.activation or (len(df.shape(x)) < 3 and df.op[node].name != "mm"):
        return None
    same = df.shape(x).numel() == df.shape(node).numel()
    return x if same and len({n for n in df.shape(weight) if n > 1}) <= 1 else None


def _behind(
    df: Dataflow, softmax: _Softmax, value_products: set[Node]
) -> tuple[list[Product], list[Node], Node | None]:
    """Walk back from a softmax to the products in its input.

    Returns:
        The products, the nodes in between, and a batched product of data with a parameter if there is one.
    """
    products: list[Product] = []
    path: list[Node] = []
    learned: Node | None = None
    seen: set[Node] = set()
    todo = list(df.reads(softmax.node))
    while todo:
        node = todo.pop()
        if node in seen or not _may_be_logits(df, node) or (softmax.groups is not None and scatters(df, node)):
            continue
        seen.add(df.open(node))
        if _is_product(df, node):
            if node not in value_products:
                left, right, added = factors_of(df, node)  # type: ignore[misc]
                products.append(Product(node, left, right))
                path.append(node)
                todo.extend([added] if added is not None else [])
        elif _is_bilinear(df, node):
            left, right = (n for n in node.args[0].all_input_nodes if n in df.activation)  # type: ignore[union-attr]
            products.append(Product(node, left, right, "bilinear"))
            path.append(node)
        elif df.op[node].kind in (*_PASS_THROUGH, "factory") or df.op[node].name in ("cumsum", "cumprod"):
            path.append(node)
            todo.extend(df.reads(node))
        elif (x := _keeps_logits(df, node)) is not None:
            path.append(node)
            todo.append(x)
        elif df.op[node].kind == "contraction" and any(df.is_weight(n) for n in node.all_input_nodes):
            # A batched product of data with a parameter: attention with learned queries.
            batched = df.op[node].name in ("bmm", "baddbmm", "matmul") and len(df.shape(node)) > 2
            learned = node if batched else learned
    products.sort(key=lambda p: df.index[p.node])
    return products, path, learned


def _may_be_logits(df: Dataflow, node: Node) -> bool:
    """Whether a node can hold logits. Booleans cannot, so the walk stops at a mask computed from products."""
    value = df.value(node)
    floating = not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex()
    return floating and (node in df.activation or df.group[node] in df.writes)


def _content(df: Dataflow, products: list[Product]) -> list[Product]:
    """Drop products with learned queries or positions, unless there are no products of data with data."""
    sides = [(p.left in df.from_input) + (p.right in df.from_input) for p in products]
    return [p for p, n in zip(products, sides, strict=True) if n == max(sides)]


def _fused(df: Dataflow, node: Node, misses: list[NearMiss]) -> list[Logits]:
    query, key = node.args[0], node.args[1]
    if not isinstance(query, Node) or not isinstance(key, Node) or not df.shape(query) or not df.shape(key):
        misses.append(NearMiss(node, "opaque-attention", f"the op {node.target} does not say which input is which"))
        return []
    name = df.op[node].name
    tokens_first = any(kernel in name for kernel in ("flash_attn", "_flash_attention_forward", "varlen_attn"))
    tokens_first |= "efficient_attention" in name and "scaled_dot_product" not in name
    product = Product(node, query, key, "fused-tokens-first" if tokens_first else "fused")
    return [Logits((product,), (node,), node, 3, node)]


def fused_scale(df: Dataflow, product: Product) -> float | None:
    """Scale of a fused attention op; None if it is not a Python number."""
    node = product.node
    given = node.kwargs.get("scale")
    position = _index_of_scale(node.target, df.op[node].name)
    if position is not None and len(node.args) > position:
        given = node.args[position]
    if given is None:
        return float(df.shape(product.left)[-1] ** -0.5)
    return float(given) if isinstance(given, int | float) else None


def _index_of_scale(target: object, name: str) -> int | None:
    """Index of an attention op's positional scale argument; None if there is none."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return 5 if name == "flex_attention" else None  # after score_mod and block_mask
    names = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    return names.index("scale") if "scale" in names else None


def _without_softmax(df: Dataflow, used: set[Node]) -> list[NearMiss]:
    """Find products of products without a softmax in between: linear attention, recurrences."""
    misses: dict[str, NearMiss] = {}
    text = "products of queries, keys and values without a softmax between them (linear attention or a recurrence)"
    for node in df.nodes:
        if node in used or not _is_product(df, node):
            continue
        other = _multiplied_with_data(df, node)
        if other is not None and other not in used:
            misses.setdefault(df.home(node), NearMiss(node, "no-softmax", text))
    return list(misses.values())
