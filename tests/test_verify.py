"""The proof by gradients: true layouts pass, each kind of false one is caught, and what cannot be told is said so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CASES, IDS, Case, gpt2, heads, hugging_face, llama, our_gpt, site
from torch import nn

from quack_fx.errors import LayoutError, VerifyError
from quack_fx.find import find_qk_pairs
from quack_fx.layout import AttentionSite, LogitTerm, Norm, QKLayout, WeightBlock
from quack_fx.verify import verify_qk_pairs


@pytest.fixture(scope="session", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    return CASES[request.param]()


def test_true_layout_is_proved(case: Case) -> None:
    before = {n: t.clone() for n, t in case.model.state_dict().items()}
    report = verify_qk_pairs(case.model, case.layout, **case.inputs)
    assert [p.name for p in report.proved] == [s.name for s in case.layout.sites]
    assert report.complete
    assert report.checks >= sum(2 * s.query_heads for s in case.layout.sites)
    after = case.model.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before), "the model itself was changed"
    assert all(p.grad is None for p in case.model.parameters())


def rows(layout: QKLayout) -> dict[str, Any]:
    """What a layout says about heads and rows, whatever the order of its blocks."""
    return {
        s.name: (
            s.cross,
            s.calls,
            s.head_map,
            {(b.param, b.axis, b.heads, b.bias) for b in s.query},
            {(b.param, b.axis, b.heads, b.bias) for b in s.key},
            {(frozenset(s.query[i] for i in t.query), frozenset(s.key[i] for i in t.key)) for t in s.terms}
            if s.kind == "mla"
            else None,
            {(n.side, n.kind, n.width) for n in s.qk_norm},
        )
        for s in layout.sites
    }


def test_what_the_finder_finds_is_proved(case: Case) -> None:
    found = find_qk_pairs(case.model, **case.inputs)
    assert rows(found) == rows(case.layout)
    assert verify_qk_pairs(case.model, found, **case.inputs).complete


# -- false layouts ---------------------------------------------------------------------------------------------------


def roll(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return values[1:] + values[:1]


def moved(block: WeightBlock, by: int) -> WeightBlock:
    """The block with every range of every head moved."""
    return replace(block, heads=tuple(tuple((a + by, b + by) for a, b in ranges) for ranges in block.heads))


def without(s: AttentionSite, side: str, index: int) -> AttentionSite:
    """The site without one of its blocks; terms that name it lose it."""
    blocks = getattr(s, side)
    kept = [i for i in range(len(blocks)) if i != index]
    terms = []
    for term in s.terms:
        chain = tuple(kept.index(i) for i in getattr(term, side) if i != index)
        if chain:
            terms.append(replace(term, **{side: chain}))
    return replace(s, **{side: tuple(blocks[i] for i in kept)}, terms=tuple(terms))


def swapped_sides(s: AttentionSite) -> AttentionSite | None:
    if s.query_heads != s.key_heads:
        return None
    terms = tuple(LogitTerm(t.key, t.query) for t in s.terms)
    return replace(s, query=s.key, key=s.query, terms=terms)


def query_rows_of_the_next_head(s: AttentionSite) -> AttentionSite:
    first = replace(s.query[0], heads=roll(s.query[0].heads))
    return replace(s, query=(first, *s.query[1:]))


def query_rows_one_further(s: AttentionSite) -> AttentionSite:
    block = s.query[0]
    last = ((block.heads[-1][0][0] - 1, block.heads[-1][0][1] - 1),)
    return replace(s, query=(replace(block, heads=(*block.heads[:-1], last)), *s.query[1:]))


def key_rows_cut_short(s: AttentionSite) -> AttentionSite:
    block = s.key[0]
    start, stop = block.heads[0][0]
    return replace(s, key=(replace(block, heads=(((start, stop - 1),), *block.heads[1:])), *s.key[1:]))


def all_heads_read_all_rows(s: AttentionSite) -> AttentionSite:
    block = s.query[0]
    everything = tuple(r for ranges in block.heads for r in ranges)
    return replace(s, query=(replace(block, heads=(everything,) * s.query_heads), *s.query[1:]))


def head_map_rolled(s: AttentionSite) -> AttentionSite | None:
    return replace(s, head_map=roll(s.head_map)) if s.key_heads > 1 else None


def two_heads_taken_for_one(s: AttentionSite) -> AttentionSite | None:
    """Half as many heads of twice the width."""
    if s.kind != "mha" or len(s.query) > 1:
        return None

    def merge(block: WeightBlock) -> WeightBlock:
        pairs = zip(block.heads[::2], block.heads[1::2], strict=True)
        return replace(block, heads=tuple(a + b for a, b in pairs))

    return site(s.name, merge(s.query[0]), merge(s.key[0]), 2 * s.head_dim, qk_norm=s.qk_norm)


def query_bias_forgotten(s: AttentionSite) -> AttentionSite | None:
    if s.query[0].bias is None:
        return None
    return replace(s, query=tuple(replace(b, bias=None) for b in s.query))


def every_other_head_taken_for_one(s: AttentionSite) -> AttentionSite | None:
    """Half as many heads, each made of two that are not neighbours."""
    if s.kind != "mha" or len(s.query) > 1 or s.query_heads % 2:
        return None
    half = s.query_heads // 2

    def merge(block: WeightBlock) -> WeightBlock:
        return replace(block, heads=tuple(a + b for a, b in zip(block.heads[:half], block.heads[half:], strict=True)))

    return site(s.name, merge(s.query[0]), merge(s.key[0]), 2 * s.head_dim, qk_norm=s.qk_norm)


def qk_norm_forgotten(s: AttentionSite) -> AttentionSite | None:
    return replace(s, qk_norm=()) if s.qk_norm and s.qk_norm[0].width == s.head_dim else None


def term_forgotten(s: AttentionSite) -> AttentionSite | None:
    return replace(s, terms=s.terms[1:]) if len(s.terms) > 1 else None


def chains_crossed(s: AttentionSite) -> AttentionSite | None:
    """Content queries against rotated keys and the reverse."""
    if len(s.terms) < 2:
        return None
    a, b = s.terms
    return replace(s, terms=(LogitTerm(a.query, b.key), LogitTerm(b.query, a.key)))


def drop(side: str, index: int) -> Callable[[AttentionSite], AttentionSite | None]:
    """Mutation that drops one block of a site that has several on that side."""

    def mutation(s: AttentionSite) -> AttentionSite | None:
        return without(s, side, index) if len(getattr(s, side)) > index > -1 and len(getattr(s, side)) > 1 else None

    mutation.__name__ = f"{side}_block_{index}_dropped"
    return mutation


MUTATIONS = [
    swapped_sides,
    query_rows_of_the_next_head,
    query_rows_one_further,
    key_rows_cut_short,
    all_heads_read_all_rows,
    head_map_rolled,
    two_heads_taken_for_one,
    every_other_head_taken_for_one,
    qk_norm_forgotten,
    query_bias_forgotten,
    term_forgotten,
    chains_crossed,
    *(drop(side, index) for side in ("query", "key") for index in range(3)),
]


def test_every_false_layout_is_refuted(case: Case) -> None:
    """Each mutation changes the meaning of the last site; each must raise and name that site."""
    *others, last = case.layout.sites
    survivors = []
    for mutation in MUTATIONS:
        if (false := mutation(last)) is None:  # does not apply to this attention
            continue
        assert false != last, mutation.__name__
        try:
            verify_qk_pairs(case.model, replace(case.layout, sites=(*others, false)), **case.inputs)
        except VerifyError as error:
            assert str(error).startswith(f"site {false.name!r}: "), error
            assert "\n" not in str(error)
        else:
            survivors.append(mutation.__name__)
    assert not survivors


def test_weights_of_another_layer_are_refuted() -> None:
    case = llama()
    first, second = case.layout.sites
    false = replace(first, query=second.query)
    with pytest.raises(VerifyError, match=r"site 'model.layers.0.self_attn': its query side comes out of .*layers.0"):
        verify_qk_pairs(case.model, QKLayout((false, second)), **case.inputs)


def test_forgotten_attention_is_refuted() -> None:
    case = gpt2()
    with pytest.raises(VerifyError, match=r"attention runs in module 'transformer.h.1.attn'"):
        verify_qk_pairs(case.model, replace(case.layout, sites=case.layout.sites[:1]), **case.inputs)


# -- any arrangement of rows -----------------------------------------------------------------------------------------


class Arranged(nn.Module):
    """Grouped attention that gathers each head's rows from wherever they lie in one matrix."""

    def __init__(self, query: list[list[int]], key: list[list[int]], head_map: list[int], rows: int) -> None:
        super().__init__()
        self.project = nn.Linear(12, rows, bias=False)
        self.query, self.key, self.head_map = query, key, head_map

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(x)
        q = torch.stack([y[..., rows] for rows in self.query], 1)
        k = torch.stack([y[..., self.key[of]] for of in self.head_map], 1)
        return (q @ k.mT).tril().softmax(-1) @ x[:, None]


