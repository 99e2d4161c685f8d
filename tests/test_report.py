"""Reports: what they say is what the layout says, at every width, on layouts like those of real models."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import networkx as nx
import pytest
import rule
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from quack_fx.errors import LayoutError
from quack_fx.layout import AttentionSite, LogitTerm, Norm, QKLayout, Ranges, Skipped, WeightBlock
from quack_fx.layout.fit import qk_count
from quack_fx.report import Facts, find_site, html, overview, pair
from quack_fx.report.facts import count_text
from quack_fx.report.graph import pair_graph, svg
from quack_fx.report.groups import group_names, group_sites, labels, local_name, rows_text, rule_texts, scale_text

# ---- layouts like those of real models -------------------------------------------------------------------------------


def tiled(heads: int, width: int, start: int = 0, step: int | None = None) -> tuple[Ranges, ...]:
    return tuple(((start + h * (step or width), start + h * (step or width) + width),) for h in range(heads))


def shared(heads: int, start: int, stop: int) -> tuple[Ranges, ...]:
    return ((((start, stop),)),) * heads


def plain(
    name: str, heads: int = 4, keys: int = 4, dim: int = 8, cross: bool = False, key_from: str = ""
) -> AttentionSite:
    return AttentionSite(
        name=name,
        kind="mha" if keys == heads else "gqa",
        cross=cross,
        calls=1,
        query_heads=heads,
        key_heads=keys,
        head_dim=dim,
        head_map=tuple(h // (heads // keys) for h in range(heads)),
        query=(WeightBlock(f"{name}.q_proj.weight", "q", 0, tiled(heads, dim)),),
        key=(WeightBlock(f"{key_from or name}.k_proj.weight", "k", 0, tiled(keys, dim)),),
        terms=(LogitTerm((0,), (0,)),),
        logit_scale=dim**-0.5,
    )


def latent(name: str, heads: int = 128, nope: int = 128, rope: int = 64, q: int = 1536, kv: int = 512) -> AttentionSite:
    return AttentionSite(
        name=name,
        kind="mla",
        cross=False,
        calls=1,
        query_heads=heads,
        key_heads=heads,
        head_dim=nope + rope,
        head_map=tuple(range(heads)),
        query=(
            WeightBlock(f"{name}.q_b_proj.weight", "uq", 0, tiled(heads, nope, 0, nope + rope)),
            WeightBlock(f"{name}.q_b_proj.weight", "qr", 0, tiled(heads, rope, nope, nope + rope)),
            WeightBlock(f"{name}.q_a_proj.weight", "dq", 0, shared(heads, 0, q)),
        ),
        key=(
            WeightBlock(f"{name}.kv_b_proj.weight", "uk", 0, tiled(heads, nope, 0, 2 * nope)),
            WeightBlock(f"{name}.kv_a_proj_with_mqa.weight", "dkv", 0, shared(heads, 0, kv)),
            WeightBlock(f"{name}.kv_a_proj_with_mqa.weight", "kr", 0, shared(heads, kv, kv + rope)),
        ),
        terms=(LogitTerm((0, 2), (0, 1)), LogitTerm((1, 2), (2,))),
        latent_norm=(
            Norm("query", "rms", q, f"{name}.q_a_layernorm", f"{name}.q_a_layernorm.weight"),
            Norm("key", "rms", kv, f"{name}.kv_a_layernorm", f"{name}.kv_a_layernorm.weight"),
        ),
        logit_scale=0.1147213867929261,
    )


def fused(name: str, heads: int = 6, dim: int = 32) -> AttentionSite:
    width = heads * dim
    return replace(
        plain(name, heads, heads, dim),
        query=(WeightBlock(f"{name}.qkv.weight", "q", 0, tiled(heads, dim), f"{name}.qkv.bias"),),
        key=(WeightBlock(f"{name}.qkv.weight", "k", 0, tiled(heads, dim, width), f"{name}.qkv.bias"),),
        qk_norm=(Norm("query", "rms", dim, f"{name}.q_norm", f"{name}.q_norm.weight"), Norm("key", "l2", dim)),
    )


LLAMA = QKLayout(tuple(plain(f"model.layers.{i}.self_attn", 128, 8, 128) for i in range(126)))
DEEPSEEK = QKLayout(
    tuple(latent(f"model.layers.{i}.self_attn") for i in range(61)),
    untouched=tuple(f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in range(3, 61) for e in range(8, 256)),
)
T5 = QKLayout(
    (
        *(plain(f"encoder.block.{i}.layer.0.SelfAttention") for i in range(12)),
        *itertools.chain.from_iterable(
            (
                plain(f"decoder.block.{i}.layer.0.SelfAttention"),
                plain(f"decoder.block.{i}.layer.1.EncDecAttention", cross=True),
            )
            for i in range(12)
        ),
    )
)
ODD = QKLayout(
    (
        *(fused(f"blocks.{i}.attn") for i in range(3)),
        replace(plain("pool"), calls=2, logit_scale=None),
        plain("", 3, 3),
    ),
    skipped=(
        *(Skipped(f"blocks.{i}.mixer", "no-softmax", "Its products never reach a softmax.") for i in range(3)),
        Skipped("scorer", "additive-attention", "Logits are a sum <of> two projections & a tanh."),
    ),
    untouched=("head.extra.weight",),
)
LAYOUTS = {"llama": LLAMA, "deepseek": DEEPSEEK, "t5": T5, "odd": ODD}


def facts(layout: QKLayout) -> Facts:
    shapes = {"lm_head.weight": (1000, 64)}
    for site in layout.sites:
        for _, block in site.blocks():
            rows = max(stop for ranges in block.heads for _, stop in ranges)
            shapes[block.param] = (max(rows, shapes.get(block.param, (0,))[0]), 64)
    return Facts(
        "Model of model.py",
        "built on the meta device; inputs x (given)",
        "1,234 nodes, recorded with fake weights",
        2.0,
        shapes,
    )


# ---- groups ----------------------------------------------------------------------------------------------------------


def expand(pattern: str) -> set[str]:
    """The names that a pattern stands for, by the rules of a shell's braces."""
    names = [""]
    for text in re.split(r"(\{[^}]*\})", pattern):
        options = [text]
        if text.startswith("{"):
            options = []
            for item in text[1:-1].split(","):
                a, *rest = item.split("..")
                step = int(rest[1]) if len(rest) > 1 else 1
                options += [str(n) for n in range(int(a), int(rest[0] if rest else a) + 1, step)]
        names = [name + option for name in names for option in options]
    return set(names)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (LLAMA, [("model.layers.{0..125}.self_attn", 126)]),
        (DEEPSEEK, [("model.layers.{0..60}.self_attn", 61)]),
        (
            T5,
            [
                ("encoder.block.{0..11}.layer.0.SelfAttention", 12),
                ("decoder.block.{0..11}.layer.0.SelfAttention", 12),
                ("decoder.block.{0..11}.layer.1.EncDecAttention", 12),
            ],
        ),
        (ODD, [("blocks.{0..2}.attn", 3), ("pool", 1), ("(root)", 1)]),
    ],
)
def test_one_row_for_equal_layers(layout: QKLayout, expected: list[tuple[str, int]]) -> None:
    assert [(group.name, len(group.sites)) for group in group_sites(layout.sites)] == expected


