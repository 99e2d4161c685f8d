"""Inputs whose sizes no layer and no message tells: they are found by how what fails depends on each of them."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent, indent

import pytest
import torch
from torch import nn

from quack_fx.targets import resolve
from quack_fx.targets.inputs import Attempts
from quack_fx.targets.inputs.measure import mismatch
from quack_fx.targets.inputs.values import expression, named

pytestmark = pytest.mark.usefixtures("own_folder")

HEAD = """
import torch
import torch.nn.functional as F
from torch import nn

def looked_up(table, masks):
    found = []
    for m in masks:
        found += [torch.gather(table, dim=1, index=m.unsqueeze(-1).repeat(1, 1, 8))]
    return torch.cat(found)

class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
    def forward(self, x, y=None):
        q, k, v = (l(i) for l, i in zip((self.q, self.k, self.v), (x, x if y is None else y, x if y is None else y)))
        return (q @ k.mT).softmax(-1) @ v
"""

CASES = {
    "frames behind a convolution that halves them, asserted": (
        """
        self.c, self.table = nn.Conv1d(5, 8, 3, 2, 1), nn.Parameter(torch.zeros(30, 8))
        self.e, self.b, self.d = nn.Embedding(50, 8), Block(), Block()
        """,
        "mel, tokens",
        """
        x = F.gelu(self.c(mel)).permute(0, 2, 1)
        assert x.shape[1:] == self.table.shape, "wrong shape"
        return self.d(self.e(tokens), self.b(x + self.table))
        """,
        "mel=float32[2, 5, 60], tokens=int64[2, 4]",
    ),
    "a picture and a text, each with a table of its own": (
        """
        self.c, self.b, self.d = nn.Conv2d(3, 8, 8, 8), Block(), Block()
        self.e, self.cls = nn.Embedding(50, 8), nn.Parameter(torch.zeros(1, 1, 8))
        self.here, self.there = (nn.Parameter(torch.zeros(n, 8)) for n in (26, 13))
        """,
        "image, text",
        """
        x = self.c(image).flatten(2).mT
        x = torch.cat((self.cls.expand(len(x), -1, -1), x), 1) + self.here
        return self.b(x).mean(1) @ self.d(self.e(text) + self.there).mean(1).T
        """,
        "image=float32[2, 3, 40, 40], text=int64[2, 13]",
    ),
    "patches of a series, flattened for a head": (
        "self.l, self.b, self.head = nn.Linear(16, 8), Block(), nn.Linear(88, 3)",
        "x",
        """
        x = F.pad(x.permute(0, 2, 1), (0, 8)).unfold(-1, 16, 8)
        x = self.b(self.l(x))
        return self.head(x.flatten(-2))
        """,
        "x=float32[2, 88, 16]",
    ),
    "a table for each patch of each variable": (
        "self.l, self.b, self.table = nn.Linear(4, 8), Block(), nn.Parameter(torch.zeros(1, 7, 6, 8))",
        "x",
        """
        x = x.permute(0, 2, 1).unflatten(-1, (-1, 4))
        x = self.l(x)
        x += self.table
        return self.b(x)
        """,
        "x=float32[2, 24, 7]",
    ),
    "a clip whose sides are asserted, a mask that chooses as many tokens of each": (
        """
        self.c, self.b, self.mask_token = nn.Conv3d(3, 8, (2, 8, 8), (2, 8, 8)), Block(), nn.Parameter(torch.ones(8))
        self.table, self.img_size = torch.zeros(1, 72, 8), 24
        """,
        "x, mask",
        """
        b, c, t, h, w = x.shape
        assert h == self.img_size and w == self.img_size
        x = self.c(x).flatten(2).mT + self.table
        hidden = self.table.expand(b, -1, -1)[mask].reshape(b, -1, 8) + self.mask_token
        return self.b(torch.cat((x[~mask].reshape(b, -1, 8), hidden), 1))
        """,
        "x=float32[2, 3, 16, 24, 24], mask=bool[2, 72]",
    ),
    "a class and tokens, by their annotations and the letters of their axes": (
        """
        self.e, self.l, self.b = nn.Embedding(11, 8), nn.Linear(5, 8), Block()
        self.table = nn.Parameter(torch.zeros(1, 30, 8))
        """,
        "label_B: torch.LongTensor, x_BLC: torch.Tensor",
        """
        label_B = torch.where(torch.rand(len(x_BLC)) < 0.1, 10, label_B)
        x = torch.cat((self.e(label_B).unsqueeze(1), self.l(x_BLC.float())), 1)
        return self.b(x + self.table)
        """,
        "label_B=int64[2], x_BLC=float32[2, 29, 5]",
    ),
    "indices called masks that must be there, one or a list of them": (
        """
        self.l, self.b, self.img_size = nn.Linear(3 * 4 * 4, 8), Block(), 32
        self.table = nn.Parameter(torch.zeros(1, 20, 8))
        """,
        "context, target, masks_context, masks_target",
        """
        assert (masks_context is not None) and (masks_target is not None), "there must be masks"
        if not isinstance(masks_context, list):
            masks_context = [masks_context]
        if not isinstance(masks_target, list):
            masks_target = [masks_target]
        table = self.table.expand(len(context), -1, -1)
        x = self.l(context)
        b, n, _ = x.shape
        x += looked_up(table, masks_context)
        return self.b(torch.cat((x, self.l(target) + looked_up(table, masks_target)), 1))
        """,
        "context=float32[2, 4, 48], target=float32[2, 4, 48], masks_context=int64[2, 4], masks_target=int64[2, 4]",
    ),
    "a kind that no layer of its own tells": (
        "self.l, self.b, self.kinds = nn.Linear(5, 8), Block(), nn.Parameter(torch.zeros(3, 8))",
        "x: torch.FloatTensor, kind: torch.LongTensor",
        """
        x = self.l(x)
        x = x + torch.stack([self.kinds[0] * kind[:, :, None], self.kinds[1] * (1 - kind[:, :, None])]).sum(0)
        kind.bitwise_and(1)
        return self.b(x)
        """,
        "x=float32[2, 4, 5], kind=int64[2, 4]",
    ),
}

TOLD = {
    "records in a list": (
        "self.c, self.b = nn.Conv2d(3, 8, 8, 8), Block(); self.img_size = 32",
        "records: list[dict[str, torch.Tensor]]",
        """
        x = torch.stack([F.pad(r["image"].float(), (0, 0)) for r in records], 0)
        x = self.b(self.c(x).flatten(2).mT)
        return [F.interpolate(one[None], r["size"]) for r, one in zip(records, x)]
        """,
        "[{'image': float32[3, 32, 32], 'size': 4}, {'image': float32[3, 32, 32], 'size': 4}]",
    ),
    "lengths of packed tokens": (
        "self.e, self.b = nn.Embedding(50, 8), Block()",
        "ids: torch.Tensor, seqlens: list[int]",
        """
        (n,) = ids.shape
        assert sum(seqlens) == n
        return torch.cat([self.b(x) for x in self.e(ids).split(seqlens)])
        """,
        "ids=int64[4], seqlens=[2, 2]",
    ),
    "frames that are viewed, steps that index": (
        """
        self.c, self.e, self.b = nn.Conv2d(2, 8, 6, 6), nn.Embedding(48, 8), Block()
        self.r, self.table = nn.Linear(1, 8), nn.Parameter(torch.zeros(1, 12, 8))
        """,
        "states, actions, returns=None, timesteps=None",
        """
        x = self.c(states.reshape(-1, 2, 6, 6)).reshape(states.shape[0], states.shape[1], 8)
        x = x + self.r(returns.type(torch.float32)) + self.e(actions)
        places = self.table.repeat_interleave(len(x), 0)
        return self.b(x + torch.gather(places, 1, torch.repeat_interleave(timesteps, 8, dim=-1)))
        """,
        "states=float32[2, 1, 72], actions=int64[2, 4], returns=float32[2, 4, 1], timesteps=int64[2, 1, 1]",
    ),
    "a condition called y with more axes than a class has": (
        "self.c, self.b, self.d = nn.Conv2d(3, 8, 8, 8), Block(), Block(); self.null = nn.Parameter(torch.zeros(6, 8))",
        "x, y",
        """
        assert y.shape[2:] == self.null.shape
        x = self.b(self.c(x).flatten(2).mT)
        return self.d(x, y.view(len(x), 6, 8))
        """,
        "x=float32[2, 3, 32, 32], y=float32[2, 1, 6, 8]",
    ),
}


def write(init: str, parameters: str, body: str) -> None:
    Path("model.py").write_text(
        f"{HEAD}\nclass Model(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"{indent(dedent(init), ' ' * 8)}\n    def forward(self, {parameters}):\n{indent(dedent(body), ' ' * 8)}\n"
    )


@pytest.mark.parametrize("case", CASES | TOLD)
def test_sizes_are_found(case: str) -> None:
    init, parameters, body, text = (CASES | TOLD)[case]
    write(init, parameters, body)
    target = resolve("model.py:Model")
    assert f"{text} (inferred)" in target.how
    real = resolve("model.py:Model", real=True).model
    real(*target.args, **target.kwargs)


def test_sizes_of_the_model_itself_that_do_not_go_together_end_the_search() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e = nn.Embedding(20, 16)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            b, t = ids.shape
            out: torch.Tensor = self.e(ids).view(b, t, 3, 16 // 3)
            return out

    model = Uneven()
    tried = 0
    attempts = Attempts(model, [named((torch.zeros(2, n, dtype=torch.int64),), {}, ["ids"]) for n in range(3, 30)])
    for inputs in attempts:
        tried += 1
        try:
            model(*inputs.args)
        except RuntimeError as error:
            attempts.failed(inputs, error)
    assert tried == 3


def test_no_size_is_read_off_an_error_about_none() -> None:
    try:
        nn.Linear(2, 2)(torch.ones(1, 2).long())
    except RuntimeError as error:
        assert mismatch(error) is None


CARRY = """
from dataclasses import dataclass

