"""The proof by gradients: true layouts pass, each kind of false one is caught, and what cannot be told is said so."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import absorbed_together
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CASES, EXAMPLES, IDS, Case, gpt2, heads, hugging_face, llama, our_gpt, site
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from quack_fx.cli.app import main
from quack_fx.errors import LayoutError, VerifyError
from quack_fx.find import find_qk_pairs
from quack_fx.layout import AttentionSite, Norm, QKLayout, WeightBlock
from quack_fx.prove import VerifyReport, carried_over, verify_qk_pairs
from quack_fx.prove.norms import sums_to_zero


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


# -- false layouts (each mutation of each kind of attention is in test_mutations.py) --------------------------------


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


# -- what autograd does not see, or not head by head -----------------------------------------------------------------


class Attention(nn.Module):
    """Two heads over 8 features; `attend` makes the result of queries, keys and values of [batch, heads, tokens, 4]."""

    def __init__(self, attend: Callable[..., torch.Tensor], between: Callable[..., nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.q_norm, self.k_norm = between(), between()
        self.attend = attend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = (self.q_norm(self.q(x)), self.k_norm(self.k(x)), self.v(x))
        return self.attend(*(part.unflatten(-1, (2, 4)).transpose(1, 2) for part in parts))


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT / 2).softmax(-1) @ v


class GroupNorm(nn.Module):
    """One group a head, position by position."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.group_norm(x.reshape(-1, 8), 2).view_as(x)


class Hidden(torch.autograd.Function):
    """Attention whose backward is its own affair."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return plain(q, k, v)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise NotImplementedError


@torch.library.custom_op("quack_fx_tests::attention", mutates_args=())
def python_op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return plain(q, k, v)


kernels = torch.library.Library("quack_fx_kernels", "DEF")
kernels.define("attention(Tensor q, Tensor k, Tensor v) -> Tensor")
kernels.impl("attention", plain, "CPU")


def without_gradient(*parts: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return plain(*parts)


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, q.shape[2], k.shape[2], device="cpu")
    return flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + h * (i - j), block_mask=mask)


def norms_over(width: int, kind: Any) -> tuple[Norm, ...]:
    return (Norm("query", kind, width, "q_norm"), Norm("key", kind, width, "k_norm"))


def hidden_site(norms: tuple[Norm, ...] = ()) -> AttentionSite:
    query, key = WeightBlock("q.weight", "q", 0, heads(2, 4)), WeightBlock("k.weight", "k", 0, heads(2, 4))
    return site("", query, key, 4, qk_norm=norms)


HIDDEN = {
    "without gradient": (Attention(without_gradient), ()),
    "an autograd function": (Attention(Hidden.apply), ()),
    "an op written in Python": (Attention(lambda *parts: python_op(*parts)), ()),
    "flex attention": (Attention(flex), ()),
    "detached": (Attention(lambda q, k, v: plain(q.detach(), k.detach(), v)), ()),
    "layer norm over all heads": (Attention(plain, lambda: nn.LayerNorm(8)), norms_over(8, "layer")),
    "RMS norm over all heads": (Attention(plain, lambda: nn.RMSNorm(8)), norms_over(8, "rms")),
    "group norm of each head": (Attention(plain, GroupNorm), norms_over(4, "layer")),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_autograd_does_not_see_is_proved_and_refuted(name: str) -> None:
    model, norms = HIDDEN[name]
    true, x = hidden_site(norms), torch.randn(2, 5, 8)
    assert verify_qk_pairs(model, QKLayout((true,)), x).complete
    first = replace(true.query[0], heads=true.query[0].heads[::-1])
    with pytest.raises(VerifyError, match=r"head 0, query side: 'q.weight' .* rows 0-3, the layout claims rows 4-7"):
        verify_qk_pairs(model, QKLayout((replace(true, query=(first,)),)), x)
    with pytest.raises(VerifyError, match=r"an attention runs in module ''"):
        verify_qk_pairs(model, QKLayout(()), x)


def test_bias_added_by_an_op_of_its_own() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.b = (
                nn.Linear(8, 8, bias=False),
                nn.Linear(8, 8, bias=False),
                nn.Parameter(torch.ones(8)),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (self.q(x) + self.b, self.k(x)))
            return plain(q, k, k)

    silent, x = hidden_site(), torch.randn(2, 5, 8)
    with pytest.raises(VerifyError, match="'b' is added to a claimed product, but no block names it"):
        verify_qk_pairs(Biased(), QKLayout((silent,)), x)
    told = replace(silent, query=(replace(silent.query[0], bias="b"),))
    assert verify_qk_pairs(Biased(), QKLayout((told,)), x).complete


def test_two_attentions_of_one_module() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            (q, q2), (k, k2) = (y.unflatten(-1, (2, 4)).unbind(-2) for y in (self.q(x), self.k(x)))
            return plain(q, k, x) - plain(q2, k2, x)

    def one(start: int) -> AttentionSite:
        query, key = (WeightBlock(f"{s}.weight", s, 0, heads(1, 4, start)) for s in ("q", "k"))  # type: ignore[arg-type]
        return site("", query, key, 4)

    model, x = Two(), torch.randn(2, 5, 8)
    assert verify_qk_pairs(model, QKLayout((one(0), one(4))), x).complete
    for false in [(one(0),), (one(0), one(2)), (one(0), replace(one(4), key=one(0).key)), (one(0), one(0))]:
        with pytest.raises(VerifyError, match="site ''"):
            verify_qk_pairs(model, QKLayout(false), x)


def test_logits_that_nothing_reads_are_none() -> None:
    class Leftover(Attention):
        """Some model files compute weights that they never use."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k = (y.unflatten(-1, (2, 4)) for y in (self.q(x), self.k(x)))
            (q @ k.mT).softmax(-1).view(-1)
            return super().forward(x)

    assert verify_qk_pairs(Leftover(plain), QKLayout((hidden_site(),)), torch.randn(2, 5, 8)).complete


