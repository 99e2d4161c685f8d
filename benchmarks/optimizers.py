"""Tests QuacK with the optimizers of other packages.

    python -m benchmarks.optimizers --markdown docs/optimizers.md

In: the classes below, from installed packages. Out: a page with a table of results and a description of the test.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quack_fx import QuacK, find_qk_pairs
from quack_fx.errors import OptimizerError, first_line
from quack_fx.layout import QKLayout

STEPS = 14
LIMIT = 1e-3
TAU = 0.5

PACKAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "torch": (
        "torch.optim",
        ("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "LBFGS", "Muon", "NAdam", "RAdam",
         "RMSprop", "Rprop", "SGD"),
    ),
    "bitsandbytes": (
        "bitsandbytes.optim",
        ("AdamW", "AdamW8bit", "PagedAdamW8bit", "Lion", "Lion8bit", "RMSprop8bit", "LAMB8bit"),
    ),
    "torchao": ("torchao.optim", ("AdamW8bit", "AdamW4bit", "AdamWFp8")),
    "schedulefree": ("schedulefree", ("AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree")),
    "prodigyopt": ("prodigyopt", ("Prodigy",)),
    "adam-atan2-pytorch": ("adam_atan2_pytorch", ("AdamAtan2", "AdoptAtan2")),
    "pytorch-optimizer": (
        "pytorch_optimizer",
        ("ADOPT", "AdaBelief", "AdEMAMix", "AdamP", "Adan", "CAME", "GaLore", "LaProp", "Lamb", "LARS", "Lion",
         "Lookahead", "MADGRAD", "MARS", "Muon", "Prodigy", "Ranger", "SAM", "SCION", "SOAP", "ScheduleFreeAdamW",
         "Shampoo", "SignSGD", "StableAdamW"),
    ),
    "dion": ("dion", ("Dion", "DionSimple", "DionReference", "Muon", "MuonReference", "Dion2", "NorMuon", "NorDion2")),
}  # fmt: skip
"""For each package, its module and the classes to test."""

EXTRA: dict[str, dict[str, Any]] = {"Ranger21": {"num_iterations": 100}, "SAM": {"base_optimizer": torch.optim.SGD}}
"""Arguments that some classes need besides the learning rate."""

AROUND = {"Lookahead": torch.optim.SGD}
"""Classes that wrap an optimizer, and the class to wrap."""


class OneHead(nn.Module):
    """Attention with one head, so that each weight has one learning rate; the value weight is in no logit."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(64, 64, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, T, 64] to tokens [B, T, 64]."""
        q, k, v = (layer(x).unsqueeze(1) for layer in (self.q, self.k, self.v))
        return nn.functional.scaled_dot_product_attention(q, k, v).squeeze(1)


@dataclass(frozen=True)
class Verdict:
    """Result for one optimizer class.

    Attributes:
        outcome: "exact", "scaled" (steps are scaled, but differ from those with a learning rate for each weight),
            "refused" or "not tried".
        detail: The difference, relative to the distance that the weights moved; or the message.
        resumed: Whether a run that is saved and loaded half-way ends bitwise identical: "yes", "no", or "not without
            QuacK either"; empty if there was no run.
    """

    outcome: str
    detail: str
    resumed: str = ""


def judge(make: Callable[[list[dict[str, Any]]], Optimizer]) -> Verdict:
    """Test an optimizer.

    Arguments:
        make: Builds it from parameter groups.
    """
    try:
        whole, start = _train(make)
    except OptimizerError as error:
        return Verdict("refused", str(error))
    except Exception as error:
        return Verdict("not tried", first_line(error))
    try:
        expected, _ = _train(make, attach=False, rates=True)
        off = float((whole - expected).abs().max() / (expected - start).abs().max())
        outcome, detail = "exact" if off < LIMIT else "scaled", f"{off:.0e}"
    except RuntimeError as error:
        outcome, detail = "scaled", f"it takes one learning rate for all groups ({first_line(error)})"
    resumed = (
        "yes" if _resumes(make, attach=True) else "no" if _resumes(make, attach=False) else "not without QuacK either"
    )
    return Verdict(outcome, detail, resumed)


def _resumes(make: Callable[[list[dict[str, Any]]], Optimizer], attach: bool) -> bool:
    """Whether a run that is saved and loaded half-way ends bitwise identical."""
    try:
        return torch.equal(_train(make, attach)[0], _train(make, attach, resume=True)[0])
    except (KeyError, ValueError, RuntimeError):  # from its load_state_dict
        return False


