"""The scale of every query and key row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quack_fx.train.program.parts.norms import check_stripped
from quack_fx.train.program.parts.sharded import add_up, held, local, meshes_of, spread


class Kind(NamedTuple):
    """Attentions that are the same but for the numbers in the names of their weights."""

    numbers: Iterable[tuple[int, ...]]  # those of each attention
    weights: Callable[..., dict[str, str]]  # the names of its weights and biases, from its numbers
    rows: Callable[[], Any]  # for each block the rows of its heads, [heads, rows of a head], and the weights with them
    factors: Callable[[Any], Any]  # the rule: factors from norms, both [attentions, heads] for each block
    mark: int  # tells saved factors of this kind from others
    axes: Mapping[str, int] = {}  # of weights that count their rows along another axis than 0


KINDS: tuple[Kind, ...] = ()


class QuacK:
    """The scale on the learning rate of every query and key row.

    Make it while the model has its initial weights: their factors are what later ones are divided by. `tau`, the scale
    at the start, may be changed between steps.
    """

    def __init__(self, model: nn.Module, tau: float | Tensor = 1.0, optimizers: Iterable[Optimizer] = ()) -> None:
        self.tau = tau
        self.kept: dict[Tensor, Tensor] = {}  # what the state of each weight has of first factors
        self.find(model)
        self.first = self.factors()
        # Where a state has first factors the run had begun, and heads may have become zero since (they were pruned).
        states = (state for optimizer in optimizers for state in optimizer.state.items())
        begun = {self.home[w] for w, state in states if w in self.home and "quack_init" in state}
        for k, (kind, factors) in enumerate(zip(KINDS, self.first, strict=True)):
            for block, factor in zip(factors._fields, factors, strict=True):
                usable = ((factor > 0) & factor.isfinite()).all(-1).tolist()
                for i, numbers in enumerate(kind.numbers):
                    if not usable[i] and (k, i) not in begun:
                        names = ", ".join(kind.weights(*numbers).values())
                        raise ValueError(f"what {block} meets in {names} is zero or not finite; initialise it")

    def find(self, model: nn.Module) -> None:
        """Find the weights; again where some were replaced."""
        check_stripped(model)  # if norms
        params = dict(model.named_parameters(remove_duplicate=False))
        params |= {bare(name): weight for name, weight in params.items()}
        self.stacks: list[dict[str, list[Tensor]]] = []  # for each kind its weights, each in all attentions
        self.rows: list[Any] = []
        self.home: dict[Tensor, tuple[int, int]] = {}  # of each weight the number of its kind, and of its attention
        self.held: dict[Tensor, Tensor] = {}  # if sharded
        for k, kind in enumerate(KINDS):
            names = [kind.weights(*numbers) for numbers in kind.numbers]
            self.stacks.append({name: [params[own[name]] for own in names] for name in names[0]})
            self.home.update({params[name]: (k, i) for i, own in enumerate(names) for name in own.values()})
            for name in names[0]:  # if sharded
                self.held |= {w: held(w, kind.axes.get(name, 0)) for w in self.stacks[k][name]}  # if sharded
            device = params[next(iter(names[0].values()))].device
            with torch.device("cpu"):  # whatever the default
                rows = kind.rows()
            self.rows.append(type(rows)(*((index.to(device), *where) for index, *where in rows)))
        self.meshes = meshes_of(self.home)  # if sharded

    @torch.no_grad()
    def norms(self) -> list[Any]:
        """Norms of the blocks as the weights are, [attentions, heads] for each block; the same on every rank."""
        squares = []
        for kind, stacks, rows in zip(KINDS, self.stacks, self.rows, strict=True):
            of = {name: self.squares(weights, kind.axes.get(name, 0)) for name, weights in stacks.items()}
            squares.append([torch.stack([of[n][..., index].sum(-1) for n in names]).sum(0) for index, *names in rows])
        add_up(squares, self.meshes)  # if sharded
        return [type(rows)(*(x.sqrt() for x in own)) for rows, own in zip(self.rows, squares, strict=True)]

    def squares(self, weights: list[Tensor], axis: int) -> Tensor:
        """Squared norm of every row, [attentions, rows], in double: products of four of them must not overflow."""
        exact = torch.promote_types(weights[0].dtype, torch.float32)
        others = [d for d in range(weights[0].dim()) if d != axis]
        own = weights
        own = [local(weight) for weight in own]  # if sharded
        norms = [torch.linalg.vector_norm(w, dim=others, dtype=exact) if others else w for w in own]
        norms = spread(norms, weights, self.held, axis, self.meshes)  # if sharded
        return torch.stack(norms, -2).double().square()

    def factors(self) -> list[Any]:
        """Factors of the blocks as the weights are, [attentions, heads] for each block."""
        return [kind.factors(norms) for kind, norms in zip(KINDS, self.norms(), strict=True)]

    @torch.no_grad()
    def scales(self) -> dict[Tensor, Tensor]:
        """Scale of each row of the weights with heads, [rows, 1, ...]: tau * factor / first; 1 for rows of values."""
        found: dict[Tensor, Tensor] = {}
        factors = self.factors()
        for kind, stacks, rows, now, first in zip(KINDS, self.stacks, self.rows, factors, self.first, strict=True):
            axes = {name: kind.axes.get(name, 0) for name in stacks}
            sizes = {name: (len(weights), weights[0].shape[axes[name]]) for name, weights in stacks.items()}
            scale = {name: now[0].new_full(size, torch.inf) for name, size in sizes.items()}
            for (index, *names), factor, start in zip(rows, now, first, strict=True):
                # What is multiplied with a head that has become zero (it was pruned) makes logits of zero at any rate.
                relative = torch.where(factor.isinf(), 1.0, factor / start)
                by_row = relative.unsqueeze(-1).expand(-1, *index.shape).flatten(1)
                for name in names:
                    scale[name].scatter_reduce_(1, index.flatten().expand_as(by_row), by_row, "amin")
            for name, weights in stacks.items():
                exact = torch.promote_types(weights[0].dtype, torch.float32)
                shape = [-1 if d == axes[name] else 1 for d in range(weights[0].dim())]
                each = torch.where(scale[name].isinf(), 1.0, self.tau * scale[name]).to(exact)
                for weight, own in zip(weights, each.unbind(), strict=True):
                    own = own[self.held[weight]]  # if sharded
                    found[weight] = own.view(shape)
        return found

    @torch.no_grad()
    def keep(self, optimizer: Optimizer, weights: Iterable[Tensor]) -> None:
        """Keep first factors, those of its whole attention, in the state of some weights, and so in the state_dict."""
        for weight in weights:
            if weight in self.home and "quack_init" not in optimizer.state[weight]:
                # As bytes: load_state_dict would round other numbers to the type of the weight.
                saved = torch.cat([part.view(torch.uint8) for part in self.first_of(weight)])
                optimizer.state[weight]["quack_init"] = self.kept[weight] = saved

    @torch.no_grad()
    def take_over(self, optimizer: Optimizer) -> None:
        """Take over first factors from a state that was loaded."""
        for weight in self.home:
            state, kept = optimizer.state.get(weight), self.kept.get(weight)
            if not state or (saved := state.get("quack_init")) is kept:
                continue
            if saved is None:
                raise ValueError("the optimizer state has no first factors of QuacK; load it before the step is made")
            mark, *first = self.first_of(weight)
            saved = saved.to(mark.device, torch.uint8).clone()
            if len(saved) != 8 * sum(map(len, (mark, *first))) or not saved[:8].view(torch.int64).equal(mark):
                raise ValueError(
                    "the optimizer state has first factors of QuacK for other heads, or of another norm; use those "
                    "that it was saved with"
                )
            for factor, value in zip(first, saved[8:].view(torch.float64).split(list(map(len, first))), strict=True):
                factor.copy_(value)
            state["quack_init"] = self.kept[weight] = saved

    def first_of(self, weight: Tensor) -> list[Tensor]:
        """The mark of a weight's kind, [1], and the first factors of the blocks of its attention, [heads] each."""
        kind, attention = self.home[weight]
        first = [factor[attention] for factor in self.first[kind]]
        return [torch.tensor([KINDS[kind].mark], device=first[0].device), *first]


def largest(numbers: Tensor, heads: list[int], count: int) -> Tensor:
    """The largest number of each of `count` heads, where number i is of head heads[i]: [..., n] -> [..., count]."""
    index = torch.tensor(heads, device=numbers.device).expand_as(numbers)
    return numbers.new_zeros(*numbers.shape[:-1], count).scatter_reduce(-1, index, numbers, "amax")


def smallest(*factors: Tensor) -> Tensor:
    """The smallest of several factors."""
    return torch.stack(torch.broadcast_tensors(*factors)).amin(0)


def bare(name: str) -> str:
    """Name of a parameter without what wrappers put into it."""
    path = [part for part in name.split(".") if part not in ("_orig_mod", "_checkpoint_wrapped_module")]
    return ".".join(path[1:] if path[0] == "module" else path)
