"""What happens to queries and keys between their projections and the logits.

In: a draft and an operand. Out: the operand afterwards; its rows are the same, its norms and scale may not be.
"""

from __future__ import annotations

from dataclasses import replace

from quack_fx.layout import Norm, NormKind, Side

from .projections import Operand
from .source import Draft, Value
from .truth import Path

# ---- rope ------------------------------------------------------------------------------------------------------------

ROPES = """\
def halves(x, angle):
    a, b = x.chunk(2, -1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


def rotate_half(x, angle):
    a, b = x.chunk(2, -1)
    angle = torch.cat((angle, angle), -1)
    return x * angle.cos() + torch.cat((-b, a), -1) * angle.sin()


def pairs(x, angle):
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1).flatten(-2)


def turned(x, angle):
    x = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(x * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
"""
"""Source of the rotations."""


def rotated(draft: Draft, operand: Operand, tokens: str) -> Operand:
    """Rotary positions: halves, pairs or complex numbers; over all of the head dimension or its first part."""
    width = draft.sizes[operand.dims]
    if width < 2 or width % 2:
        return operand
    axes = operand.value.axes.replace(operand.dims, "").replace(tokens, "") + tokens + operand.dims
    value = draft.arrange(operand.value, axes)
    x, n = value.name, draft.sizes[tokens]
    part = width
    if width >= 4 and draft.choices.chance("partial rope", 4):
        part = 2
    way = draft.choices.pick("rope", ["halves", "pairs", "rotate_half", "turned", "matrix", "summed matrix"])
    learned = draft.choices.pick("angles", ["", "", "", "looked up", "projected"])
    if learned == "looked up":
        angle = f"{draft.module('angles', f'nn.Embedding({n}, {part // 2})')}(torch.arange({n}))"
    elif learned == "projected":
        angle = f"{draft.module('angles', f'nn.Linear(1, {part // 2})')}(torch.arange({n}.0)[:, None])"
    else:
        angle = draft.buffer("angle", f"torch.outer(torch.arange({n}.0), torch.arange(1.0, {part // 2 + 1}))")
    head, tail = (x, None) if part == width else (f"{x}[..., :{part}]", f"{x}[..., {part}:]")
    code = f"{way}({head}, self.{angle})"
    if "matrix" in way:
        turn = draft.buffer("turn", f"torch.linalg.qr(torch.randn({n}, {part}, {part}))[0]")
        product = f"({head}.unsqueeze(-2) @ self.{turn}).squeeze(-2)"
        code = product if way == "matrix" else f"({head}.unsqueeze(-2) * self.{turn}).sum(-1)"
    if tail is not None:
        code = f"torch.cat(({code}, {tail}), -1)"
    half = part // 2
    apart = [{j, j + half} for j in range(half)]
    known = {"halves": apart, "rotate_half": apart, "matrix": [set(range(part))], "summed matrix": [set(range(part))]}
    together = known.get(way, [{2 * j, 2 * j + 1} for j in range(half)])
    return _mixed(operand.at(draft.let(value.hint, code, axes)), together)


def _mixed(operand: Operand, together: list[set[int]]) -> Operand:
    """Places of the head dimension that are turned into each other hold what both held."""

    def mixed(head: tuple[frozenset[Path], ...]) -> tuple[frozenset[Path], ...]:
        group = {j: places for places in together for j in places}
        return tuple(frozenset().union(*(head[i] for i in group.get(j, {j}))) for j in range(len(head)))

    return replace(operand, kinds=tuple(tuple(map(mixed, kind)) for kind in operand.kinds))


# ---- norms -----------------------------------------------------------------------------------------------------------


def gained_norm(draft: Draft, hint: str, value: Value, width: int) -> tuple[Value, str | None, NormKind]:
    """An RMS or layer norm module over the last axis."""
    kind = draft.choices.pick("norm module", ["RMSNorm", "LayerNorm"])
    m = draft.module(hint, f"nn.{kind}({width})")
    made = draft.let(value.hint, f"self.{m}({value.name})", value.axes)
    return made, m, "rms" if kind == "RMSNorm" else "layer"


