"""Queries projected by a weight for each kind of token: by experts that a router chooses, or by place.

On fake weights, what a router chooses is made up. So whatever is chosen, a site has the rows of every expert, which
gradients prove, or there is none.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from by_hand import DIM, INNER, WIDTH, attend, k_block, linear, plain, q_block, split
from tiny_models import heads
from torch import Tensor, nn
from toy import Toy

import quack_fx.graph.capture.answers
from quack_fx import find_qk_pairs, verify_qk_pairs
from quack_fx.find import find
from quack_fx.layout import WeightBlock

EXPERTS, ROUNDS = 3, 4
Queries = Callable[[Any, Tensor], Tensor]


def by(m: Any, x: Tensor, expert: int) -> Tensor:
    """Queries of one expert; their weights lie in modules of their own or in one tensor."""
    made: Tensor = m.w[expert](x) if isinstance(m.w, nn.ModuleList) else x @ m.w[expert].T
    return made


def chosen(m: Any, x: Tensor) -> Tensor:
    return m.router(x).argmax(-1)  # type: ignore[no-any-return]


def sorted_and_split(m: Any, x: Tensor) -> Tensor:
    """JetMoE's way."""
    expert = chosen(m, x)
    order = expert.argsort()
    parts = x[order].split(torch.bincount(expert, minlength=EXPERTS).tolist())
    return torch.cat([by(m, part, i) for i, part in enumerate(parts)])[order.argsort()]


def split_by_counts(m: Any, x: Tensor) -> Tensor:
    expert = chosen(m, x)
    parts = x.split(torch.bincount(expert, minlength=EXPERTS).tolist())
    return torch.cat([by(m, part, i) for i, part in enumerate(parts)])


def written_at_indices(m: Any, x: Tensor) -> Tensor:
    expert, q = chosen(m, x), x.new_zeros(len(x), INNER)
    for i in range(EXPERTS):
        (where,) = torch.where(expert == i)
        q[where] = by(m, x[where], i)
    return q


def written_at_masks(m: Any, x: Tensor) -> Tensor:
    expert, q = chosen(m, x), x.new_zeros(len(x), INNER)
    for i in range(EXPERTS):
        q[expert == i] = by(m, x[expert == i], i)
    return q


def copied_to_indices(m: Any, x: Tensor) -> Tensor:
    expert, q = chosen(m, x), x.new_zeros(len(x), INNER)
    for i in range(EXPERTS):
        (where,) = torch.where(expert == i)
        q = q.index_copy(0, where, by(m, x[where], i))
    return q


def scattered(m: Any, x: Tensor) -> Tensor:
    expert, q = chosen(m, x), x.new_zeros(len(x), INNER)
    for i in range(EXPERTS):
        (where,) = torch.where(expert == i)
        q = q.scatter(0, where[:, None].expand(-1, INNER), by(m, x[where], i))
    return q


def added_at_indices(m: Any, x: Tensor) -> Tensor:
    """Mixtral's way: each token goes to two experts."""
    gates, expert = m.router(x).softmax(-1).topk(2)
    q = x.new_zeros(len(x), INNER)
    for i in range(EXPERTS):
        token, slot = torch.where(expert == i)
        q.index_add_(0, token, by(m, x[token], i) * gates[token, slot, None])
    return q


def of_experts_that_are_hit(m: Any, x: Tensor) -> Tensor:
    """transformers' way: only the experts that have a token."""
    _, expert = m.router(x).topk(2)
    mask, q = F.one_hot(expert, EXPERTS).permute(2, 1, 0), x.new_zeros(len(x), INNER)
    for (i,) in (mask.sum((-1, -2)) > 0).nonzero():
        _, token = torch.where(mask[i])
        q.index_add_(0, token, by(m, x[token], int(i)))
    return q


def picked(m: Any, x: Tensor) -> Tensor:
    expert, q = chosen(m, x)[:, None], x.new_zeros(len(x), INNER)
    for i in range(EXPERTS):
        q = torch.where(expert == i, by(m, x, i), q)
    return q


def gathered_weights(m: Any, x: Tensor) -> Tensor:
    weights = torch.stack([one.weight for one in m.w]) if isinstance(m.w, nn.ModuleList) else m.w
    return torch.einsum("toi,ti->to", weights[chosen(m, x)], x)