@dataclass
class Carry:
    state: torch.Tensor
    halted: torch.Tensor
    data: dict[str, torch.Tensor]

class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(20, 8))
    def forward(self, ids):
        return F.embedding(ids, self.weight.to(torch.float32))

class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.task, self.b = Table(), nn.Embedding(3, 8), Block()
    def forward(self, state, batch):
        x = self.e(batch["inputs"].to(torch.int32)) + self.task(batch["task"])
        return self.b(state + x)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Inner()
    def initial_carry(self, batch):
        n, data = len(batch["inputs"]), {k: torch.zeros_like(v) for k, v in batch.items()}
        return Carry(torch.zeros(n, 6, 8), torch.ones(n, dtype=torch.bool), data)
    def forward(self, carry: Carry, batch: dict[str, torch.Tensor]):
        wide = carry.halted[:, None]
        data = {k: torch.where(wide, batch[k], v) for k, v in carry.data.items()}
        return self.inner(carry.state, data)
"""

HIDDEN = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.b = nn.Embedding(20, 8), Block()
    def init_hidden(self, batch_size):
        return [next(self.parameters()).new_zeros(batch_size, 3, 8) for _ in range(2)]
    def forward(self, x, hidden):
        x = self.e(x)
        for h in hidden:
            x = self.b(x, torch.cat((h, x), 1))
        return x
"""


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            CARRY,
            "carry=Carry(state=float32[2, 4, 8], halted=bool[2], data={'inputs': int64[2, 4], 'task': int64[2, 4]}), "
            "batch={'inputs': int64[2, 4], 'task': int64[2, 4]}",
        ),
        (HIDDEN, "x=int64[2, 4], hidden=[float32[2, 3, 8], float32[2, 3, 8]]"),
    ],
    ids=["a carry of its own class", "a hidden state"],
)
def test_what_the_model_makes_itself_is_made_by_it(source: str, text: str) -> None:
    Path("model.py").write_text(HEAD + source)
    target = resolve("model.py:Model")
    assert f"inputs {text} (inferred)" in target.how
    again = resolve("model.py:Model", inputs=expression(target.args))
    assert str(again.how).split("; inputs")[0] == target.how.split("; inputs")[0]