@pytest.mark.parametrize(
    "change",
    [
        {"cross": True},
        {"calls": 2},
        {"logit_scale": 1.0},
        {"logit_scale": None},
        {"head_dim": 9},
        {"qk_norm": (Norm("key", "rms", 8),)},
        {"head_map": (0, 1, 3, 2)},
        {"key": (WeightBlock("layers.1.attn.k_proj.weight", "k", 1, tiled(4, 8)),)},
        {"key": (WeightBlock("layers.1.attn.k_proj.weight", "k", 0, tiled(4, 8), "layers.1.attn.k_proj.bias"),)},
        {"key": (WeightBlock("layers.0.attn.k_proj.weight", "k", 0, tiled(4, 8)),)},
    ],
)
def test_layers_that_differ_at_all_stand_apart(change: dict[str, object]) -> None:
    sites = [plain(f"layers.{i}.attn") for i in range(3)]
    sites[1] = replace(sites[1], **change)  # type: ignore[arg-type]
    assert [group.name for group in group_sites(sites)] == ["layers.{0,2}.attn", "layers.1.attn"]


def test_layers_that_borrow_from_the_one_before_are_equal() -> None:
    sites = [plain(f"layers.{i}.attn", key_from=f"layers.{i - i % 2}.attn") for i in range(8)]
    assert [group.name for group in group_sites(sites)] == ["layers.{0..6..2}.attn", "layers.{1..7..2}.attn"]
    assert local_name(sites[3].key[0].param, sites[3].name) == "layers.{i-1}.attn.k_proj.weight"


