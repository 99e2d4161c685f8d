"""Layouts written by hand, and models that have just their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from tiny_models import example
from torch import Tensor, nn

from quack_fx.layout import AttentionSite, LogitTerm, QKLayout, Ranges, Role, WeightBlock

Shapes = dict[str, tuple[int, ...]]

# ---- layouts written by hand ----------------------------------------------------------------------------------------


def rows(heads: int, width: int, start: int = 0, stride: int | None = None) -> tuple[Ranges, ...]:
    """One contiguous run of rows for each head."""
    step = width if stride is None else stride
    return tuple(((start + h * step, start + h * step + width),) for h in range(heads))


def scattered(heads: int, runs: int, width: int, start: int = 0) -> tuple[Ranges, ...]:
    """A few rows of every head in turn, again and again."""
    return tuple(
        tuple(rows(1, width, start + (run * heads + h) * width)[0][0] for run in range(runs)) for h in range(heads)
    )


def block(param: str, role: Role, heads: tuple[Ranges, ...], axis: int = 0, bias: str | None = None) -> WeightBlock:
    return WeightBlock(param, role, axis, heads, bias)


def site(
    name: str, query: list[WeightBlock], key: list[WeightBlock], terms: list[tuple[tuple[int, ...], tuple[int, ...]]],
    **more: Any,
) -> AttentionSite:  # fmt: skip
    n, m = len(query[0].heads), len(key[0].heads)
    fields: dict[str, Any] = {
        "kind": "mha" if n == m else "gqa",
        "cross": False,
        "calls": 1,
        "query_heads": n,
        "key_heads": m,
        "head_dim": 4,
        "head_map": tuple(h * m // n for h in range(n)),
    }
    return AttentionSite(
        name=name, query=tuple(query), key=tuple(key), terms=tuple(LogitTerm(*term) for term in terms),
        **{**fields, **more},
    )  # fmt: skip


PAIR = [((0,), (0,))]


def gqa(name: str, n: int, m: int, width: int, bias: bool = False, **more: Any) -> AttentionSite:
    def one(part: str, heads: int) -> WeightBlock:
        return block(
            f"{name}.{part}_proj.weight", part, rows(heads, width), bias=f"{name}.{part}_proj.bias" * bias or None
        )  # type: ignore[arg-type]

    return site(name, [one("q", n)], [one("k", m)], PAIR, **more)


def fused(name: str, n: int, width: int, axis: int, interleaved: bool = False) -> AttentionSite:
    stride, start = (3 * width, width) if interleaved else (width, n * width)
    weight, bias = f"{name}.c_attn.weight", f"{name}.c_attn.bias"
    query = block(weight, "q", rows(n, width, 0, stride), axis, bias)
    return site(name, [query], [block(weight, "k", rows(n, width, start, stride), axis, bias)], PAIR)


def falcon(name: str, groups: int, per_group: int, width: int) -> AttentionSite:
    """Query heads, key and value of a group side by side."""
    weight, stride = f"{name}.qkv.weight", (per_group + 2) * width
    heads = tuple(rows(1, width, g * stride + i * width)[0] for g in range(groups) for i in range(per_group))
    key = block(weight, "k", rows(groups, width, per_group * width, stride))
    return site(name, [block(weight, "q", heads)], [key], PAIR)


def mla(name: str, n: int, nope: int, rope: int, value: int, q_rank: int | None, kv_rank: int) -> AttentionSite:
    ukv, dkv = f"{name}.kv_b_proj.weight", f"{name}.kv_a_proj.weight"
    up = f"{name}.q_b_proj.weight" if q_rank else f"{name}.q_proj.weight"
    query = [block(up, "uq", rows(n, nope, 0, nope + rope)), block(up, "qr", rows(n, rope, nope, nope + rope))]
    if q_rank:
        query.append(block(f"{name}.q_a_proj.weight", "dq", (((0, q_rank),),) * n))
    key = [
        block(ukv, "uk", rows(n, nope, 0, nope + value)),
        block(dkv, "dkv", (((0, kv_rank),),) * n),
        block(dkv, "kr", (((kv_rank, kv_rank + rope),),) * n),
    ]
    dq = (2,) if q_rank else ()
    return site(name, query, key, [((0, *dq), (0, 1)), ((1, *dq), (2,))], kind="mla")


def split_rotary(name: str, n: int, half: int) -> AttentionSite:
    """First halves of all heads, then second halves: each head has two runs of rows."""

    def heads(start: int) -> tuple[Ranges, ...]:
        first, second = rows(n, half, start), rows(n, half, start + n * half)
        return tuple(a + b for a, b in zip(first, second, strict=True))

    weight = f"{name}.qk.weight"
    return site(name, [block(weight, "q", heads(0))], [block(weight, "k", heads(2 * n * half))], PAIR)


LONG = "a_wrapper.another_wrapper_inside.backbone.transformer_stack.blocks.7.self_attention.the_core_of_it"
IRREGULAR: tuple[Ranges, ...] = (((0, 4),), ((5, 9), (12, 14)), ((16, 24),))

SITES: dict[str, tuple[list[AttentionSite], Shapes]] = {
    "gqa": (
        [gqa(f"layers.{i}.attn", 6, 2, 4) for i in range(3)],
        {f"layers.{i}.attn.{p}_proj.weight": (r, 10) for i in range(3) for p, r in (("q", 24), ("k", 8))},
    ),
    "mqa_with_bias": (
        [gqa("attn", 4, 1, 4, bias=True)],
        {
            **{"attn.q_proj.weight": (16, 6), "attn.q_proj.bias": (16,)},
            **{"attn.k_proj.weight": (4, 6), "attn.k_proj.bias": (4,)},
        },
    ),
    "fused": (
        [fused(f"h.{i}.attn", 3, 4, 0) for i in range(2)],
        {f"h.{i}.attn.c_attn.{p}": s for i in range(2) for p, s in (("weight", (36, 8)), ("bias", (36,)))},
    ),
    "conv1d": (
        [fused(f"h.{i}.attn", 3, 4, 1) for i in range(2)],
        {f"h.{i}.attn.c_attn.{p}": s for i in range(2) for p, s in (("weight", (8, 36)), ("bias", (36,)))},
    ),
    "interleaved": (
        [fused("attn", 3, 4, 0, interleaved=True)],
        {"attn.c_attn.weight": (36, 8), "attn.c_attn.bias": (36,)},
    ),
    "grouped_fused": ([falcon("attn", 2, 3, 4)], {"attn.qkv.weight": (40, 6)}),
    "mla": (
        [mla(f"layers.{i}.attn", 4, 4, 2, 3, 6, 8) for i in (0, 2, 3)],
        {
            f"layers.{i}.attn.{p}.weight": s
            for i in (0, 2, 3)
            for p, s in (("q_a_proj", (6, 10)), ("q_b_proj", (24, 6)), ("kv_a_proj", (10, 10)), ("kv_b_proj", (28, 8)))
        },
    ),
    "mla_without_q_latent": (
        [mla("attn", 4, 4, 2, 3, None, 8)],
        {"attn.q_proj.weight": (24, 10), "attn.kv_a_proj.weight": (10, 10), "attn.kv_b_proj.weight": (28, 8)},
    ),
    "encoder_decoder": (
        [gqa(f"{side}.block.{i}.layer.{n}.{at}", 2, 2, 4, cross=n == 1) for side, n, at in
         (("encoder", 0, "SelfAttention"), ("decoder", 0, "SelfAttention"), ("decoder", 1, "EncDecAttention"))
         for i in range(2)],
        {
            f"{side}.block.{i}.layer.{n}.{at}.{p}_proj.weight": (8, 6)
            for side, n, at in
            (("encoder", 0, "SelfAttention"), ("decoder", 0, "SelfAttention"), ("decoder", 1, "EncDecAttention"))
            for i in range(2)
            for p in "qk"
        },
    ),
    "two_pieces": ([split_rotary("attn", 3, 2)], {"attn.qk.weight": (24, 6)}),
    "row_by_row": (
        [
            site(
                "attn",
                [block("attn.qk.weight", "q", scattered(3, 4, 1))],
                [block("attn.qk.weight", "k", scattered(3, 4, 1, start=12))],
                PAIR,
            )
        ],
        {"attn.qk.weight": (24, 6)},
    ),
    "two_by_two": (
        [
            site(
                "attn",
                [block("attn.q.weight", "q", scattered(3, 6, 2))],
                [block("attn.k.weight", "k", rows(3, 4))],
                PAIR,
            )
        ],
        {"attn.q.weight": (36, 6), "attn.k.weight": (12, 6)},
    ),
    "odd_head_map_of_many": (
        [gqa("attn", 40, 5, 2, head_map=tuple(h * h % 5 for h in range(40)))],
        {"attn.q_proj.weight": (80, 6), "attn.k_proj.weight": (10, 6)},
    ),
    "irregular": (
        [site("attn", [block("attn.q.weight", "q", IRREGULAR)], [block("attn.k.weight", "k", IRREGULAR)], PAIR)],
        {"attn.q.weight": (25, 6), "attn.k.weight": (24, 6)},
    ),
    "keys_of_the_layer_below": (
        [
            site(
                f"layers.{i}.attn",
                [block(f"layers.{i}.attn.q.weight", "q", rows(4, 4))],
                [block(f"layers.{i - i % 2}.attn.k.weight", "k", rows(2, 4))],
                PAIR,
            )
            for i in range(6)
        ],
        {
            **{f"layers.{i}.attn.q.weight": (16, 6) for i in range(6)},
            **{f"layers.{i}.attn.k.weight": (8, 6) for i in range(0, 6, 2)},
        },
    ),
    "joint": (
        [
            site(
                "attn",
                [block(f"attn.{p}.weight", "q", rows(2, 4)) for p in ("to_q", "add_q")],
                [block(f"attn.{p}.weight", "k", rows(2, 4)) for p in ("to_k", "add_k")],
                [((0,), (0,)), ((0,), (1,)), ((1,), (0,)), ((1,), (1,))],
            )
        ],
        {f"attn.{p}.weight": (8, 6) for p in ("to_q", "add_q", "to_k", "add_k")},
    ),
    "low_rank_branch": (
        [
            site(
                "attn",
                [
                    block("attn.q.base.weight", "q", rows(2, 4)),
                    block("attn.q.lora_b.weight", "other", rows(2, 4)),
                    block("attn.q.lora_a.weight", "other", (((0, 3),),) * 2),
                ],
                [block("attn.k.weight", "k", rows(2, 4))],
                [((0,), (0,)), ((1, 2), (0,))],
            )
        ],
        {
            **{"attn.q.base.weight": (8, 6), "attn.q.lora_b.weight": (8, 3)},
            **{"attn.q.lora_a.weight": (3, 6), "attn.k.weight": (8, 6)},
        },
    ),
    "low_rank_branches_of_both": (
        [
            site(
                "attn",
                [
                    block("attn.q.base.weight", "q", rows(2, 4)),
                    block("attn.q.lora_b.weight", "other", rows(2, 4)),
                    block("attn.q.lora_a.weight", "other", (((0, 3),),) * 2),
                ],
                [
                    block("attn.k.base.weight", "k", rows(2, 4)),
                    block("attn.k.lora_b.weight", "other", rows(2, 4)),
                    block("attn.k.lora_a.weight", "other", (((0, 3),),) * 2),
                ],
                [(q, k) for q in ((0,), (1, 2)) for k in ((0,), (1, 2))],
            )
        ],
        {
            f"attn.{p}.{w}.weight": s
            for p in "qk" for w, s in (("base", (8, 6)), ("lora_b", (8, 3)), ("lora_a", (3, 6)))
        },
    ),
    "a_head_without_rows": (
        [
            site(
                "attn",
                [block("attn.q.weight", "q", (*rows(2, 4), ()))],
                [block("attn.k.weight", "k", rows(3, 4))],
                PAIR,
            )
        ],
        {"attn.q.weight": (8, 6), "attn.k.weight": (12, 6)},
    ),
    "overlapping_heads": (
        [
            site(
                "attn",
                [block("attn.q.weight", "q", rows(3, 4, 2, 3))],
                [block("attn.k.weight", "k", rows(3, 4))],
                PAIR,
            ),
            site(
                "attn.again",
                [block("attn.q.weight", "q", rows(3, 4, 0, 5), bias="attn.q.bias")],
                [block("attn.k.weight", "k", rows(3, 4))],
                PAIR,
            ),
        ],
        {"attn.q.weight": (14, 6), "attn.q.bias": (14,), "attn.k.weight": (12, 6)},
    ),
    "heads_of_other_sizes_that_overlap": (
        [
            site(
                "attn",
                [block("attn.q.weight", "q", (((0, 4),), ((2, 9),), ((9, 12),)))],
                [block("attn.k.weight", "k", (((0, 6),), ((5, 8),), ((0, 12),)))],
                PAIR,
            )
        ],
        {"attn.q.weight": (12, 6), "attn.k.weight": (12, 6)},
    ),
    "shared_query_and_key": (
        [site("attn", [block("attn.qk.weight", "q", rows(3, 4))], [block("attn.qk.weight", "k", rows(3, 4))], PAIR)],
        {"attn.qk.weight": (12, 6)},
    ),
    "called_twice": (
        [gqa("shared.attn", 2, 2, 4, calls=2)],
        {"shared.attn.q_proj.weight": (8, 6), "shared.attn.k_proj.weight": (8, 6)},
    ),
    "tiled_heads": (
        [gqa("attn", 6, 3, 4, head_map=(0, 1, 2, 0, 1, 2))],
        {"attn.q_proj.weight": (24, 6), "attn.k_proj.weight": (12, 6)},
    ),
    "odd_head_map": (
        [gqa("attn", 4, 2, 4, head_map=(0, 1, 1, 0))],
        {"attn.q_proj.weight": (16, 6), "attn.k_proj.weight": (8, 6)},
    ),
    "raw_3d": (
        [
            site(
                "attn",
                [block("attn.wq", "q", rows(3, 1), axis=1)],
                [block("attn.wk", "k", rows(3, 1), axis=0)],
                PAIR,
            )
        ],
        {"attn.wq": (6, 3, 4), "attn.wk": (3, 6, 4)},
    ),
    "keys_of_two_layers": (
        [
            site(
                f"layers.{i}.attn",
                [block(f"layers.{i}.attn.q.weight", "q", rows(2, 4))],
                [block(f"layers.{min(i, 5)}.attn.k.weight", "k", rows(2, 4))],
                PAIR,
            )
            for i in range(12)
        ],
        {f"layers.{i}.attn.{p}.weight": (8, 6) for i in range(12) for p in "qk" if p == "q" or i < 6},
    ),
    "pairs_without_a_rule": (
        [
            site(
                f"layers.{i}.attn",
                [block(f"layers.{i}.attn.query_projection.weight", "q", rows(2, 4))],
                [block(f"layers.{i * i % 23}.attn.k.weight", "k", rows(2, 4))],
                PAIR,
            )
            for i in range(23)
        ],
        {
            f"layers.{i}.attn.{p}.weight": (8, 6)
            for i in range(23) for p in ("query_projection", "k") if p != "k" or i in {j * j % 23 for j in range(23)}
        },
    ),
    "long_names": (
        [gqa(LONG, 2, 2, 4, bias=True)],
        {f"{LONG}.{p}_proj.{w}": s for p in "qk" for w, s in (("weight", (8, 6)), ("bias", (8,)))},
    ),
    "names_that_clash": (
        [gqa("at.h.range", 2, 2, 4), gqa("{odd}.x1", 2, 2, 4), gqa("a b.class", 2, 2, 4)],
        {f"{at}.{p}_proj.weight": (8, 6) for at in ("at.h.range", "{odd}.x1", "a b.class") for p in "qk"},
    ),
    "grid_of_names": (
        [
            gqa(f"down.{i}.attn.{j}.blocks.{k}", 2, 2, 4)
            for i, n in ((1, 2), (2, 3)) for j in range(2) for k in range(n)
        ],
        {
            f"down.{i}.attn.{j}.blocks.{k}.{p}_proj.weight": (8, 6)
            for i, n in ((1, 2), (2, 3)) for j in range(2) for k in range(n) for p in "qk"
        },
    ),
}  # fmt: skip


def layout_of(name: str) -> tuple[QKLayout, Shapes]:
    sites, shapes = SITES[name]
    # One weight that is nobody's, to see that the rest of a model is trained as ever.
    return QKLayout(tuple(sites)), {**shapes, "rest.weight": (5, 7)}


# ---- models ----------------------------------------------------------------------------------------------------------


class Bag(nn.Module):
    """Parameters of given names and shapes, and a loss whose gradient is smooth and never small."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            at: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(at, part):
                    at.add_module(part, nn.Module())
                at = getattr(at, part)
            scale = 1 + torch.rand((), generator=generator, dtype=torch.float64)
            value = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
            at.register_parameter(leaf, nn.Parameter(value.to(dtype)))

    def forward(self, x: Tensor) -> Tensor:
        # A constant slope of either sign, and a wave that is never steep enough to turn it.
        terms = [
            ((1 + i + 3 * torch.arange(p.numel()).view_as(p)).sin().sign() * p + (p + x + i).sin() / 2).sum()
            for i, p in enumerate(self.parameters())
        ]
        return torch.stack(terms).sum()


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al., 2023, Alg. 2), as anybody may have written it."""

    def __init__(self, params: Any, lr: float = 1e-4, betas: Any = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(group["lr"] * mean.lerp(p.grad, 1 - group["betas"][0]).sign())
                    mean.lerp_(p.grad, 1 - group["betas"][1])


def batches(n: int, dtype: torch.dtype) -> Iterator[Tensor]:
    for i in range(n):
        yield torch.tensor(0.3 * i, dtype=dtype)


def example_mla() -> tuple[nn.Module, QKLayout]:
    """One layer of the example, and its layout by hand."""
    module = example("mla")
    torch.manual_seed(0)
    at = "blocks.0.attn"
    ukv, dkv, uq, dq = (f"{at}.{part}.weight" for part in ("kv_up", "kv_down", "q_up", "q_down"))
    layout = QKLayout((
        site(
            at,
            [
                block(uq, "uq", rows(6, 32, 0, 48)),
                block(uq, "qr", rows(6, 16, 32, 48)),
                block(dq, "dq", (((0, 96),),) * 6),
            ],
            [
                block(ukv, "uk", rows(6, 32, 0, 64)),
                block(dkv, "dkv", (((0, 64),),) * 6),
                block(dkv, "kr", (((64, 80),),) * 6),
            ],
            [((0, 2), (0, 1)), ((1, 2), (2,))],
            kind="mla",
        ),
    ))  # fmt: skip
    return module.MLATransformer(module.MLAConfig(layers=1)), layout