@st.composite
def arrangements(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], list[int], int]:
    """Rows of each query head and key head, the key head of each query head, and the number of rows."""
    width, groups, key_heads = draw(st.integers(2, 4)), draw(st.integers(1, 3)), draw(st.integers(2, 3))
    spare, heads = draw(st.integers(0, 3)), groups * key_heads
    rows = draw(st.permutations(range(width * (heads + key_heads) + spare)))
    cut = [sorted(rows[i * width : (i + 1) * width]) for i in range(heads + key_heads)]
    head_map = draw(st.permutations([h % key_heads for h in range(heads)]))
    return cut[:heads], cut[heads:], head_map, len(rows)


@settings(max_examples=15, deadline=None)
@given(arrangements(), st.data())
def test_any_arrangement_of_rows(arrangement: Any, data: st.DataObject) -> None:
    query, key, head_map, _ = arrangement
    model = Arranged(*arrangement)

    def block(role: Any, rows: list[list[int]]) -> WeightBlock:
        return WeightBlock("project.weight", role, 0, tuple(tuple((r, r + 1) for r in head) for head in rows))

    true = site("", block("q", query), block("k", key), len(query[0]), head_map=tuple(head_map))
    x = torch.randn(2, 5, 12)
    assert verify_qk_pairs(model, QKLayout((true,)), x).complete

    one, two = data.draw(st.permutations(range(len(query))))[:2]
    swapped = list(query)
    swapped[one], swapped[two] = query[two], query[one]
    with pytest.raises(VerifyError, match="head"):
        verify_qk_pairs(model, QKLayout((replace(true, query=(block("q", swapped),)),)), x)


