"""The finder against attentions whose rows are known because the test lays them out itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import (
    BATCH,
    CASES,
    DIM,
    HEADS,
    INNER,
    TOKENS,
    WIDTH,
    X,
    attend,
    linear,
    made,
    plain,
    q_block,
    qkv,
    separate,
    split,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import example, heads, site
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import flex_attention
from toy import Toy

from quack_fx.find import find, find_in_graph, find_qk_pairs
from quack_fx.layout import AttentionSite, LogitTerm, QKLayout, WeightBlock
from quack_fx.prove import verify_qk_pairs


def canonical(one: AttentionSite) -> AttentionSite:
    """The same site with its blocks and terms in an order that does not depend on who wrote them down."""

    def order(blocks: tuple[WeightBlock, ...]) -> list[int]:
        return sorted(range(len(blocks)), key=lambda i: (blocks[i].param, blocks[i].role, blocks[i].heads))

    q, k = order(one.query), order(one.key)
    terms = {LogitTerm(tuple(q.index(i) for i in t.query), tuple(k.index(i) for i in t.key)) for t in one.terms}
    return replace(
        one,
        query=tuple(one.query[i] for i in q),
        key=tuple(one.key[i] for i in k),
        terms=tuple(sorted(terms, key=lambda t: (t.query, t.key))),
        logit_scale=None if one.logit_scale is None else round(one.logit_scale, 9),
    )


def assert_same(found: AttentionSite, expected: AttentionSite) -> None:
    """Field by field, so that a failure names the field."""
    found, expected = canonical(found), canonical(expected)
    for name in AttentionSite.__dataclass_fields__:
        assert getattr(found, name) == getattr(expected, name), name


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_the_construction(name: str, device: str) -> None:
    model, inputs, expected = CASES[name]()
    layout = find_qk_pairs(model.to(device), *inputs)
    assert len(layout.sites) == 1 and not layout.skipped
    assert_same(layout.sites[0], expected)


# ---- what is no site -------------------------------------------------------------------------------------------------


def linear_attention() -> tuple[nn.Module, tuple[Tensor, ...]]:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = F.elu(split(m.q(x))) + 1, F.elu(split(m.k(x))) + 1, split(m.v(x))
        return q @ (k.mT @ v)

    return Toy(run, **qkv()), (X,)


def learned_queries() -> tuple[nn.Module, tuple[Tensor, ...]]:
    def run(m: Any, x: Tensor) -> Tensor:
        return attend(m.queries.expand(BATCH, -1, -1, -1), split(m.k(x)), split(m.v(x)))

    return Toy(run, queries=torch.ones(HEADS, 6, DIM), k=linear(INNER), v=linear(INNER)), (X,)


def additive() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Bahdanau's score: v . tanh(q + k)."""

    def run(m: Any, x: Tensor) -> Tensor:
        score = m.score(torch.tanh(m.q(x).unsqueeze(2) + m.k(x).unsqueeze(1))).squeeze(-1)
        return score.softmax(-1) @ m.v(x)

    return Toy(run, **qkv(), score=linear(1, of=INNER)), (X,)


def computed_weight() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """An adapter that is merged in every forward."""

    def run(m: Any, x: Tensor) -> Tensor:
        q = F.linear(x, m.q.weight + m.b @ m.a)
        return attend(split(q), split(m.k(x)), split(m.v(x)))

    return Toy(run, **qkv(), a=torch.ones(2, WIDTH), b=torch.ones(INNER, 2)), (X,)


def gated() -> tuple[nn.Module, tuple[Tensor, ...]]:
    def run(m: Any, x: Tensor) -> Tensor:
        return attend(split(m.q(x)), split(m.k(x) * m.gate(x).sigmoid()), split(m.v(x)))

    return Toy(run, **qkv(), gate=linear(INNER)), (X,)


def single_key() -> tuple[nn.Module, tuple[Tensor, ...]]:
    def run(m: Any, x: Tensor) -> Tensor:
        logits = split(m.q(x)) @ split(m.k(x)).mT
        return logits.softmax(-1) * split(m.v(x))

    return Toy(run, **qkv()), (torch.ones(BATCH, 1, WIDTH),)


