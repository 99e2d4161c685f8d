"""From queries, keys and values to the output: products, masks, softmax, weighing.

In: a draft, pairs of operands whose products are summed, and the values. Out: the output with axes of tokens, heads and
value features, and what it did to the logits' scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .projections import Operand
from .source import Draft, Value

Pairs = list[tuple[Operand, Operand]]


@dataclass(frozen=True)
class Attended:
    """Output of an attention; `scale` multiplies queries and keys, None where it is not a plain number."""

    value: Value
    scale: float | None
    loops: bool = False


def attended(draft: Draft, pairs: Pairs, v: Operand, batch: str, tiled: bool, may_loop: bool = True) -> Attended:
    """One attention, written in one of many ways.

    Arguments:
        draft: The module.
        pairs: Queries and keys; axes `batch`, t or s, heads (queries "h", keys "k", "h" or none) and features.
        v: The values, likewise.
        batch: Letters of the axes that are neither tokens nor heads nor features.
        tiled: Whether query head i reads key head i % k (else blocks of query heads read one key head).
        may_loop: Whether heads may be looped over.
    """
    plain = len(pairs) == 1 and pairs[0][0].dims == pairs[0][1].dims and len(batch) <= 1
    ways: list[Callable[..., Attended]] = [_written]
    if plain:
        ways += [_fused, _looped] if may_loop else [_fused]
        if batch and draft.choices.chance("flex attention", 60):
            ways = [_flexible]
    way = draft.choices.pick("attention", [ways[0], *ways])
    return way(draft, pairs, v, batch, tiled)


# ---- heads of keys ---------------------------------------------------------------------------------------------------


def _for_all(draft: Draft, x: Operand, tiled: bool) -> Operand:
    """Keys or values with as many heads as the queries."""
    n = draft.sizes["h"]
    if x.heads == "h":
        return x
    if x.heads == "":
        at = draft.choices.pick("new heads", [1, 0])
        axes = x.value.axes[:at] + "h" + x.value.axes[at:]
        sizes = ", ".join("-1" if a != "h" else str(n) for a in axes)
        return replace(
            x, value=draft.let(x.value.name, f"{x.value.name}.unsqueeze({at}).expand({sizes})", axes), heads="h"
        )
    k = draft.sizes["k"]
    g, at, name = n // k, x.value.axis("k"), x.value.name
    axes = x.value.axes.replace("k", "h")
    if tiled:
        repeat = ", ".join(str(g) if a == "h" else "1" for a in axes)
        pick = [i % k for i in range(n)]
        ways = [
            f"{name}.repeat({repeat})",
            f"torch.cat([{name}] * {g}, {at})",
            f"{name}.index_select({at}, torch.tensor({pick}))",
        ]
    else:
        sizes = draft.shape(x.value.axes)
        wide = ", ".join(map(str, (*sizes[: at + 1], g, *sizes[at + 1 :])))
        pick = [i // g for i in range(n)]
        ways = [
            f"{name}.repeat_interleave({g}, {at})",
            f"{name}.unsqueeze({at + 1}).expand({wide}).flatten({at}, {at + 1})",
            f"{name}.index_select({at}, torch.tensor({pick}))",
            f"{name}[{':, ' * at}torch.tensor({pick})]",
            f"torch.stack([{name}] * {g}, {at + 1}).flatten({at}, {at + 1})",
        ]
    code = draft.choices.pick("key heads", ways)
    return replace(x, value=draft.let(x.value.hint, code, axes), heads="h")


# ---- written out -----------------------------------------------------------------------------------------------------


def _written(draft: Draft, pairs: Pairs, v: Operand, batch: str, tiled: bool) -> Attended:
    pick, chance = draft.choices.pick, draft.choices.chance
    grouped = any(k.heads == "k" for _, k in pairs)
    heads = "h"
    if grouped and pick("grouped product", ["repeat", "group"]) == "group":
        # Queries get an axis of key heads and one of the heads that share it.
        g = draft.letter(draft.sizes["h"] // draft.sizes["k"])
        heads = g + "k" if tiled else "k" + g
        pairs = [(q.at(draft.unfold(q.value, "h", heads)), k) for q, k in pairs]
    elif grouped:
        pairs = [(q, _for_all(draft, k, tiled)) for q, k in pairs]
        v = _for_all(draft, v, tiled)
    scale = pick("scale", [draft.sizes[pairs[0][0].dims] ** -0.5, 1.0, 0.3])
    place = "after" if scale == 1.0 else pick("scale place", ["after", "queries", "both", "divide"])
    if place == "queries":
        pairs = [(_times(draft, q, scale), k) for q, k in pairs]
    elif place == "both":
        pairs = [(_times(draft, q, scale**0.5), _times(draft, k, scale**0.5)) for q, k in pairs]
    logits: Value | None = None
    for q, k in pairs:
        made = _product(draft, q.value, k.value, q.dims, k.dims, batch, heads, may_fold=len(pairs) == 1)
        if logits is not None:
            made = draft.arrange(made, logits.axes)
            made = draft.let("logits", f"{logits.name} + {made.name}", logits.axes)
        logits = made
    assert logits is not None
    known: float | None = scale
    if place == "after" and scale != 1.0:
        logits = draft.let("logits", f"{logits.name} * {scale!r}", logits.axes)
    elif place == "divide":
        logits = draft.let("logits", f"{logits.name} / {1 / scale!r}", logits.axes)
    rotated = pairs[0][0].value
    if chance("relative positions", 8) and len(pairs) == 1:
        logits = _relative(draft, logits, rotated, pairs[0][0].dims)
    steps = [(_temperature, 10), (_soft_cap, 8), (_position_bias, 6), (_mixed_heads, 10), (_masked, 2)]
    for step, one_in in steps:
        if chance(step.__name__[1:], one_in):
            logits = step(draft, logits, heads)
            known = None if step in (_temperature, _mixed_heads, _soft_cap) else known
    weights = _softmax(draft, logits, heads)
    if chance("mixed weights", 12):
        weights = _mixed_heads(draft, weights, heads)
    if chance("dropout", 6):
        weights = draft.let("weights", f"F.dropout({weights.name}, 0.1, self.training)", weights.axes)
    return Attended(_weighed(draft, weights, v, batch, heads), known)


def _times(draft: Draft, x: Operand, factor: float) -> Operand:
    return x.at(draft.let(x.value.hint, f"{x.value.name} * {factor!r}", x.value.axes))


def _product(draft: Draft, q: Value, k: Value, qd: str, kd: str, batch: str, heads: str, may_fold: bool) -> Value:
    """The product of queries and keys."""
    pick = draft.choices.pick
    k = k.renamed(kd, qd)
    key_heads = "".join(a for a in heads if a in k.axes)
    lead = batch + heads
    axes = [
        lead + "ts",
        lead + "st",
        batch + "t" + heads + "s",
        batch + "ts" + heads,
        heads + batch + "ts",
        batch + "t" + "s" + heads,
    ]
    whole = all(a in k.axes for a in lead) and len(lead) == 2
    ways = ["matmul", "einsum", "key left", "elementwise", *(["bmm", "baddbmm", "heads first"] if whole else [])]
    way = pick("product", ways)
    if way == "einsum":
        out = pick("logits axes", axes)
        first, second = (q, k) if not draft.choices.chance("key first", 3) else (k, q)
        return draft.let(
            "logits", f'torch.einsum("{first.axes},{second.axes}->{out}", {first.name}, {second.name})', out
        )
    if way == "heads first":
        lead = heads + batch
    own = "".join(a for a in lead if a in batch + key_heads)
    q = draft.arrange(q, lead + "t" + qd)
    k = draft.arrange(k, own + "s" + qd)
    if way in ("bmm", "baddbmm"):
        q, both = draft.fold(q, lead)
        k, _ = draft.fold(k, lead)
        turn = pick("turn", ["transpose(1, 2)", "mT", "permute(0, 2, 1)"])
        if way == "bmm":
            logits = draft.let("logits", f"torch.bmm({q.name}, {k.name}.{turn})", both + "ts")
        else:
            added = f"torch.zeros({draft.dims(both + 'ts')})"
            logits = draft.let("logits", f"torch.baddbmm({added}, {q.name}, {k.name}.{turn})", both + "ts")
        stays = may_fold and draft.choices.chance("stay folded", 2)
        return logits if stays else draft.unfold(logits, both, lead)
    missing = [i for i, a in enumerate(lead) if a not in own]
    left, right = q.name, k.name + "".join(f".unsqueeze({i})" for i in missing)
    if way == "elementwise":
        out = pick("pairs", [lead + "ts", lead + "st"])
        mine, yours = (-2, -3) if out.endswith("ts") else (-3, -2)
        total = pick("sum", ["sum(-1)", f"sum({len(lead) + 2})"])
        return draft.let("logits", f"({left}.unsqueeze({mine}) * {right}.unsqueeze({yours})).{total}", out)
    if way == "key left":
        return draft.let("logits", f"{right} @ {left}.transpose(-1, -2)", lead + "st")
    turn = pick("turn", ["transpose(-1, -2)", "mT", "transpose(-2, -1).contiguous()"])
    return draft.let("logits", f"torch.matmul({left}, {right}.{turn})", lead + "ts")


def _along(draft: Draft, logits: Value, letters: str) -> str:
    """Shape of a tensor that broadcasts against the logits and has only these axes."""
    return ", ".join(str(draft.sizes[a]) if a in letters else "1" for a in logits.axes)


def _temperature(draft: Draft, logits: Value, heads: str) -> Value:
    p = draft.parameter("temperature", *(int(n) for n in _along(draft, logits, heads).split(", ")))
    return draft.let("logits", f"{logits.name} * self.{p}", logits.axes)


def _soft_cap(draft: Draft, logits: Value, heads: str) -> Value:
    return draft.let("logits", f"5.0 * torch.tanh({logits.name} / 5.0)", logits.axes)


def _position_bias(draft: Draft, logits: Value, heads: str) -> Value:
    shape = _along(draft, logits, heads + "ts")
    sizes = [int(n) for n in shape.split(", ")]
    way = draft.choices.pick("bias", ["parameter", "buffer", "table"])
    if way == "parameter":
        p = draft.parameter("position_bias", *sizes)
    elif way == "buffer":
        p = draft.buffer("position_bias", f"torch.randn({shape})")
    else:
        t, s = draft.sizes["t"], draft.sizes["s"]
        table = draft.parameter("table", t + s)
        index = draft.buffer("index", f"torch.arange({t})[:, None] - torch.arange({s}) + {s}")
        flip = logits.axes.index("s") < logits.axes.index("t")
        sizes = [draft.sizes[a] if a in "ts" else 1 for a in logits.axes]
        code = f"self.{table}[self.{index}]{'.T' if flip else ''}.reshape({', '.join(map(str, sizes))})"
        return draft.let("logits", f"{logits.name} + {code}", logits.axes)
    return draft.let("logits", f"{logits.name} + self.{p}", logits.axes)


def _masked(draft: Draft, logits: Value, heads: str) -> Value:
    t, s = draft.sizes["t"], draft.sizes["s"]
    flip = logits.axes.index("s") < logits.axes.index("t")
    turned = ".T" if flip else ""
    sizes = ", ".join(str(draft.sizes[a]) if a in "ts" else "1" for a in logits.axes)
    allowed = f"torch.ones({t}, {s}, dtype=torch.bool).tril({max(0, s - t)}){turned}.reshape({sizes})"
    way = draft.choices.pick("mask", ["masked_fill", "where", "additive", "in place"])
    if way == "masked_fill":
        code = f"{logits.name}.masked_fill(~{allowed}, float('-inf'))"
    elif way == "where":
        code = f"torch.where({allowed}, {logits.name}, torch.tensor(-1e9))"
    elif way == "additive":
        code = f"{logits.name} + torch.zeros({sizes}).masked_fill(~{allowed}, -1e9)"
    else:
        draft.lines.append(f"{logits.name} = {logits.name}.contiguous().masked_fill_(~{allowed}, -1e9)")
        return logits
    return draft.let("logits", code, logits.axes)


def _mixed_heads(draft: Draft, logits: Value, heads: str) -> Value:
    """Talking heads: logits (or weights) of all heads mixed by a learned matrix."""
    if len(heads) != 1 or heads not in logits.axes:
        return logits
    n, name, hint = draft.sizes[heads], logits.name, logits.hint
    at = logits.axis(heads)
    ways = ["einsum", "linear"] + (["conv2d"] if at == 1 and len(logits.axes) == 4 else [])
    way = draft.choices.pick("mix", ways)
    if way == "conv2d":
        m = draft.module("mix", f"nn.Conv2d({n}, {n}, 1, bias=False)")
        return draft.let(hint, f"self.{m}({name})", logits.axes)
    if way == "linear":
        m = draft.module("mix", f"nn.Linear({n}, {n}, bias=False)")
        return draft.let(hint, f"self.{m}({name}.movedim({at}, -1)).movedim(-1, {at})", logits.axes)
    p, new = draft.parameter("mix", n, n), "z"
    out = logits.axes.replace(heads, new)
    return draft.let(hint, f'torch.einsum("{logits.axes},{heads}{new}->{out}", {name}, self.{p})', logits.axes)


def _relative(draft: Draft, logits: Value, q: Value, dims: str) -> Value:
    """A product of the queries with a table of positions beside the content product: no pair."""
    t, s, d = draft.sizes["t"], draft.sizes["s"], draft.sizes[dims]
    heads = [a for a in logits.axes if a not in "ts" and a not in q.axes]
    if heads or len([a for a in logits.axes if a not in "ts"]) + 2 != len(q.axes):
        return logits
    way = draft.choices.pick("table", ["embedding", "parameter", "projected"])
    if way == "embedding":
        m = draft.module("distance", f"nn.Embedding({t + s}, {d})")
        index = draft.buffer("index", f"torch.arange({t})[:, None] - torch.arange({s}) + {s}")
        table, letters = f"self.{m}(self.{index})", "ts" + dims
    elif way == "parameter":
        p = draft.parameter("distance", s, d)
        table, letters = f"self.{p}", "s" + dims
    else:
        sine = draft.buffer("sine", f"torch.randn({s}, 7)")
        m = draft.module("r", f"nn.Linear(7, {d}, bias=False)")
        table, letters = f"self.{m}(self.{sine})", "s" + dims
    code = f'torch.einsum("{q.axes},{letters}->{logits.axes}", {q.name}, {table})'
    return draft.let("logits", f"{logits.name} + {code}", logits.axes)


def _softmax(draft: Draft, logits: Value, heads: str) -> Value:
    """Softmax over the keys, wherever they stand."""
    name = logits.name
    if draft.choices.chance("move before softmax", 4):
        others = logits.axes.replace("s", "")
        at = draft.choices.pick("keys at", list(range(len(others), -1, -1)))
        logits = draft.arrange(logits, others[:at] + "s" + others[at:])
        name = logits.name
    at = logits.axis("s")
    last = logits.axes[-1] == "s"
    way = draft.choices.pick("softmax", ["method", "functional", "by hand", "module", "sinks", "one more"])
    if way == "method":
        code = f"{name}.softmax({at - len(logits.axes) if last else at})"
    elif way == "functional":
        code = f"F.softmax({name}, dim={at}, dtype=torch.float32).to({name}.dtype)"
    elif way == "module":
        m = draft.module("softmax", f"nn.Softmax(dim={at})")
        code = f"self.{m}({name})"
    elif way == "sinks":
        shape = [1 if a == "s" else draft.sizes[a] if a in heads else 1 for a in logits.axes]
        sink = draft.parameter("sink", *shape)
        wide = ", ".join("1" if a == "s" else str(draft.sizes[a]) for a in logits.axes)
        both = draft.let("both", f"torch.cat(({name}, self.{sink}.expand({wide})), {at}).softmax({at})", logits.axes)
        code = f"{both.name}.narrow({at}, 0, {draft.sizes['s']})"
    else:
        e = draft.let("e", f"torch.exp({name} - {name}.amax({at}, keepdim=True))", logits.axes)
        plus = " + 1.0" if way == "one more" else ""
        code = f"{e.name} / ({e.name}.sum({at}, keepdim=True){plus})"
    return draft.let("weights", code, logits.axes)


def _weighed(draft: Draft, weights: Value, v: Operand, batch: str, heads: str) -> Value:
    """Values weighed: the output with axes of tokens, heads and value features."""
    folded = next((a for a in weights.axes if a not in batch + heads + "ts"), None)
    value = v.value
    if folded is not None:
        if v.heads != "h":
            value = _for_all(draft, v, False).value
        value = draft.arrange(value, batch + heads + "s" + v.dims)
        value, letter = draft.fold(value, batch + heads)
        value = value.renamed(letter, folded)
        out = draft.let(
            "out", f"torch.bmm({draft.arrange(weights, folded + 'ts').name}, {value.name})", folded + "t" + v.dims
        )
        return draft.unfold(out, folded, batch + heads)
    way = draft.choices.pick("weigh", ["matmul", "einsum", "elementwise"])
    if way == "einsum":
        out = draft.choices.pick("out axes", [batch + "t" + heads + v.dims, batch + heads + "t" + v.dims])
        return draft.let(
            "out", f'torch.einsum("{weights.axes},{value.axes}->{out}", {weights.name}, {value.name})', out
        )
    lead = batch + heads
    own = "".join(a for a in lead if a in value.axes)
    value = draft.arrange(value, own + "s" + v.dims)
    right = value.name + "".join(f".unsqueeze({i})" for i, a in enumerate(lead) if a not in own)
    weights = draft.arrange(weights, lead + "ts")
    if way == "elementwise":
        return draft.let("out", f"({weights.name}.unsqueeze(-1) * {right}.unsqueeze(-3)).sum(-2)", lead + "t" + v.dims)
    return draft.let("out", f"torch.matmul({weights.name}, {right})", lead + "t" + v.dims)


# ---- ops that do all of it -------------------------------------------------------------------------------------------


def _fused(draft: Draft, pairs: Pairs, v: Operand, batch: str, tiled: bool) -> Attended:
    """F.scaled_dot_product_attention."""
    q, k = pairs[0]
    native = (
        k.heads == "k"
        and v.heads == "k"
        and not tiled
        and batch != ""
        and draft.choices.pick("enable_gqa", [True, False])
    )
    if not native:
        k, v = _for_all(draft, k, tiled), _for_all(draft, v, tiled)
    lead = [batch + x for x in ("h", "k" if native else "h")]
    q_value = draft.arrange(q.value, lead[0] + "t" + q.dims)
    k_value = draft.arrange(k.value, lead[1] + "s" + k.dims)
    v_value = draft.arrange(v.value, lead[1] + "s" + v.dims)
    t, s = draft.sizes["t"], draft.sizes["s"]
    more = ["", f", attn_mask=torch.ones({t}, {s}, dtype=torch.bool).tril({max(0, s - t)})"]
    more += [", is_causal=True"] * (t >= s)
    more += (
        [f", attn_mask=self.{draft.parameter('bias', draft.sizes['h'], t, s)}"]
        if draft.choices.chance("learned bias", 8)
        else []
    )
    arguments = draft.choices.pick("sdpa", more)
    scale = draft.choices.pick("sdpa scale", [None, 0.3, 1.0])
    arguments += "" if scale is None else f", scale={scale}"
    arguments += ", enable_gqa=True" if native else ""
    code = f"F.scaled_dot_product_attention({q_value.name}, {k_value.name}, {v_value.name}{arguments})"
    out = draft.let("out", code, lead[0] + "t" + v.dims)
    return Attended(out, draft.sizes[q.dims] ** -0.5 if scale is None else scale)


def _flexible(draft: Draft, pairs: Pairs, v: Operand, batch: str, tiled: bool) -> Attended:
    """flex_attention as it runs without a compiler."""
    q, k = pairs[0]
    k, v = _for_all(draft, k, tiled), _for_all(draft, v, tiled)
    values = [draft.arrange(x.value, f"bh{a}{x.dims}") for x, a in ((q, "t"), (k, "s"), (v, "s"))]
    ways = ["", ", score_mod=relative"] + [", score_mod=causal"] * (draft.sizes["t"] >= draft.sizes["s"])
    score = draft.choices.pick("score_mod", ways)
    out = draft.fresh("out")
    draft.lines.append("with torch.no_grad():  # without a compiler there is no backward on CPU")
    draft.lines.append(f"    {out} = flex_attention({', '.join(x.name for x in values)}{score})")
    return Attended(Value(out, f"bht{v.dims}"), draft.sizes[q.dims] ** -0.5)


def _looped(draft: Draft, pairs: Pairs, v: Operand, batch: str, tiled: bool) -> Attended:
    """A Python loop over heads."""
    q, k = pairs[0]
    n = draft.sizes["h"]
    if any(x.heads == "" for x in (k, v)):
        k, v = _for_all(draft, k, tiled), _for_all(draft, v, tiled)
    q_value = draft.arrange(q.value, "h" + batch + "t" + q.dims)
    k_value = draft.arrange(k.value, k.heads + batch + "s" + k.dims)
    v_value = draft.arrange(v.value, v.heads + batch + "s" + v.dims)
    draft.lines.append("outs = []")
    draft.lines.append(f"for i in range({n}):")
    index = "i"
    if k.heads == "k":
        index = f"i % {draft.sizes['k']}" if tiled else f"i // {n // draft.sizes['k']}"
    scale = draft.sizes[q.dims] ** -0.5
    draft.lines.append(
        f"    w = ({q_value.name}[i] @ {k_value.name}[{index}].transpose(-1, -2) * {scale!r}).softmax(-1)"
    )
    draft.lines.append(f"    outs.append(w @ {v_value.name}[{index}])")
    at = draft.choices.pick("stack outs", [0, len(batch), len(batch) + 1])
    axes = (batch + "t" + v.dims)[:at] + "h" + (batch + "t" + v.dims)[at:]
    return Attended(draft.let("out", f"torch.stack(outs, {at})", axes), scale, loops=True)
