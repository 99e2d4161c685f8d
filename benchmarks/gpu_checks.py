"""Correctness checks that precede timing on a GPU.

In: a device. Out: one line for each check, and whether it passed.

    optimizers   200 compiled updates equal the eager optimizer with QuacK's hooks, on given gradients: each optimizer
                 with weight decay, a schedule and clipping, and with fp32 master weights
    steps        50 whole steps are equal too; 100 different learning rates cause no recompilation
    waiting      from the third step on, none of these waits for the device (torch.cuda.set_sync_debug_mode("error"))
    gates        non-finite gradients change nothing, with and without a GradScaler
    CUDA graphs  mode="reduce-overhead" captures the loss and gives the same results
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer
from torch.utils._pytree import tree_leaves

from benchmarks.step import loss_of
from quack_fx.bench.measure import synchronize
from quack_fx.errors import first_line
from quack_fx.find import find_qk_pairs
from quack_fx.layout import QKLayout
from quack_fx.train.hooks import QuacK
from quack_fx.train.step import compile_train_step

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from gpt import GPT, GPTConfig

STEPS, CLIP, LR = 200, 0.5, 1e-3
VOCABULARY, CONTEXT = 64, 32

Check = tuple[str, bool]
"""The result of a check, and whether it passed."""

Batches = Sequence[tuple[Tensor, ...]]


def checks(device: torch.device) -> Iterator[Check]:
    """Run all checks lazily; a check that raises has failed."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=VOCABULARY, context=CONTEXT, layers=3, heads=4, width=64, bias=False)).to(device)
    batches = [tuple(torch.randint(0, VOCABULARY, (2, 4, CONTEXT), device=device)) for _ in range(50)]
    layout = find_qk_pairs(model, *batches[0])
    tried: list[Callable[..., Check]] = [partial(_optimizer, name) for name in _OPTIMIZERS]
    tried += [_masters, _steps, _learning_rates, _gate, _scaler]
    tried += [_cuda_graphs] if device.type == "cuda" else []
    for check in tried:
        try:
            yield check(model, layout, batches)
        except Exception as error:  # any error is listed, and the other checks still run
            yield f"{_name(check)}: {first_line(error)}", False


def _name(check: Callable[..., Check]) -> str:
    return check.args[0] if isinstance(check, partial) else check.__name__.strip("_").replace("_", " ")


# ---- updates on given gradients --------------------------------------------------------------------------------------


