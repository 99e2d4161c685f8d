"""Low-rank projections: chains of factors, additive branches (LoRA), latent attention (MLA), plain and absorbed.

In: a draft, the tensor to project and what is wanted of it. Out: operands whose vectors hold whole chains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from quack_fx.layout import Norm, Role, Side

from .projections import Features, Linear, Operand, Want, linear, single, to_heads, with_role
from .source import Draft, Value
from .truth import Link, Path
from .way import gained_norm, rotated


def behind(features: Features, latent: Features) -> Features:
    """Features of a product of a latent: each reads all of it."""
    whole: dict[tuple[object, ...], Path] = {}
    for place in latent:
        for path in place:
            kind = tuple((x.param, x.axis, x.role) for x in path)
            known = whole.get(kind)
            whole[kind] = (
                path
                if known is None
                else tuple(replace(a, rows=a.rows | b.rows) for a, b in zip(known, path, strict=True))
            )
    tails = whole.values()
    return [frozenset((*path, *tail) for path in place for tail in tails) for place in features]


def down(draft: Draft, hint: str, x: Value, rank: int, role: Role, bias: bool = False) -> Linear:
    """A down projection; its features stand last."""
    made = linear(draft, hint, x, rank, role, bias)
    letter = next(a for a in made.value.axes if a not in x.axes)
    return Linear(draft.arrange(made.value, made.value.axes.replace(letter, "") + letter), made.features)


def low_rank(draft: Draft, x: Value, want: Want, rank: int, roles: tuple[Role, Role]) -> Operand:
    """A projection in two factors."""
    rank = min(rank, draft.sizes[want.heads] * draft.sizes[want.dims])  # a factor does not widen
    latent = down(draft, f"{want.name}_down", x, rank, roles[1])
    value, norm = latent.value, None
    if draft.choices.chance("latent norm", 3):
        value, norm = latent_norm(draft, "query" if want.name == "q" else "key", value)
    operand = single(draft, value, replace(want, role=roles[0]))
    return replace(_on(operand, latent.features), latent_norms=(norm,) if norm else ())


def _on(operand: Operand, latent: Features) -> Operand:
    return replace(
        operand, kinds=tuple(tuple(tuple(behind(list(head), latent)) for head in kind) for kind in operand.kinds)
    )


def with_adapter(draft: Draft, x: Value, want: Want, rank: int) -> Operand:
    """A projection with an additive low-rank branch: W x + s B A x."""
    width = draft.sizes[want.heads] * draft.sizes[want.dims]
    rank = min(rank, width)
    base = linear(draft, str(want.name), x, width, want.role, want.bias)
    letter = next(a for a in base.value.axes if a not in x.axes)
    inner = down(draft, f"{want.name}_lora_a", x, rank, "other")
    outer = linear(draft, f"{want.name}_lora_b", inner.value, width, "other", False)
    other = next(a for a in outer.value.axes if a not in inner.value.axes)
    added = draft.arrange(outer.value.renamed(other, letter), base.value.axes)
    factor = draft.choices.pick("lora scale", ["", "2.0 * ", "0.5 * "])
    value = draft.let(str(want.name), f"{base.value.name} + {factor}{added.name}", base.value.axes)
    chains = behind(outer.features, inner.features)
    features = [a | b for a, b in zip(base.features, chains, strict=True)]
    return replace(to_heads(draft, Linear(value, features), want, letter), scale=None)


def latent_norm(draft: Draft, side: Side, value: Value) -> tuple[Value, Norm]:
    """A norm between two factors."""
    width = draft.sizes[value.axes[-1]]
    made, module, kind = gained_norm(draft, f"{side}_latent_norm", value, width)
    return made, Norm(side, kind, width, module, f"{module}.weight")


def with_branch(draft: Draft, x: Value, want: Want, rank: int) -> Operand:
    """A projection beside another one of full rank: W x + V f(x)."""
    width = draft.sizes[want.heads] * draft.sizes[want.dims]
    base = linear(draft, str(want.name), x, width, want.role, want.bias)
    letter = next(a for a in base.value.axes if a not in x.axes)
    bent = draft.let("bent", draft.choices.pick("f", ["F.gelu({})", "{}.flip(-1)", "{}"]).format(x.name), x.axes)
    other = linear(draft, f"{want.name}_too", bent, width, want.role, False)
    added = next(a for a in other.value.axes if a not in x.axes)
    name = draft.arrange(other.value.renamed(added, letter), base.value.axes).name
    value = draft.let(str(want.name), f"{base.value.name} + {name}", base.value.axes)
    features = [a | b for a, b in zip(base.features, other.features, strict=True)]
    return to_heads(draft, Linear(value, features), want, letter)


def merged_adapter(draft: Draft, x: Value, want: Want, rank: int) -> Operand:
    """The same with its branch added to the weight, so that the rows are those of several parameters: (W + s B A) x."""
    draft.may_refuse = True
    width, n_in = draft.sizes[want.heads] * draft.sizes[want.dims], draft.sizes[x.axes[-1]]
    base, inner, outer = (
        draft.parameter(f"{want.name}_{hint}", *shape)
        for hint, shape in (("w", (width, n_in)), ("a", (rank, n_in)), ("b", (width, rank)))
    )
    letter = draft.letter(width)
    code = f"F.linear({x.name}, self.{base} + 2.0 * self.{outer} @ self.{inner})"
    value = draft.let(str(want.name), code, x.axes[:-1] + letter)
    tail = Link(inner, 0, frozenset(range(rank)))
    features: Features = [
        frozenset({(Link(base, 0, frozenset({i}), None, want.role),), (Link(outer, 0, frozenset({i})), tail)})
        for i in range(width)
    ]
    return replace(to_heads(draft, Linear(value, features), want, letter), scale=None)


# ---- latent attention ------------------------------------------------------------------------------------------------


def latent_attention(draft: Draft, x: Value, y: Value, absorbed: bool) -> tuple[list[tuple[Operand, Operand]], Operand]:
    """MLA: pairs of operands whose products are summed, and the values.

    Axes: h heads, d nope places, r rope places, e value places; ranks are drawn.
    """
    pick = draft.choices.pick
    sizes = draft.sizes
    q_rank, k_rank = pick("query rank", [0, 2, 3]), pick("key rank", [3, 2, 5])
    rope = draft.letter(pick("rope width", [2, 4, 0]))
    has_rope = bool(sizes[rope])
    # A factor does not widen.
    q_rank = min(q_rank, *(sizes["h"] * sizes[a] for a in ("d", rope) if sizes[a]), q_rank)
    k_rank = min(k_rank, sizes["h"] * sizes["d"])
    source, tail, norms = x, [], []
    latent, ckv, k_rope = _downs(draft, x, y, q_rank, k_rank, rope if has_rope else None)
    if latent is not None:
        source, tail = latent.value, latent.features
        if draft.choices.chance("query latent norm", 3):
            source, norm = latent_norm(draft, "query", source)
            norms.append(norm)
    q_nope, q_rope = _parts(draft, source, "q_up", "h", "t", ("d", rope) if has_rope else ("d",), ("uq", "qr"))
    if tail:
        q_nope, q_rope = _on(q_nope, tail), _on(q_rope, tail) if q_rope else None
    stored = ckv.value
    if draft.choices.chance("key latent norm", 3):
        stored, norm = latent_norm(draft, "key", stored)
        norms.append(norm)
    q_nope = replace(q_nope, latent_norms=tuple(norms))
    if has_rope:
        assert q_rope is not None and k_rope is not None
        q_rope, k_rope = rotated(draft, q_rope, "t"), rotated(draft, k_rope, "s")
    if absorbed:
        return _absorbed(draft, q_nope, q_rope, Linear(stored, ckv.features), k_rope)
    up_letters = ("d", "e")
    k_nope, v = _parts(draft, stored, "kv_up", "h", "s", up_letters, ("uk", "other"))
    assert v is not None
    k_nope = _on(k_nope, ckv.features)
    if not has_rope:
        return [(q_nope, k_nope)], v
    assert q_rope is not None and k_rope is not None
    if draft.choices.chance("two products", 3):
        return [(q_nope, k_nope), (q_rope, k_rope)], v
    k_rope = spread(draft, k_rope, "h", 1)
    flip = draft.choices.chance("rope first", 3)
    q = concatenated(draft, [q_rope, q_nope] if flip else [q_nope, q_rope])
    k = concatenated(draft, [k_rope, k_nope] if flip else [k_nope, k_rope])
    return [(q, replace(k, dims=q.dims, value=k.value.renamed(k.dims, q.dims)))], v


def _parts(
    draft: Draft, x: Value, hint: str, heads: str, tokens: str, dims: Sequence[str], roles: Sequence[Role]
) -> tuple[Operand, Operand | None]:
    """One or two operands from a tensor: from one matrix per head side by side, in blocks, or from one each."""
    wants = [Want(hint[0] + a, heads, a, tokens, role) for a, role in zip(dims, roles, strict=False)]
    if len(wants) == 1:
        return single(draft, x, wants[0]), None
    way = draft.choices.pick(f"{hint} storage", ["side by side", "separate", "blocks"])
    if way == "separate":
        first, second = (single(draft, x, w) for w in wants)
        return first, second
    n, widths = draft.sizes[heads], [draft.sizes[a] for a in dims]
    made = linear(draft, hint, x, n * sum(widths), "other", False)
    letter = next(a for a in made.value.axes if a not in x.axes)
    if way == "blocks":
        letters = [draft.letter(n * w) for w in widths]
        values = draft.split(made.value, letter, [(str(w.name), a) for w, a in zip(wants, letters, strict=True)])
        cut = n * widths[0]
        features = [made.features[:cut], made.features[cut:]]
        first, second = (
            to_heads(draft, Linear(v, with_role(f, w.role)), w, a)
            for v, f, w, a in zip(values, features, wants, letters, strict=True)
        )
        return first, second
    inside = draft.letter(sum(widths))
    value = draft.unfold(made.value, letter, heads + inside)
    if tokens not in value.axes:
        value = value.renamed("t", tokens)
    values = draft.split(value, inside, [(str(w.name), a) for w, a in zip(wants, dims, strict=True)])
    operands, start = [], 0
    for v, w, width in zip(values, wants, widths, strict=True):
        vectors = tuple(
            tuple(with_role([made.features[h * sum(widths) + start + j] for j in range(width)], w.role))
            for h in range(n)
        )
        operands.append(Operand(v, heads, w.dims, (vectors,)))
        start += width
    return operands[0], operands[1]


def _downs(
    draft: Draft, x: Value, y: Value, q_rank: int, k_rank: int, rope: str | None
) -> tuple[Linear | None, Linear, Operand | None]:
    """The latents of queries and keys and the rope key, from matrices of their own or from one."""
    if not q_rank:
        return None, *_key_latent(draft, y, k_rank, rope)
    if x != y or draft.choices.pick("down projections", ["apart", "apart", "fused"]) == "apart":
        return down(draft, "q_down", x, q_rank, "dq"), *_key_latent(draft, y, k_rank, rope)
    letters = [draft.letter(q_rank), draft.letter(k_rank), *([rope] if rope else [])]
    made = down(draft, "downs", x, sum(draft.shape("".join(letters))), "other")
    names = ("cq", "ckv", "k_rope")
    values = draft.split(made.value, made.value.axes[-1], list(zip(names, letters, strict=False)))
    features = [made.features[:q_rank], made.features[q_rank : q_rank + k_rank], made.features[q_rank + k_rank :]]
    latent, key = Linear(values[0], with_role(features[0], "dq")), Linear(values[1], with_role(features[1], "dkv"))
    if rope is None:
        return latent, _tokens(key), None
    vectors = tuple(with_role(features[2], "kr"))
    return latent, _tokens(key), Operand(_tokens(Linear(values[2])).value, "", rope, ((vectors,),))


def _key_latent(draft: Draft, y: Value, rank: int, rope: str | None) -> tuple[Linear, Operand | None]:
    """The latent of keys and values, and the rope key that all heads share."""
    if rope is None:
        return _tokens(down(draft, "kv_down", y, rank, "dkv")), None
    width = draft.sizes[rope]
    if draft.choices.pick("rope key", ["beside the latent", "separate"]) == "separate":
        latent, key = down(draft, "kv_down", y, rank, "dkv"), down(draft, "k_rope", y, width, "kr")
        key_value, features = key.value, key.features
    else:
        made = down(draft, "kv_down", y, rank + width, "dkv")
        r = draft.letter(rank)
        last = made.value.axes[-1]
        value, key_value = draft.split(made.value, last, [("ckv", r), ("k_rope", rope)])
        latent, features = Linear(value, made.features[:rank]), with_role(made.features[rank:], "kr")
    key_value = _tokens(Linear(key_value)).value
    key_value = key_value.renamed(key_value.axes[-1], rope)
    return _tokens(latent), Operand(key_value, "", rope, ((tuple(features),),))


def _tokens(made: Linear) -> Linear:
    return Linear(made.value if "s" in made.value.axes else made.value.renamed("t", "s"), made.features)


def _absorbed(
    draft: Draft, q_nope: Operand, q_rope: Operand | None, latent: Linear, k_rope: Operand | None
) -> tuple[list[tuple[Operand, Operand]], Operand]:
    """Keys are never made: their up projection multiplies the queries, and the latent is the key of all heads."""
    n, rank = draft.sizes["h"], len(latent.features)
    r = latent.value.axes[-1]
    letters = "".join(draft.choices.shuffled("absorbed weight", "hd" + r))
    w = draft.parameter("k_up", *draft.shape(letters))
    axes = q_nope.value.axes.replace("d", r)
    value = draft.let(
        "q_absorbed", f'torch.einsum("{q_nope.value.axes},{letters}->{axes}", {q_nope.value.name}, self.{w})', axes
    )
    axis = letters.index("h")
    vectors = tuple(
        tuple(behind([frozenset({(Link(w, axis, frozenset({h}), None, "uk"),)})] * rank, list(q_nope.kinds[0][h])))
        for h in range(n)
    )
    q = Operand(value, "h", r, (vectors,), latent_norms=q_nope.latent_norms)
    k = Operand(latent.value, "", r, ((tuple(latent.features),),))
    v = Operand(latent.value.renamed(r, "e"), "", "e", ((tuple(latent.features),),))
    draft.sizes["e"] = rank
    if q_rope is None or k_rope is None:
        return [(q, k)], v
    if draft.choices.chance("two products", 2):
        return [(q, k), (q_rope, k_rope)], v
    both_q, both_k = concatenated(draft, [q, q_rope]), concatenated(draft, [k, k_rope])
    return [(both_q, replace(both_k, dims=both_q.dims, value=both_k.value.renamed(both_k.dims, both_q.dims)))], v


def refined_heads(draft: Draft, operand: Operand, name: str) -> Operand:
    """A product with a weight of its own inside each head."""
    h, d = operand.heads, operand.dims
    n, width = draft.sizes[h], draft.sizes[d]
    if draft.choices.pick("refine", ["grouped convolution", "einsum"]) == "einsum":
        new = draft.letter(width)
        letters = "".join(draft.choices.shuffled("weight of a head", h + d + new))
        w = draft.parameter(f"{name}_head", *draft.shape(letters))
        axes = operand.value.axes.replace(d, new)
        code = f'torch.einsum("{operand.value.axes},{letters}->{axes}", {operand.value.name}, self.{w})'
        value = draft.let(name, code, axes).renamed(new, d)
        axis = letters.index(h)
        rows = [[frozenset({i})] * width for i in range(n)]
    else:
        tokens = next(a for a in operand.value.axes if a not in "b" + h + d)
        value, letter = draft.fold(draft.arrange(operand.value, "b" + h + d + tokens), h + d)
        m = draft.module(f"{name}_head", f"nn.Conv1d({n * width}, {n * width}, 1, groups={n}, bias=False)")
        value = draft.unfold(draft.let(name, f"self.{m}({value.name})", value.axes), letter, h + d)
        w, axis = f"{m}.weight", 0
        rows = [[frozenset({i * width + j}) for j in range(width)] for i in range(n)]
    vectors = tuple(
        tuple(behind([frozenset({(Link(w, axis, own),)}) for own in rows[i]], list(operand.kinds[0][i])))
        for i in range(n)
    )
    return replace(operand, value=value, kinds=(vectors,))


# ---- putting operands together ---------------------------------------------------------------------------------------


def spread(draft: Draft, operand: Operand, heads: str, at: int) -> Operand:
    """An operand without heads, given to all of them."""
    n = draft.sizes[heads]
    axes = operand.value.axes[:at] + heads + operand.value.axes[at:]
    shape = ", ".join("-1" if a != heads else str(n) for a in axes)
    way = draft.choices.pick(
        "spread", [f"unsqueeze({at}).expand({shape})", f"unsqueeze({at}).repeat_interleave({n}, {at})"]
    )
    value = draft.let(operand.value.name, f"{operand.value.name}.{way}", axes)
    return replace(operand, value=value, heads=heads, kinds=tuple(kind * n for kind in operand.kinds))


def concatenated(draft: Draft, operands: Sequence[Operand]) -> Operand:
    """Operands side by side along the head dimension."""
    axes = operands[0].value.axes.replace(operands[0].dims, "")
    place = operands[0].value.axis(operands[0].dims)
    letter = draft.letter(sum(draft.sizes[o.dims] for o in operands))
    values = [draft.arrange(o.value, axes[:place] + o.dims + axes[place:]) for o in operands]
    code = f"torch.cat(({', '.join(v.name for v in values)}), {place})"
    value = draft.let("q" if "t" in axes else "k", code, axes[:place] + letter + axes[place:])
    heads = len(operands[0].kinds[0])
    vectors = tuple(tuple(one for o in operands for one in o.kinds[0][h]) for h in range(heads))
    scales = {o.scale for o in operands}
    latent_norms = tuple(n for o in operands for n in o.latent_norms)
    scale = scales.pop() if len(scales) == 1 else None
    return Operand(value, operands[0].heads, letter, (vectors,), operands[0].norms, latent_norms, scale)