# -- what cannot be told, and bad input --------------------------------------------------------------------------------


class Outside(nn.Module):
    """Attention whose logits autograd does not see through."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = (part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q, self.k))
        with torch.no_grad():
            weights = (q @ k.mT).softmax(-1)
        return weights @ q


class NormOverAll(nn.Module):
    """Attention whose layer norm over the full width ties its heads together."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.q_norm, self.k_norm = nn.LayerNorm(8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k = self.q_norm(self.q(x)), self.k_norm(self.k(x))
        q, k = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k))
        return (q @ k.mT).softmax(-1) @ k


@pytest.mark.parametrize(
    ("model", "norms", "reason"),
    [
        (Outside(), (), "no softmax ran for it where gradients can be followed"),
        (NormOverAll(), (Norm("query", "layer", 8), Norm("key", "layer", 8)), "ties all heads together"),
    ],
)
def test_what_cannot_be_told_is_not_proved(model: nn.Module, norms: tuple[Norm, ...], reason: str) -> None:
    query, key = WeightBlock("q.weight", "q", 0, heads(2, 4)), WeightBlock("k.weight", "k", 0, heads(2, 4))
    report = verify_qk_pairs(model, QKLayout((site("", query, key, 4, qk_norm=norms),)), torch.randn(2, 5, 8))
    assert not report.proved
    assert not report.complete
    assert reason in report.not_proved[0].reason


def test_model_on_meta_is_filled_with_random_numbers() -> None:
    with torch.device("meta"):
        case = llama()
    assert verify_qk_pairs(case.model, case.layout, **case.inputs).complete
    assert all(p.is_meta for p in case.model.parameters())


def test_precision_mode_and_randomness_are_left_alone() -> None:
    case = our_gpt()
    model = case.model.to(torch.bfloat16).train().requires_grad_(False)
    state = torch.get_rng_state()
    assert verify_qk_pairs(model, case.layout, **case.inputs).complete
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())


def test_zero_weights_hide_nothing() -> None:
    case = our_gpt()
    for parameter in case.model.parameters():
        nn.init.zeros_(parameter)
    assert verify_qk_pairs(case.model, case.layout, **case.inputs).complete


def test_wrapped_model_is_unwrapped() -> None:
    case = our_gpt()
    assert verify_qk_pairs(nn.DataParallel(case.model), case.layout, **case.inputs).complete
    assert verify_qk_pairs(torch.compile(case.model), case.layout, **case.inputs).complete


def test_layers_with_tied_weights_are_one_site() -> None:
    case = our_gpt()
    first, second = (case.model.get_submodule(f"blocks.{i}.attn.qkv") for i in range(2))
    second.weight, second.bias = first.weight, first.bias
    tied = replace(case.layout.sites[0], calls=2)
    report = verify_qk_pairs(case.model, QKLayout((tied,)), **case.inputs)
    assert report.complete
    assert report.proved[0].attentions == 2
    false = replace(tied, query=(moved(tied.query[0], 1),))
    with pytest.raises(VerifyError, match=r"head 0, query side: .* rows 0-31, the layout claims rows 1-32"):
        verify_qk_pairs(case.model, QKLayout((false,)), **case.inputs)


def giant() -> Case:
    with torch.device("meta"):
        return hugging_face("llama", [], hidden_size=16384, num_hidden_layers=4, intermediate_size=4096)


def renamed() -> Case:
    case = our_gpt()
    first = case.layout.sites[0]
    return replace(case, layout=QKLayout((replace(first, query=(replace(first.query[0], param="blocks.0.q"),)),)))


def too_far() -> Case:
    case = our_gpt()
    first = case.layout.sites[0]
    return replace(case, layout=QKLayout((replace(first, key=(moved(first.key[0], 10_000),)),)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (giant, r"verify the same architecture with fewer layers and a smaller width$"),
        (renamed, r"names 'blocks.0.q', which is no parameter of this model"),
        (too_far, r"rows \[10192, 10224\] along axis 0 of 'blocks.0.attn.qkv.weight', whose shape is \(576, 192\)"),
        (
            lambda: replace(our_gpt(), inputs={"ids": IDS}),
            r"TypeError: .*; give the inputs that find_qk_pairs was given$",
        ),
        (lambda: replace(our_gpt(), inputs={"idx": IDS.to("meta")}), r"an example input is on meta"),
    ],
)
def test_bad_input_is_told_in_one_line(build: Callable[[], Case], message: str) -> None:
    case = build()
    with pytest.raises((VerifyError, LayoutError), match=message) as error:
        verify_qk_pairs(case.model, case.layout, **case.inputs)
    assert "\n" not in str(error.value)
