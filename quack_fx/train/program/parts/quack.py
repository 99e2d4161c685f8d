"""The scale of every query and key row."""

from __future__ import annotations

import re
from collections import namedtuple
from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quack_fx.train.program.parts.change import SMALL
from quack_fx.train.program.parts.norms import check_stripped
from quack_fx.train.program.parts.sharded import add_up, held, local, meshes_of, spread

# Attentions that differ only in the `numbers` in the names of their weights. weights(*numbers) has the name and number
# of rows of each weight; rows() the rows of the heads of each block, [heads, rows of a head], and the weights with
# them; factors(norms) is the rule, a function of the norms of all blocks, [attentions, heads] each. `mark` identifies
# saved factors of this kind; `axes` has the axis of the rows where it is not 0; `ends` the number of rows before the
# values where these are the last rows of a weight.
Kind = namedtuple("Kind", ["numbers", "weights", "rows", "factors", "mark", "axes", "ends"], defaults=[{}, {}])

KINDS: tuple[Kind, ...] = ()


class QuacK:
    """Scales the learning rate of each query and key row; the scale starts at `tau`, which may be changed."""

    def __init__(self, model: nn.Module, tau: float | Tensor = 1.0, optimizers: Iterable[Optimizer] = ()) -> None:
        self.tau = tau
        self.kept: dict[Tensor, Tensor] = {}  # the initial factors stored in the state of each weight
        self.find(model)
        self.first, self.saved = list[Any](), list[Tensor]()  # initial factors by block, and as stored
        # A resumed run has initial factors in its state; its heads may be zero, because they were pruned.
        begun = {self.home.get(w) for o in optimizers for w, state in o.state.items() if "quack_init" in state}
        for k, (kind, factors) in enumerate(zip(KINDS, self.factors(), strict=True)):
            for i, (numbers, *own) in enumerate(zip(kind.numbers, *factors, strict=True)):
                if (k, i) not in begun and not torch.cat(own).log().isfinite().all():
                    names = ", ".join(name for name, _ in kind.weights(*numbers).values())
                    raise ValueError(f"a head in {names} has norm zero, or one that is not finite; initialise it")
            self.saved.append(torch.cat([torch.full_like(factors[0][:, :1], kind.mark), *factors], 1))
            self.first.append(type(factors)(*torch.split(self.saved[-1][:, 1:], [f.shape[1] for f in factors], 1)))

    def find(self, model: nn.Module) -> None:
        """Look up the weights by name; called again if parameters were replaced."""
        check_stripped(model)  # if norms
        params = dict(model.named_parameters(remove_duplicate=False))
        wrapper = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module)\.")
        params |= {wrapper.sub("", name).removeprefix("module."): weight for name, weight in params.items()}
        self.stacks: list[dict[str, tuple[list[Tensor], int]]] = []  # of each kind: the weights of all attentions, axis
        self.rows: list[Any] = []
        self.ends: dict[Tensor, int] = {}  # if ends
        self.home: dict[Tensor, tuple[int, int]] = {}  # index of each weight's kind, and of its attention
        for k, kind in enumerate(KINDS):
            every = [kind.weights(*numbers) for numbers in kind.numbers]
            for w, (name, rows) in (entry for own in every for entry in own.items()):
                if name not in params or params[name].shape[kind.axes.get(w, 0)] != rows:
                    raise ValueError(f"the model has no {name} of {rows} rows; write this file anew for it")
            self.home |= {params[name]: (k, i) for i, own in enumerate(every) for name, _ in own.values()}
            self.stacks.append({w: ([params[own[w][0]] for own in every], kind.axes.get(w, 0)) for w in every[0]})
            self.ends |= {params[own[w][0]]: end for own in every for w, end in kind.ends.items()}  # if ends
            with next(iter(self.home)).device:  # not the default device
                self.rows.append(kind.rows())
        stacks = [stack for own in self.stacks for stack in own.values()]  # if sharded
        self.held = {w: held(w, axis) for weights, axis in stacks for w in weights}  # if sharded
        self.meshes = meshes_of(self.home)  # if sharded

    @torch.no_grad()
    def norms(self) -> list[Any]:
        """The current norms of the heads of each block, [attentions, heads]; the same on every rank."""
        squares = []
        for stacks, rows in zip(self.stacks, self.rows, strict=True):
            of = {}
            for name, (weights, axis) in stacks.items():
                own, exact = weights, torch.promote_types(weights[0].dtype, torch.float32)
                own = [local(weight) for weight in weights]  # if sharded
                own = [w.narrow(axis, 0, self.ends.get(w, w.shape[axis])) for w in weights]  # if ends
                dims = [dim for dim in range(weights[0].dim() + 1) if dim != axis]
                norms = [torch.linalg.vector_norm(w.unsqueeze(-1), dim=dims, dtype=exact) for w in own]  # if not small
                norms = norms_of_rows(own, dims, exact)  # if small
                norms = spread(norms, weights, self.held, axis, self.meshes)  # if sharded
                # In double precision, because products of four norms could overflow.
                of[name] = torch.stack(norms, -2).double().square()
            squares.append([torch.stack([of[n][..., index].sum(-1) for n in names]).sum(0) for index, *names in rows])
        exact = reduce(torch.promote_types, {weight.dtype for weight in self.home}, torch.float32)  # if sharded
        add_up(squares, self.meshes, exact)  # if sharded
        return [type(rows)(*(x.sqrt() for x in own)) for rows, own in zip(self.rows, squares, strict=True)]

    def factors(self) -> list[Any]:
        """The current factors of each block, by the rule."""
        return [kind.factors(norms) for kind, norms in zip(KINDS, self.norms(), strict=True)]

    def scales(self) -> dict[Tensor, Tensor]:
        """The scale of each row of a weight, [rows, 1, ...]: tau * factor / initial factor; 1 for rows of values."""
        found: dict[Tensor, Tensor] = {}
        for stacks, rows, now, first in zip(self.stacks, self.rows, self.factors(), self.first, strict=True):
            scale = {n: now[0].new_full((len(w), w[0].shape[axis]), torch.inf) for n, (w, axis) in stacks.items()}
            for (index, *names), factor, start in zip(rows, now, first, strict=True):
                # Rows multiplied with a pruned head (norm zero) give logits of zero at any learning rate.
                relative = torch.where(factor.isinf(), 1.0, factor / start).unsqueeze(-1)
                by_row = relative.expand(-1, *index.shape).flatten(1)
                for name in names:
                    scale[name].scatter_reduce_(1, index.flatten().expand_as(by_row), by_row, "amin")
            for name, (weights, axis) in stacks.items():
                shape = [-1 if d == axis else 1 for d in range(weights[0].dim())]
                exact = torch.promote_types(weights[0].dtype, torch.float32)
                each = torch.where(scale[name].isinf(), 1.0, self.tau * scale[name]).to(exact)
                found |= zip(weights, each.view(len(weights), *shape).unbind(), strict=True)  # if not sharded
                for weight, own in zip(weights, each.unbind(), strict=True):  # if sharded
                    found[weight] = own[self.held[weight]].view(shape)  # if sharded
        return found

    def keep(self, optimizer: Optimizer, weights: Iterable[Tensor]) -> None:
        """Store the initial factors of its attention in the optimizer's state of each weight."""
        for weight in weights:
            if "quack_init" not in optimizer.state[weight]:
                kind, attention = self.home[weight]
                # As bytes, because load_state_dict casts floating-point state to the dtype of the weight.
                self.kept[weight] = self.saved[kind][attention].view(torch.uint8).clone()
                optimizer.state[weight]["quack_init"] = self.kept[weight]

    def take_over(self, optimizer: Optimizer) -> None:
        """Take the initial factors from an optimizer state that was loaded."""
        for weight, (kind, attention) in self.home.items():
            state = optimizer.state.get(weight)
            if state and (saved := state.get("quack_init")) is not self.kept.get(weight):
                own = self.saved[kind][attention]
                saved = saved.to(own.device, torch.uint8).clone() if isinstance(saved, Tensor) else None
                if saved is None or len(saved) != 8 * len(own) or saved[:8].view(torch.float64) != own[:1]:
                    raise ValueError("the optimizer state has no initial factors of QuacK for these heads and norm")
                own.copy_(saved.view(torch.float64))
                state["quack_init"] = self.kept[weight] = saved


def norms_of_rows(weights: list[Tensor], dims: list[int], exact: torch.dtype) -> list[Tensor]:
    """The row norms of each weight, [rows]; small weights of the same shape take one call."""
    if weights[0].numel() > SMALL or len({weight.shape for weight in weights}) > 1:
        return [torch.linalg.vector_norm(weight.unsqueeze(-1), dim=dims, dtype=exact) for weight in weights]
    stack = torch.stack(weights).unsqueeze(-1)
    return list(torch.linalg.vector_norm(stack, dim=[1 + dim for dim in dims], dtype=exact))


def largest(numbers: Tensor, heads: list[int], count: int) -> Tensor:
    """The maximum of each head, where number i belongs to head heads[i]: [..., n] -> [..., count]."""
    index = torch.tensor(heads, device=numbers.device).expand_as(numbers)
    return numbers.new_zeros(*numbers.shape[:-1], count).scatter_reduce(-1, index, numbers, "amax")


def smallest(*factors: Tensor) -> Tensor:
    """The elementwise minimum of several factors."""
    return reduce(torch.minimum, factors)
