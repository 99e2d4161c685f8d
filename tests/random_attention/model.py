"""A whole random model: one attention design, the module around it, layers, wrappers, distractors.

In: decisions. Out: a `RandomModel`: Python source, the module made from it, its inputs, and what is to be found in it.
"""

from __future__ import annotations

import linecache
import sys
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quack_fx.layout import QKLayout, Role, SiteKind

from .choices import Choices
from .distractors import DISTRACTORS
from .latent import latent_attention, low_rank, merged_adapter, with_adapter
from .logits import Pairs, attended
from .projections import Operand, Want, projected, single
from .source import Draft, Value
from .truth import Expected, Link, Truth, Vectors
from .way import NORMS, ROPES, clamped, normed, rotated, scaled, shifted_in_time, thinned, with_null

HEADER = """\
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint
from einops import rearrange


def relative(score, b, h, t, s):
    return score + (t - s)


def causal(score, b, h, t, s):
    return torch.where(t >= s, score, -float("inf"))
"""


@dataclass(frozen=True)
class RandomModel:
    """A model and the truth about it."""

    source: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    expected: Expected
    choices: Choices

    @property
    def layout(self) -> QKLayout:
        """The truth as a layout."""
        return QKLayout(tuple(t.site() for t in self.expected.sites))


@dataclass
class _Attention:
    """A drawn attention module: its source, whether it reads a second input, whether it keeps the tokens."""

    source: str
    sites: list[Truth]
    cross: bool
    keeps_tokens: bool
    loops: bool


def random_model(choices: Choices) -> RandomModel:
    """Draw a model."""
    sizes = _sizes(choices)
    attention = _attention(choices, sizes)
    source, sites, skips = _around(choices, attention, sizes)
    source = "\n\n".join((HEADER, ROPES, source))
    torch.manual_seed(0)
    module = sys.modules["random_model"] = types.ModuleType("random_model")  # torch.compile asks for it
    name = f"<random model {abs(hash(source))}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    exec(compile(source, name, "exec"), module.__dict__)
    model = module.__dict__["Model"]().eval()
    x = torch.randn(sizes["b"], sizes["t"], sizes["c"])
    inputs = (x, torch.randn(sizes["b"], sizes["s"], sizes["c"] + 2)) if attention.cross else (x,)
    return RandomModel(source, model, inputs, Expected(sites, attention.loops, skips), choices)


def _sizes(choices: Choices) -> dict[str, int]:
    """Numbers that are all different, so that none is taken for another; now and then they are not."""
    sizes = {
        "b": choices.pick("batch", [2, 1, 3]),
        "t": choices.pick("tokens", [5, 7, 4]),
        "s": choices.pick("other tokens", [7, 11, 6]),
        "c": choices.pick("width", [13, 17, 12]),
        "k": choices.pick("key heads", [3, 2, 1, 5]),
        "d": choices.pick("head dimension", [4, 2, 6, 3]),
    }
    sizes["h"] = sizes["k"] * choices.pick("group", [1, 1, 2, 3])
    sizes["e"] = choices.pick("value dimension", [sizes["d"], 5, 3])
    if choices.chance("equal sizes", 15):
        sizes |= dict.fromkeys("tsde", max(2, sizes["h"]))
    return sizes


# ---- attention -------------------------------------------------------------------------------------------------------


@dataclass
class _Sides:
    """Queries, keys and values of one attention, before the logits."""

    pairs: Pairs
    v: Operand
    cross: bool = False
    kind: SiteKind | None = None
    unchecked: frozenset[str] = frozenset()
    keep: int | None = None
    batch: str = "b"
    back: str = ""
    may_refuse: bool = False
    name: str = ""