def added_heads() -> tuple[nn.Module, tuple[Tensor, ...]]:
    def run(m: Any, x: Tensor) -> Tensor:
        logits = split(m.q(x)) @ split(m.k(x)).mT
        return (logits + logits.flip(1)).softmax(-1) @ split(m.v(x))

    return Toy(run, **qkv()), (X,)


def selective() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """What the first head has chosen before is masked for all of them."""

    def run(m: Any, x: Tensor) -> Tensor:
        logits = split(m.q(x)) @ split(m.k(x)).mT
        return (logits - logits[:, :1].relu().cumsum(-2)).softmax(-1) @ split(m.v(x))

    return Toy(run, **qkv()), (X,)


def channels_of_one_side() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Each channel over tokens meets weights over tokens that are computed for it."""

    def run(m: Any, x: Tensor) -> Tensor:
        return (m.q(x).mT @ m.over(x).mT).softmax(-1) @ m.v(x)

    return Toy(run, over=linear(TOKENS), **qkv()), (X,)


REFUSALS = {
    "channels of one side": (channels_of_one_side, {"channel-attention"}),
    "linear attention": (linear_attention, {"no-softmax"}),
    "learned queries": (learned_queries, {"learned-query"}),
    "additive attention": (additive, {"additive-attention"}),
    "a weight computed from several": (computed_weight, {"unknown-query"}),
    "gated keys": (gated, {"unknown-key"}),
    "a single key": (single_key, {"one-key"}),
    "heads added up": (added_heads, {"mixed-heads"}),
    "selective attention": (selective, {"mixed-heads"}),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_with_a_code_and_a_sentence(name: str) -> None:
    make, codes = REFUSALS[name]
    layout = find_qk_pairs(*_flat(make()))
    assert not layout.sites
    assert {s.code for s in layout.skipped} == codes
    assert all(s.reason and "\n" not in s.reason for s in layout.skipped)


def test_a_reason_says_where_understanding_ended() -> None:
    (entry,) = find_qk_pairs(*_flat(gated())).skipped
    assert entry.reason.endswith(f"they are lost at mul [{BATCH}, {TOKENS}, {INNER}] in the model itself")


def test_tokens_of_one_head_may_be_treated_in_different_ways() -> None:
    """A class token that is not rotated has the same rows as the others."""

    def rotated(x: Tensor) -> Tensor:
        token, rest = x[:, :, :1], x[:, :, 1:]
        a, b = rest.chunk(2, -1)
        return torch.cat((token, torch.cat((a - b, a + b), -1)), 2)

    model, inputs, expected = made(
        lambda m, x: attend(rotated(split(m.q(x))), rotated(split(m.k(x))), split(m.v(x))), plain()
    )
    (found,) = find_qk_pairs(model, *inputs).sites
    assert (found.query, found.key, found.head_map) == (expected.query, expected.key, expected.head_map)


def test_shares_pool_features_and_are_none() -> None:
    """Keys of a window are pooled with shares that other weights choose: an attention pooling before the attention."""

    def run(m: Any, x: Tensor) -> Tensor:
        shares = m.share(x[:, :4]).unflatten(1, (2, 2)).softmax(2)
        k, v = ((part(x)[:, :4].unflatten(1, (2, 2)) * shares).sum(2) for part in (m.k, m.v))
        return attend(split(m.q(x)), split(k), split(v))

    model, (x,), expected = made(run, plain(), **qkv(), share=linear(INNER))
    layout = find_qk_pairs(model, x)
    (found,) = layout.sites
    assert_same(found, expected)
    assert {s.code for s in layout.skipped} == {"additive-attention"}
    assert verify_qk_pairs(model, layout, torch.randn_like(x)).complete


def test_projected_positions_are_a_projection() -> None:
    """Conditional DETR: half of each head compares positions; content that is zero throughout makes nothing."""

    def run(m: Any, x: Tensor) -> Tensor:
        places = torch.linspace(0, 1, TOKENS * WIDTH).view(TOKENS, WIDTH).expand_as(x)
        q = torch.cat((split(m.q(x)), split(m.q_place(m.places.expand_as(x)))), -1)
        k = torch.cat((split(m.k(x)), split(m.k_place(places)) + split(m.k_empty(torch.zeros_like(x)))), -1)
        return attend(q, k, split(m.v(x)))

    parts = {name: linear(INNER) for name in ("q", "k", "v", "q_place", "k_place", "k_empty")}
    model = Toy(run, places=torch.ones(TOKENS, WIDTH), **parts)
    (found,) = find_qk_pairs(model, X).sites
    assert [b.param for b in found.query] == ["q.weight", "q_place.weight"]
    assert [b.param for b in found.key] == ["k.weight", "k_place.weight"]
    assert found.terms == (LogitTerm((0,), (0,)), LogitTerm((1,), (1,)))
    assert verify_qk_pairs(model, QKLayout((found,)), torch.randn_like(X)).complete


def test_a_bias_without_the_keys_part() -> None:
    """Swin v2: the keys' part of a fused bias is set to zero in every forward."""

    def run(m: Any, x: Tensor) -> Tensor:
        bias = m.qkv.bias.clone()
        bias[INNER : 2 * INNER].zero_()
        return attend(*map(split, F.linear(x, m.qkv.weight, bias).chunk(3, -1)))

    (found,) = find_qk_pairs(Toy(run, qkv=linear(3 * INNER, bias=True)), X).sites
    assert found.query == (q_block("qkv.weight", bias="qkv.bias"),)
    assert found.key == (WeightBlock("qkv.weight", "k", 0, heads(HEADS, DIM, INNER)),)