@given(st.sets(st.tuples(st.integers(0, 5), st.integers(0, 12)), min_size=1, max_size=30))
def test_patterns_stand_for_exactly_their_names(indices: set[tuple[int, int]]) -> None:
    names = [f"stages.{a}.blocks.{b}.attn" for a, b in sorted(indices)]
    patterns = group_names(names)
    assert [name for _, members in patterns for name in members] != [] and sorted(
        n for _, m in patterns for n in m
    ) == sorted(names)
    for pattern, members in patterns:
        assert expand(pattern) == set(members)


# ---- rows ------------------------------------------------------------------------------------------------------------


def evaluate(text: str, head: int) -> Ranges:
    """Ranges of one head by the formula."""
    ranges = []
    for part in text.removesuffix(", every head").split(", "):
        numbers = [re.sub(r"(\d)(h|\()", r"\1*\2", n) for n in part.split(":")]
        start, stop, step = (*(eval(n, {"h": head}) for n in numbers), 0)[:3]
        ranges += [(i, i + 1) for i in range(start, stop, step)] if step else [(start, stop)]
    return tuple(ranges)


@given(
    start=st.integers(0, 999),
    width=st.integers(1, 64),
    gaps=st.tuples(st.integers(0, 64), st.integers(0, 64)),
    size=st.integers(1, 6),
    groups=st.integers(1, 6),
    repeat=st.booleans(),
)
def test_row_formulas_are_true(
    start: int, width: int, gaps: tuple[int, int], size: int, groups: int, repeat: bool
) -> None:
    inner = width + gaps[0]
    outer = size * inner + gaps[1]
    starts = [start + g * outer + (0 if repeat else i * inner) for g in range(groups) for i in range(size)]
    heads = tuple(((a, a + width),) for a in starts)
    text = rows_text(heads)
    assert "…" not in text
    assert tuple(evaluate(text, h) for h in range(len(heads))) == heads


@given(st.integers(2, 8), st.integers(1, 8), st.integers(3, 9), st.integers(2, 4))
def test_row_formulas_of_interleaved_and_split_heads(heads: int, half: int, rows: int, step: int) -> None:
    split = tuple(((h * half, (h + 1) * half), (99 + h * half, 99 + (h + 1) * half)) for h in range(heads))
    woven = tuple(
        tuple((h * rows * step + i * step, h * rows * step + i * step + 1) for i in range(rows)) for h in range(heads)
    )
    for case in (split, woven):
        assert tuple(evaluate(rows_text(case), h) for h in range(heads)) == case


def test_rows_in_words() -> None:
    assert rows_text(tiled(4, 8)) == "8h:8h+8"
    assert rows_text(tiled(4, 8, 32), "g") == "8g+32:8g+40"
    assert rows_text(shared(4, 0, 512)) == "0:512, every head"
    assert rows_text((((0, 64),),)) == "0:64"
    assert rows_text(((), ((3, 5),), ())) == "3:5, head 1 only"
    assert rows_text((((0, 4),), ((4, 8),), (), ())) == "4i:4i+4 for the i-th of heads 0..1"
    assert rows_text((((0, 4),), ((9, 13),), ((4, 8),), ((1, 2),))) == "0:4; 9:13; 4:8; … (4 heads)"


@pytest.mark.parametrize(
    ("scale", "text"),
    [(128**-0.5, "1/√128"), (1.0, "1"), (0.1147213867929261, "0.1147"), (None, "not a number"), (-0.125, "-0.125")],
)
def test_scales(scale: float | None, text: str) -> None:
    assert scale_text(replace(plain("a"), logit_scale=scale)) == text


# ---- the rule --------------------------------------------------------------------------------------------------------