# -- what cannot be told, and bad input --------------------------------------------------------------------------------


def test_what_a_kernel_hides_is_not_proved() -> None:
    report = verify_qk_pairs(
        Attention(torch.ops.quack_fx_kernels.attention), QKLayout((hidden_site(),)), torch.randn(2, 5, 8)
    )
    assert not report.proved and not report.complete
    assert "made inside the op quack_fx_kernels.attention.default" in report.not_proved[0].reason


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


def moved(block: WeightBlock, by: int) -> WeightBlock:
    """The block with every range of every head moved."""
    return replace(block, heads=tuple(tuple((a + by, b + by) for a, b in ranges) for ranges in block.heads))


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


class Normed(nn.Module):
    """Two layers with one weight, each with gains of its own: in modules, or inline; logits summed by hand, or not."""

    def __init__(self, inline: bool = False, by_hand: bool = False) -> None:
        super().__init__()
        self.inline, self.by_hand = inline, by_hand
        self.qkv = nn.Linear(8, 24, bias=False)
        self.layers = nn.ModuleList(nn.ModuleList(nn.RMSNorm(8) for _ in "qk") for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norms in self.layers:
            q, k, v = self.qkv(x).chunk(3, -1)
            pairs = zip(norms, (q, k), strict=True)
            q, k = (nn.functional.rms_norm(y, (8,), n.weight) if self.inline else n(y) for n, y in pairs)
            logits = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) if self.by_hand else q @ k.mT
            x = x + logits.softmax(-1) @ v
        return x


def test_absorbed_attention_whose_up_projection_is_one_weight_is_proved() -> None:
    model, inputs, expected = absorbed_together()
    assert verify_qk_pairs(model, QKLayout((expected,)), *inputs).complete
    assert verify_qk_pairs(model, find_qk_pairs(model, *inputs), *inputs).complete
    query = (replace(expected.query[0], heads=expected.query[0].heads[::-1]), *expected.query[1:])
    with pytest.raises(VerifyError, match=r"query side: 'q.weight' .* rows 0-5"):
        verify_qk_pairs(model, QKLayout((replace(expected, query=query),)), *inputs)


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("inline", [False, True])
def test_norms_of_layers_with_tied_weights(inline: bool, by_hand: bool) -> None:
    """Found by random models 1006625 and 515770957: a call need not read the gains of the others."""
    model, x = Normed(inline, by_hand), torch.randn(2, 5, 8)
    layout = find_qk_pairs(model, x)
    (found,) = layout.sites
    modules = {None} if inline else {f"layers.{i}.{j}" for i in "01" for j in "01"}
    assert found.calls == 2 and {n.module for n in found.qk_norm} == modules and len(found.qk_norm) == 4
    report = verify_qk_pairs(model, layout, x)
    if inline:  # no module tells which call a gain belongs to
        (left,) = report.not_proved
        assert "is said to scale its query side, which it does not in each of its calls" in left.reason
        return
    assert report.complete
    own, other = (n for n in found.qk_norm if n.side == "query")
    for wrong in (replace(own, side="key"), replace(own, weight=other.weight)):
        norms = tuple(wrong if n == own else n for n in found.qk_norm)
        with pytest.raises(VerifyError):
            verify_qk_pairs(model, QKLayout((replace(found, qk_norm=norms),)), x)


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