def of_one_expert_for_all(m: Any, x: Tensor) -> Tensor:
    return by(m, x, int(m.router(x.mean(0)).argmax().item()))


def before_and_after(m: Any, x: Tensor) -> Tensor:
    n = int((chosen(m, x) > 0).sum()) % (len(x) - 2)
    return torch.cat([by(m, x[: n + 1], 0), by(m, x[n + 1 : n + 2], 1), by(m, x[n + 2 :], 2)])


def one_by_one(m: Any, x: Tensor) -> Tensor:
    return torch.stack([by(m, token, i) for i, token in zip(chosen(m, x).tolist(), x, strict=True)])


def of_the_experts_that_occur(m: Any, x: Tensor) -> Tensor:
    expert, q = chosen(m, x), x.new_zeros(len(x), INNER)
    for i in expert.unique().tolist():
        q[expert == i] = by(m, x[expert == i], i)
    return q


def of_the_largest_in_a_list(m: Any, x: Tensor) -> Tensor:
    scores = m.router(x.mean(0)).tolist()
    return by(m, x, scores.index(max(scores)))


def of_the_first_or_second(m: Any, x: Tensor) -> Tensor:
    return by(m, x, min(int(m.router(x).abs().mean() * 10), 1))


def if_all_agree(m: Any, x: Tensor) -> Tensor:
    return by(m, x, 0 if torch.equal(chosen(m, x), torch.zeros(len(x), dtype=torch.long)) else 1)


def after_some_rounds(m: Any, x: Tensor) -> Tensor:
    n = 0
    while n < EXPERTS - 1 and m.router(x).mean().item() > 0:
        x, n = x + 1, n + 1
    return by(m, x, n)


def with_values_of_its_own(m: Any, x: Tensor) -> Tensor:
    """Runs on real values only."""
    return by(m, x, int(m.router(x).mean(0).detach().numpy().argmax()))


def drawn_by_torch(m: Any, x: Tensor) -> Tensor:
    return by(m, x, int(torch.randint(EXPERTS, ())))


def drawn_uniformly(m: Any, x: Tensor) -> Tensor:
    return by(m, x, 0 if torch.rand(()) < 0.4 else 1)


def drawn_by_python(m: Any, x: Tensor) -> Tensor:
    return by(m, x, random.randrange(EXPERTS))


def with_a_drawn_weight(m: Any, x: Tensor) -> Tensor:
    weights = torch.stack([one.weight for one in m.w]) if isinstance(m.w, nn.ModuleList) else m.w
    return x @ weights[torch.randint(EXPERTS, (1,))][0].T


FOUND: tuple[Queries, ...] = (
    written_at_indices,
    written_at_masks,
    copied_to_indices,
    scattered,
    added_at_indices,
    of_experts_that_are_hit,
    picked,
    before_and_after,
    split_by_counts,
)
REFUSED = {
    sorted_and_split: "unknown-query",
    gathered_weights: "unknown-query",
    of_one_expert_for_all: "computed-route",
    one_by_one: "computed-route",
    of_the_experts_that_occur: "computed-route",
    of_the_largest_in_a_list: "computed-route",
    of_the_first_or_second: "computed-route",
    if_all_agree: "computed-route",
    after_some_rounds: "computed-route",
    with_values_of_its_own: "computed-route",
    drawn_by_torch: "computed-route",
    drawn_uniformly: "computed-route",
    drawn_by_python: "computed-route",
    with_a_drawn_weight: "unknown-query",
}


def routed(queries: Queries, *, modules: bool) -> Toy:
    def run(m: Any, x: Tensor) -> Tensor:
        q = queries(m, x.flatten(0, 1)).view(*x.shape[:2], INNER)
        return attend(split(q), split(m.k(x)), split(m.v(x)))

    parts = {"k": linear(INNER), "v": linear(INNER), "router": linear(EXPERTS)}
    experts = nn.ModuleList(linear(INNER) for _ in range(EXPERTS)) if modules else torch.randn(EXPERTS, INNER, WIDTH)
    return Toy(run, w=experts, **parts)


