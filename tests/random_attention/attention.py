"""One random attention module: a design, the logits, the output; its source and the truth about it.

In: decisions and sizes. Out: an `AttentionModule`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace

from quack_fx.layout import Role, SiteKind

from . import designs
from .choices import Choices
from .designs import Sides
from .logits import attended
from .projections import Want, projected
from .source import Draft, Value
from .truth import Link, Truth, Vectors


@dataclass
class AttentionModule:
    """A drawn attention module: source, attentions, whether it reads a second input, whether it keeps the tokens."""

    source: str
    sites: list[Truth]
    cross: bool
    keeps_tokens: bool


def class_source(name: str, init: list[str], lines: list[str], arguments: str) -> str:
    """Source of a module."""
    body = "\n".join(["super().__init__()", *init])
    forward = "\n".join(lines)
    return (
        f"class {name}(nn.Module):\n    def __init__(self):\n{textwrap.indent(body, ' ' * 8)}\n\n"
        f"    def forward(self, {arguments}):\n{textwrap.indent(forward, ' ' * 8)}\n"
    )


def attention_module(choices: Choices, sizes: dict[str, int], name: str, torch_layer: bool = True) -> AttentionModule:
    """Draw an attention module; its class is called `name`."""
    draft = Draft(choices, sizes)
    if torch_layer and choices.chance("torch's layer", 25):
        return _torch_layer(choices, sizes, name)
    one = designs.self_attention
    ways: list[Callable[[Draft], Sides]] = [one, one, one, designs.cross_attention, designs.adapters, designs.factored]
    ways += [
        designs.multi_latent,
        designs.absorbed,
        designs.joint,
        designs.tied,
        designs.learned_queries,
        designs.refined,
        designs.fewer_queries,
    ]
    design = choices.pick("design", ways)
    sides = design(draft)
    tiled = draft.sizes["h"] != draft.sizes["k"] != 1 and choices.chance("tiled", 3)
    site, out = _run(draft, sides, tiled, sizes["c"])
    sites = [site]
    once_more = design is designs.self_attention and choices.chance("shared keys", 6)
    if once_more and not site.loops and not sides.back:
        # A second attention with queries of its own and the same keys (cross-layer sharing).
        later = draft.let("x2", f"x + {out.name}", "btc")
        query, key = sides.pairs[0]
        sides.pairs = [(projected(draft, later, [Want("q", "h", query.dims, "t", "q")])[0], key)]
        site, out = _run(draft, sides, tiled, sizes["c"], may_loop=False)
        sites.append(site)
    draft.lines.append(f"return {out.name}")
    second = design in (designs.cross_attention, designs.joint)
    source = class_source(name, draft.init, draft.lines, "x, y" if second else "x")
    return AttentionModule(source, sites, second, design not in (designs.learned_queries, designs.fewer_queries))


def _run(draft: Draft, sides: Sides, tiled: bool, width: int, may_loop: bool = True) -> tuple[Truth, Value]:
    """The attention of queries, keys and values that were made, and the output."""
    made = attended(draft, sides.pairs, sides.v, sides.batch, tiled, may_loop)
    truth = replace(_truth(draft, sides, made.scale, tiled), loops=made.loops)
    return truth, _output(draft, made.value, width, sides)


def _torch_layer(choices: Choices, sizes: dict[str, int], name: str) -> AttentionModule:
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
        entries = "mha.in_proj_bias" if bias and own_bias else None
        return tuple(
            tuple(frozenset({(Link(param, 0, frozenset({start + i * d + j}), entries, role),)}) for j in range(d))
            for i in range(h)
        )

    query = side("mha.q_proj_weight" if cross else "mha.in_proj_weight", 0, "q", True)
    # With weights of their own the bias is still one: its entries are numbered like the rows of the queries' weight.
    key = side("mha.k_proj_weight", 0, "k", False) if cross else side("mha.in_proj_weight", width, "k", True)
    truth = Truth((query,), (key,), tuple(range(h)), cross=cross, kind="mha", name="mha", scale=d**-0.5)
    source = class_source(name, init, lines, "x, y" if cross else "x")
    return AttentionModule(source, [truth], cross, True)


def _truth(draft: Draft, sides: Sides, scale: float | None, tiled: bool) -> Truth:
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
        unchecked=sides.unchecked.union(
            sides.v.unchecked & {"pooling"}, *(o.unchecked for p in sides.pairs for o in p)
        ),
        may_refuse=draft.may_refuse,
    )


def _output(draft: Draft, out: Value, width: int, sides: Sides) -> Value:
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