def _flat(pair: tuple[nn.Module, tuple[Tensor, ...]]) -> tuple[Any, ...]:
    return (pair[0], *pair[1])


def test_a_router_is_no_attention() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        weights, picked = m.router(x).softmax(-1).topk(2)
        experts = torch.stack((m.up(x), m.down(x)), -2)
        return (experts * weights.unsqueeze(-1)).sum(-2) + picked.sum()

    layout = find_qk_pairs(Toy(run, router=linear(4), up=linear(WIDTH), down=linear(WIDTH)), X)
    assert not layout.sites


def test_what_no_op_reads_is_untouched() -> None:
    model, inputs, _ = separate()
    model.idle = nn.Linear(2, 3)
    assert set(find_qk_pairs(model, *inputs).untouched) == {"idle.weight", "idle.bias"}


# ---- graphs that others made -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt() -> nn.Module:
    module = example("gpt")
    return module.GPT(module.GPTConfig(vocab_size=16, context=8, layers=2, heads=HEADS, width=INNER)).eval()


IDS = torch.arange(10).view(2, 5)


def rows_of(layout: QKLayout, rename: Callable[[str], str] = str) -> list[AttentionSite]:
    """Sites without what only a module tree tells, their parameters renamed."""

    def renamed(blocks: tuple[WeightBlock, ...]) -> tuple[WeightBlock, ...]:
        return tuple(replace(b, param=rename(b.param), bias=b.bias and rename(b.bias)) for b in blocks)

    return [
        replace(canonical(s), name="", query=renamed(canonical(s).query), key=renamed(canonical(s).key))
        for s in layout.sites
    ]


def test_exported_graph_gives_the_same_rows(gpt: nn.Module) -> None:
    exported = torch.export.export(gpt, (IDS,)).module()
    assert rows_of(find_in_graph(exported)) == rows_of(find_qk_pairs(gpt, IDS))


def test_make_fx_graph_gives_the_same_rows(gpt: nn.Module) -> None:
    names = [n for n, _ in gpt.named_parameters()]

    def forward(values: dict[str, Tensor], ids: Tensor) -> Any:
        return torch.func.functional_call(gpt, values, (ids,))[0]

    values = dict(gpt.named_parameters())
    graph = make_fx(forward)(values, IDS)
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    layout = find_in_graph(graph, dict(zip(inputs, names, strict=False)), all_names=names)
    assert rows_of(layout) == rows_of(find_qk_pairs(gpt, IDS))