# -- on the command line -----------------------------------------------------------------------------------------------


def test_inspect_ticks_every_attention(capsys: pytest.CaptureFixture[str]) -> None:
    target = str(EXAMPLES / "mla.py")
    assert main(["inspect", target, "--verify"]) == 0
    out = capsys.readouterr().out
    assert "4 of 4 proved by gradients on a copy with random weights" in out
    assert re.search(r"^✓ +blocks.\{0..3\}.attn", out, re.MULTILINE)


def test_inspect_says_why_there_is_no_tick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    large = ["--build", "GPT(GPTConfig(width=6144, heads=48, layers=2))"]
    assert main(["inspect", str(EXAMPLES / "gpt.py"), *large, "--verify", "--html", str(page)]) == 1
    told = capsys.readouterr()
    assert re.search(r"^- +blocks.\{0..1\}.attn", told.out, re.MULTILINE)
    assert "a proof copies at most" in told.out and "a proof copies at most" in page.read_text()
    assert "0 of 2 proved" in told.err


# -- models too large to copy ------------------------------------------------------------------------------------------


def large_and_small(**large: Any) -> tuple[QKLayout, QKLayout, VerifyReport]:
    """Layouts of a Llama of 70 billion parameters and of a small one, and the proof of the small one."""
    sizes = {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 16, "intermediate_size": 28672}
    with torch.device("meta"):
        big = hugging_face("llama", [], **{**sizes, "num_hidden_layers": 20, **large})
    small = hugging_face("llama", [], num_key_value_heads=2)
    found = find_qk_pairs(small.model, **small.inputs)
    return find_qk_pairs(big.model, **big.inputs), found, verify_qk_pairs(small.model, found, **small.inputs)


def test_proof_on_a_small_copy_carries_over() -> None:
    layout, small, proof = large_and_small()
    report = carried_over(layout, small, proof)
    assert report.complete and len(report.proved) == 20
    assert {p.heads for p in report.proved} == {64}


@pytest.mark.parametrize("large", [{"attention_bias": True}, {"num_key_value_heads": 1}, {"num_key_value_heads": 64}])
def test_proof_of_another_form_does_not_carry_over(large: dict[str, Any]) -> None:
    report = carried_over(*large_and_small(**large))
    assert not report.proved and len(report.not_proved) == 20
    assert "no attention of this form" in report.not_proved[0].reason


def test_wrong_rows_do_not_carry_over() -> None:
    layout, small, proof = large_and_small()
    first = layout.sites[0]
    far = replace(first.key[0], heads=tuple(((2 * a, 2 * a + b - a),) for ((a, b),) in first.key[0].heads))
    report = carried_over(QKLayout((replace(first, key=(far,)), *layout.sites[1:])), small, proof)
    assert [entry.name for entry in report.not_proved] == [first.name]


class TwiceInTraining(nn.Module):
    """A forward that looks at its input once more while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2 if self.training else 1):
            x = self.drop(x)
            x = x + self.attend(x, x, x, need_weights=False)[0]
        return x


def test_an_attention_that_runs_more_often_in_training_is_proved_there() -> None:
    model, x = TwiceInTraining(), torch.randn(2, 5, 8)
    layout = find_qk_pairs(model, x)
    assert layout.sites[0].calls == 2
    assert verify_qk_pairs(model, layout, x).complete
    wrong = replace(layout, sites=(replace(layout.sites[0], calls=3),))
    with pytest.raises(VerifyError, match="runs 1 times in a forward pass, the layout claims 3"):
        verify_qk_pairs(model, wrong, x)
    with pytest.raises(VerifyError, match="runs 1 times in a forward pass, the layout claims 2"):
        verify_qk_pairs(model.eval(), layout, x)


@pytest.mark.parametrize("less_mean", [True, False])
def test_features_that_are_nearly_equal_do_not_hide_that_a_norm_takes_the_mean(less_mean: bool) -> None:
    """In one row of ten, rounding is as large as what is left of the features without their mean."""
    norm = torch.nn.functional.layer_norm if less_mean else torch.nn.functional.rms_norm
    hidden = 0
    for seed in range(20):
        torch.manual_seed(seed)
        x = torch.randn(2, 5, 3) * 3000
        x[1, 2] = 1700 + torch.randn(3) * 0.1
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(norm(x, (3,)), x, torch.randn(2, 5, 3))
        assert sums_to_zero(gradient, (2, 5, 1)) == less_mean
        hidden += less_mean and not sums_to_zero(gradient, ())
    assert not less_mean or hidden > 5
