"""QK norms out of real models: bitwise what a hand-made model without them computes, and bitwise back again."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import Case, heads, llama, olmo2, our_gpt, qwen3, site
from torch import Tensor, nn

from quack_fx.errors import StripError
from quack_fx.find import find_qk_pairs
from quack_fx.layout import Norm, QKLayout, WeightBlock
from quack_fx.prove import verify_qk_pairs
from quack_fx.qk_norm.strip import strip_qk_norm


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    result = model(**inputs)
    return result[0] if isinstance(result, tuple) else result.logits


@pytest.fixture(params=[qwen3, olmo2])
def normed(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    case: Case = request.param()
    for name, parameter in case.model.named_parameters():
        if name.endswith("_norm.weight"):  # gains of one would hide a norm that is only half gone
            nn.init.uniform_(parameter, 0.5, 1.5)
    return case


def test_stripped_model_is_bitwise_the_one_with_identities(normed: Case) -> None:
    model = normed.model.eval()
    by_hand = copy.deepcopy(model)
    for s in normed.layout.sites:
        attention = by_hand.get_submodule(s.name)
        attention.q_norm, attention.k_norm = nn.Identity(), nn.Identity()
    with_norm = output(model, normed.inputs)
    report = strip_qk_norm(model, normed.layout)
    assert torch.equal(output(model, normed.inputs), output(by_hand, normed.inputs))
    assert not torch.equal(output(model, normed.inputs), with_norm)
    assert list(model.state_dict()) == list(by_hand.state_dict())
    assert len(report.removed) == 4
    assert not report.left


def test_norms_of_tied_stacks_go_together() -> None:
    """Two stacks with the same weights are one site with two calls; the norm modules of both are found and removed."""
    case = qwen3()
    model = case.model.model
    one, two = (model.layers[i].self_attn for i in range(2))
    for part in ("q_proj", "k_proj", "q_norm", "k_norm"):
        two.get_submodule(part).weight = one.get_submodule(part).weight
    layout = find_qk_pairs(model, **case.inputs)
    assert [(site.name, site.calls) for site in layout.sites] == [("layers.0.self_attn", 2)]
    modules = {f"layers.{i}.self_attn.{part}_norm" for i in range(2) for part in "qk"}
    assert {norm.module for norm in layout.sites[0].qk_norm} == modules
    assert verify_qk_pairs(model, layout, **case.inputs).complete
    report = strip_qk_norm(model, layout)
    assert {norm.module for norm in report.removed} == modules
    assert verify_qk_pairs(model, report.layout, **case.inputs).complete


def test_report_and_layout_tell_what_is_gone(normed: Case) -> None:
    keys = set(normed.model.state_dict())
    layout = replace(normed.layout, untouched=("model.layers.0.self_attn.q_norm.weight", "other"))
    report = strip_qk_norm(normed.model, layout)
    gone = [n.weight for s in normed.layout.sites for n in s.qk_norm]
    assert list(report.vanished) == gone
    assert keys - set(normed.model.state_dict()) == set(gone)
    assert all(not s.qk_norm for s in report.layout.sites)
    assert report.layout.untouched == ("other",)
    assert [r.sites for r in report.removed] == [(s.name,) for s in normed.layout.sites for _ in s.qk_norm]
    assert report.to_dict()["vanished"] == gone
    assert verify_qk_pairs(normed.model, report.layout, **normed.inputs).complete


def test_restore_brings_everything_back(normed: Case) -> None:
    model = normed.model.train()
    before, state, parameters = repr(model), copy.deepcopy(model.state_dict()), list(model.parameters())
    report = strip_qk_norm(model, normed.layout)
    model.eval()
    report.restore()
    assert {k: True for k in state} == {k: torch.equal(state[k], v) for k, v in model.state_dict().items()}
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert repr(model) == before
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("build", [llama, our_gpt])
def test_model_without_qk_norm_comes_back_untouched(build: Any) -> None:
    case = build()
    modules = dict(case.model.named_modules())
    report = strip_qk_norm(case.model, case.layout)
    assert (report.removed, report.left, report.notes, report.vanished) == ((), (), (), ())
    assert report.layout == case.layout
    assert all(module is modules[name] for name, module in case.model.named_modules())


# -- norms that have to stay -------------------------------------------------------------------------------------------


class Both(nn.Module):
    """Norm that treats queries and keys in one call."""

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.rms_norm(q, (4,)), nn.functional.rms_norm(k, (4,))


class Attention(nn.Module):
    """Two heads; where its norms are depends on what it is given."""

    def __init__(self, **norms: nn.Module) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        for name, norm in norms.items():
            self.add_module(name, norm)


class Pair(nn.Module):
    """Two attentions."""

    def __init__(self, first: Attention, second: Attention) -> None:
        super().__init__()
        self.first, self.second = first, second


def normed_site(name: str, query: str | None, key: str | None) -> Any:
    norms = (Norm("query", "rms", 4, query), Norm("key", "rms", 4, key))
    blocks = [WeightBlock(f"{name}.{at}.weight", at, 0, heads(2, 4)) for at in ("q", "k")]
    return site(name, *blocks, 4, qk_norm=norms, logit_scale=0.5)


def test_site_with_an_inline_norm_keeps_both() -> None:
    model = Pair(Attention(norm=nn.RMSNorm(4)), Attention(a=nn.RMSNorm(4), b=nn.RMSNorm(4)))
    layout = QKLayout((normed_site("first", "first.norm", None), normed_site("second", "second.a", "second.b")))
    report = strip_qk_norm(model, layout)
    assert [(left.site, left.reason) for left in report.left] == [
        (
            "first",
            "its key norm is no module of its own (it is written inline, or its module serves more than the logits); "
            "take it out of a graph of the model",
        )
    ]
    assert [r.module for r in report.removed] == ["second.a", "second.b"]
    assert isinstance(model.first.norm, nn.RMSNorm)
    assert report.layout.sites[0] == layout.sites[0]


def test_norm_shared_with_a_site_that_keeps_it_stays() -> None:
    norm = nn.RMSNorm(4)
    model = Pair(Attention(norm=norm), Attention(other=nn.RMSNorm(4)))
    layout = QKLayout((normed_site("first", "first.norm", "first.norm"), normed_site("second", "first.norm", None)))
    report = strip_qk_norm(model, layout)
    assert not report.removed
    assert report.left[1].reason == "its norm 'first.norm' also serves 'second', which keeps its norms"
    assert model.first.norm is norm


def test_norm_registered_elsewhere_stays() -> None:
    norm = nn.RMSNorm(4)
    model = Pair(Attention(norm=norm), Attention(final=norm))
    report = strip_qk_norm(model, QKLayout((normed_site("first", "first.norm", "first.norm"),)))
    assert report.left[0].reason == "its query norm 'first.norm' is also registered as 'second.final'"


class Crossed(Both):
    """The same, but queries come back last."""

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(k, q)


def test_norm_of_two_tensors_goes_where_it_gives_both_back() -> None:
    model = Pair(Attention(norm=Both()), Attention(norm=Crossed()))
    sites = tuple(normed_site(name, f"{name}.norm", f"{name}.norm") for name in ("first", "second"))
    report = strip_qk_norm(model, QKLayout(sites))
    q, k = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert all(map(torch.equal, model.first.norm(q, k), (q, k)))
    (left,) = report.left
    assert left.site == "second" and "'second.norm' takes more than one tensor (q, k)" in left.reason


def test_logit_scale_that_relied_on_the_norm_comes_back() -> None:
    unscaled = replace(normed_site("first", "first.norm", "first.norm"), logit_scale=1.0)
    q = torch.randn(2, 4)
    for scale, factor in (("keep", 1.0), ("restore", 0.5**0.5)):  # one module for both sides: each gets the root
        model = Pair(Attention(norm=nn.RMSNorm(4)), Attention())
        report = strip_qk_norm(model, QKLayout((unscaled,)), scale=scale)  # type: ignore[arg-type]
        assert torch.equal(model.first.norm(q), q * factor)
        assert report.layout.sites[0].logit_scale == pytest.approx(factor**2)
        assert [(r.module, r.sites) for r in report.removed] == [("first.norm", ("first",))]
        assert len(report.notes) == (scale == "restore")
    assert "logits were scaled by 1, which relied on the norm" in report.notes[0]


def test_bad_input_leaves_the_model_alone() -> None:
    case = qwen3()
    last = case.layout.sites[-1]
    broken = replace(last, qk_norm=(Norm("query", "rms", 8, "model.q_norm"),))
    with pytest.raises(StripError, match=r"names the norm 'model.q_norm', which Qwen3ForCausalLM does not have; find"):
        strip_qk_norm(case.model, replace(case.layout, sites=(case.layout.sites[0], broken)))
    with pytest.raises(StripError, match=r"gain='hold' is not known; use gain='drop', gain='keep' or"):
        strip_qk_norm(case.model, case.layout, gain="hold")  # type: ignore[arg-type]
    with pytest.raises(StripError, match=r"scale='fix' is not known; use scale='restore' or scale='keep'"):
        strip_qk_norm(case.model, case.layout, scale="fix")  # type: ignore[arg-type]
    with pytest.raises(StripError, match=r"give the layout of the model, quack_fx.find_qk_pairs"):
        strip_qk_norm(case.model)
    assert sum(name.endswith("_norm") for name, _ in case.model.named_modules()) == 4
    assert strip_qk_norm(case.model, case.layout).removed


# -- numbers -----------------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Causal attention whose queries, keys and values are normed; fused or written out."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in "qkv")
        self.q_norm, self.k_norm, self.v_norm = (nn.RMSNorm(8) for _ in "qkv")

    def heads(self, x: Tensor, normed: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (m(x).unflatten(-1, (2, 8)).transpose(1, 2) for m in (self.q, self.k, self.v))
        return (self.q_norm(q), self.k_norm(k), self.v_norm(v)) if normed else (q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        if self.fused:
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        return (q @ k.mT * 8**-0.5 + mask).softmax(-1) @ v


@pytest.mark.parametrize("fused", [False, True])
def test_report_tells_how_far_logits_spread(fused: bool) -> None:
    model, x = Masked(fused), 3 * torch.randn(2, 6, 16)
    logits = [q @ k.mT * 8**-0.5 for q, k, _ in (model.heads(x), model.heads(x, normed=False))]
    seen = torch.ones(6, 6, dtype=torch.bool) if fused else torch.ones(6, 6, dtype=torch.bool).tril()
    report = strip_qk_norm(model, find_qk_pairs(model, x), inputs=(x,))
    (change,) = report.logits
    assert [change.before, change.after] == pytest.approx([one[..., seen].std().item() for one in logits], rel=1e-4)
    assert report.notes == ("'': its values pass a norm, too (rms norm 'v_norm'), which stays",)
    assert isinstance(model.v_norm, nn.RMSNorm)
    assert report.to_dict()["logits"] == [{"site": "", "before": change.before, "after": change.after}]
