"""Layouts that fit a model, however it is wrapped, and one line on those that do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from emit_cases import PAIR, Bag, block, rows, site
from torch import nn

from quack_fx.errors import LayoutError
from quack_fx.layout import QKLayout, WeightBlock
from quack_fx.layout.fit import check_layout, layout_params, without_wrappers

SHAPES = {"attn.q.weight": (12, 8), "attn.q.bias": (12,), "attn.k.weight": (12, 8), "attn.scale": (3,)}
Q, K = block("attn.q.weight", "q", rows(3, 4), bias="attn.q.bias"), block("attn.k.weight", "k", rows(3, 4))
LAYOUT = QKLayout((site("attn", [Q], [K], PAIR),))


class Attention(nn.Module):
    """The weights of `SHAPES`, in a module that torch.compile takes."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 12), nn.Linear(8, 12, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x) @ self.k(x).mT


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.attn(x)
        return out


def renamed(layout: QKLayout, rename: Callable[[str], str]) -> QKLayout:
    def new(b: WeightBlock) -> WeightBlock:
        return replace(b, param=rename(b.param), bias=b.bias and rename(b.bias))

    return QKLayout(tuple(replace(s, query=tuple(map(new, s.query)), key=tuple(map(new, s.key))) for s in layout.sites))


def test_wrapped_models_are_seen_through() -> None:
    """On both sides: a layout may have been found on the model or on a wrapped one."""
    model = Model()
    wanted = {name: id(p) for name, p in model.named_parameters()}
    partly = Model()
    partly.attn = torch.compile(model.attn, backend="eager")  # type: ignore[assignment]
    parallel = nn.Module()  # the names that DistributedDataParallel(torch.compile(model)) has
    parallel.module = torch.compile(model, backend="eager")
    for wrapped in (model, parallel.module, partly, parallel):
        found = layout_params(LAYOUT, wrapped)
        assert {name: id(p) for name, p in found.items()} == {name: wanted[name] for name in found}
        names = {id(p): name for name, p in wrapped.named_parameters()}
        theirs = renamed(LAYOUT, lambda name, names=names: names[wanted[name]])  # type: ignore[misc]
        assert sorted(map(id, layout_params(theirs, model).values())) == sorted(map(id, found.values()))
        assert without_wrappers(theirs) == LAYOUT


def changed(**fields: Any) -> QKLayout:
    return QKLayout((site("attn", [replace(Q, **fields)], [K], PAIR),))


UNFIT = {
    "missing parameter": (changed(param="attn.query.weight"), "'attn.query.weight', which is no parameter.*closest"),
    "missing bias": (changed(bias="attn.q.offset"), "'attn.q.offset', which is no parameter"),
    "axis too high": (changed(axis=2), r"axis 2 of 'attn.q.weight', whose shape is \(12, 8\)"),
    "rows past the end": (changed(heads=rows(3, 5)), r"rows \[10, 15\] along axis 0 of 'attn.q.weight'"),
    "rows along the other axis": (changed(axis=1, bias=None), r"rows \[8, 12\] along axis 1 of 'attn.q.weight'"),
    "empty range": (changed(heads=(((4, 4),), *rows(2, 4))), r"rows \[4, 4\]"),
    "bias of too few rows": (changed(bias="attn.scale"), r"bias 'attn.scale' of shape \(3,\); need 12"),
}


@pytest.mark.parametrize(("layout", "message"), UNFIT.values(), ids=UNFIT)
def test_layouts_that_do_not_fit(layout: QKLayout, message: str) -> None:
    with pytest.raises(LayoutError, match=message) as error:
        check_layout(layout, Bag(SHAPES))
    assert "\n" not in str(error.value) and "site 'attn'" in str(error.value)


def test_ties_that_the_layout_does_not_know() -> None:
    model = Model()
    model.attn.k.weight = model.attn.q.weight
    with pytest.raises(LayoutError, match=r"'attn.q.weight' and 'attn.k.weight', which are one tied tensor"):
        check_layout(LAYOUT, model)


def test_fsdp1_is_refused() -> None:
    flattened = nn.Module()
    flattened.register_parameter("_flat_param", nn.Parameter(torch.randn(100)))
    with pytest.raises(LayoutError, match=r"FSDP1.*fully_shard"):
        check_layout(LAYOUT, flattened)