class Lion(Optimizer):
    """Lion as in its paper: the sign of an interpolation, decoupled weight decay."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            interpolation, decay = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * momentum.lerp(p.grad, 1 - interpolation).sign())
                momentum.lerp_(p.grad, 1 - decay)


def _muon_and_adamw(params: Sequence[Tensor]) -> list[Optimizer]:
    matrices, rest = [[p for p in params if (p.ndim == 2) is two] for two in (True, False)]
    return [Muon(matrices, lr=LR, weight_decay=0.1), AdamW(rest, lr=LR, fused=rest[0].is_cuda)]


_OPTIMIZERS: dict[str, tuple[Callable[..., Any], float | None]] = {
    "AdamW": (partial(AdamW, lr=LR, weight_decay=0.1, fused=True), CLIP),
    "AdamW, amsgrad, capturable": (
        partial(AdamW, lr=LR, weight_decay=0.1, amsgrad=True, capturable=torch.cuda.is_available()),
        CLIP,
    ),
    "Adam": (partial(Adam, lr=LR, weight_decay=1e-3, fused=True), CLIP),
    "SGD": (partial(SGD, lr=LR, momentum=0.9, nesterov=True, weight_decay=0.01), CLIP),
    "Lion": (partial(Lion, lr=LR, weight_decay=0.1), CLIP),
    # Unclipped: Muon rounds to bfloat16, which amplifies rounding of the clipping factor.
    "Muon with AdamW": (_muon_and_adamw, None),
}
"""For each, a constructor from a list of parameters, and the maximum gradient norm."""


def _optimizer(name: str, model: nn.Module, layout: QKLayout, batches: Batches) -> Check:
    make, clip = _OPTIMIZERS[name]
    eager, compiled = copy.deepcopy(model), copy.deepcopy(model)
    if name == "Lion":  # in fp32, rounding can flip the sign of values near zero
        eager, compiled = eager.double(), compiled.double()
    references, own = (_listed(make([*each.parameters()])) for each in (eager, compiled))
    QuacK(references[0], eager, layout, tau=0.5)
    step = compile_train_step(compiled, own, layout=layout, tau=0.5, clip_grad_norm=clip)
    for i in range(STEPS):
        for each in (*references, *own):
            each.param_groups[0]["lr"] = LR / (1 + i / 20)
        _give(eager, i)
        _give(compiled, i)
        if clip is not None:
            nn.utils.clip_grad_norm_(eager.parameters(), clip)
        for each in references:
            each.step()
        with _no_waiting(i):
            step.update()
    error = _error(eager.parameters(), compiled.parameters())
    return f"{name}: {error:.1e} off after {STEPS} updates", error < 1e-5


def _masters(model: nn.Module, layout: QKLayout, batches: Batches) -> Check:
    half = copy.deepcopy(model).bfloat16()
    exact = copy.deepcopy(half).float()
    reference, own = (AdamW(each.parameters(), lr=LR, weight_decay=0.1, fused=True) for each in (exact, half))
    QuacK(reference, exact, layout)
    step = compile_train_step(half, own, layout=layout, clip_grad_norm=CLIP, master_weights=True)
    for i in range(STEPS):
        _give(half, i)
        for p, q in zip(half.parameters(), exact.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.float()
        nn.utils.clip_grad_norm_(exact.parameters(), CLIP)
        reference.step()
        with _no_waiting(i):
            step.update()
    error = _error(exact.parameters(), (own.state[p]["master_param"] for p in half.parameters()))
    rounded = all(torch.equal(p, own.state[p]["master_param"].bfloat16()) for p in half.parameters())
    return f"AdamW on fp32 masters of bfloat16: {error:.1e} off after {STEPS} updates", error < 1e-5 and rounded


def _give(model: nn.Module, step: int) -> None:
    """Set gradients that do not depend on the weights, so rounding of the weights does not change them."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, device=p.device).to(p.dtype)


# ---- whole steps -----------------------------------------------------------------------------------------------------


def _steps(model: nn.Module, layout: QKLayout, batches: Batches) -> Check:
    eager, compiled = copy.deepcopy(model), copy.deepcopy(model)
    reference, own = (AdamW(each.parameters(), lr=LR, weight_decay=0.1, fused=True) for each in (eager, compiled))
    QuacK(reference, eager, layout)
    step = compile_train_step(compiled, own, loss_of, layout=layout, clip_grad_norm=CLIP, skip_nonfinite=True)
    for i, batch in enumerate(batches):
        loss_of(eager, *batch).backward()
        nn.utils.clip_grad_norm_(eager.parameters(), CLIP)
        reference.step()
        reference.zero_grad()
        with _no_waiting(i):
            step(*batch)
    error = _error(eager.parameters(), compiled.parameters())
    return f"whole steps: {error:.1e} off after {len(batches)}", error < 1e-4


def _learning_rates(model: nn.Module, layout: QKLayout, batches: Batches) -> Check:
    model = copy.deepcopy(model)
    own = AdamW(model.parameters(), lr=LR, fused=True)
    step = compile_train_step(model, own, loss_of, layout=layout)
    for batch in batches[:2]:
        step(*batch)
    graphs = _graphs()
    for i, batch in enumerate([*batches, *batches]):
        own.param_groups[0]["lr"] = LR / (1 + i)
        step(*batch)
    anew = _graphs() - graphs
    return f"{2 * len(batches)} learning rates: {anew} graphs compiled anew", anew == 0