@pytest.mark.parametrize("modules", [True, False])
@pytest.mark.parametrize("queries", [*FOUND, *REFUSED])
def test_a_site_has_the_rows_of_every_expert_or_there_is_none(queries: Queries, modules: bool) -> None:
    for seed in range(ROUNDS):
        torch.manual_seed(seed)
        model, x = routed(queries, modules=modules), torch.randn(2, 5, WIDTH)
        layout = find_qk_pairs(model, x)
        if modules and queries in FOUND:
            blocks = tuple(q_block(f"w.{i}.weight") for i in range(EXPERTS))
            (site,) = layout.sites
            assert (site.query, site.key, site.query_heads) == (blocks, (k_block(),), plain().query_heads)
        if queries in REFUSED:
            assert not layout.sites
        if layout.sites:
            assert verify_qk_pairs(model, layout, x).complete
        elif modules:
            assert [entry.code for entry in layout.skipped] == [REFUSED[queries]]


def test_routes_are_made_up_without_running_for_real() -> None:
    for queries in (written_at_indices, sorted_and_split, of_experts_that_are_hit):
        found = find(routed(queries, modules=True), (torch.ones(2, 5, WIDTH),))
        assert found.way == "hybrid" and found.canned


# ---- by place --------------------------------------------------------------------------------------------------------


def test_queries_of_some_tokens_from_another_weight_are_the_same_heads() -> None:
    """A class token or a modality: each head then has rows of both, whatever the keys do."""

    def run(m: Any, x: Tensor) -> Tensor:
        q = torch.cat([m.first(x[:, :2]), m.q(x[:, 2:])], 1)
        return attend(split(q), split(m.k(x)), split(m.v(x)))

    model = Toy(run, first=linear(INNER), **{name: linear(INNER) for name in "qkv"})
    x = torch.randn(2, 5, WIDTH)
    (site,) = find_qk_pairs(model, x).sites
    assert site.query == (q_block("first.weight"), q_block()) and site.key == (k_block(),)
    assert (site.kind, site.query_heads, site.head_map) == ("mha", 3, (0, 1, 2))
    assert verify_qk_pairs(model, find_qk_pairs(model, x), x).complete


def test_heads_from_a_weight_each_stay_heads() -> None:
    """They read the same tokens, here folded into the axis of tokens: many queries for one key head."""

    def run(m: Any, x: Tensor) -> Tensor:
        q = torch.cat([one(x) for one in m.heads], 1)
        return attend(q, m.k(x), m.v(x))

    model = Toy(run, heads=nn.ModuleList(linear(DIM) for _ in range(3)), k=linear(DIM), v=linear(DIM))
    (site,) = find_qk_pairs(model, torch.randn(2, 5, WIDTH)).sites
    assert (site.kind, site.query_heads, site.key_heads) == ("mqa", 3, 1)


def test_heads_that_read_a_part_of_each_token_stay_heads() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        q = torch.stack([one(part) for one, part in zip(m.heads, x.chunk(3, -1), strict=True)], 1)
        return attend(q, m.k(x)[:, None], m.v(x)[:, None])

    model = Toy(run, heads=nn.ModuleList(linear(DIM, of=WIDTH // 3) for _ in range(3)), k=linear(DIM), v=linear(DIM))
    x = torch.randn(2, 5, WIDTH)
    layout = find_qk_pairs(model, x)
    assert (layout.sites[0].kind, layout.sites[0].query_heads) == ("mqa", 3)
    assert verify_qk_pairs(model, layout, x).complete


@pytest.mark.parametrize(("texts", "code"), [(0, "no-tokens"), (2, None)])
def test_a_projection_without_tokens_is_told(texts: int, code: str | None) -> None:
    def run(m: Any, text: Tensor, x: Tensor) -> Tensor:
        q = torch.cat([m.text(text), m.q(x)], 1)
        return attend(split(q), split(m.k(x)), split(m.v(x)))

    model = Toy(run, text=linear(INNER), **{name: linear(INNER) for name in "qkv"})
    layout = find_qk_pairs(model, torch.randn(2, texts, WIDTH), torch.randn(2, 5, WIDTH))
    assert [entry.code for entry in layout.skipped] == ([code] if code else [])
    assert not layout.sites if code else {b.param for b in layout.sites[0].query} == {"text.weight", "q.weight"}
    if code:
        assert layout.skipped[0].reason == "with these inputs, 'text.weight' projects no token at all"


def test_a_number_that_decides_nothing_does_not_matter() -> None:
    """A length out of a mask that depends on weights: the rows are the same for each."""

    def run(m: Any, x: Tensor) -> Tensor:
        n = int((m.router(x)[0, :, 0] > 0).sum())
        y = x[:, : max(n, 3)]
        return attend(split(m.q(y)), split(m.k(y)), split(m.v(y)))

    model = Toy(run, router=linear(1), **{name: linear(INNER) for name in "qkv"})
    assert find_qk_pairs(model, torch.randn(2, 5, WIDTH)).sites == (plain(),)


def test_a_number_may_be_out_of_range_for_the_model() -> None:
    """The other number is then one that every list has."""

    def run(m: Any, x: Tensor) -> Tensor:
        return attend(split(m.w[int(m.router(x).argmax())](x)), split(m.k(x)), split(m.v(x)))

    parts = {"k": linear(INNER), "v": linear(INNER), "router": linear(2)}
    model = Toy(run, w=nn.ModuleList(linear(INNER) for _ in range(2)), **parts)
    layout = find_qk_pairs(model, torch.randn(2, 5, WIDTH))
    assert not layout.sites and [entry.code for entry in layout.skipped] == ["computed-route"]


def test_a_gate_by_the_largest_features_of_another_projection_is_unknown() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        gate = m.router(x).sigmoid().topk(1).values
        return attend(split(m.q(x) * gate), split(m.k(x)), split(m.v(x)))

    model = Toy(run, router=linear(3), **{name: linear(INNER) for name in "qkv"})
    layout = find_qk_pairs(model, torch.randn(2, 5, WIDTH))
    assert not layout.sites and [entry.code for entry in layout.skipped] == ["unknown-query"]


def test_a_choice_that_depends_on_weights_is_refused() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        q = m.q(x) if (m.router(x) > 0).any() else m.other(x)
        return attend(split(q), split(m.k(x)), split(m.v(x)))

    model = Toy(run, router=linear(1), other=linear(INNER), **{name: linear(INNER) for name in "qkv"})
    layout = find_qk_pairs(model, torch.randn(2, 5, WIDTH))
    assert not layout.sites and [entry.code for entry in layout.skipped] == ["computed-route"]


def test_a_check_that_depends_on_weights_does_not_matter() -> None:
    """It would raise if it were true; the pass is then recorded with what it can take."""

    def run(m: Any, x: Tensor) -> Tensor:
        q = m.q(x)
        if torch.isnan(q).any():
            raise ValueError("not a number")
        return attend(split(q), split(m.k(x)), split(m.v(x)))

    assert find_qk_pairs(Toy(run, **{name: linear(INNER) for name in "qkv"}), torch.randn(2, 5, WIDTH)).sites == (
        plain(),
    )


def test_one_weight_for_all_kinds_of_tokens() -> None:
    """Writes at computed indices of what one weight projects: the rows are known."""

    def run(m: Any, x: Tensor) -> Tensor:
        q = torch.zeros(2, 5, INNER)
        kept = m.router(x)[..., 0] > 0
        q[kept] = m.q(x[kept])
        return attend(split(q), split(m.k(x)), split(m.v(x)))

    model = Toy(run, router=linear(1), **{name: linear(INNER) for name in "qkv"})
    assert find_qk_pairs(model, torch.randn(2, 5, WIDTH)).sites == (plain(),)


def test_features_moved_by_computed_indices_are_unknown() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        q = m.q(x)
        order = m.router(x).argsort(-1)
        q = torch.zeros_like(q).scatter(-1, order, q)
        return attend(split(q), split(m.k(x)), split(m.v(x)))

    parts = {name: linear(INNER) for name in ("q", "k", "v", "router")}
    layout = find_qk_pairs(Toy(run, **parts), torch.randn(2, 5, WIDTH))
    assert not layout.sites and [entry.code for entry in layout.skipped] == ["unknown-query"]


def test_a_sum_at_indices_along_features_is_unknown() -> None:
    """`scatter_add` along the features permutes them."""

    def run(m: Any, x: Tensor) -> Tensor:
        q = m.q(x)
        order = torch.arange(INNER).flip(0).expand_as(q)
        return attend(split(torch.zeros_like(q).scatter_add(-1, order, q)), split(m.k(x)), split(m.v(x)))

    layout = find_qk_pairs(Toy(run, **{name: linear(INNER) for name in "qkv"}), torch.randn(2, 5, WIDTH))
    assert not layout.sites


def test_part_of_the_rows_of_one_weight() -> None:
    """A fused weight whose other half has no tokens counts as read: its rows that are read are known."""

    def run(m: Any, x: Tensor) -> Tensor:
        q = torch.cat([m.both(x[:, :0])[..., INNER:], m.both(x)[..., :INNER]], 1)
        return attend(split(q), split(m.k(x)), split(m.v(x)))

    model = Toy(run, both=linear(2 * INNER), k=linear(INNER), v=linear(INNER))
    (site,) = find_qk_pairs(model, torch.randn(2, 5, WIDTH)).sites
    assert site.query == (WeightBlock("both.weight", "q", 0, heads(3, DIM), None),)


# ---- at random -------------------------------------------------------------------------------------------------------

LAYERS = 8


def layers_left_out(keep: Callable[[], bool]) -> Toy:
    def run(m: Any, x: Tensor) -> Tensor:
        for one in m.layers:
            if keep():
                x = x + one(x)
        return x

    def layer(m: Any, x: Tensor) -> Tensor:
        return m.o(attend(split(m.q(x)), split(m.k(x)), split(m.v(x))).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def parts() -> dict[str, nn.Module]:
        return {"o": linear(WIDTH, of=INNER), **{name: linear(INNER) for name in "qkv"}}

    return Toy(run, layers=nn.ModuleList(Toy(layer, **parts()) for _ in range(LAYERS)))


DRAWS: dict[str, Callable[[], bool]] = {
    "torch": lambda: bool(torch.rand([]) >= 0.5),
    "in place": lambda: bool(torch.empty(1).uniform_() >= 0.5),
    "in a range": lambda: bool(torch.empty(1).uniform_(-1, 3) >= 1),
    "python": lambda: random.random() >= 0.5,
    "python, in a range": lambda: random.uniform(0, 2) >= 1,
    "numpy": lambda: numpy.random.random() >= 0.5,
    "numpy, in a range": lambda: numpy.random.uniform(0, 2) >= 1,
}


@pytest.mark.parametrize("draw", DRAWS)
def test_layers_that_a_forward_leaves_out_at_random_are_found(draw: str) -> None:
    """LayerDrop: whatever the state of the generators, which stays as it is, the sites are those of all layers."""
    model, x = layers_left_out(DRAWS[draw]), torch.randn(2, 5, WIDTH)
    for seed in range(ROUNDS):
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        layout = find_qk_pairs(model, x)
        drawn = torch.rand(1).item(), random.random(), numpy.random.random()
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        assert drawn == (torch.rand(1).item(), random.random(), numpy.random.random())
        assert [site.name for site in layout.sites] == [f"layers.{i}" for i in range(LAYERS)]
        assert all(site.logit_scale == layout.sites[0].logit_scale for site in layout.sites) and not layout.untouched
        assert verify_qk_pairs(model, layout, x).complete


def test_a_loop_that_waits_for_a_draw_ends() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        while random.random() > 0.1:
            pass
        return attend(split(m.q(x)), split(m.k(x)), split(m.v(x)))

    model = Toy(run, **{name: linear(INNER) for name in "qkv"})
    assert find_qk_pairs(model, torch.randn(2, 5, WIDTH)).sites == (plain(),)


def test_a_loop_that_waits_for_a_computed_answer_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake weights it would never: the forward then runs for real, and fails with weights of the other sign."""
    monkeypatch.setattr(quack_fx.graph.capture.answers, "MOST_READS", 100)

    def run(m: Any, x: Tensor) -> Tensor:
        while not (m.router(x) > 3).any():
            x = x * 1.1 + 0.1
        return attend(split(m.q(x)), split(m.k(x)), split(m.v(x)))

    model = Toy(run, router=linear(1), **{name: linear(INNER) for name in "qkv"})
    nn.init.ones_(model.router.weight)
    found = find(model, (torch.ones(2, 5, WIDTH),))
    assert found.way == "real" and found.layout.sites == (plain(),)