def _attention(choices: Choices, sizes: dict[str, int]) -> _Attention:
    draft = Draft(choices, sizes)
    designs: list[Callable[[Draft], _Sides]] = [_self, _self, _self, _cross, _adapters, _low_rank, _latent, _absorbed]
    designs += [_joint, _tied, _learned_queries]
    if choices.chance("torch's layer", 25):
        return _torch_layer(choices, sizes)
    design = choices.pick("design", designs)
    sides = design(draft)
    tiled = draft.sizes["h"] != draft.sizes["k"] != 1 and choices.chance("tiled", 3)
    sites, loops, out = [], False, None
    for again in (False, True):
        if again:
            # A second attention with queries of its own and the same keys (cross-layer sharing).
            if design is not _self or not choices.chance("shared keys", 6):
                break
            assert out is not None
            if loops or sides.back:
                break
            later = draft.let("x2", f"x + {out.name}", "btc")
            draft.sizes["b"], draft.sizes["t"] = sizes["b"], sizes["t"]
            q = projected(draft, later, [Want("q", "h", sides.pairs[0][0].dims, "t", "q")])[0]
            sides.pairs = [(q, sides.pairs[0][1])]
        made = attended(draft, sides.pairs, sides.v, sides.batch, tiled, may_loop=not again)
        sites.append(_truth(draft, sides, made.scale, tiled))
        loops |= made.loops
        out = _output(draft, made.value, sizes["c"], sides)
    assert out is not None
    draft.lines.append(f"return {out.name}")
    second = design in (_cross, _joint)
    source = _class("Attention", draft.init, draft.lines, "x, y" if second else "x")
    return _Attention(source, sites, second, design is not _learned_queries, loops)


def _torch_layer(choices: Choices, sizes: dict[str, int]) -> _Attention:
    """nn.MultiheadAttention: one weight, or three where keys have a width of their own; its bias is one for all."""
    h, d = sizes["h"], sizes["d"]
    width = sizes["c"] = h * d
    cross, bias = choices.pick("cross", [False, True]), choices.pick("bias", [True, False])
    more = f", bias={bias}, batch_first=True" + (f", kdim={width + 2}, vdim={width + 2}" if cross else "")
    more += ", add_bias_kv=True" if choices.chance("bias_kv", 6) else ""
    weights = choices.pick("need_weights", [False, True])
    init = [f"self.mha = nn.MultiheadAttention({width}, {h}{more})"]
    other = "y" if cross else "x"
    lines = [f"return self.mha(x, {other}, {other}, need_weights={weights})[0]"]

    def side(param: str, start: int, role: Role, own_bias: bool) -> Vectors:
        name = "mha.in_proj_bias" if bias and own_bias else None
        return tuple(
            tuple(frozenset({(Link(param, 0, frozenset({start + i * d + j}), name, role),)}) for j in range(d))
            for i in range(h)
        )

    query = side("mha.q_proj_weight" if cross else "mha.in_proj_weight", 0, "q", True)
    # With weights of their own the bias is still one: its entries are numbered like the rows of the queries' weight.
    key = side("mha.k_proj_weight", 0, "k", False) if cross else side("mha.in_proj_weight", width, "k", True)
    truth = Truth((query,), (key,), tuple(range(h)), cross=cross, kind="mha", name="mha", scale=d**-0.5)
    source = _class("Attention", init, lines, "x, y" if cross else "x")
    return _Attention(source, [truth], cross, True, False)