def test_the_rule_reads_as_in_the_paper() -> None:
    assert rule_texts(plain("a")) == [("q_h", "1 / ‖k_h‖"), ("k_h", "1 / ‖q_h‖")]
    assert rule_texts(plain("a", 8, 2)) == [("q_h", "1 / ‖k_g‖"), ("k_g", "1 / max_h ‖q_h‖")]
    assert rule_texts(latent("a")) == [
        ("uq_h", "1 / (‖dq‖ ‖uk_h‖ ‖dkv‖)"),
        ("qr_h", "1 / (‖dq‖ ‖kr‖)"),
        ("dq", "min(1 / max_h (‖uq_h‖ ‖uk_h‖ ‖dkv‖), 1 / max_h (‖qr_h‖ ‖kr‖))"),
        ("uk_h", "1 / (‖uq_h‖ ‖dq‖ ‖dkv‖)"),
        ("dkv", "1 / max_h (‖uq_h‖ ‖dq‖ ‖uk_h‖)"),
        ("kr", "1 / max_h (‖qr_h‖ ‖dq‖)"),
    ]


@pytest.mark.parametrize(
    "site", [plain("a"), plain("a", 8, 2, 4), plain("a", 4, 1, 4), latent("a", 4, 3, 2, 5, 6)], ids=lambda s: s.kind
)
def test_the_rule_as_text_gives_the_factors(site: AttentionSite) -> None:
    layout = QKLayout((site,))
    norms = {unit: 0.5 + torch.rand(()).item() for unit in rule.units(layout)}
    true = rule.factors(layout, norms)
    names = labels(site)
    norm = {names[id(b)]: [norms[rule.Unit.of(b, r)] for r in b.heads] for _, b in site.blocks()}
    letter = "h" if site.query_heads == site.key_heads else "g"
    for (_, text), (side, block) in zip(rule_texts(site), site.blocks(), strict=True):
        for i, ranges in enumerate(block.heads):
            values = []
            for option in re.findall(r"1 / (max_h )?(?:\(([^()]*)\)|(‖\w+‖))", text):
                product = re.findall(r"‖([a-z]+?)(?:_([hg]))?‖", option[1] or option[2])
                # The query heads that the text speaks of: all that read this head's rows, or this very head.
                readers = [
                    h for h in range(site.query_heads) if side == "query" or letter == "h" or site.head_map[h] == i
                ]
                heads = readers if option[0] else [i if side == "query" or letter == "h" else readers[0]]
                product_of = [
                    torch.tensor([norm[n][h if at != "g" else site.head_map[h]] for n, at in product]).prod().item()
                    for h in heads
                ]
                values.append(1 / max(product_of))
            assert min(values) == pytest.approx(true[rule.Unit.of(block, ranges)], rel=1e-6)


# ---- terminal --------------------------------------------------------------------------------------------------------