def _train(
    make: Callable[[list[dict[str, Any]]], Optimizer], attach: bool = True, rates: bool = False, resume: bool = False
) -> tuple[Tensor, Tensor]:
    """Train for some steps.

    Arguments:
        make: Builds the optimizer from parameter groups.
        attach: Whether to attach QuacK.
        rates: Whether the groups' learning rates follow Algorithm 1.
        resume: Whether to save and load half-way.

    Returns:
        The weights at the end and at the start.
    """
    layout = _layout()  # before the seed, because it draws random numbers, as some optimizers do
    torch.manual_seed(0)
    model = OneHead()
    optimizer = _made(make, model, layout if attach else None)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    first = _norms(model)
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        if resume and step == STEPS // 2:
            saved = io.BytesIO()
            torch.save(optimizer.state_dict(), saved)
            optimizer = _made(make, model, layout if attach else None)
            saved.seek(0)
            optimizer.load_state_dict(torch.load(saved, weights_only=False))
        for param in model.parameters():
            param.grad = torch.randn(64, 64, generator=generator)
        if rates:
            queries, keys, others = optimizer.param_groups
            (query, key), (query_first, key_first) = _norms(model), first
            queries["lr"], keys["lr"] = (others["lr"] * TAU * x for x in (key_first / key, query_first / query))
        try:
            optimizer.step()
        except TypeError:  # it needs a closure
            optimizer.step(lambda: torch.zeros(()))
    return torch.cat([p.detach().flatten() for p in model.parameters()]), start


def _norms(model: OneHead) -> tuple[float, float]:
    return float(model.q.weight.detach().norm()), float(model.k.weight.detach().norm())


@cache
def _layout() -> QKLayout:
    return find_qk_pairs(OneHead(), torch.randn(1, 3, 64))


def _made(make: Callable[[list[dict[str, Any]]], Optimizer], model: OneHead, layout: QKLayout | None) -> Optimizer:
    optimizer = make([{"params": [layer.weight], "lr": 1e-2} for layer in (model.q, model.k, model.v)])
    if callable(train := getattr(optimizer, "train", None)):
        train()
    if layout is not None:
        QuacK(optimizer, model, layout, tau=TAU)
    return optimizer


def verdicts() -> Iterator[tuple[str, str, Verdict]]:
    """Package, class and verdict of every installed optimizer in the list."""
    for package, (name, classes) in PACKAGES.items():
        for each in classes:
            with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    module = importlib.import_module(name)
                except ImportError:
                    break
                verdict = judge(maker(module, each))
            yield package, each, verdict


def maker(module: Any, name: str) -> Callable[[list[dict[str, Any]]], Optimizer]:
    """A function that builds an optimizer of a class from parameter groups."""
    kind = getattr(module, name)
    if name in AROUND:
        return lambda groups: kind(AROUND[name](groups, lr=1e-2))
    return lambda groups: kind(groups, lr=1e-2, **EXTRA.get(name, {}))


def markdown() -> Iterator[str]:
    """The page, line by line."""
    yield from PAGE.splitlines()
    for package, name, verdict in verdicts():
        version = importlib.metadata.version(package).partition("+")[0]
        cells = (f"{package} {version}", name, verdict.outcome, verdict.detail, verdict.resumed)
        yield f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


PAGE = f"""# Optimizers of other packages

`python -m benchmarks.optimizers --markdown docs/optimizers.md`, on a CPU; the packages that are installed are tried.

Each class trains attention with one head for {STEPS} steps twice: with `QuacK(optimizer, model, layout, tau={TAU})`,
and by itself with a learning rate for each weight that follows Algorithm 1 of the paper.

- *exact*: both end at the same weights, but for {LIMIT} of the way that they went.
- *scaled*: they do not, since a step of this optimizer is not proportional to its learning rate. QuacK scales the step.
- *refused*: it would be silently wrong. Some optimizers make the weights anew from copies of their own, so that what
  was scaled does not last; a try on a tiny weight tells, no list of names. Others are around an optimizer, which is the
  one to attach QuacK to.
- *not tried*: it does not take groups of weights with an `lr`.

The last column says whether a run that is saved and loaded half-way ends at the same bits.

What takes steps by an optimizer, and is none itself (`tests/test_optimizers.py`, `tests/test_deepspeed.py`):

- Sharpness-aware minimization goes up, takes the gradient there, goes back and steps. Attach QuacK to the optimizer
  that takes this step, which most packages hold as `base_optimizer`. Exact in the four forms tried: two calls, a
  closure, an optimizer that takes both steps itself, and an object around an optimizer.
- DeepSpeed 0.19.8 on two ranks: exact without ZeRO. With ZeRO 1, 2 or 3 it is refused on every rank, whether QuacK was
  attached before or after `deepspeed.initialize`: flat parts of weights are stepped then, in which rows are lost.
- Other flat partitions, such as that of Megatron's distributed optimizer, are refused in the same way. megatron-core
  itself was not tried.

| package | optimizer | outcome | off by, or why | resumed |
|---|---|---|---|---|"""


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description="What QuacK does with optimizers of other packages.")
    parser.add_argument("--markdown", type=Path, help="file to write")
    file = parser.parse_args().markdown
    lines = []
    for line in markdown():
        lines.append(line)
        if file is None or line.startswith("| "):
            print(line, flush=True)
    if file is not None:
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