def normed(draft: Draft, operand: Operand, side: Side, kind: str) -> Operand:
    """QK norm of some kind; `kind` is drawn once for both sides."""
    d, h = operand.dims, operand.heads
    value = operand.value
    norm: Norm
    if kind.startswith("full") or kind == "batch":
        if h not in value.axes or not h or (kind == "batch" and "b" not in value.axes):
            return operand
        return _over_all_heads(draft, operand, side, kind)
    axes = value.axes
    if kind in ("rms", "layer", "l2 gain"):
        axes = axes.replace(d, "") + d
        value = draft.arrange(value, axes)
    at, width, x = value.axis(d), draft.sizes[d], value.name
    hint = value.hint
    if kind in ("rms", "layer"):
        m = draft.module(f"{hint}_norm", f"nn.{'RMSNorm' if kind == 'rms' else 'LayerNorm'}({width})")
        code, norm = f"self.{m}({x})", Norm(side, kind, width, m, f"{m}.weight")  # type: ignore[arg-type]
    elif kind == "rms bare":
        code = f"{x} * torch.rsqrt({x}.pow(2).mean({at}, keepdim=True) + 1e-6)"
        norm = Norm(side, "rms", width)
    elif kind == "layer bare":
        code = f"({x} - {x}.mean({at}, keepdim=True)) / ({x}.var({at}, keepdim=True, unbiased=False) + 1e-6).sqrt()"
        norm = Norm(side, "layer", width)
    elif kind == "l2":
        code, norm = f"F.normalize({x}, dim={at})", Norm(side, "l2", width)
    elif kind == "l2 by hand":
        code, norm = f"{x} / {x}.norm(dim={at}, keepdim=True).clamp_min(1e-6)", Norm(side, "l2", width)
    else:  # l2 with a gain
        g = draft.parameter(f"{hint}_gain", width)
        code, norm = f"F.normalize({x}, dim=-1) * self.{g}", Norm(side, "l2", width, None, g)
    value = draft.let(hint, code, axes)
    return replace(operand, value=value, norms=(*operand.norms, norm))


def _over_all_heads(draft: Draft, operand: Operand, side: Side, kind: str) -> Operand:
    h, d = operand.heads, operand.dims
    rest = operand.value.axes.replace(h, "").replace(d, "")
    hint = operand.value.hint
    width = draft.sizes[h] * draft.sizes[d]
    if kind == "batch":
        value = draft.arrange(operand.value, "b" + h + d + rest.replace("b", ""))
        value, letter = draft.fold(value, h + d)
        m = draft.module(f"{hint}_norm", f"nn.BatchNorm1d({width})")
        norm = Norm(side, "batch", width, m, f"{m}.weight")
    else:
        value = draft.arrange(operand.value, rest + h + d)
        value, letter = draft.fold(value, h + d)
        module = {"full rms": "RMSNorm", "full layer": "LayerNorm"}[kind]
        m = draft.module(f"{hint}_norm", f"nn.{module}({width})")
        norm = Norm(side, "rms" if kind == "full rms" else "layer", width, m, f"{m}.weight")
    value = draft.let(hint, f"self.{m}({value.name})", value.axes)
    value = draft.unfold(value, letter, h + d)
    return replace(operand, value=value, norms=(*operand.norms, norm))


NORMS = ["rms", "l2", "layer", "rms bare", "layer bare", "l2 by hand", "l2 gain", "full rms", "full layer", "batch"]


# ---- others ----------------------------------------------------------------------------------------------------------


def clamped(draft: Draft, operand: Operand) -> Operand:
    """Queries or keys cut off, or their negative part dropped, or the long ones shortened."""
    # What a norm or a bias has made long is always shortened: nobody can tell that from another norm.
    ways = ["clamp(-3.0, 3.0)", "relu()", "tanh()"]
    way = draft.choices.pick("bend", ways + ["clipped"] * (not operand.norms and "biases" not in operand.unchecked))
    x = operand.value
    if way == "clipped":
        length = f"{x.name}.norm(dim={x.axis(operand.dims)}, keepdim=True)"
        code = f"{x.name} * (1.0 / ({length} + 1e-6)).clamp(max=1.0)"
        return replace(operand, value=draft.let(x.hint, code, x.axes), scale=None)
    return replace(operand, value=draft.let(x.hint, f"{x.name}.{way}", x.axes))


