"""The scale of every query and key row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from quack_fx.train.program.parts.sharded import add_up, held, local, meshes_of, spread


class Kind(NamedTuple):
    """Attentions that are the same but for the numbers in the names of their weights.

    Attributes:
        numbers: Those numbers, for each attention.
        weights: Gives the name of each weight and bias of an attention from its numbers.
        rows: Gives for each block the rows of its heads, [heads, rows of a head], and the weights that have them.
        factors: The rule: gives the factors for some norms, both [attentions, heads].
        axes: For weights that do not count their rows along axis 0 the axis that does.
    """

    numbers: Iterable[tuple[int, ...]]
    weights: Callable[..., dict[str, str]]
    rows: Callable[[], Any]
    factors: Callable[[Any], Any]
    axes: Mapping[str, int] = {}


KINDS: tuple[Kind, ...] = ()


class QuacK:
    """The scale on the learning rate of every query and key row.

    Make it while the model has its initial weights: their factors are what later ones are divided by.

    Arguments:
        model: The model, or what torch.compile, DistributedDataParallel or fully_shard made of it.
        tau: The scale at the start.
    """

    def __init__(self, model: nn.Module, tau: float = 1.0) -> None:
        self.tau = tau
        params = {bare(name): weight for name, weight in model.named_parameters(remove_duplicate=False)}
        self.stacks: list[dict[str, Stack]] = []
        self.rows: list[Any] = []
        self.meshes: list[DeviceMesh] = []  # if sharded
        for kind in KINDS:
            names = [kind.weights(*numbers) for numbers in kind.numbers]
            stacks = {w: Stack([params[n[w]] for n in names], kind.axes.get(w, 0)) for w in names[0]}
            for stack in stacks.values():  # if sharded
                stack.meshes = self.meshes  # if sharded
            device = next(iter(stacks.values())).weights[0].device
            self.stacks.append(stacks)
            self.rows.append(type(rows := kind.rows())(*((index.to(device), *where) for index, *where in rows)))
        stacked = (stack for own in self.stacks for stack in own.values())  # if sharded
        self.meshes += meshes_of(weight for stack in stacked for weight in stack.weights)  # if sharded
        self.first = self.factors()
        self.kept: dict[Tensor, Tensor] = {}
        for kind, factors in zip(KINDS, self.first, strict=True):
            for block, factor in zip(factors._fields, factors, strict=True):
                for numbers, dead in zip(kind.numbers, factor.isinf().any(-1).tolist(), strict=True):
                    if dead:
                        weights = ", ".join(kind.weights(*numbers).values())
                        raise ValueError(f"all that {block} is multiplied with in {weights} is zero; initialise it")

    @torch.no_grad()
    def factors(self) -> list[Any]:
        """Factors of the weights as they are, [attentions, heads] for each block; the same on every rank."""
        squares = []
        for stacks, rows in zip(self.stacks, self.rows, strict=True):
            of = {name: stack.squares() for name, stack in stacks.items()}
            sums = [torch.stack([of[name][..., index].sum(-1) for name in names]).sum(0) for index, *names in rows]
            squares.append(sums)
        add_up(squares, self.meshes)  # if sharded
        norms = [type(rows)(*(x.sqrt() for x in own)) for rows, own in zip(self.rows, squares, strict=True)]
        return [kind.factors(own) for kind, own in zip(KINDS, norms, strict=True)]

    @torch.no_grad()
    def keep(self, state: Mapping[Tensor, dict[str, Tensor]]) -> None:
        """Keep the first factors in the state of each weight, and take over those of a state that was loaded."""
        for stacks, rows, first in zip(self.stacks, self.rows, self.first, strict=True):
            for name, stack in stacks.items():
                blocks = [factor for (_, home, *_), factor in zip(rows, first, strict=True) if home == name]
                for i, weight in enumerate(stack.weights):
                    if not blocks or weight not in state:
                        continue
                    own = [factor[i] for factor in blocks]
                    saved = state[weight].get("quack")
                    if saved is None and weight in self.kept:
                        raise ValueError(
                            "the state that was loaded has no first factors; make the step after loading it"
                        )
                    if saved is None:  # as bytes: load_state_dict would round other numbers to the type of the weight
                        state[weight]["quack"] = saved = torch.cat(own).view(torch.uint8)
                    elif saved is not self.kept.get(weight):
                        for factor, value in zip(
                            own, saved.to(torch.uint8).view(torch.float64).split(list(map(len, own))), strict=True
                        ):
                            factor.copy_(value)
                    self.kept[weight] = saved

    @torch.no_grad()
    def scales(self) -> dict[Tensor, Tensor]:
        """Scale of each row of the weights with heads, [rows, 1, ...]: tau * factor / first; 1 for rows of values."""
        found: dict[Tensor, Tensor] = {}
        for stacks, rows, now, first in zip(self.stacks, self.rows, self.factors(), self.first, strict=True):
            scale = {name: stack.ones() for name, stack in stacks.items()}
            for (index, *names), factor, start in zip(rows, now, first, strict=True):
                # What is multiplied with a head that has become zero (it was pruned) makes logits of zero at any rate.
                relative = torch.where(factor.isinf(), 1.0, factor / start).unsqueeze(-1)
                for name in names:
                    scale[name][:, index] = self.tau * relative
            for name, stack in stacks.items():
                found.update(stack.along(scale[name]))
        return found


class Stack:
    """One weight of all attentions of a kind; `axis` counts its rows."""

    meshes: list[DeviceMesh]  # if sharded

    def __init__(self, weights: list[Tensor], axis: int) -> None:
        self.weights, self.axis = weights, axis
        self.others = [d for d in range(weights[0].dim()) if d != axis]
        self.exact = torch.promote_types(weights[0].dtype, torch.float32)
        self.held = [held(weight, axis) for weight in weights]  # if sharded

    def squares(self) -> Tensor:
        """Squared norm of every row, [attentions, rows], in double: products of four of them must not overflow."""
        weights = self.weights
        weights = [local(weight) for weight in weights]  # if sharded
        norms = [torch.linalg.vector_norm(w, dim=self.others, dtype=self.exact) if self.others else w for w in weights]
        squares = [norm.double().square() for norm in norms]
        squares = spread(squares, self.weights, self.held, self.axis, self.meshes)  # if sharded
        return torch.stack(squares, -2)

    def ones(self) -> Tensor:
        """A scale of 1 for every row, [attentions, rows]."""
        weight = self.weights[0]
        return torch.ones(len(self.weights), weight.shape[self.axis], dtype=torch.float64, device=weight.device)

    def along(self, scale: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Each weight with the scale of its rows, shaped to broadcast over it."""
        shape = [-1 if d == self.axis else 1 for d in range(self.weights[0].dim())]
        each: Iterable[Tensor] = scale.to(self.exact).unbind()
        each = [own[here] for own, here in zip(each, self.held, strict=True)]  # if sharded
        return zip(self.weights, (own.view(shape) for own in each), strict=True)


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
