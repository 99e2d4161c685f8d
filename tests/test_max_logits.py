"""The largest logits that the watch reads against those that attention itself puts into its softmax."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from per_head import HEADS, Model, batch, loss_of
from per_head import LAYOUT as GROUPED
from per_head import train as train_grouped
from test_metrics import Waits
from tiny_models import Case, heads, site
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint
from toy import Toy

from benchmarks.stability.grid import PRESETS
from benchmarks.stability.models import build
from quack_fx import QuacK, find_qk_pairs
from quack_fx.errors import OptimizerError
from quack_fx.layout import AttentionSite, QKLayout, WeightBlock
from quack_fx.train.logits import MaxLogits
from quack_fx.train.logits.heads import HeadAxes
from quack_fx.train.logits.rows import largest_logits

LOUD = 12.0
"""Weights are made this much larger, so that logits are not all close to zero."""


def loud(case: Case) -> Case:
    """A case whose queries and keys have large weights, without dropout but in training."""
    params = dict(case.model.named_parameters())
    with torch.no_grad():
        for name in {block.param for one in case.layout.sites for _, block in one.blocks()}:
            params[name].mul_(LOUD)
    for module in case.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "attn_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    case.model.train()
    return case


@contextmanager
def softmax_inputs(model: nn.Module, layout: QKLayout) -> Iterator[dict[str, Tensor]]:
    """By the name of each site the largest number of each head that goes into an eager softmax, [batch, heads, ...]."""
    found: dict[str, Tensor] = {}
    at: list[str] = []
    softmax = F.softmax

    def seen(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if at and x.dim() == 4:
            own = x.detach().amax((0, 2, 3))
            found[at[-1]] = torch.maximum(own, found[at[-1]]) if at[-1] in found else own
        return softmax(x, *args, **kwargs)

    names = {one.name for one in layout.sites}
    handles = []
    for name, module in model.named_modules():
        if name in names:
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: at.append(name)))
            handles.append(module.register_forward_hook(lambda *_: at.pop() and None))
    F.softmax = seen
    try:
        yield found
    finally:
        F.softmax = softmax
        for handle in handles:
            handle.remove()


def by_hand(case: Case, **inputs: Any) -> Tensor:
    """The largest logits of all heads, by an eager copy of a model of transformers."""
    model = copy.deepcopy(case.model)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with softmax_inputs(model, case.layout) as found, torch.no_grad():
        model(**{**case.inputs, **inputs})
    return torch.cat([found[one.name] for one in case.layout.sites])


MODELS = [
    (name, attention)
    for name in ("llama", "gpt2", "qwen3", "deepseek_v3", "t5", "bert", "gpt_neox", "whisper", "gemma3")
    for attention in ("eager", "sdpa")
]


@pytest.mark.parametrize(("name", "attention"), MODELS)
def test_they_are_what_goes_into_the_softmax(name: str, attention: str) -> None:
    case = loud(getattr(tiny_models, name)())
    case.model.set_attn_implementation(attention)  # type: ignore[operator]
    watch = MaxLogits(case.model, case.layout)
    for _ in range(2):  # heads are proved in the first pass
        case.model(**case.inputs)
        found = watch.take()
        torch.testing.assert_close(found, by_hand(case), rtol=1e-5, atol=1e-5)
    assert found.std() > 0.02


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_masked_positions_do_not_count(attention: str, side: str) -> None:
    """Masked keys, in a batch with another mask for each sequence."""
    torch.manual_seed(0)
    case = loud(tiny_models.llama(attention))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, slice(0, 3) if side == "left" else slice(4, 7)] = 0
    watch = MaxLogits(case.model, case.layout)
    ids = torch.where(mask == 1, case.inputs["input_ids"], 0)
    with torch.no_grad():
        case.model.model.embed_tokens.weight[0] = 0.02 * torch.randn(32)
    case.model(input_ids=ids, attention_mask=mask, use_cache=False)
    found = watch.take()
    torch.testing.assert_close(found, by_hand(case, input_ids=ids, attention_mask=mask), rtol=1e-5, atol=1e-5)
    if side == "left":  # the others see no token behind them at any rate
        case.model(input_ids=ids, use_cache=False)
        assert not torch.equal(watch.take(), found)


# ---- heads wherever they are -----------------------------------------------------------------------------------------

HEAD = 4


def attention(logits: Callable[[Tensor, Tensor], Tensor], key_heads: int = HEADS) -> tuple[Toy, AttentionSite]:
    """Four query heads of width four; `logits` makes something of x W_q and x W_k that is summed up."""

    def run(self: Toy, x: Tensor) -> Tensor:
        return logits(F.linear(x, self.q), F.linear(x, self.k)).sum()

    torch.manual_seed(0)
    toy = Toy(run, q=torch.randn(HEADS * HEAD, 8), k=torch.randn(key_heads * HEAD, 8))
    query, key = WeightBlock("q", "q", 0, heads(HEADS, HEAD)), WeightBlock("k", "k", 0, heads(key_heads, HEAD))
    return toy, site("", query, key, HEAD)


def split(x: Tensor) -> Tensor:
    """[batch, tokens, heads * width] -> [batch, heads, tokens, width]."""
    return x.unflatten(-1, (-1, HEAD)).transpose(1, 2)


def batch_and_heads(q: Tensor, k: Tensor) -> Tensor:
    q, k = (split(x).flatten(0, 1) for x in (q, k))
    return (q @ k.mT).softmax(-1)


def heads_and_batch(q: Tensor, k: Tensor) -> Tensor:
    q, k = (split(x).transpose(0, 1).flatten(0, 1) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, k, scale=1.0)


def heads_last(q: Tensor, k: Tensor) -> Tensor:
    q, k = (x.unflatten(-1, (-1, HEAD)) for x in (q, k))
    return torch.softmax(torch.einsum("bihd,bjhd->bijh", q, k), 2)


def keys_first(q: Tensor, k: Tensor) -> Tensor:
    return F.softmax(torch.einsum("bhid,bhjd->jhbi", split(q), split(k)), dim=0)


def packed(q: Tensor, k: Tensor) -> Tensor:
    """[heads, tokens of all sequences, width], each sequence for itself by a mask."""
    size = q.shape[1]
    q, k = (x.flatten(0, 1).unflatten(-1, (-1, HEAD)).transpose(0, 1) for x in (q, k))
    own = torch.arange(q.shape[1]) // size
    return F.scaled_dot_product_attention(q, k, k, attn_mask=own[:, None] == own, scale=1.0)


def mapped(q: Tensor, k: Tensor) -> Tensor:
    return torch.stack([(a @ b.mT).softmax(-1) for a, b in zip(split(q), split(k), strict=True)])


def one_query_at_a_time(q: Tensor, k: Tensor) -> Tensor:
    q, k = split(q), split(k)
    return torch.cat([(q[:, :, i : i + 1] @ k.mT).softmax(-1) for i in range(q.shape[2])], 2)


def grouped(q: Tensor, k: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(split(q), split(k), split(k), scale=1.0, enable_gqa=True)


def grouped_by_hand(q: Tensor, k: Tensor) -> Tensor:
    q = split(q).unflatten(1, (2, 2))
    return (q @ split(k).unsqueeze(2).mT).softmax(-1)


def grouped_into_rows(q: Tensor, k: Tensor) -> Tensor:
    """The query heads of a key head lie behind each other where queries do."""
    q = split(q).unflatten(1, (2, 2)).flatten(2, 3)
    return F.scaled_dot_product_attention(q, split(k), split(k), scale=1.0)


def repeated(q: Tensor, k: Tensor) -> Tensor:
    k = split(k).repeat_interleave(2, 1)
    return F.scaled_dot_product_attention(split(q), k, k, scale=1.0)


WAYS = [
    *((way, HEADS) for way in (batch_and_heads, heads_and_batch, heads_last, keys_first, packed)),
    *((way, HEADS) for way in (mapped, one_query_at_a_time)),
    *((way, 2) for way in (grouped, grouped_by_hand, grouped_into_rows, repeated)),
]


@pytest.mark.parametrize(("way", "key_heads"), WAYS)
@pytest.mark.parametrize("size", [(4, 4), (4, 5), (1, 4), (3, 2)])
def test_heads_are_found_on_any_axis(way: Any, key_heads: int, size: tuple[int, int]) -> None:
    """As many sequences or tokens as heads, too."""
    toy, one = attention(way, key_heads)
    watch = MaxLogits(toy, QKLayout((one,)))
    for seed in range(2):
        x = torch.randn(*size, 8, generator=torch.Generator().manual_seed(seed))
        toy(x)
        q, k = split(F.linear(x, toy.q)), split(F.linear(x, toy.k)).repeat_interleave(HEADS // key_heads, 1)
        torch.testing.assert_close(watch.take(), (q @ k.mT).amax((0, 2, 3)).detach())


def test_other_sizes_and_several_passes_are_one_maximum() -> None:
    toy, one = attention(batch_and_heads)
    watch = MaxLogits(toy, QKLayout((one,)))
    inputs = [torch.randn(b, t, 8) for b, t in ((2, 3), (5, 7), (4, 4))]
    expected = []
    for x in inputs:
        toy(x)
        expected.append((split(F.linear(x, toy.q)) @ split(F.linear(x, toy.k)).mT).amax((0, 2, 3)))
    torch.testing.assert_close(watch.take(), torch.stack(expected).amax(0).detach())


def test_softcap_scale_and_bias_are_in_the_logit() -> None:
    bias = torch.randn(HEADS, 5, 5)

    def capped(q: Tensor, k: Tensor) -> Tensor:
        return (2.0 * torch.tanh(split(q) @ split(k).mT / 8) + bias).softmax(-1)

    toy, one = attention(capped)
    watch = MaxLogits(toy, QKLayout((one,)))
    x = torch.randn(2, 5, 8)
    toy(x)
    logits = 2.0 * torch.tanh(split(F.linear(x, toy.q)) @ split(F.linear(x, toy.k)).mT / 8) + bias
    torch.testing.assert_close(watch.take(), logits.amax((0, 2, 3)).detach())


@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention_of_torch(need_weights: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.attn(x, x, x, need_weights=need_weights)[0]
            return out

    model, x = Net(), torch.randn(4, 6, 16)
    watch = MaxLogits(model, find_qk_pairs(model, x))
    model(x)
    q, k, _ = (split(y) for y in F.linear(x, model.attn.in_proj_weight, model.attn.in_proj_bias).chunk(3, -1))
    torch.testing.assert_close(watch.take(), (q @ k.mT / 2).amax((0, 2, 3)).detach())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    model, plain = Model(), Model()
    watch, expected = MaxLogits(model, GROUPED), MaxLogits(plain, GROUPED)
    for step in range(2):
        x = batch(step).requires_grad_()
        for layer in model.layers:
            x = x + checkpoint(layer, x, use_reentrant=reentrant)
        model.head(x).square().mean().backward()
        plain(batch(step))
        assert torch.equal(watch.take(), expected.take())


def test_the_watch_changes_nothing() -> None:
    """Gradients are the same to the bit, and nothing that a proof computes is left in them."""
    model, plain = Model(), Model()
    MaxLogits(model, GROUPED)
    for net in (model, plain):
        loss_of(net, 0).backward()
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad)  # type: ignore[arg-type]


def test_only_passes_that_are_trained_count() -> None:
    model = Model()
    watch = MaxLogits(model, GROUPED)
    model(batch(0))
    with torch.no_grad():
        model(100 * batch(1))
    found = watch.take()
    model(batch(0))
    assert torch.equal(watch.take(), found)


def test_autocast_has_the_dtype_of_the_kernel() -> None:
    model = Model()
    watch = MaxLogits(model, GROUPED)
    seen: list[Tensor] = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(batch(0))
        q = F.linear(seen[0], model.layers[0].q.weight, model.layers[0].q.bias).float()
        k = F.linear(seen[0], model.layers[0].kv.weight).float()[..., : 2 * HEAD]
    logits = split(q) @ split(k).repeat_interleave(2, 1).mT / 2
    torch.testing.assert_close(watch.take()[:HEADS], logits.amax((0, 2, 3)).detach())


def test_copies_are_not_watched() -> None:
    """Of an average of the weights, or a model that is saved whole."""
    model = Model()
    watch = MaxLogits(model, GROUPED)
    model(batch(0))
    copy.deepcopy(model)(100 * batch(1))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    torch.load(file, weights_only=False)(100 * batch(1))
    found = watch.take()
    model(batch(0))
    assert torch.equal(watch.take(), found)


def test_weights_of_zero_are_looked_at_again() -> None:
    """No gradient reaches the queries behind keys of zero, and the keys serve two heads each."""
    toy, one = attention(grouped_by_hand, 2)
    watch = MaxLogits(toy, QKLayout((one,)))
    x = torch.randn(2, 5, 8)
    keys = toy.k.detach().clone()
    for scale in (0.0, 1.0):
        with torch.no_grad():
            toy.k.copy_(scale * keys)
        toy(x)
        if scale == 0:
            with pytest.raises(OptimizerError, match="its forward called no softmax"):
                watch.take()
    q, k = split(F.linear(x, toy.q)), split(F.linear(x, toy.k)).repeat_interleave(2, 1)
    torch.testing.assert_close(watch.take(), (q @ k.mT).amax((0, 2, 3)).detach())


def test_after_detach_nothing_is_seen() -> None:
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.1)
    quack = QuacK(optimizer, model, GROUPED, logits=True)
    quack.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    train_grouped(model, optimizer, steps=range(2))


def test_a_forward_that_was_interrupted_is_not_seen_any_more() -> None:
    """Ctrl-C runs no hooks of torch; what runs afterwards is not taken for the forward that it ended."""
    read = []
    for interrupted in (False, True):
        model = Model()
        watch = MaxLogits(model, GROUPED)
        model(batch(0))
        watch.take()
        if interrupted:
            layer = model.layers[0]
            forward = layer.forward

            def interrupted_forward(x: Tensor, forward: Callable[..., Tensor] = forward) -> Tensor:
                forward(x)
                raise KeyboardInterrupt

            layer.forward = interrupted_forward  # type: ignore[method-assign]
            with pytest.raises(KeyboardInterrupt):
                model(batch(1))
            layer.forward = forward  # type: ignore[method-assign]
            assert torch.overrides._get_current_function_mode_stack()
        model(batch(1))  # the same again
        read.append(watch.take())
        watch.detach()
        assert not torch.overrides._get_current_function_mode_stack()
    assert torch.equal(*read)


def test_a_first_pass_that_is_not_finite_is_refused_and_forgotten() -> None:
    model = Model()
    watch = MaxLogits(model, GROUPED)
    model(batch(0) * torch.nan)
    with pytest.raises(OptimizerError, match="cannot be read: they are not finite in the first forward pass"):
        watch.take()
    model(batch(0))
    assert watch.take().isfinite().all()


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_have_them_of_the_last_step_by_one_copy() -> None:
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.1)
    quack = QuacK(optimizer, model, GROUPED, logits=True)
    plain = quack.metrics()
    assert not any("max_attn_logit" in name for name in plain)
    other = Model()
    watch = MaxLogits(other, GROUPED)
    other(batch(0))
    expected = watch.take().tolist()
    train_grouped(model, optimizer, steps=range(1))
    with Waits() as waits:
        found = quack.metrics(heads=True)
    assert waits.calls == ["tolist"]
    at = "attention/layers.1/max_attn_logit"
    assert [found[f"{at}/head_{h}"] for h in range(HEADS)] == pytest.approx(expected[HEADS:])
    assert found[f"{at}/max"] == max(expected[HEADS:]) and found[f"{at}/min"] == min(expected[HEADS:])
    assert set(plain) < set(found)


def test_steps_after_the_first_do_not_wait() -> None:
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.1)
    QuacK(optimizer, model, GROUPED, method="qk-clip", threshold=0.01)
    with Waits() as first:
        train_grouped(model, optimizer, steps=range(1))
    assert first.calls  # the proof
    with Waits() as later:
        train_grouped(model, optimizer, steps=range(1, 4))
    assert later.calls == []


# ---- refusals --------------------------------------------------------------------------------------------------------


def mixed(q: Tensor, k: Tensor) -> Tensor:
    """Talking heads: a logit is of all heads."""
    return torch.einsum("bhij,gh->bgij", split(q) @ split(k).mT, torch.randn(HEADS, HEADS)).softmax(-1)


def no_softmax(q: Tensor, k: Tensor) -> Tensor:
    return (split(q) @ split(k).mT).exp()


def with_sink(q: Tensor, k: Tensor) -> Tensor:
    logits = split(q) @ split(k).mT
    return torch.cat([logits, torch.full_like(logits[..., :1], 3.0)], -1).softmax(-1)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (mixed, "its forward called no softmax and no scaled_dot_product_attention of these heads"),
        (no_softmax, "its forward called no softmax and no scaled_dot_product_attention of these heads"),
        (with_sink, "a column of its logits is no product of queries and keys, but an attention sink"),
    ],
)
def test_what_cannot_be_read_is_refused_before_the_step(way: Any, message: str) -> None:
    toy, one = attention(way)
    optimizer = SGD(toy.parameters(), lr=0.1)
    QuacK(optimizer, toy, QKLayout((one,)), method="qk-clip")
    before = toy.q.detach().clone()
    toy(torch.randn(2, 5, 8)).backward()
    with pytest.raises(OptimizerError, match=message):
        optimizer.step()
    assert torch.equal(toy.q, before)


def test_compiled_models_are_refused() -> None:
    model = Model()
    with pytest.raises(OptimizerError, match=r"cannot be read: 'OptimizedModule' is compiled"):
        MaxLogits(torch.compile(model), GROUPED)  # type: ignore[arg-type]
    model.layers[1].compile()
    with pytest.raises(OptimizerError, match=r"cannot be read: 'layers.1' is compiled"):
        QuacK(SGD(model.parameters()), model, GROUPED, logits=True)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ["read", "hidden"])
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace", "ignore:The .grad attribute")
def test_a_model_that_is_compiled_afterwards_is_read_right_or_refused(name: str, in_place: bool) -> None:
    """Where Dynamo leaves the attention to Python its logits are seen; none of our code is compiled."""
    read = []
    for compiles in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        if name == "read":
            model, inputs = Model(), (batch(0),)
        else:
            model, inputs = build("mha", PRESETS["toy"].shape, 0), (torch.arange(8).view(1, 8),) * 2
        optimizer = SGD(model.parameters(), lr=0.1)
        quack = QuacK(optimizer, model, find_qk_pairs(model, *inputs), logits=True)
        if compiles and in_place:
            model.compile(backend="eager")
        forward = torch.compile(model, backend="eager") if compiles and not in_place else model
        output = forward(*inputs)
        (output if name == "read" else output[1]).sum().backward()
        if compiles and name == "hidden":
            with pytest.raises(OptimizerError, match=r"cannot be read: its forward called no softmax"):
                optimizer.step()
            return
        optimizer.step()
        read.append({key: value for key, value in quack.metrics().items() if "max_attn_logit" in key})
    assert read[0] == read[1] and read[0]


def test_data_parallel_is_refused() -> None:
    with pytest.raises(OptimizerError, match=r"cannot be read in nn.DataParallel; use DistributedDataParallel"):
        MaxLogits(nn.DataParallel(Model()), GROUPED)


def test_a_model_that_did_not_run_is_refused() -> None:
    model = Model()
    optimizer = SGD(model.parameters(), lr=0.1)
    QuacK(optimizer, model, GROUPED, logits=True)
    with pytest.raises(OptimizerError, match="no attention ran since the last step"):
        optimizer.step()
    model.layers[0].forward(batch(0))
    with pytest.raises(OptimizerError, match="call the model itself"):
        optimizer.step()


# ---- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float", "keys"])
def test_pieces_of_a_fused_attention(causal: bool, mask: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if causal and mask:
        pytest.skip("torch takes one of them")
    q, k = torch.randn(2, 4, 7, 3, dtype=torch.double), torch.randn(2, 2, 9, 3, dtype=torch.double)
    masks = {
        "bool": torch.rand(2, 1, 7, 9) > 0.4,
        "float": torch.randn(4, 7, 9, dtype=torch.double),
        "keys": torch.rand(2, 1, 1, 9) > 0.4,
    }
    given = masks.get(mask or "")
    logits = q @ k.repeat_interleave(2, 1).mT * 0.3
    if causal:
        logits = logits.masked_fill(torch.ones(7, 9).triu(1) > 0, -torch.inf)
    elif mask == "float":
        logits = logits + given  # type: ignore[operator]
    elif given is not None:
        logits = logits.masked_fill(~given, -torch.inf)
    for cells in (1, 200, 1 << 20):
        monkeypatch.setattr("quack_fx.train.logits.rows._CELLS", cells)
        torch.testing.assert_close(largest_logits(q, k, given, causal, 0.3, True), logits.amax(-1))


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((2, 4, 5), HeadAxes(((1, "whole", 4),))),
        ((8, 5), HeadAxes(((0, "inner", 4),))),
        ((8, 5), HeadAxes(((0, "outer", 4),))),
        ((2, 2, 3, 2), HeadAxes(((1, "whole", 2), (3, "whole", 2)))),
        ((6, 10), HeadAxes(((1, "inner", 2), (0, "outer", 2)))),
        ((3, 5), HeadAxes(())),
    ],
)
def test_spread_is_the_way_back_from_first(shape: tuple[int, ...], axes: HeadAxes) -> None:
    numbers = torch.randn(axes.first(torch.zeros(shape)).shape[0])
    spread = axes.first(axes.spread(numbers, shape))
    assert axes.fit(shape) and torch.equal(spread, numbers.unsqueeze(-1).expand_as(spread))