def _gate(model: nn.Module, layout: QKLayout, batches: Batches) -> Check:
    model = copy.deepcopy(model)
    own = AdamW(model.parameters(), lr=LR, fused=True)
    step = compile_train_step(model, own, loss_of, layout=layout, clip_grad_norm=CLIP, skip_nonfinite=True)
    for batch in batches[:3]:
        step(*batch)
    before = _everything(model, own)
    step.forward_backward(*batches[3])
    next(model.parameters()).grad[0] = torch.inf  # type: ignore[index]
    with _no_waiting():
        step.update()
    same = _equal(before, _everything(model, own))
    step(*batches[4])
    return "an infinite gradient changes nothing", same and not _equal(before, _everything(model, own))


def _scaler(model: nn.Module, layout: QKLayout, batches: Batches) -> Check:
    model = copy.deepcopy(model)
    device = next(model.parameters()).device
    own = AdamW(model.parameters(), lr=LR, fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40, backoff_factor=2.0**-10)
    half = torch.float16 if device.type == "cuda" else torch.bfloat16

    def loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=half):
            return loss_of(model, tokens, targets)

    step = compile_train_step(model, own, loss, layout=layout, clip_grad_norm=CLIP, scaler=scaler)
    before = _everything(model, own)
    step(*batches[0])
    overflowed = scaler.get_scale() < 2.0**40
    skipped = not overflowed or _equal(before[:1], _everything(model, own)[:1])
    for batch in batches[1:10]:
        with _no_waiting(0 if batch is batches[1] else 2):
            step(*batch)
    went_on = not _equal(before[:1], _everything(model, own)[:1])
    what = "skipped" if overflowed else "none was seen"
    return f"GradScaler: overflow {what}, then trained", skipped and went_on and (overflowed or half != torch.float16)


def _cuda_graphs(model: nn.Module, layout: QKLayout, batches: Batches) -> Check:
    graphed, plain = copy.deepcopy(model), copy.deepcopy(model)
    losses: list[list[float]] = []
    torch._dynamo.utils.counters["inductor"].clear()
    for each, mode in ((graphed, "reduce-overhead"), (plain, None)):
        own = AdamW(each.parameters(), lr=LR, fused=True)
        step = compile_train_step(each, own, loss_of, layout=layout, clip_grad_norm=CLIP, mode=mode)
        losses.append([])
        for i, batch in enumerate(batches[:20]):
            own.param_groups[0]["lr"] = LR / (1 + i)
            losses[-1].append(float(step(*batch)))
    skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    error = _error(plain.parameters(), graphed.parameters())
    told = f"CUDA graphs: {error:.1e} off after 20 steps, {skips} calls not captured"
    return told, error < 1e-4 and skips == 0 and losses[0][0] > losses[0][-1]


# ---- common ----------------------------------------------------------------------------------------------------------


@contextmanager
def _no_waiting(step: int = 2) -> Iterator[None]:
    """Context in which waiting for the device raises, from the third step on; the first two may compile."""
    if step < 2 or not torch.cuda.is_available():
        yield
        return
    synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _listed(made: Optimizer | list[Optimizer]) -> list[Optimizer]:
    return made if isinstance(made, list) else [made]


def _error(expected: Any, found: Any) -> float:
    """The largest relative difference of a weight; NaN if a weight is NaN."""
    pairs = [(a.detach(), b.detach()) for a, b in zip(expected, found, strict=True)]
    return float(torch.stack([(a - b).norm() / a.norm() for a, b in pairs]).max())


def _everything(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    return copy.deepcopy([[*model.parameters()], optimizer.state_dict()["state"]])


def _equal(before: list[Any], after: list[Any]) -> bool:
    sides = [[leaf for leaf in tree_leaves(side) if isinstance(leaf, Tensor)] for side in (before, after)]
    return len(sides[0]) == len(sides[1]) and all(map(torch.equal, *sides))


def _graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
