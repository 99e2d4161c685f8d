"""Forwards that mind the device, the numbers of buffers, the layout of attention's result, and how large things are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import quack_fx
from quack_fx.errors import CaptureError
from quack_fx.find import Found, find
from quack_fx.graph.capture import capture
from quack_fx.prove import TooLarge, copy, verify_qk_pairs

HEADS, DIM, WIDTH = 2, 16, 32
IDS = torch.tensor([[3, 1, 4, 5, 1, 2, 6, 7]])
QUERY_ROWS = (((0, 16),), ((16, 32),))
KEY_ROWS = (((32, 48),), ((48, 64),))

Run = Callable[["Model", Tensor, Tensor, Tensor, Tensor], Tensor]


class Model(nn.Module):
    """One attention; what is between the projections and the result is up to the test."""

    def __init__(self, run: Run, key_heads: int = HEADS) -> None:
        super().__init__()
        self.run, self.key_heads = run, key_heads
        self.emb = nn.Embedding(50, WIDTH)
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * key_heads) * DIM, bias=False)
        self.out = nn.Linear(WIDTH, 50, bias=False)
        self.slope = nn.Parameter(torch.ones(HEADS))
        self.rnn = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.register_buffer("angles", torch.arange(8.0)[:, None] * torch.ones(DIM // 2), persistent=False)
        self.register_buffer("mask", torch.ones(8, 8, dtype=torch.bool).tril())
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("sizes", torch.tensor([2, 1]))
        self.register_buffer("loops", torch.tensor(1))
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, ids: Tensor) -> Tensor:
        sizes = (HEADS * DIM, self.key_heads * DIM, self.key_heads * DIM)
        parts = self.qkv(self.emb(ids)).split(sizes, -1)
        q, k, v = (x.unflatten(-1, (-1, DIM)).transpose(1, 2) for x in parts)
        return self.out(self.run(self, ids, q, k, v))


def attend(m: Model, _: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (
        F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=m.key_heads < HEADS)
        .transpose(1, 2)
        .flatten(2)
    )


def check(run: Run, device: str, key_heads: int = HEADS) -> Found:
    """Exactly the right rows, a complete proof, and a model that is as it was."""
    with torch.device(device):
        model = Model(run, key_heads)
    before = {n: (id(t), t.is_meta, t._version) for n, t in model.state_dict(keep_vars=True).items()}
    attributes = dict(vars(model))
    found = find(model, [IDS])
    assert found.way == "hybrid" and found.fallback_reason is None
    (site,) = found.layout.sites
    (query,), (key,) = site.query, site.key
    assert (query.param, key.param) == ("qkv.weight", "qkv.weight")
    assert (site.query_heads, site.key_heads, site.head_dim) == (HEADS, key_heads, DIM)
    assert query.heads == QUERY_ROWS and key.heads == KEY_ROWS[:key_heads]
    assert verify_qk_pairs(model, found.layout, IDS).complete
    assert {n: (id(t), t.is_meta, t._version) for n, t in model.state_dict(keep_vars=True).items()} == before
    assert vars(model) == attributes
    return found


def both(runs: dict[str, Run]) -> Any:
    """Each on a model with numbers and on one without."""
    cases = [(device, run) for run in runs.values() for device in ("cpu", "meta")]
    names = [f"{name}-{device}" for name in runs for device in ("cpu", "meta")]
    return pytest.mark.parametrize(("device", "run"), cases, ids=names)


# ---- devices ---------------------------------------------------------------------------------------------------------


def agrees(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    assert ids.device == m.angles.device == q.device == next(m.parameters()).device == torch.zeros(1).device
    assert not q.is_meta and q.is_cpu and not q.is_cuda and q.get_device() == torch.get_device(ids) == -1
    assert q.type() == "torch.FloatTensor" and q.type(torch.float64).dtype == torch.float64
    return attend(m, ids, q, k, v)


def rotates(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    assert ids.device == m.angles.device
    cos, sin = m.angles[: ids.shape[1]].cos(), m.angles[: ids.shape[1]].sin()
    cos, sin = torch.cat((cos, cos), -1).to(q.device), torch.cat((sin, sin), -1).to(q.device)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return attend(m, ids, turned(q), turned(k), v)


def casts(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast(q.device.type, dtype=torch.bfloat16):
        table = torch.eye(DIM, device=q.device) @ torch.eye(DIM)
        return attend(m, ids, q @ table.to(q.dtype), k @ table.to(k.dtype), v.to(table.dtype)).float()


def caches(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cache = torch.zeros(2, *k.shape, device=q.device, dtype=q.dtype)
    cache[0], cache[1] = k, v
    assert cache.device == q.device
    return attend(m, ids, q, cache[0], cache[1])


def recurs(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = attend(m, ids, q, k, v)
    return m.rnn(y, torch.zeros(1, len(y), WIDTH, device=y.device))[0]


@both({"agrees": agrees, "rotates": rotates, "casts": casts, "caches": caches, "recurs": recurs})
def test_a_forward_that_minds_devices(device: str, run: Run) -> None:
    assert not check(run, device).canned


def test_tables_on_the_device_of_an_activation_are_real() -> None:
    def run(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past = torch.arange(8, device=q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=past[:, None] >= past).transpose(1, 2).flatten(2)

    with torch.device("meta"):
        recorded = capture(Model(run), [IDS])
    (table,) = [n for n in recorded.graph_module.graph.nodes if n.target is torch.ops.aten.ge.Tensor]
    assert torch.equal(table.meta["val"], torch.ones(8, 8, dtype=torch.bool).tril())


def test_outside_of_a_recording_tensors_are_where_they_are() -> None:
    seen: list[str] = []

    def run(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(m.angles.device.type)
        return attend(m, ids, q, k, v)

    with torch.device("meta"):
        model = Model(run)
    capture(model, [IDS])
    assert seen == ["cpu"] and model.angles.device.type == "meta" and model.angles.is_meta


def test_weights_without_numbers_meet_numbers_where_everything_is_recorded_for_real() -> None:
    """PyTorch's own checks see the devices that there are: those of the weights on meta, and of what they made."""

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.empty(1, 2, 3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(self.queries, x, x)

    with torch.device("meta"):
        model = Learned()
    graph = capture(model, [torch.randn(1, 2, 3, 4)], real=True).graph_module.graph
    assert not any(t.is_meta for n in graph.nodes for t in [n.meta.get("val")] if isinstance(t, Tensor))


# ---- numbers of buffers ----------------------------------------------------------------------------------------------


def counts(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    for _ in range(m.loops):
        y = attend(m, ids, q, k, v)
    return y * sum(m.sizes.tolist())


def decides(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = torch.zeros(8, 8).masked_fill(~m.mask, float("-inf")) if not m.flag or m.sizes[0] > 1 else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


def lists(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.tensor(data=[m.scale, 1.0], device=q.device)
    return attend(m, ids, q, k, v) * weights.sum() * len(f"{m.scale:.2f} {m.flag} {m.sizes}")


def repeats(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = attend(m, ids, q, k, v)
    return y.repeat_interleave(m.sizes[1:], 0) if not torch.allclose(m.scale, m.scale + 1) else y


@both({"counts": counts, "decides": decides, "lists": lists, "repeats": repeats})
def test_a_forward_that_reads_buffers(device: str, run: Run) -> None:
    assert bool(check(run, device).canned) is (device == "meta")


def test_a_list_of_what_weights_reached_is_made_up() -> None:
    """The list of a tensor that fake numbers were written into, not of the zeros that it had."""

    def run(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = torch.zeros(2)
        first.copy_(q.flatten()[:2])
        assert first.tolist() == [0.5, 0.5]
        return attend(m, ids, q, k, v)

    recorded = capture(Model(run), [IDS])
    assert recorded.way == "hybrid" and recorded.computed


# ---- layout of attention's result ------------------------------------------------------------------------------------


def transposed(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=m.key_heads < HEADS)
    return y.transpose(1, 2).view(*ids.shape, WIDTH)


def masked(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = F.scaled_dot_product_attention(
        query=q, key=k, value=v, attn_mask=m.mask, dropout_p=0.1 * m.training, enable_gqa=m.key_heads < HEADS
    )
    return (y.to(q.dtype) * 2).transpose(1, 2).view(*ids.shape, WIDTH)


def contiguous(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads and positions mixed up, which a contiguous result allows."""
    y = F.scaled_dot_product_attention(q.contiguous(), k, v, enable_gqa=m.key_heads < HEADS)
    return y.view(*ids.shape, WIDTH) + y.transpose(1, 2).view_as(torch.empty(*ids.shape, WIDTH))


@pytest.mark.parametrize("key_heads", [2, 1])
@both({"transposed": transposed, "masked": masked, "contiguous": contiguous})
def test_a_view_of_what_attention_made(device: str, run: Run, key_heads: int) -> None:
    check(run, device, key_heads)


def test_a_view_that_is_wrong_before_any_attention_is_refused() -> None:
    def run(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.view(*ids.shape, WIDTH)

    with pytest.raises(CaptureError, match="view size is not compatible"):
        capture(Model(run), [IDS])


# ---- flex attention --------------------------------------------------------------------------------------------------

compiled = torch.compile(flex_attention)


def documents(ids: Tensor) -> Callable[..., Tensor]:
    docs = (ids.flatten() == 1).cumsum(0)
    return lambda b, h, i, j: (i >= j) & (docs[i] == docs[j])


def flex(make: Callable[[Model, Tensor], BlockMask], attention: Callable[..., Any] = flex_attention) -> Run:
    def run(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Tensor = attention(q, k, v, block_mask=make(m, ids), enable_gqa=m.key_heads < HEADS)
        return y.transpose(1, 2).view(*ids.shape, WIDTH)

    return run


def created(m: Model, ids: Tensor) -> BlockMask:
    return create_block_mask(documents(ids), None, None, 8, 8, device=m.angles.device, BLOCK_SIZE=4)


def compiled_mask(m: Model, ids: Tensor) -> BlockMask:
    return create_block_mask(documents(ids), None, None, 8, 8, device=str(ids.device), _compile=True)


def by_hand(m: Model, ids: Tensor) -> BlockMask:
    blocks = torch.arange(2, dtype=torch.int32, device=m.slope.device)
    seen = blocks[:, None] >= blocks
    places = seen.argsort(dim=-1, descending=True, stable=True).to(torch.int32)[None, None].contiguous()
    counts = seen.sum(-1, dtype=torch.int32)[None, None]
    return BlockMask.from_kv_blocks(counts, places, BLOCK_SIZE=4, mask_mod=documents(ids))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key_heads", [2, 1])
@both({"created": flex(created), "compiled mask": flex(compiled_mask), "kv blocks": flex(by_hand, compiled)})
def test_a_block_mask_made_in_the_forward(device: str, run: Run, key_heads: int) -> None:
    found = check(run, device, key_heads)
    assert not found.canned


@pytest.mark.filterwarnings("ignore")
def test_flex_attention_of_numbers_runs() -> None:
    model = Model(flex(by_hand)).eval()
    graph = capture(model, [IDS], real=True).graph_module.graph
    (output,) = (n for n in graph.nodes if n.op == "output")
    with torch.no_grad():
        assert torch.equal(output.args[0][0].meta["val"], model(IDS))


@pytest.mark.filterwarnings("ignore")
def test_a_learned_score_is_reached() -> None:
    def run(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Any = flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + m.slope[h] * (i - j))
        return y.transpose(1, 2).view(*ids.shape, WIDTH)

    found = check(run, "meta")
    assert "slope" not in found.layout.untouched and "rnn.weight_ih_l0" in found.layout.untouched


# ---- how large -------------------------------------------------------------------------------------------------------


def test_a_large_model_that_fails_is_refused_and_never_made() -> None:
    """52 GB of weights on meta: no machine of a test holds them."""

    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb = nn.Embedding(400_000_000, WIDTH)

        def forward(self, ids: Tensor) -> Tensor:
            return self.emb(ids) * float(self.emb.weight.detach().numpy().max())

    with torch.device("meta"):
        model = Large()
    with pytest.raises(CaptureError, match=r"TypeError: can't convert meta.*48 GiB it is too large") as caught:
        capture(model, [IDS])
    assert "\n" not in str(caught.value)
    with pytest.raises(CaptureError, match="cannot be run for real: at 48 GiB"):
        capture(model, [IDS], real=True)
    with pytest.raises(TooLarge, match="a proof copies at most"):
        copy.random_copy(model, torch.Generator())


def test_tables_that_memory_cannot_hold_are_fake() -> None:
    def run(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = 1 << 18
        ones = torch.ones(n, n, dtype=torch.bool, device=q.device)
        past = torch.arange(n)[:, None] >= torch.arange(n)
        mask = ones.tril()[:8, :8] & past[:8, :8] & (torch.eye(n)[:8, :8] == 0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    with torch.device("meta"):
        model = Model(run)
    found = find(model, [IDS])
    assert found.way == "hybrid" and found.layout.sites[0].query[0].heads == QUERY_ROWS


def test_little_memory_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quack_fx.graph.capture, "available_memory", lambda: 1000)
    monkeypatch.setattr(copy, "available_memory", lambda: 1000)

    def run(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(m, ids, q, k, v) * float(m.slope.detach().numpy().max())

    with pytest.raises(CaptureError, match="too large to run for real"):
        capture(Model(run), [IDS])
    with pytest.raises(TooLarge, match="what memory is left"):
        copy.random_copy(Model(run), torch.Generator())


def test_a_recording_that_takes_what_memory_is_left_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quack_fx.graph.capture.recorder, "available_memory", lambda: 1000)

    def run(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(m, ids, q, k, v) + sum(float(torch.ones(1 << 22).sum()) for _ in range(8))

    with pytest.raises(CaptureError, match=r"takes more than the 0\.1 GiB"):
        capture(Model(run), [IDS])


def test_a_mask_that_is_too_small_is_refused_as_on_real_numbers() -> None:
    def run(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(m, ids, q, k, v)[torch.ones(1, 1, dtype=torch.bool)]

    with pytest.raises(CaptureError, match=r"shape of the mask .* does not match"):
        capture(Model(run), [IDS])


def test_values_of_the_wrong_shape_are_not_written() -> None:
    def run(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = attend(m, ids, q, k, v).clone()
        x[torch.arange(len(x)), None] = x[:, :2].clone()
        return x

    with pytest.raises(CaptureError, match=r"shape mismatch: value tensor of shape .* cannot be broadcast"):
        capture(Model(run), [IDS])


def test_a_buffer_that_memory_cannot_hold_twice_is_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quack_fx.graph.capture.recorder, "available_memory", lambda: 1000)

    def run(m: Model, ids: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(m, ids, q, k, v) * float(m.angles[0, 0]) * m.sizes.tolist()[0]

    recorded = capture(Model(run), [IDS])
    fake = {str(n.target): n.meta["val"].is_meta for n in recorded.graph_module.graph.nodes if n.op == "get_attr"}
    assert fake["angles"] and recorded.computed


def test_the_error_is_that_of_the_attempt_that_came_furthest() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.register_buffer("table", torch.ones(4, device="meta"))

        def forward(self, x: Tensor, numbers: bool) -> Tensor:
            y = self.first(x)
            if numbers:
                y = y * float(y.numpy().max())  # fails on fake weights alone
            if self.second(y).shape[0] != 7:
                raise ValueError("needs 7 rows")
            return y

    for numbers in (False, True):
        with pytest.raises(CaptureError, match="ValueError: needs 7 rows"):
            capture(Late(), [torch.ones(2, 4), numbers])
