"""Every right layout is proved, and every layout that is wrong in one way is refuted; over all kinds of attention."""

from __future__ import annotations

import by_hand
import pytest
import tiny_models
import torch
from mutations import meaning, mutations
from torch import Tensor, nn

from quack_fx.errors import LayoutError, VerifyError
from quack_fx.layout import QKLayout
from quack_fx.layout.fit import check_layout
from quack_fx.prove import alone, prove, run_copy

Right = tuple[nn.Module, QKLayout, tuple[Tensor, ...], dict[str, Tensor]]
"""A model, its right layout, and the inputs of its forward."""


def tiny(name: str) -> Right:
    case = tiny_models.CASES[name]()
    return case.model, case.layout, (), case.inputs


def hand(name: str) -> Right:
    model, inputs, site = by_hand.CASES[name]()
    random: dict[int, Tensor] = {}  # a tensor that is given twice stays one
    for x in inputs:
        random.setdefault(id(x), torch.randn(x.shape) if x.is_floating_point() else x)
    return model, QKLayout((site,)), tuple(random[id(x)] for x in inputs), {}


ZOO = {f"tiny-{name}": (tiny, name) for name in tiny_models.CASES}
ZOO |= {f"hand-{name}": (hand, name) for name in by_hand.CASES}


ALIKE = {"tiny-llama_eager", "tiny-bloom", "tiny-bert", "tiny-our_gpt", "tiny-our_mla", "tiny-gemma3", "tiny-whisper"}
"""Those of which a quick run has another with the same mechanism."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ALIKE)) for n in ZOO])
def test_right_is_proved_and_wrong_is_refuted(name: str) -> None:
    torch.manual_seed(0)
    build, key = ZOO[name]
    model, layout, args, kwargs = build(key)
    true = meaning(layout, model)
    survivors = []
    with alone():
        graph = run_copy(model, args, kwargs)
        report = prove(layout, graph)
        assert report.complete, report.not_proved
        for what, wrong in mutations(layout, len(layout.sites) - 1, model):
            try:
                check_layout(wrong, model)
            except LayoutError:
                continue  # refused before any proof: the rows are not even there
            if meaning(wrong, model) == true:
                assert prove(wrong, graph).complete, what
                continue
            try:
                prove(wrong, graph)
            except VerifyError as error:
                assert "\n" not in str(error)
            else:
                survivors.append(what)
    assert not survivors