# ---- any arrangement of a fused weight -------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    key_heads=st.integers(1, 4),
    group=st.integers(1, 3),
    dim=st.integers(2, 6),
    order=st.permutations("qkv"),
    tiled=st.booleans(),
    bias=st.booleans(),
)
def test_rows_of_any_fused_weight(
    key_heads: int, group: int, dim: int, order: list[str], tiled: bool, bias: bool
) -> None:
    count = {"q": key_heads * group, "k": key_heads, "v": key_heads}
    widths = [count[s] * dim for s in order]
    start = {s: sum(widths[:i]) for i, s in enumerate(order)}

    def run(m: Any, x: Tensor) -> Tensor:
        part = {s: split(y, dim) for s, y in zip(order, m.w(x).split(widths, -1), strict=True)}
        k, v = (part[s].repeat(1, group, 1, 1) if tiled else part[s].repeat_interleave(group, 1) for s in "kv")
        return attend(part["q"], k, v)

    query, key = (
        WeightBlock("w.weight", s, 0, heads(count[s], dim, start[s]), "w.bias" if bias else None)  # type: ignore[arg-type]
        for s in "qk"
    )
    head_map = tuple(h % key_heads if tiled else h // group for h in range(count["q"]))
    expected = site("", query, key, dim, head_map=head_map, logit_scale=dim**-0.5)
    layout = find_qk_pairs(Toy(run, w=linear(sum(widths), bias)), X)
    assert len(layout.sites) == 1 and not layout.skipped
    assert_same(layout.sites[0], expected)


# ---- equal layers ----------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Fused attention whose queries, keys and values stand in a given order, with grouped heads."""

    def __init__(self, order: str = "qkv", tiled: bool = False) -> None:
        super().__init__()
        self.order, self.tiled = order, tiled
        self.w, self.out = linear(3 * INNER + INNER, bias=True), linear(WIDTH, of=2 * INNER)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        widths = [2 * INNER if s == "q" else INNER for s in self.order]
        part = {s: split(y) for s, y in zip(self.order, self.w(self.norm(x)).split(widths, -1), strict=True)}
        k, v = (part[s].repeat(1, 2, 1, 1) if self.tiled else part[s].repeat_interleave(2, 1) for s in "kv")
        return x + self.out(attend(part["q"], k, v).transpose(1, 2).flatten(2))


def renamed(one: AttentionSite, to: str) -> AttentionSite:
    """A site of layer "0" as that of another layer."""

    def block(b: WeightBlock) -> WeightBlock:
        return replace(b, param=to + b.param[1:], bias=None if b.bias is None else to + b.bias[1:])

    return replace(one, name=to, query=tuple(map(block, one.query)), key=tuple(map(block, one.key)))


def test_each_of_equal_layers_is_as_if_alone() -> None:
    (alone,) = find_qk_pairs(nn.Sequential(Layer()), X).sites
    sites = find_qk_pairs(nn.Sequential(*(Layer() for _ in range(5))), X).sites
    assert list(sites) == [renamed(alone, str(i)) for i in range(5)]


@pytest.mark.parametrize("odd", [{"order": "kqv"}, {"order": "vkq"}, {"tiled": True}], ids=str)
def test_a_layer_that_differs_is_not_taken_for_the_others(odd: dict[str, Any]) -> None:
    (usual,) = find_qk_pairs(nn.Sequential(Layer()), X).sites
    (other,) = find_qk_pairs(nn.Sequential(Layer(**odd)), X).sites
    assert usual != other
    sites = find_qk_pairs(nn.Sequential(*(Layer(**(odd if i == 3 else {})) for i in range(5))), X).sites
    assert list(sites) == [renamed(other if i == 3 else usual, str(i)) for i in range(5)]


class Flipped(nn.Module):
    """Attention whose heads are taken in an order that only an index tensor tells."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.q, self.k, self.v = (linear(INNER) for _ in range(3))
        self.out = linear(WIDTH, of=INNER)
        self.register_buffer("order", torch.tensor(order))

    def forward(self, x: Tensor) -> Tensor:
        k = split(self.k(x)).index_select(1, self.order)
        return x + self.out(attend(split(self.q(x)), k, split(self.v(x))).transpose(1, 2).flatten(2))


def test_layers_that_differ_in_an_index_alone_are_told_apart() -> None:
    orders = [[0, 1, 2], [0, 1, 2], [0, 1, 2], [2, 0, 1], [0, 1, 2]]
    sites = find_qk_pairs(nn.Sequential(*map(Flipped, orders)), X).sites
    for i, (one, order) in enumerate(zip(sites, orders, strict=True)):
        reads = [one.key[0].heads[k] for k in one.head_map]
        assert reads == [heads(HEADS, DIM)[h] for h in order], i
        assert one.query[0].heads == heads(HEADS, DIM)


def test_find_tells_how_it_was_done() -> None:
    model, inputs, _ = separate()
    steps: list[str] = []
    found = find(model, inputs, progress=steps.append)
    assert found.way == "hybrid" and found.fallback_reason is None
    assert found.nodes > 0 and set(found.seconds) == {"capture", "find"} and steps


def test_a_residual_stream_is_no_projection() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.second(x.relu())
        return attend(split(x), split(self.k(x)), split(x))

    layout = find_qk_pairs(Toy(run, first=linear(INNER), second=linear(INNER, of=INNER), k=linear(INNER, of=INNER)), X)
    assert not layout.sites
    assert [entry.code for entry in layout.skipped] == ["residual-query"]


def test_a_mask_made_of_products_is_no_part_of_the_logits() -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        mask = self.mask(x) @ self.mask(x).transpose(-1, -2) < 0
        logits = (split(self.q(x)) @ split(self.k(x)).mT).masked_fill(mask[:, None], -1e9)
        return logits.softmax(-1) @ split(self.v(x))

    parts = {name: linear(INNER) for name in ("q", "k", "v", "mask")}
    (found,) = find_qk_pairs(Toy(run, **parts), X).sites
    assert [block.param for block in (*found.query, *found.key)] == ["q.weight", "k.weight"]


@pytest.mark.parametrize(
    ("bend", "params"), [(nn.GELU(), ["k.weight"]), (nn.RMSNorm(INNER), ["down.weight", "k.weight"])]
)
def test_a_chain_ends_where_a_nonlinear_function_stands(bend: nn.Module, params: list[str]) -> None:
    def run(self: Any, x: Tensor) -> Tensor:
        return attend(split(self.q(x)), split(self.k(self.bend(self.down(x)))), split(self.v(x)))

    parts = {"q": linear(INNER), "v": linear(INNER), "down": linear(INNER), "k": linear(INNER, of=INNER)}
    (found,) = find_qk_pairs(Toy(run, bend=bend, **parts), X).sites
    assert [block.param for block in found.key] == params


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("factor", "scale"), [(None, 8**-0.5), (0.5, 0.5)])
def test_the_scale_given_to_flex_attention(factor: float | None, scale: float) -> None:
    class Flex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x_BTD: Tensor) -> Tensor:
            q, k, v = (f(x_BTD).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
            return flex_attention(q, k, v, scale=factor)

    assert find_qk_pairs(Flex(), torch.ones(1, 4, 16)).sites[0].logit_scale == pytest.approx(scale)


def test_queries_of_experts_whose_sizes_are_made_up_are_refused() -> None:
    """On fake weights, the number of tokens of each expert is made up, so that the split does not fit its tensor."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "kv_channels": 4, "num_hidden_layers": 2}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    with torch.device("meta"):
        model = transformers.JetMoeModel(transformers.JetMoeConfig(**sizes, **experts))
    layout = find_qk_pairs(model, torch.randint(64, (2, 5)))
    assert not layout.sites
    skipped = {entry.name: entry.code for entry in layout.skipped}
    assert [skipped[f"layers.{i}.self_attention"] for i in range(2)] == ["unknown-query"] * 2
