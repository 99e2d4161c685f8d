"""What one optimizer's update is to the compiled step.

In: a weight, its gradient, the optimizer's own state tensors and a few 0-d coefficients. Out: the change of the weight
before QuacK scales it, and the new state. A rule knows nothing of heads, factors or compilation: the update writes
`weight - scale * change`, whatever the rule is, so that weight decay follows the scaled learning rate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Group = Mapping[str, Any]
State = dict[str, Tensor]
Flags = tuple[bool, ...]
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Gate:
    """What was found out about all gradients of a step; tensors, so that nothing waits for the device.

    Attributes:
        clip: What to multiply them with; None for nothing.
        finite: Whether all are finite, 0-d; where not, the step changes nothing. None where it is not asked.
    """

    clip: Tensor | None = None
    finite: Tensor | None = None


class UpdateRule(ABC):
    """How one class of optimizer changes a weight.

    Everything that a user may change between two steps is a number of `numbers`, which reaches the graph as a tensor:
    a learning-rate schedule never recompiles. What decides which operations there are is in `flags`.
    """

    name: str
    """Of the optimizer whose arithmetic this is."""

    def refusal(self, group: Group, skipping: bool) -> str | None:
        """Why this rule cannot honour the options of a parameter group, and what to do; None where it can.

        Arguments:
            group: The group.
            skipping: Whether steps may turn out, on the device, to be none.
        """
        return None

    @abstractmethod
    def flags(self, group: Group) -> Flags:
        """Options of a parameter group that choose the operations of the update."""

    @abstractmethod
    def slots(self, flags: Flags) -> tuple[str, ...]:
        """Names of the state tensors, as the optimizer itself calls them; each has the shape of its weight."""

    @abstractmethod
    def numbers(self, group: Group) -> tuple[float | Tensor, ...]:
        """Hyperparameters of a group, read anew before each step."""

    @abstractmethod
    def count(self, params: Sequence[Tensor], groups: Sequence[Group], states: Sequence[State]) -> Tensor:
        """What this step is to each parameter, and make what state is missing.

        Arguments:
            params: The parameters.
            groups: The group of each.
            states: The optimizer's state of each.

        Returns:
            What `coefficients` needs to know of how often each parameter was updated, float64 [n].
        """

    @abstractmethod
    def advance(self, states: Sequence[State], finite: Tensor | None) -> None:
        """Advance the step counters, if there are any, once the step is done.

        Arguments:
            states: The optimizer's state of each parameter.
            finite: 0-d; where it is false, no counter advances. None for always.
        """

    @abstractmethod
    def coefficients(self, count: Tensor, numbers: Tensors) -> Tensors:
        """What `change` needs, for all parameters at once.

        Arguments:
            count: What `count` returned, [n].
            numbers: The hyperparameters of each parameter's group, [n] each.

        Returns:
            Coefficients, [n] each.
        """

    def directions(self, grads: Sequence[Tensor], groups: Sequence[Group], states: Sequence[State], gate: Gate) -> Gate:
        """Put in place of each gradient what can only be told from the whole of it.

        `change` works element by element, so that it may be given a weight in pieces; a rule that does not (Muon) does
        the rest of its work here.

        Arguments:
            grads: The gradients; they may be written into.
            groups: The group of each.
            states: The optimizer's state of each.
            gate: What was found out about them.

        Returns:
            What of it is still to be done.
        """
        return gate

    @abstractmethod
    def change(
        self, weight: Tensor, grad: Tensor, slots: Tensors, coefficients: Tensors, flags: Flags
    ) -> tuple[Tensor, Tensors]:
        """What this step subtracts from a weight, and the new state.

        Arguments:
            weight, grad, slots: Tensors of one shape, in the precision to compute in.
            coefficients: 0-d tensors, the entries of `coefficients` for this parameter.
            flags: Options of its group.

        Returns:
            The change, learning rate and weight decay included, and the new slots.
        """

    def kept(self, flags: Flags) -> tuple[str, ...]:
        """Names of all tensors of the shape of a weight that the optimizer keeps; `slots` are those that `change`
        reads and writes."""
        return self.slots(flags)


def add_zeros(param: Tensor, state: State, names: Sequence[str]) -> None:
    """Make the state tensors that a parameter lacks, all zero."""
    for name in names:
        if state.get(name) is None:
            state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