def printed(renderable: RenderableType, width: int) -> str:
    console = Console(width=width, color_system=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_nothing_is_cut_off(name: str, width: int) -> None:
    layout = LAYOUTS[name]
    text = printed(overview(layout, facts(layout)), width) + printed(pair(layout.sites[0], facts(layout)), width)
    assert max(map(len, text.splitlines())) <= width
    joined = re.sub(r"[\s│├└─]", "", text)
    for entry in layout.skipped:
        assert entry.reason.replace(" ", "") in joined and f"[{entry.code}]" in joined
    if width >= 80:  # below that names are folded inside their cells
        for group in group_sites(layout.sites):
            assert group.name in joined
        for _, block in layout.sites[0].blocks():
            assert block.param in joined


def test_the_overview_at_80_columns() -> None:
    expected = """\
model  Model of model.py
       built on the meta device; inputs x (given)
graph  1,234 nodes, recorded with fake weights, 2.0 s
found  126 attentions, all equal; 140.4 M of 140.4 M parameters are query/key
       rows (100.0%)

Attention, weights and rows of a head   Heads       Dim   Scale
────────────────────────────────────────────────────────────────
model.layers.{0..125}.self_attn  x126   GQA 128/8   128   1/√128
  q  q_proj.weight  128h:128h+128
  k  k_proj.weight  128g:128g+128
h counts query heads, g key heads; rows a:b end before b
"""
    assert printed(overview(LLAMA, facts(LLAMA)), 80).strip() == expected.strip()


def test_the_tree_of_a_pair() -> None:
    expected = """\
model.layers.0.self_attn  MLA 128, head dim 192
├── query
│   ├── uq  model.layers.0.self_attn.q_b_proj.weight  [24576, 64]
│   │   └── rows 192h:192h+128   in all 0:128, 192:320, 384:512, 576:704, …
│   ├── qr  model.layers.0.self_attn.q_b_proj.weight  [24576, 64]
│   │   └── rows 192h+128:192h+192   in all 128:192, 320:384, 512:576, 704:768, …
│   ├── dq  model.layers.0.self_attn.q_a_proj.weight  [1536, 64]
│   │   └── rows 0:1536, every head   in all 0:1536
│   └── latent norm rms over 1536: model.layers.0.self_attn.q_a_layernorm, gain
│       model.layers.0.self_attn.q_a_layernorm.weight
├── key
│   ├── uk   model.layers.0.self_attn.kv_b_proj.weight  [32640, 64]
│   │   └── rows 256h:256h+128   in all 0:128, 256:384, 512:640, 768:896, …
│   ├── dkv  model.layers.0.self_attn.kv_a_proj_with_mqa.weight  [576, 64]
│   │   └── rows 0:512, every head   in all 0:512
│   ├── kr   model.layers.0.self_attn.kv_a_proj_with_mqa.weight  [576, 64]
│   │   └── rows 512:576, every head   in all 512:576
│   └── latent norm rms over 512: model.layers.0.self_attn.kv_a_layernorm, gain
│       model.layers.0.self_attn.kv_a_layernorm.weight
├── heads   query head h reads key head h
├── logit   ((uq dq x)·(uk dkv y) + (qr dq x)·(kr y)) * 0.1147   y = x
└── QuacK   learning-rate factors, each relative to its value at the start
    ├── uq_h  1 / (‖dq‖ ‖uk_h‖ ‖dkv‖)
    ├── qr_h  1 / (‖dq‖ ‖kr‖)
    ├── dq    min(1 / max_h (‖uq_h‖ ‖uk_h‖ ‖dkv‖), 1 / max_h (‖qr_h‖ ‖kr‖))
    ├── uk_h  1 / (‖uq_h‖ ‖dq‖ ‖dkv‖)
    ├── dkv   1 / max_h (‖uq_h‖ ‖dq‖ ‖uk_h‖)
    └── kr    1 / max_h (‖qr_h‖ ‖dq‖)
"""
    assert printed(pair(DEEPSEEK.sites[0], facts(DEEPSEEK)), 96).strip() == expected.strip()


def test_what_never_ran_is_grouped() -> None:
    text = printed(overview(DEEPSEEK, facts(DEEPSEEK)), 100)
    assert "model.layers.{3..60}.mlp.experts.{8..255}.up_proj.weight  x14384" in text


def test_a_kept_qk_norm_is_told() -> None:
    text = printed(overview(ODD, facts(ODD)), 120)
    assert "3 of 5 attentions have a QK norm; QuacK leaves them alone" in text
    assert "left alone: behind a QK norm" in printed(pair(ODD.sites[0], facts(ODD)), 120)
    assert "l2 over 32: written inline, no gain" in printed(pair(ODD.sites[0], facts(ODD)), 120)


def test_a_layout_without_attention() -> None:
    empty = QKLayout(skipped=ODD.skipped)
    assert "0 attentions; 4 skipped" in printed(overview(empty, Facts("M")), 80)
    assert "No attention was found" in html(empty, Facts("M"))


# ---- sums and names --------------------------------------------------------------------------------------------------


def test_weights_are_counted_once() -> None:
    site = plain("a", 4, 2, 8)
    twice = QKLayout((site, replace(site, name="b")))  # tied weights: the same rows again
    shapes = {"a.q_proj.weight": (32, 10), "a.k_proj.weight": (16, 10)}
    assert qk_count(twice, shapes) == 480
    assert qk_count(QKLayout((fused("x", 2, 4),)), {"x.qkv.weight": (24, 5), "x.qkv.bias": (24,)}) == 16 * 5 + 16
    assert [count_text(n) for n in (12, 1234, 5_600_000, 405_900_000_000)] == ["12", "1.2 k", "5.6 M", "405.9 G"]


def test_a_site_by_name() -> None:
    assert find_site(LLAMA, "model.layers.3.self_attn").name == "model.layers.3.self_attn"
    assert find_site(LLAMA, "3.self_attn").name == "model.layers.3.self_attn"
    with pytest.raises(LayoutError, match="'self_attn' ends the names of 126 attentions"):
        find_site(LLAMA, "self_attn")
    with pytest.raises(
        LayoutError, match=r"no attention is called 'model.layers.3.attn'; did you mean 'model.layers.3.self"
    ):
        find_site(LLAMA, "model.layers.3.attn")


# ---- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_pair_graphs_hold_exactly_the_terms(name: str) -> None:
    for group in group_sites(LAYOUTS[name].sites):
        site, graph = group.first, pair_graph(group.first)
        names = labels(site)
        assert nx.is_directed_acyclic_graph(graph)
        for i, term in enumerate(site.terms):
            blocks = {names[id(site.query[q])] for q in term.query} | {names[id(site.key[k])] for k in term.key}
            kinds = nx.get_node_attributes(graph, "kind")
            assert {n for n in nx.ancestors(graph, f"product {i}") if kinds[n] == "block"} == blocks
        norms = [n for n, kind in nx.get_node_attributes(graph, "kind").items() if kind == "norm"]
        assert bool(norms) == bool(site.qk_norm or site.latent_norm)


@pytest.mark.parametrize("site", [LLAMA.sites[0], DEEPSEEK.sites[0], T5.sites[-1], ODD.sites[0]], ids=lambda s: s.kind)
def test_the_drawing_is_whole_and_nothing_overlaps(site: AttentionSite) -> None:
    drawing = ET.fromstring(svg(site))
    _, _, width, height = map(float, drawing.attrib["viewBox"].split())
    boxes = [tuple(float(r.attrib[a]) for a in ("x", "y", "width", "height")) for r in drawing.iter("rect")]
    assert len(boxes) == len(pair_graph(site))
    for x, y, w, h in boxes:
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
    for (x0, y0, w0, h0), (x1, y1, w1, h1) in itertools.combinations(boxes, 2):
        assert x0 + w0 <= x1 or x1 + w1 <= x0 or y0 + h0 <= y1 or y1 + h1 <= y0


class Tags(HTMLParser):
    """Tags, attributes and text of a page; every opened element of these kinds must be closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag in ("div", "table", "details", "summary", "svg", "g", "ul", "main", "body", "html"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open and tag == self.open[-1]:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_page_is_whole_and_alone(name: str) -> None:
    layout = LAYOUTS[name]
    page = html(layout, facts(layout))
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    assert not {tag for tag, _ in tags.seen} & {"script", "link", "img", "iframe", "object"}
    assert not any(a in attrs for _, attrs in tags.seen for a in ("src", "href", "onclick"))
    assert "http" not in page and "url(" not in page and "@import" not in page
    for group in group_sites(layout.sites):
        assert group.name in tags.text
        for _, block in group.first.blocks():
            assert local_name(block.param, group.first.name) in tags.text
    for entry in layout.skipped:
        assert entry.reason in tags.text


def test_names_cannot_break_the_page() -> None:
    evil = "<script>alert(1)</script>"
    layout = QKLayout((replace(plain("a"), name=evil),), (Skipped(evil, evil, evil),), (evil,))
    page = html(layout, Facts(evil, evil))
    assert "<script" not in page and "&lt;script&gt;" in page


def test_names_cannot_style_the_terminal() -> None:
    site = plain("[bold]x[/bold]")
    text = printed(overview(QKLayout((site,)), Facts("[red]t", "[/red]")), 80) + printed(pair(site, Facts("t")), 80)
    assert text.count("[bold]x[/bold]") == 4 and "[red]t" in text and "[/red]" in text


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9))
def test_row_maps_show_every_head(heads: int, dim: int) -> None:
    tags = Tags()
    tags.feed(html(QKLayout((plain("a", heads, heads, dim),)), Facts("M")))
    bars = [a for tag, a in tags.seen if tag == "rect" and a.get("class", "") and a.get("height") == "10"]
    assert [(int(a["x"] or 0), int(a["width"] or 0)) for a in bars] == [(h * dim, dim) for h in range(heads)] * 2


def test_reports_need_no_torch() -> None:
    code = "import sys, quack_fx.report; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )
