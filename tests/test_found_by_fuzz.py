"""Attentions that the finder once got wrong on random models, each as small as it failed.

What must be found is written down beside each: the rows of a head, factor by factor.
"""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import heads
from torch import Tensor, nn
from toy import Toy

from quack_fx.find import find_qk_pairs
from quack_fx.layout import AttentionSite, WeightBlock

X, Y = torch.ones(2, 5, 13), torch.ones(2, 7, 15)
HEADS, DIM = 3, 4
INNER = HEADS * DIM


def linear(of: int, to: int, bias: bool = False) -> nn.Linear:
    return nn.Linear(of, to, bias=bias)


def split(x: Tensor) -> Tensor:
    """[b, t, heads * dim] to [b, heads, t, dim]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.5).softmax(-1) @ v


def only_site(model: nn.Module, *inputs: Tensor) -> AttentionSite:
    layout = find_qk_pairs(model, *inputs)
    assert not layout.skipped and len(layout.sites) == 1, layout
    return layout.sites[0]


Term = frozenset[tuple[str, str, tuple[tuple[int, int], ...]]]


def terms(site: AttentionSite, head: int) -> set[Term]:
    """Terms of a head, each as the (side, parameter, rows) of its factors."""
    queries = {id(b) for b in site.query}
    return {
        frozenset(("query" if id(block) in queries else "key", block.param, rows) for block, rows in term)
        for term in site.head_terms(head)
    }


def term(**sides: dict[str, list[int]]) -> Term:
    """A term written down: for each side its parameters, each with its rows [start, stop]."""
    return frozenset(
        (side, name, ((rows[0], rows[1]),)) for side, blocks in sides.items() for name, rows in blocks.items()
    )


# ---- several products are one logit ----------------------------------------------------------------------------------


def test_content_and_rope_products_that_are_summed_are_one_head() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        latent, rope = m.down(x).split((3, 2), -1)
        k, v = split(m.up(latent)).split(4, -1)
        logits = split(m.q(x)) @ k.mT + split(m.qr(x)) @ rope.unsqueeze(1).mT
        return logits.softmax(-1) @ v

    site = only_site(Toy(run, q=linear(13, 12), qr=linear(13, 6), down=linear(13, 5), up=linear(3, 24)), X)
    assert site.query_heads == 3
    for h in range(HEADS):
        content = term(
            query={"q.weight": [4 * h, 4 * h + 4]}, key={"up.weight": [8 * h, 8 * h + 4], "down.weight": [0, 3]}
        )
        position = term(query={"qr.weight": [2 * h, 2 * h + 2]}, key={"down.weight": [3, 5]})
        assert terms(site, h) == {content, position}


# ---- chains ----------------------------------------------------------------------------------------------------------


def test_a_factor_behind_a_product_per_head_keeps_the_rows_of_that_head() -> None:
    """Absorbed latent attention: the keys' up projection multiplies the queries."""

    def run(m: Any, x: Tensor) -> Tensor:
        latent = m.down(x).unsqueeze(1)
        q = torch.einsum("bhtd,hdr->bhtr", split(m.q(x)), m.k_up)
        return attend(q, latent, latent)

    site = only_site(Toy(run, q=linear(13, 12), down=linear(13, 3), k_up=torch.ones(HEADS, DIM, 3)), X)
    assert not site.cross
    for h in range(HEADS):
        rows = {"k_up": [h, h + 1], "q.weight": [4 * h, 4 * h + 4]}
        assert terms(site, h) == {term(query=rows, key={"down.weight": [0, 3]})}


def test_a_grouped_convolution_behind_a_projection() -> None:
    """Each head mixes its own features once more."""

    def run(m: Any, x: Tensor) -> Tensor:
        return attend(split(m.mix(m.q(x).mT).mT), split(m.k(x)), split(m.v(x)))

    mix = nn.Conv1d(12, 12, 1, groups=HEADS, bias=False)
    site = only_site(Toy(run, mix=mix, **{n: linear(13, 12) for n in "qkv"}), X)
    for h in range(HEADS):
        rows = [4 * h, 4 * h + 4]
        assert terms(site, h) == {term(query={"mix.weight": rows, "q.weight": rows}, key={"k.weight": rows})}


def test_a_second_factor_behind_a_linear_for_each_head() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        q = torch.stack([one(x) for one in m.q], 1)
        return attend(torch.einsum("bhtd,hde->bhte", q, m.mix), split(m.k(x)), split(m.v(x)))

    parts = {"k": linear(13, 12), "v": linear(13, 12), "q": nn.ModuleList(linear(13, 4) for _ in range(HEADS))}
    site = only_site(Toy(run, mix=torch.ones(HEADS, DIM, DIM), **parts), X)
    for h in range(HEADS):
        query = {"mix": [h, h + 1], f"q.{h}.weight": [0, 4]}
        assert terms(site, h) == {term(query=query, key={"k.weight": [4 * h, 4 * h + 4]})}


def test_second_factors_behind_weights_that_are_concatenated() -> None:
    """Queries and keys come out of one product, but of rows and parameters of their own."""

    def run(m: Any, x: Tensor) -> Tensor:
        q, v, k = map(split, nn.functional.linear(x, torch.cat((m.qv, m.k))).split(12, -1))
        q, k = (torch.einsum("bhtd,hde->bhte", one, mix) for one, mix in ((q, m.mix_q), (k, m.mix_k)))
        return attend(q, k, v)

    mixes = {n: torch.ones(HEADS, DIM, DIM) for n in ("mix_q", "mix_k")}
    site = only_site(Toy(run, qv=torch.ones(24, 13), k=torch.ones(12, 13), **mixes), X)
    for h in range(HEADS):
        rows, own = [4 * h, 4 * h + 4], [h, h + 1]
        assert terms(site, h) == {term(query={"mix_q": own, "qv": rows}, key={"mix_k": own, "k": rows})}


def test_absorbed_latent_attention_of_one_head() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        latent = m.down(x).unsqueeze(1)
        q = torch.einsum("bhtd,hdr->bhtr", m.q(x).unsqueeze(1), m.k_up)
        return attend(q, latent, latent)

    site = only_site(Toy(run, q=linear(13, 4), down=linear(13, 3), k_up=torch.ones(1, DIM, 3)), X)
    assert not site.cross
    assert {b.param for b in site.query} == {"k_up", "q.weight"} and {b.param for b in site.key} == {"down.weight"}


def test_absorbed_latent_attention_in_a_loop() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        latent = m.down(x)
        q = torch.einsum("bhtd,hdr->bhtr", split(m.q(x)), m.k_up)
        return torch.stack([attend(q[:, h], latent, latent) for h in range(HEADS)], 1)

    model = Toy(run, q=linear(13, 12), down=linear(13, 3), k_up=torch.ones(HEADS, DIM, 3))
    found = [terms(site, h) for site in find_qk_pairs(model, X).sites for h in range(site.query_heads)]
    for h in range(HEADS):
        rows = {"k_up": [h, h + 1], "q.weight": [4 * h, 4 * h + 4]}
        assert {term(query=rows, key={"down.weight": [0, 3]})} in found


def test_an_adapter_of_rank_one() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        return attend(split(m.q(x) + m.b(m.a(x))), split(m.k(x)), split(m.v(x)))

    parts = {n: linear(13, 12) for n in "qkv"} | {"a": linear(13, 1), "b": linear(1, 12)}
    site = only_site(Toy(run, **parts), X)
    for h in range(HEADS):
        rows = [4 * h, 4 * h + 4]
        plain = term(query={"q.weight": rows}, key={"k.weight": rows})
        assert terms(site, h) == {plain, term(query={"b.weight": rows, "a.weight": [0, 1]}, key={"k.weight": rows})}


def test_unknown_rows_behind_a_depthwise_convolution() -> None:
    """The weight is computed from several parameters; the convolution behind it is no projection."""

    def run(m: Any, x: Tensor) -> Tensor:
        q = m.conv(nn.functional.linear(x, m.w + m.b @ m.a).mT).mT
        return attend(split(q), split(m.k(x)), split(m.v(x)))

    conv = nn.Conv1d(12, 12, 3, padding=1, groups=12, bias=False)
    parts = {"w": torch.ones(12, 13), "b": torch.ones(12, 2), "a": torch.ones(2, 13)}
    layout = find_qk_pairs(Toy(run, conv=conv, k=linear(13, 12), v=linear(13, 12), **parts), X)
    assert not layout.sites and [s.code for s in layout.skipped] == ["unknown-query"]


def test_chains_in_a_loop_over_heads() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = split(m.up(m.down(x))), split(m.k(x)), split(m.v(x))
        return torch.stack([attend(q[:, i], k[:, i], v[:, i]) for i in range(HEADS)], 1)

    model = Toy(run, down=linear(13, 2), up=linear(2, 12), k=linear(13, 12), v=linear(13, 12))
    found = [terms(site, h) for site in find_qk_pairs(model, X).sites for h in range(site.query_heads)]
    assert len(found) == HEADS
    for h in range(HEADS):
        rows = [4 * h, 4 * h + 4]
        assert {term(query={"up.weight": rows, "down.weight": [0, 2]}, key={"k.weight": rows})} in found


def test_adapters_in_a_loop_over_heads() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = split(m.q(x) + m.b(m.a(x))), split(m.k(x)), split(m.v(x))
        return torch.stack([attend(q[:, i], k[:, i], v[:, i]) for i in range(HEADS)], 1)

    parts = {"q": linear(13, 12), "a": linear(13, 2), "b": linear(2, 12), "k": linear(13, 12), "v": linear(13, 12)}
    found = [terms(site, h) for site in find_qk_pairs(Toy(run, **parts), X).sites for h in range(site.query_heads)]
    for h in range(HEADS):
        rows = [4 * h, 4 * h + 4]
        plain = term(query={"q.weight": rows}, key={"k.weight": rows})
        branch = term(query={"b.weight": rows, "a.weight": [0, 2]}, key={"k.weight": rows})
        assert {plain, branch} in found


def test_a_latent_of_up_projections_one_for_each_head() -> None:
    """Each up projection alone gives less than the latent holds; together they give more."""

    def run(m: Any, x: Tensor) -> Tensor:
        latent = m.down(x)
        return attend(torch.stack([up(latent) for up in m.ups], 1), split(m.k(x)), split(m.v(x)))

    parts = {"down": linear(13, 3), "k": linear(13, 6), "v": linear(13, 12)}
    site = only_site(Toy(run, ups=nn.ModuleList(linear(3, 2) for _ in range(HEADS)), **parts), X)
    for h in range(HEADS):
        rows = {f"ups.{h}.weight": [0, 2], "down.weight": [0, 3]}
        assert terms(site, h) == {term(query=rows, key={"k.weight": [2 * h, 2 * h + 2]})}


def test_down_projections_of_both_sides_in_one_matrix() -> None:
    """The rows tell the queries' latent from the keys'."""

    def run(m: Any, x: Tensor) -> Tensor:
        cq, ckv = m.downs(x).split((2, 3), -1)
        k, v = split(m.kv(ckv)).chunk(2, -1)
        return attend(split(m.q(cq)), k, v)

    site = only_site(Toy(run, downs=linear(13, 5), q=linear(2, 12), kv=linear(3, 24)), X)
    for h in range(HEADS):
        query = {"q.weight": [4 * h, 4 * h + 4], "downs.weight": [0, 2]}
        key = {"kv.weight": [8 * h, 8 * h + 4], "downs.weight": [2, 5]}
        assert terms(site, h) == {term(query=query, key=key)}


def test_a_residual_stream_that_starts_at_the_input_is_no_latent() -> None:
    """The input itself holds no weight, yet what is added to it is not all that the projection reads."""

    def run(m: Any, x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + m.layer(x)
        return x

    def layer(m: Any, x: Tensor) -> Tensor:
        return m.out(attend(split(m.q(x)), m.k(x).unsqueeze(1), split(m.v(x))).transpose(1, 2).flatten(2))

    parts = {n: linear(13, 18) for n in "qv"} | {"k": linear(13, 6), "out": linear(18, 13)}
    site = only_site(Toy(run, layer=Toy(layer, **parts)), X)
    assert site.calls == 2 and not site.cross
    assert [b.param for _, b in site.blocks()] == ["layer.q.weight", "layer.k.weight"]


def test_a_second_attention_on_the_keys_of_the_first() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        k, v = split(m.k(x)), split(m.v(x))
        x = x + m.out(attend(split(m.q(x)), k, v).transpose(1, 2).flatten(2))
        return attend(split(m.q2(x)), k, v)

    parts = {n: linear(13, 18) for n in ("q", "k", "v", "q2")} | {"out": linear(18, 13)}
    first, second = find_qk_pairs(Toy(run, **parts), X).sites
    assert [b.param for _, b in first.blocks()] == ["q.weight", "k.weight"] and not first.cross
    assert [b.param for _, b in second.blocks()] == ["q2.weight", "k.weight"] and not second.cross


def test_an_einsum_over_an_axis_of_one() -> None:
    """It runs as an elementwise product, yet it is a factor like any other."""

    def run(m: Any, x: Tensor) -> Tensor:
        q = m.q(x) + torch.einsum("btr,fr->btf", m.a(x), m.b)
        return attend(split(q), split(m.k(x)), split(m.v(x)))

    parts = {n: linear(13, 12) for n in "qkv"}
    layout = find_qk_pairs(Toy(run, a=linear(13, 1), b=torch.ones(12, 1), **parts), X)
    for site in layout.sites:  # or none, with a reason
        assert {b.param for b in site.query} == {"q.weight", "a.weight", "b"}
    assert layout.sites or layout.skipped


# ---- joint attention -------------------------------------------------------------------------------------------------


def test_joint_streams_one_with_a_linear_for_each_head() -> None:
    def run(m: Any, x: Tensor, y: Tensor) -> Tensor:
        q = torch.cat((torch.stack([one(x) for one in m.q], 1), split(m.q2(y))), 2)
        k, v = (torch.cat((split(a(x)), split(b(y))), 2) for a, b in ((m.k, m.k2), (m.v, m.v2)))
        return attend(q, k, v)

    parts: dict[str, nn.Module] = {n: linear(13, 12) for n in "kv"} | {n: linear(15, 12) for n in ("q2", "k2", "v2")}
    site = only_site(Toy(run, q=nn.ModuleList(linear(13, 4) for _ in range(HEADS)), **parts), X, Y)
    assert site.query_heads == HEADS and site.head_map == (0, 1, 2)
    for h in range(HEADS):
        rows = [4 * h, 4 * h + 4]
        queries: list[dict[str, list[int]]] = [{f"q.{h}.weight": [0, 4]}, {"q2.weight": rows}]
        keys = [{"k.weight": rows}, {"k2.weight": rows}]
        assert terms(site, h) == {term(query=q, key=k) for q in queries for k in keys}


# ---- fewer keys ------------------------------------------------------------------------------------------------------


def test_keys_that_are_bent_and_then_pooled() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        k, v = (p(x).clamp(-3.0, 3.0)[:, :4].unflatten(1, (2, 2)).mean(2) for p in (m.k, m.v))
        return attend(split(m.q(x)), split(k), split(v))

    site = only_site(Toy(run, **{n: linear(13, 12) for n in "qkv"}), X)
    assert site.query == (WeightBlock("q.weight", "q", 0, heads(HEADS, DIM)),)
    assert site.key == (WeightBlock("k.weight", "k", 0, heads(HEADS, DIM)),)


def test_a_mean_over_nothing() -> None:
    """Keys of no token at all are no reason to fail."""

    def run(m: Any, x: Tensor) -> Tensor:
        k, v = (split(p(x))[:, :, :0].unflatten(2, (2, 0)).mean(3) for p in (m.k, m.v))
        return attend(split(m.q(x)), k, v)

    layout = find_qk_pairs(Toy(run, **{n: linear(13, 12) for n in "qkv"}), X)
    assert [b.param for site in layout.sites for b in site.query] == ["q.weight"] or layout.skipped


# ---- biases ----------------------------------------------------------------------------------------------------------


def test_the_bias_of_a_convolution() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        q = m.q(x.mT).mT
        k = m.k(x.mT.unsqueeze(-1)).squeeze(-1).mT
        return attend(split(q), split(k), split(m.v(x)))

    site = only_site(Toy(run, q=nn.Conv1d(13, 12, 1), k=nn.Conv2d(13, 12, 1), v=linear(13, 12)), X)
    assert site.query == (WeightBlock("q.weight", "q", 0, heads(HEADS, DIM), "q.bias"),)
    assert site.key == (WeightBlock("k.weight", "k", 0, heads(HEADS, DIM), "k.bias"),)


# ---- learned queries -------------------------------------------------------------------------------------------------


def test_queries_from_a_latent_with_relative_positions() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        q = split(m.q(m.latents.expand(2, -1, -1)))
        positions = torch.einsum("bhtd,tsd->bhts", q, m.table(torch.arange(20).view(4, 5)))
        return ((q @ split(m.k(x)).mT + positions) * 0.5).softmax(-1) @ split(m.v(x))

    parts = {n: linear(13, 12) for n in "qkv"}
    site = only_site(Toy(run, latents=torch.ones(1, 4, 13), table=nn.Embedding(20, DIM), **parts), X)
    assert [b.param for _, b in site.blocks()] == ["q.weight", "k.weight"] and site.cross


def test_queries_from_a_latent_with_the_weight_written_first() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        q = torch.einsum("btc,ic->ibt", m.latents.expand(2, -1, -1), m.q).permute(1, 2, 0)
        return attend(split(q), split(m.k(x)), split(m.v(x)))

    parts = {n: linear(13, 12) for n in "kv"}
    site = only_site(Toy(run, latents=torch.ones(1, 4, 13), q=torch.ones(12, 13), **parts), X)
    assert site.query == (WeightBlock("q", "q", 0, heads(HEADS, DIM)),)


def test_latents_of_one_sequence_behind_a_depthwise_convolution() -> None:
    """Both sides of the product are parameters, and no batch tells which of them is the data: right or refused."""

    def run(m: Any, x: Tensor) -> Tensor:
        q = m.conv(torch.einsum("btc,hcd->bhdt", m.latents, m.q).flatten(1, 2)).unflatten(1, (HEADS, DIM)).mT
        return attend(q, split(m.k(x)), split(m.v(x)))

    conv = nn.Conv1d(12, 12, 3, padding=1, groups=12, bias=False)
    parts = {"k": linear(13, 12), "v": linear(13, 12), "conv": conv}
    layout = find_qk_pairs(Toy(run, latents=torch.ones(1, 4, 13), q=torch.ones(HEADS, 13, DIM), **parts), X[:1])
    if not layout.skipped:
        assert [site.query for site in layout.sites] == [(WeightBlock("q", "q", 0, heads(HEADS, 1)),)]