def scaled(draft: Draft, operand: Operand, factor: float) -> Operand:
    """Queries or keys times a number."""
    x = operand.value
    value = draft.let(x.hint, f"{x.name} * {factor!r}", x.axes)
    return replace(operand, value=value, scale=None if operand.scale is None else operand.scale * factor)


def with_head_bias(draft: Draft, operand: Operand) -> Operand:
    """A learned vector added in each head (Transformer-XL): no bias of a projection, though it acts as one."""
    value = operand.value
    shape = [draft.sizes[a] if a in operand.heads + operand.dims else 1 for a in value.axes]
    p = draft.parameter("u", *shape)
    value = draft.let(value.hint, f"{value.name} + self.{p}", value.axes)
    return replace(operand, value=value, unchecked=operand.unchecked | {"biases"})


def shifted_in_time(draft: Draft, operand: Operand, tokens: str) -> Operand:
    """A short depthwise convolution over the tokens."""
    h, d = operand.heads, operand.dims
    if h not in operand.value.axes or not h or "b" not in operand.value.axes or len(operand.value.axes) != 4:
        return operand
    value = draft.arrange(operand.value, "b" + h + d + tokens)
    value, letter = draft.fold(value, h + d)
    width = draft.sizes[letter]
    hint = operand.value.hint
    m = draft.module(f"{hint}_conv", f"nn.Conv1d({width}, {width}, 3, padding=1, groups={width}, bias=False)")
    value = draft.let(hint, f"self.{m}({value.name})", value.axes)
    return operand.at(draft.unfold(value, letter, h + d))


def thinned(draft: Draft, operand: Operand, tokens: str, to: str) -> Operand:
    """Fewer tokens: every second one, means, maxima or shares of two, some by number or by size."""
    value, n = operand.value, draft.sizes[tokens]
    at = value.axis(tokens)
    m = draft.sizes[to]
    ways = ["first", "indexed", "mean", "max", "shares"] + (["chosen"] if len(value.axes) == 4 else [])
    way = draft.choices.pick("thin", ways)
    hint = value.hint
    axes = value.axes.replace(tokens, to)
    if way == "first":
        code = f"{value.name}.narrow({at}, 0, {m})"
    elif way == "indexed":
        index = draft.buffer("kept", f"torch.arange({n - 1}, {n - 1 - m}, -1)")
        code = f"{value.name}.index_select({at}, self.{index})"
    elif way in ("mean", "max", "shares"):
        step = n // m
        code = f"{value.name}.narrow({at}, 0, {m * step}).unflatten({at}, ({m}, {step}))"
        if way == "shares":
            gate = draft.module("gate", f"nn.Linear({step}, {step})")
            after = "[:" + ", None" * (len(axes) - 1 - at) + "]"
            operand = replace(operand, unchecked=operand.unchecked | {"pooling"})
            code = f"({code} * self.{gate}(x.reshape(-1)[:{step}]).softmax(0){after}).sum({at + 1})"
        else:
            code += f".mean({at + 1})" if way == "mean" else f".max({at + 1}).values"
    else:
        code = f"{value.name}.index_select({at}, x.reshape(-1)[:{n}].topk({m}).indices)"
    return operand.at(draft.let(hint, code, axes))


def with_null(draft: Draft, operand: Operand, tokens: str, to: str) -> Operand:
    """Learned keys (or values) before those of the tokens."""
    value = operand.value
    at = value.axis(tokens)
    extra = draft.sizes[to] - draft.sizes[tokens]
    shape = [extra if a == tokens else 1 if a == "b" else draft.sizes[a] for a in value.axes]
    p = draft.parameter("null", *shape)
    sizes = ", ".join("-1" if a != "b" else str(draft.sizes["b"]) for a in value.axes)
    expanded = f"self.{p}.expand({sizes})"
    pair = draft.choices.pick("null place", [f"({expanded}, {value.name})", f"({value.name}, {expanded})"])
    code = f"torch.cat({pair}, {at})"
    return operand.at(draft.let(value.hint, code, value.axes.replace(tokens, to)))
