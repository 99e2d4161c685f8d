"""How queries, keys and values are stored and made: the projections.

In: a draft, the tensor to project and what is wanted of it. Out: an `Operand` for each of q, k, v: a variable with head
and feature axes, and the rows of every parameter behind each place of each head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from quack_fx.layout import Norm, Role

from .source import Draft, Value
from .truth import Link, Path, Vectors

Features = list[frozenset[Path]]
"""What feeds each output feature of a product."""


@dataclass(frozen=True)
class Operand:
    """One of q, k, v.

    Attributes:
        value: The variable; its axes include those of heads and features.
        heads: Letter of the head axis.
        dims: Letter of the feature axis.
        kinds: Its vectors, one set for each kind of token.
        norms: QK norms passed.
        latent_norms: Norms between its factors.
        scale: Factor since the projection; None where it is not a plain number.
        unchecked: What is a matter of taste from here on.
    """

    value: Value
    heads: str
    dims: str
    kinds: tuple[Vectors, ...]
    norms: tuple[Norm, ...] = ()
    latent_norms: tuple[Norm, ...] = ()
    scale: float | None = 1.0
    unchecked: frozenset[str] = frozenset()

    def at(self, value: Value) -> Operand:
        """The same features in another variable."""
        return replace(self, value=value)


@dataclass(frozen=True)
class Want:
    """A projection that is asked for: "q", "k" or "v", its axes of heads and features, its tokens."""

    name: Role | str
    heads: str
    dims: str
    tokens: str
    role: Role = "other"
    bias: bool = False


@dataclass
class Linear:
    """Result of a product with a weight: a variable whose last-named axis holds features."""

    value: Value
    features: Features = field(default_factory=list)


def linear(draft: Draft, hint: str, x: Value, width: int, role: Role, bias: bool, cuts: Sequence[int] = ()) -> Linear:
    """A product with a matrix, written in one of many ways.

    Arguments:
        draft: The module.
        hint: What to call it.
        x: Data; its last axis is summed over.
        width: Number of features.
        role: Part that the features play.
        bias: Whether it has one.
        cuts: Features at which the matrix may be cut in two parameters that are concatenated when it runs.
    """
    out = draft.letter(width)
    inner, rest = x.axes[-1], x.axes[:-1]
    n_in = draft.sizes[inner]
    batched = "b" in rest and len(rest) == 2
    ways = ["module", "functional", "right", "einsum", "left", "scaled", *(["concatenated"] if cuts else [])]
    ways += ["conv1d", "conv2d", "addmm"] if batched else []
    way = draft.choices.pick(f"{hint} product", ways)
    axis, axes = 0, rest + out
    named: list[tuple[str, int, str | None]] = []  # parameter, row and bias of each feature
    if way == "module":
        m = draft.module(hint, f"nn.Linear({n_in}, {width}, bias={bias})")
        code = f"self.{m}({x.name})"
        named = [(f"{m}.weight", i, f"{m}.bias" if bias else None) for i in range(width)]
    elif way in ("conv1d", "conv2d"):
        one = "" if way == "conv1d" else ".unsqueeze(-1)"
        m = draft.module(hint, f"nn.Conv{way[4]}d({n_in}, {width}, 1, bias={bias})")
        code = f"self.{m}({x.name}.transpose(1, 2){one})" + (".squeeze(-1)" if one else "")
        axes = rest[0] + out + rest[1]
        named = [(f"{m}.weight", i, f"{m}.bias" if bias else None) for i in range(width)]
    elif way == "concatenated":
        cut = draft.choices.pick("cut", cuts)
        parts = [draft.parameter(hint + n, size, n_in) for n, size in (("_a", cut), ("_b", width - cut))]
        b = draft.parameter(f"{hint}_bias", width) if bias else None
        code = f"F.linear({x.name}, torch.cat((self.{parts[0]}, self.{parts[1]}))" + (f", self.{b})" if b else ")")
        # One bias for two matrices: its entries are numbered like the rows of the first alone.
        named = [(parts[0], i, b) for i in range(cut)] + [(parts[1], i, None) for i in range(width - cut)]
    else:
        transposed = way in ("right", "addmm") or (way == "einsum" and draft.choices.chance("weight in-out", 2))
        axis = 1 if transposed else 0
        w = draft.parameter(f"{hint}_w", *((n_in, width) if transposed else (width, n_in)))
        b = draft.parameter(f"{hint}_b", width) if bias else None
        plus = f" + self.{b}" if b else ""
        if way == "right":
            code = f"{x.name} @ self.{w}{plus}"
        elif way == "addmm":
            add = f"torch.addmm(self.{b}, " if b else "torch.mm("
            code = f"{add}{x.name}.reshape(-1, {n_in}), self.{w}).view({draft.dims(rest)}, {width})"
        elif way == "einsum":
            # A sum over one feature runs as an elementwise product, which need not be taken for a projection.
            draft.may_refuse |= n_in == 1
            axes = draft.choices.pick("einsum out", [axes, *(_orders(rest, out))])
            letters = inner + out if transposed else out + inner
            first, second = f"{x.axes},{letters}", f"{x.name}, self.{w}"
            if draft.choices.chance("weight first", 3):
                first, second = f"{letters},{x.axes}", f"self.{w}, {x.name}"
            code = f'torch.einsum("{first}->{axes}", {second})'
            if plus:
                ones = "".join(f"[:{', None' * (len(axes) - axes.index(out) - 1)}]") if axes[-1] != out else ""
                plus = f" + self.{b}{ones}"
            code += plus
        elif way == "left":
            code = f"self.{w} @ {x.name}.transpose(-1, -2)" + (f" + self.{b}[:, None]" if b else "")
            axes = rest[:-1] + out + rest[-1]
        elif way == "scaled":
            code = f"F.linear({x.name}, self.{w} * 0.5" + (f", self.{b})" if b else ")")
        else:
            code = f"F.linear({x.name}, self.{w}" + (f", self.{b})" if b else ")")
        named = [(w, i, b) for i in range(width)]
    value = draft.let(hint, code, axes)
    features = [frozenset({(Link(p, axis, frozenset({row}), of, role),)}) for p, row, of in named]
    return Linear(_last(draft, value, out), features)


def _orders(rest: str, out: str) -> list[str]:
    return [rest[:i] + out + rest[i:] for i in range(len(rest))]


def _last(draft: Draft, value: Value, letter: str) -> Value:
    """The axis of features last (mostly; movement of axes that are not last is written as such)."""
    if value.axes[-1] == letter or draft.choices.chance("features not last", 3):
        return value
    return draft.arrange(value, value.axes.replace(letter, "") + letter)


def with_role(features: Sequence[frozenset[Path]], role: Role) -> Features:
    """The same features, their first factors playing a part."""
    return [frozenset((replace(p[0], role=role), *p[1:]) for p in place) for place in features]


# ---- features to heads -----------------------------------------------------------------------------------------------


def to_heads(draft: Draft, made: Linear, want: Want, letter: str) -> Operand:
    """Split an axis of features into heads and head dimension, in either order."""
    n, d = draft.sizes[want.heads], draft.sizes[want.dims]
    order = want.heads + want.dims
    whole = len({link.param for place in made.features for path in place for link in path[:1]}) == 1
    if n > 1 and whole and draft.choices.chance(f"{want.name} strided heads", 4):
        order = want.dims + want.heads
    contiguous = order[0] == want.heads
    ways = ["unfold", *(["stacked"] if n > 1 else [])]
    if contiguous and draft.choices.pick(f"{want.name} heads", ways) == "stacked":
        i = made.value.axis(letter)
        new = made.value.axes.replace(letter, want.heads + want.dims)
        way = draft.choices.pick("stack", [f"chunk({n}, {i})", f"split({d}, {i})"])
        value = draft.let(want.name, f"torch.stack({made.value.name}.{way}, {i})", new)
    else:
        value = draft.unfold(made.value, letter, order)
    at = (lambda h, j: h * d + j) if contiguous else (lambda h, j: j * n + h)
    vectors = tuple(tuple(made.features[at(h, j)] for j in range(d)) for h in range(n))
    return Operand(_tokens(value, want), want.heads, want.dims, (vectors,))


def _tokens(value: Value, want: Want) -> Value:
    """Keys are made from the tensor of the queries in self-attention: their tokens get a letter of their own."""
    return value if want.tokens in value.axes else value.renamed("t", want.tokens)


# ---- one projection --------------------------------------------------------------------------------------------------


def single(draft: Draft, x: Value, want: Want) -> Operand:
    """q, k or v from weights of its own."""
    n, d = draft.sizes[want.heads], draft.sizes[want.dims]
    ways = ["matrix", "three-dimensional", "per head", "flattened"]
    ways += ["per head matmul"] if len(x.axes) == 3 else []
    way = draft.choices.pick(f"{want.name} weight", ways)
    if way == "matrix":
        made = linear(draft, str(want.name), x, n * d, want.role, want.bias, cuts=range(d, n * d, d))
        letter = next(a for a in made.value.axes if a not in x.axes)
        return to_heads(draft, made, want, letter)
    inner, rest = x.axes[-1], x.axes[:-1]
    n_in = draft.sizes[inner]
    if way == "per head":
        m = draft.module(want.name, f"nn.ModuleList(nn.Linear({n_in}, {d}, bias={want.bias}) for _ in range({n}))")
        at = draft.choices.pick("stack heads", [1, 0, len(rest)])
        code = f"torch.stack([one({x.name}) for one in self.{m}], {at})"
        value = draft.let(want.name, code, rest[:at] + want.heads + rest[at:] + want.dims)
        vectors = tuple(
            tuple(
                frozenset(
                    {(Link(f"{m}.{h}.weight", 0, frozenset({j}), f"{m}.{h}.bias" if want.bias else None, want.role),)}
                )
                for j in range(d)
            )
            for h in range(n)
        )
        return Operand(_tokens(value, want), want.heads, want.dims, (vectors,))
    if way == "flattened":
        w = draft.parameter(f"{want.name}_w", n, d, n_in)
        flat = draft.choices.pick("flatten", ["flatten(0, 1)", f"view({n * d}, {n_in})", f"reshape(-1, {n_in})"])
        out = draft.letter(n * d)
        value = draft.let(want.name, f"F.linear({x.name}, self.{w}.{flat})", rest + out)
        value, axis = draft.unfold(value, out, want.heads + want.dims), 0
    elif way == "per head matmul":
        w, axis = draft.parameter(f"{want.name}_w", n, n_in, d), 0
        code = f"torch.matmul({x.name}.unsqueeze(1), self.{w})"
        value = draft.let(want.name, code, rest[0] + want.heads + rest[1] + want.dims)
    else:
        draft.may_refuse |= n_in == 1
        letters = "".join(draft.choices.shuffled(f"{want.name} weight axes", want.heads + inner + want.dims))
        w = draft.parameter(f"{want.name}_w", *draft.shape(letters))
        out_axes = draft.choices.pick(
            f"{want.name} einsum out",
            [
                rest + want.heads + want.dims,
                rest[:-1] + want.heads + rest[-1] + want.dims,
                want.heads + rest + want.dims,
                rest + want.dims + want.heads,
                rest[:-1] + want.heads + want.dims + rest[-1],
            ],
        )
        value = draft.let(want.name, f'torch.einsum("{x.axes},{letters}->{out_axes}", {x.name}, self.{w})', out_axes)
        axis = letters.index(want.heads)
    vectors = tuple((frozenset({(Link(w, axis, frozenset({h}), None, want.role),)}),) * d for h in range(n))
    return Operand(_tokens(value, want), want.heads, want.dims, (vectors,))


# ---- fused projections -----------------------------------------------------------------------------------------------


def fused(draft: Draft, x: Value, wants: Sequence[Want]) -> list[Operand]:
    """Several of q, k, v from one matrix."""
    shapes = {(draft.sizes[w.heads], draft.sizes[w.dims]) for w in wants}
    counts = [draft.sizes[w.heads] for w in wants]
    ways = ["blocks"]
    ways += ["one view"] if len(shapes) == 1 else []
    ways += ["groups"] if all(n % min(counts) == 0 for n in counts) else []
    way = draft.choices.pick("fused", ways)
    order = draft.choices.shuffled("order", list(wants))
    bias = order[0].bias
    hint = "".join(str(w.name)[0] for w in order)
    size = {w.name: draft.sizes[w.heads] * draft.sizes[w.dims] for w in wants}
    cuts = [sum(size[w.name] for w in order[:i]) for i in range(1, len(order))] if way == "blocks" else []
    made = linear(draft, hint, x, sum(size.values()), "other", bias, cuts)
    letter = next(a for a in made.value.axes if a not in x.axes)
    if way == "blocks":
        found = _blocks(draft, made, letter, order, size)
    elif way == "one view":
        found = _one_view(draft, made, letter, order)
    else:
        found = _groups(draft, made, letter, order, min(counts))
    return [_in_role(found[w.name], w.role) for w in wants]


def _in_role(operand: Operand, role: Role) -> Operand:
    kinds = tuple(tuple(tuple(with_role(head, role)) for head in vectors) for vectors in operand.kinds)
    return replace(operand, kinds=kinds)


def _blocks(draft: Draft, made: Linear, letter: str, order: Sequence[Want], size: dict[str, int]) -> dict[str, Operand]:
    letters = [draft.letter(size[w.name]) for w in order]
    parts = draft.split(made.value, letter, [(str(w.name), a) for w, a in zip(order, letters, strict=True)])
    found, start = {}, 0
    for want, part, axis in zip(order, parts, letters, strict=True):
        stop = start + size[want.name]
        found[want.name] = to_heads(draft, Linear(part, made.features[start:stop]), want, axis)
        start = stop
    return found


def _one_view(draft: Draft, made: Linear, letter: str, order: Sequence[Want]) -> dict[str, Operand]:
    """All of equal shape: a view with an axis that counts q, k, v, anywhere among heads and features."""
    n, d = draft.sizes[order[0].heads], draft.sizes[order[0].dims]
    which, heads, dims = draft.letter(len(order)), draft.letter(n), draft.letter(d)
    inside = "".join(draft.choices.shuffled("fused axes", which + heads + dims))
    value = draft.unfold(made.value, letter, inside)
    sizes = draft.shape(inside)

    def feature(i: int, h: int, j: int) -> int:
        place = {which: i, heads: h, dims: j}
        index = 0
        for a, size in zip(inside, sizes, strict=True):
            index = index * size + place[a]
        return index

    at = value.axis(which)
    way = draft.choices.pick("pick one", ["unbind", "select", "permute first"])
    if way == "permute first":
        value, at = draft.arrange(value, which + value.axes.replace(which, "")), 0
    axes = value.axes.replace(which, "")
    names = [draft.fresh(str(w.name)) for w in order]
    if way == "select":
        for i, name in enumerate(names):
            draft.lines.append(f"{name} = {value.name}.select({at}, {i})")
    elif way == "unbind":
        draft.lines.append(f"{', '.join(names)} = {value.name}.unbind({at})")
    else:
        draft.lines.append(f"{', '.join(names)} = {', '.join(f'{value.name}[{i}]' for i in range(len(names)))}")
    found = {}
    for i, (want, name) in enumerate(zip(order, names, strict=True)):
        vectors = tuple(tuple(made.features[feature(i, h, j)] for j in range(d)) for h in range(n))
        own = Value(name, axes.replace(heads, want.heads).replace(dims, want.dims))
        found[want.name] = Operand(_tokens(own, want), want.heads, want.dims, (vectors,))
    return found


def _groups(draft: Draft, made: Linear, letter: str, order: Sequence[Want], groups: int) -> dict[str, Operand]:
    """Side by side for each group of heads: some query heads, their key head, their value head."""
    group = draft.letter(groups)
    per = {w.name: draft.sizes[w.heads] // groups for w in order}
    widths = [per[w.name] * draft.sizes[w.dims] for w in order]
    inner = draft.letter(sum(widths))
    value = draft.unfold(made.value, letter, group + inner)
    letters = [draft.letter(n) for n in widths]
    parts = draft.split(value, inner, [(str(w.name), a) for w, a in zip(order, letters, strict=True)])
    found, start = {}, 0
    for want, part, axis, width in zip(order, parts, letters, widths, strict=True):
        d, count = draft.sizes[want.dims], per[want.name]
        own = part
        if count > 1:
            extra = draft.letter(count)
            own = draft.unfold(part, axis, extra + want.dims)
            between = own.axes
            if group + extra not in between:
                between = between.replace(group, "").replace(extra, group + extra)
                own = draft.arrange(own, between)
            own, heads = draft.fold(own, group + extra)
            own = own.renamed(heads, want.heads)
        else:
            own = own.renamed(group, want.heads).renamed(axis, want.dims)
        vectors = tuple(
            tuple(made.features[g * sum(widths) + start + i * d + j] for j in range(d))
            for g in range(groups)
            for i in range(count)
        )
        found[want.name] = Operand(_tokens(own, want), want.heads, want.dims, (vectors,))
        start += width
    return found


def projected(draft: Draft, x: Value, wants: Sequence[Want]) -> list[Operand]:
    """q, k, v (or some of them) from one tensor, stored apart or fused in any grouping."""
    names = {
        1: [[0]],
        2: [[0, 0], [0, 1]],
        3: [[0, 1, 2], [0, 0, 0], [0, 1, 1], [0, 0, 1], [0, 1, 0]],
    }[len(wants)]
    belongs = draft.choices.pick("storage", names)
    found: dict[str, Operand] = {}
    for part in dict.fromkeys(belongs):
        mine = [w for w, p in zip(wants, belongs, strict=True) if p == part]
        made = fused(draft, x, mine) if len(mine) > 1 else [single(draft, x, mine[0])]
        found.update({w.name: one for w, one in zip(mine, made, strict=True)})
    return [found[w.name] for w in wants]