def _truth(draft: Draft, sides: _Sides, scale: float | None, tiled: bool) -> Truth:
    """What was laid out, as a `Truth`: several products are one set of vectors, side by side."""

    def vectors(side: int) -> tuple[Vectors, ...]:
        operands = [pair[side] for pair in sides.pairs]
        n = max(len(o.kinds[0]) for o in operands)
        kinds = max(len(o.kinds) for o in operands)
        return tuple(
            tuple(
                tuple(place for o in operands for place in o.kinds[kind][h if len(o.kinds[kind]) > 1 else 0])
                for h in range(n)
            )
            for kind in range(kinds)
        )

    query, key = vectors(0), vectors(1)
    h, k = len(query[0]), len(key[0])
    head_map = tuple(i % k if tiled else i // (h // k) for i in range(h))
    norms = tuple(dict.fromkeys(n for pair in sides.pairs for o in pair for n in o.norms))
    scales = [scale, *(o.scale for pair in sides.pairs for o in pair)]
    product: float | None = 1.0
    for factor in scales[:3] if len(sides.pairs) == 1 else [None]:
        product = None if factor is None or product is None else product * factor
    kind: SiteKind = sides.kind or ("mha" if h == k else "mqa" if k == 1 else "gqa")
    latent = tuple(dict.fromkeys(n for pair in sides.pairs for o in pair for n in o.latent_norms))
    return Truth(
        query=query,
        key=key,
        head_map=head_map,
        norms=norms,
        latent_norms=latent,
        cross=sides.cross,
        kind=kind,
        name=sides.name,
        scale=product,
        unchecked=sides.unchecked,
        may_refuse=sides.may_refuse,
    )


def _output(draft: Draft, out: Value, width: int, sides: _Sides) -> Value:
    """Heads side by side, projected back to the width of the stream."""
    heads = "".join(a for a in out.axes if a not in "bte")
    out = draft.arrange(out, sides.batch + "t" + heads + "e")
    if len(heads) == 1 and draft.sizes[heads] % 2 == 0 and draft.choices.chance("differential", 4):
        out, heads = _difference(draft, out, heads)
    out, letter = draft.fold(out, heads + "e")
    m = draft.module("out", f"nn.Linear({draft.sizes[letter]}, {width})")
    code = f"self.{m}({out.name})"
    if sides.keep is not None:
        code += f"[:, :{sides.keep}]"
    draft.sizes["c"] = width
    return draft.let("o", code + sides.back, "btc")


def _difference(draft: Draft, out: Value, heads: str) -> tuple[Value, str]:
    """Differential attention: every second head is taken from the one before it."""
    half, two = draft.letter(draft.sizes[heads] // 2), draft.letter(2)
    out = draft.unfold(out, heads, draft.choices.pick("pairs of heads", [half + two, two + half]))
    at = out.axis(two)
    weight = draft.parameter("lam", 1)
    code = f"{out.name}.select({at}, 0) - self.{weight} * {out.name}.select({at}, 1)"
    return draft.let("out", code, out.axes.replace(two, "")), half


def _wants(draft: Draft, roles: tuple[Role, ...] = ("q", "k", "other"), keys: str = "k") -> list[Want]:
    bias = draft.choices.pick("bias", [False, True])
    return [
        Want("q", "h", "d", "t", roles[0], bias),
        Want("k", keys, "d", "s", roles[1], bias),
        Want("v", keys, "e", "s", roles[2], bias),
    ]


def _heads_of_keys(draft: Draft) -> str:
    """Letter of the key heads: that of the query heads where there are as many."""
    return "k" if draft.sizes["k"] != draft.sizes["h"] else "h"


def _on_the_way(draft: Draft, q: Operand, k: Operand, v: Operand) -> tuple[Operand, Operand, Operand]:
    """Norms, rope and the rest, the same on both sides mostly."""
    chance, pick = draft.choices.chance, draft.choices.pick
    if chance("short convolution", 10):
        q, k = shifted_in_time(draft, q, "t"), shifted_in_time(draft, k, "s")
    norm = pick("norm", NORMS) if chance("qk norm", 3) else None
    one_side = norm is not None and chance("norm on one side", 6)
    after = chance("norm after rope", 4)
    for step in ("rope", "norm") if after else ("norm", "rope"):
        if step == "norm" and norm is not None:
            k = normed(draft, k, "key", norm)
            q = q if one_side else normed(draft, q, "query", norm)
        elif step == "rope" and (chance("rope", 3)):
            q, k = rotated(draft, q, "t"), rotated(draft, k, "s")
    if chance("bent", 10):
        q, k = clamped(draft, q), clamped(draft, k)
    if chance("scaled early", 8):
        q, k = scaled(draft, q, 0.5), scaled(draft, k, 0.25)
    if chance("fewer keys", 8):
        kept = draft.letter(max(2, draft.sizes["s"] // 2))
        k, v = thinned(draft, k, "s", kept), thinned(draft, v, "s", kept)
        k, v = _renamed(draft, k, kept), _renamed(draft, v, kept)
        draft.sizes["s"] = draft.sizes[kept]
    if chance("null key", 8):
        more = draft.letter(draft.sizes["s"] + pick("null keys", [1, 3]))
        k, v = with_null(draft, k, "s", more), with_null(draft, v, "s", more)
        k, v = _renamed(draft, k, more), _renamed(draft, v, more)
        draft.sizes["s"] = draft.sizes[more]
    return q, k, v


def _renamed(draft: Draft, x: Operand, letter: str) -> Operand:
    return x.at(x.value.renamed(letter, "s"))


def _self(draft: Draft) -> _Sides:
    x, batch, back = _seen_as(draft)
    draft.sizes["s"] = draft.sizes["t"]
    q, k, v = projected(draft, x, _wants(draft, keys=_heads_of_keys(draft)))
    q, k, v = _on_the_way(draft, q, k, v)
    return _Sides([(q, k)], v, batch=batch, back=back)


def _seen_as(draft: Draft) -> tuple[Value, str, str]:
    """The input as attention sees it; its batch axes, and what turns the output back."""
    sizes, x = draft.sizes, Value("x", "btc")
    b, t, c = sizes["b"], sizes["t"], sizes["c"]
    way = draft.choices.pick("input", ["as it is"] * 5 + ["tokens first", "no batch", "windows", "shifted windows"])
    if way == "tokens first":
        return draft.let("x", "x.transpose(0, 1)", "tbc"), "b", ""
    if way == "no batch":
        return draft.let("x", "x[0]", "tc"), "", f".expand({b}, {t}, {c})"
    if "windows" not in way or t % 2:
        return x, "b", ""
    moved, back = ("x.roll(1, 1)", ".roll(-1, 1)") if way.startswith("shifted") else ("x", "")
    sizes["b"], sizes["t"] = b * 2, t // 2
    return draft.let("x", f"{moved}.reshape({b * 2}, {t // 2}, {c})", "btc"), "b", f".reshape({b}, {t}, {c}){back}"


def _cross(draft: Draft) -> _Sides:
    q_want, k_want, v_want = _wants(draft, keys=_heads_of_keys(draft))
    draft.sizes["C"] = draft.sizes["c"] + 2
    q = projected(draft, Value("x", "btc"), [q_want])[0]
    k, v = projected(draft, Value("y", "bsC"), [k_want, v_want])
    q, k, v = _on_the_way(draft, q, k, v)
    return _Sides([(q, k)], v, cross=True)


def _learned_queries(draft: Draft) -> _Sides:
    """Queries projected from a learned latent (Perceiver)."""
    q_want, k_want, v_want = _wants(draft, keys=_heads_of_keys(draft))
    draft.sizes["s"] = draft.sizes["t"]
    count, b, c = draft.choices.pick("latents", [4, 6, 2]), draft.sizes["b"], draft.sizes["c"]
    k, v = projected(draft, Value("x", "btc"), [k_want, v_want])
    p = draft.parameter("latents", 1, count, c)
    draft.sizes["t"] = count
    latents = draft.let("latents", f"self.{p}.expand({b}, -1, -1)", "btc")
    q = single(draft, latents, q_want)
    q, k, v = _on_the_way(draft, q, k, v)
    return _Sides([(q, k)], v, cross=True)


def _adapters(draft: Draft) -> _Sides:
    draft.sizes["s"] = draft.sizes["t"]
    x = Value("x", "btc")
    rank = draft.choices.pick("rank", [2, 1, 3])
    on = draft.choices.pick("adapters", ["both", "queries", "keys"])
    merged = draft.choices.chance("merged", 12)
    wants = _wants(draft, keys=_heads_of_keys(draft))
    made = merged_adapter if merged else with_adapter
    q = made(draft, x, wants[0], rank) if on != "keys" else single(draft, x, wants[0])
    k = made(draft, x, wants[1], rank) if on != "queries" else single(draft, x, wants[1])
    v = single(draft, x, wants[2])
    q, k, v = _on_the_way(draft, q, k, v)
    return _Sides([(q, k)], v, may_refuse=merged)


def _low_rank(draft: Draft) -> _Sides:
    draft.sizes["s"] = draft.sizes["t"]
    x = Value("x", "btc")
    rank = draft.choices.pick("rank", [2, 3])
    on = draft.choices.pick("low rank", ["both", "queries", "keys"])
    wants = _wants(draft, keys=_heads_of_keys(draft))
    q = (
        single(draft, x, replace(wants[0], role="uq"))
        if on == "keys"
        else low_rank(draft, x, wants[0], rank, ("uq", "dq"))
    )
    k = single(draft, x, wants[1]) if on == "queries" else low_rank(draft, x, wants[1], rank, ("uk", "dkv"))
    v = single(draft, x, wants[2])
    q, k, v = _on_the_way(draft, q, k, v)
    return _Sides([(q, k)], v, kind=None if on == "queries" else "mla")


def _latent(draft: Draft) -> _Sides:
    draft.sizes["s"] = draft.sizes["t"]
    draft.sizes["k"] = draft.sizes["h"]
    pairs, v = latent_attention(draft, Value("x", "btc"), Value("x", "btc"), absorbed=False)
    return _Sides(pairs, v, kind="mla")


def _absorbed(draft: Draft) -> _Sides:
    # Which side the keys' up projection plays on, and so the roles and the number of key heads, is a matter of taste.
    draft.sizes["s"] = draft.sizes["t"]
    draft.sizes["k"] = 1
    pairs, v = latent_attention(draft, Value("x", "btc"), Value("x", "btc"), absorbed=True)
    # A norm of the keys' latent stands right before the logits here, and between two factors in the other reading.
    return _Sides(pairs, v, unchecked=frozenset({"roles", "kind", "norms", "latent norms"}))


def _joint(draft: Draft) -> _Sides:
    """Two streams with projections of their own, side by side along the tokens."""
    sizes = draft.sizes
    letter = _heads_of_keys(draft)
    bias = draft.choices.pick("bias", [False, True])
    others, sizes["s"], sizes["C"] = sizes["s"], sizes["t"], sizes["c"] + 2
    sizes["u"] = others
    mine = projected(draft, Value("x", "btc"), _with_tokens(letter, "s", bias))
    yours = projected(draft, Value("y", "buC"), _with_tokens(letter, "u", bias))
    norm = draft.choices.pick("joint norm", ["rms", "l2", "layer bare"]) if draft.choices.chance("qk norm", 3) else None
    if norm is not None:
        mine[:2] = [normed(draft, x, side, norm) for x, side in zip(mine, ("query", "key"), strict=False)]  # type: ignore[arg-type]
        yours[:2] = [normed(draft, x, side, norm) for x, side in zip(yours, ("query", "key"), strict=False)]  # type: ignore[arg-type]
    keep = sizes["t"]
    flip = draft.choices.chance("other stream first", 3)
    joined = []
    for a, b, tokens in zip(mine, yours, "tss", strict=True):
        axes = a.value.axes
        second = draft.arrange(b.value, axes.replace(tokens, "u"))
        pair = (second, a.value) if flip else (a.value, second)
        code = f"torch.cat(({pair[0].name}, {pair[1].name}), {axes.index(tokens)})"
        value = draft.let(a.value.name.rstrip("0123456789"), code, axes)
        norms = tuple(dict.fromkeys((*a.norms, *b.norms)))
        joined.append(replace(a, value=value, kinds=(*a.kinds, *b.kinds), norms=norms))
    sizes["t"] = sizes["s"] = keep + others
    q, k, v = joined
    return _Sides([(q, k)], v, keep=keep)


def _with_tokens(keys: str, tokens: str, bias: bool) -> list[Want]:
    return [
        Want("q", "h", "d", "t" if tokens == "s" else tokens, "q", bias),
        Want("k", keys, "d", tokens, "k", bias),
        Want("v", keys, "e", tokens, "other", bias),
    ]


def _tied(draft: Draft) -> _Sides:
    """Queries and keys are one projection (Reformer)."""
    draft.sizes["s"] = draft.sizes["t"]
    draft.sizes["k"] = draft.sizes["h"]
    wants = _wants(draft, keys="h")
    x = Value("x", "btc")
    q, v = projected(draft, x, [wants[0], wants[2]])

    def as_key(head: tuple[frozenset[Any], ...]) -> tuple[frozenset[Any], ...]:
        return tuple(frozenset((replace(p[0], role="k"), *p[1:]) for p in place) for place in head)

    k = replace(q, value=q.value.renamed("t", "s"), kinds=tuple(tuple(map(as_key, kind)) for kind in q.kinds))
    if draft.choices.chance("rope", 3):
        q, k = rotated(draft, q, "t"), rotated(draft, k, "s")
    if draft.choices.chance("normalised keys", 3):
        k = normed(draft, k, "key", "l2")
    return _Sides([(q, k)], v)


# ---- around it -------------------------------------------------------------------------------------------------------


def _class(name: str, init: list[str], lines: list[str], arguments: str) -> str:
    body = "\n".join(["super().__init__()", *init])
    forward = "\n".join(lines)
    return (
        f"class {name}(nn.Module):\n    def __init__(self):\n{textwrap.indent(body, ' ' * 8)}\n\n"
        f"    def forward(self, {arguments}):\n{textwrap.indent(forward, ' ' * 8)}\n"
    )


def _around(choices: Choices, attention: _Attention, sizes: dict[str, int]) -> tuple[str, list[Truth], tuple[str, ...]]:
    """The model around an attention; source, sites under their names in it, and modules that may be skipped."""
    arguments = "x, y" if attention.cross else "x"
    if not attention.keeps_tokens or choices.pick("layers", [False, True, True]) is False:
        return attention.source + "\n\nModel = Attention\n", attention.sites, ()
    call = choices.pick("call", ["module", "forward", "checkpoint", "reentrant", "no_grad", "function"])
    name: str | None = "attn"
    source = attention.source + "\n\n"
    if call == "function":
        source += _FUNCTION + "\n\n"
    code = {
        "module": f"self.attn({arguments})",
        "forward": f"self.attn.forward({arguments})",
        "checkpoint": f"checkpoint(self.attn, {arguments}, use_reentrant=False)",
        "reentrant": f"checkpoint(self.attn, {arguments}, use_reentrant=True)",
        "no_grad": f"self.attn({arguments})",
        "function": f"Run.apply(self.attn, {arguments})",
    }[call]
    if call == "forward":
        name = None
    lines = [f"a = {code}"]
    if call == "no_grad":
        lines = ["with torch.no_grad():", f"    a = {code}"]
    distractor = choices.pick("beside", ["", *DISTRACTORS]) if choices.chance("distractor", 3) else ""
    init = ["self.attn = Attention()"]
    if choices.pick("pre-norm", [False, True]):
        init.append(f"self.norm = nn.LayerNorm({sizes['c']})")
        lines.insert(0, "r, x = x, self.norm(x)")
        lines.append("x = r + a")
    else:
        lines.append("x = x + a")
    if distractor:
        source += DISTRACTORS[distractor].strip() + "\n\n\n"
        init.append(f"self.other = {distractor}({sizes['c']})")
        lines.append("x = x + self.other(x)")
    lines.append("return x")
    source += _class("Block", init, lines, arguments)
    depth = choices.pick("depth", [1, 2, 3])
    shared = choices.chance("shared layer", 5)
    tied = depth > 1 and not shared and choices.chance("tied parameters", 8)
    part = _tied_part(choices, attention) if depth > 1 and not shared and not tied else ""
    init = [f"self.blocks = nn.ModuleList(Block() for _ in range({1 if shared else depth}))"]
    if tied:
        init += ["for block in self.blocks[1:]:", "    block.attn = self.blocks[0].attn"]
    if part:
        init += ["for block in self.blocks[1:]:", f"    block.attn.{part} = self.blocks[0].attn.{part}"]
    if shared:
        lines = [f"for _ in range({depth}):", f"    x = self.blocks[0]({arguments})", "return x"]
    else:
        lines = ["for block in self.blocks:", f"    x = block({arguments})", "return x"]
    source += "\n\n" + _class("Model", init, lines, arguments)
    one = shared or tied
    sites = []
    for i in range(1 if one else depth):
        for site in attention.sites:
            made = site.moved(f"blocks.{i}.attn", {} if not part else _names_of(site, part, i))
            if name is None and site.name == "":
                made = replace(made, name=None)
            made = replace(made, calls=depth if one else 1)
            same = next((n for n, s in enumerate(sites) if (s.query, s.key) == (made.query, made.key)), None)
            if same is None:
                sites.append(made)
            else:  # nothing but tied parameters: one attention that runs again
                sites[same] = replace(sites[same], calls=sites[same].calls + 1)
    skips = tuple(f"blocks.{i}.other" for i in range(depth)) if distractor else ()
    return source, sites, skips


def _tied_part(choices: Choices, attention: _Attention) -> str:
    """A parameter or submodule of the attention that all layers share, "" mostly."""
    names = sorted({link.param.split(".")[0] for truth in attention.sites for link in truth.links()})
    return choices.pick("tied part", names) if choices.chance("tied part", 8) else ""


def _names_of(site: Truth, part: str, layer: int) -> dict[str, str]:
    """First names of what layers share."""
    names = {name for link in site.links() for name in (link.param, link.bias) if name and name.split(".")[0] == part}
    return {f"blocks.{layer}.attn.{name}": f"blocks.0.attn.{name}" for name in names}


_FUNCTION = """\
class Run(torch.autograd.Function):
    @staticmethod
    def forward(ctx, module, *inputs):
        return module(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient, None
"""
