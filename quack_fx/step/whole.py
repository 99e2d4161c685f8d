"""USER: loss, backward and update of one batch as one compiled graph.

In: the loss as a function, and the updates of its optimizers. Out: `WholeStep`: called with a batch, it gives the loss,
and all weights are changed.

Dynamo traces the loss and watches over what it depends on, as it does for torch.compile(model); in place of a compiler
it is given `WholeStep._made`, which joins the loss's graph with that of its gradients and with the updates, and
compiles the whole. Parameters and their state enter it whole, or in the shape of their piece where it is a single one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException

from quack_fx.errors import StepError, first_line
from quack_fx.step.compiling import Compiler, own_code
from quack_fx.step.gradients import look_at
from quack_fx.step.heads import Scaling, span_scales
from quack_fx.step.joint import Joint, joint_of
from quack_fx.step.loops import change, meet, wide
from quack_fx.step.pieces import Piece
from quack_fx.step.rules import Flags, Gate, Group, State, UpdateRule
from quack_fx.step.update import Turn, Update


class Part(NamedTuple):
    """A parameter as the graph takes it.

    One that is a single piece enters in the shape of the piece, and its state does: where they came whole, the compiler
    would not fuse what it writes into them with the sum of squares.

    Attributes:
        row: Which coefficients are its own.
        grad: Which of the gradients is.
        weight: What is updated.
        slots: Its state, as the rule has it.
        rounded: Where to write the new weight in the parameter's own type, where it is a master; else None.
        pieces: The pieces that it is updated in; None for the whole.
        flags: Options of its group.
        loss: Which input of the loss it is, and its shape there, where it enters in the shape of its piece; else None.
    """

    row: int
    grad: int
    weight: Tensor
    slots: tuple[Tensor, ...]
    rounded: Tensor | None
    pieces: tuple[Piece | None, ...]
    flags: Flags
    loss: tuple[int, tuple[int, ...]] | None

    def tensors(self) -> tuple[Tensor, ...]:
        """What is written."""
        return (self.weight, *self.slots, *([] if self.rounded is None else [self.rounded]))

    def view(self, tensor: Tensor, piece: Piece | None) -> Tensor:
        """What a piece is of the weight or of its state."""
        return tensor if piece is None or self.loss is not None else piece.of(tensor)


class Share(NamedTuple):
    """What the graph does for one optimizer.

    Attributes:
        rule: Its arithmetic.
        parts: Its parameters, those with heads last.
        groups: The group of each.
        states: The optimizer's state of each.
        coefficients: Those of the rule, [parameters, coefficients], in the precision to compute in.
        squares: Squared norms of all spans, [n_spans]; None without QuacK.
        scaling: What turns them into scales; None likewise.
    """

    rule: UpdateRule
    parts: list[Part]
    groups: list[Group]
    states: list[State]
    coefficients: Tensor
    squares: Tensor | None
    scaling: Scaling | None


class WholeStep:
    """A training step as one graph.

    Arguments:
        loss: The loss of a batch, see `make_loss`.
        updates: What each optimizer does.
        clip_grad_norm: Largest total norm of the gradients; None for no limit.
        skip_nonfinite: Whether a step whose gradients are not all finite changes nothing.
        compiler: How to compile.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor | str],
        updates: Sequence[Update],
        clip_grad_norm: float | None,
        skip_nonfinite: bool,
        compiler: Compiler,
    ) -> None:
        self._updates, self._asked, self._compiler = updates, (clip_grad_norm, skip_nonfinite), compiler
        self._loss = torch.compile(loss, backend=self._made, fullgraph=True, dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | str:
        """Train on one batch.

        Returns:
            Its loss, detached; or what the model returned in its place, and then nothing has changed.

        Raises:
            StepError: It cannot be one graph; nothing has changed.
        """
        try:
            return self._loss(*args, **kwargs)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, StepError):
                raise error.inner_exception from None
            raise StepError(
                f"whole_graph=True: the compiler fails ({first_line(error.inner_exception)}); leave it out"
            ) from error
        except TorchDynamoException as error:
            raise StepError(
                f"whole_graph=True needs a loss that torch.compile takes in one graph: {first_line(error)}"
            ) from error

    def _made(self, loss: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Backend of Dynamo: from the graph of the loss to a function that takes the whole step."""
        values = [node.meta["example_value"] for node in loss.graph.output_node().all_input_nodes]
        if not values:
            return loss  # what the model returned is no loss, and is described
        if len(values) > 1:
            raise StepError("whole_graph=True: the model keeps tensors from one batch to the next; leave it out")
        if not values[0].requires_grad:
            raise StepError("the loss does not depend on any parameter that requires a gradient")
        if any(isinstance(p, nn.Parameter) and (p._backward_hooks or p._post_accumulate_grad_hooks) for p in inputs):
            raise StepError("whole_graph=True would not call the hooks on gradients of parameters; leave it out")
        joint = joint_of(loss, inputs)
        compiled = self._compiler(_make_whole(joint, *self._asked), sizes="fixed", fullgraph=True)

        def step(*inputs: Any) -> tuple[Tensor]:
            with torch.no_grad():
                places = {id(inputs[place]): (i, place) for i, place in enumerate(joint.differentiable)}
                held = [(update, [p for p in update.params if id(p) in places]) for update in self._updates]
                turns = [(update, update.turn(params)) for update, params in held if params]
                shares = [_share(update, turn, places) for update, turn in turns]
                for share in shares:
                    self._compiler.stays([share.squares, *(t for part in share.parts for t in part.tensors())])
                value, finite = compiled(_left(inputs, shares), shares)
                for update, turn in turns:
                    update.done(turn, finite)
            return (value,)

        return step


def _share(update: Update, turn: Turn, places: dict[int, tuple[int, int]]) -> Share:
    """What an update asks of the graph; `places` are those of gradients and inputs of the loss, by parameters' ids."""
    parts = []
    for row, (param, weight, slots) in enumerate(zip(turn.params, turn.weights, turn.slots(update.rule), strict=True)):
        grad, place = places[id(param)]
        views = update.views.of(param, weight.detach(), slots)
        pieces = tuple(view.piece for view in views)
        if len(views) == 1 and pieces != (None,):
            view, loss = views[0], (place, tuple(param.shape))
            parts.append(Part(row, grad, view.weight, view.slots, view.rounded, pieces, turn.flags[row], loss))
        else:
            target, rounded = (weight, param) if weight.dtype != param.dtype else (param, None)
            parts.append(Part(row, grad, target, tuple(slots), rounded, pieces, turn.flags[row], None))
    parts.sort(key=lambda part: part.pieces != (None,))
    coefficients = turn.coefficients.to(parts[0].weight.device, wide(turn.weights), non_blocking=True)
    groups, states = [turn.groups[part.row] for part in parts], [turn.states[part.row] for part in parts]
    return Share(update.rule, parts, groups, states, coefficients, turn.squares, turn.scaling)


def _left(inputs: Sequence[Any], shares: Sequence[Share]) -> list[Any]:
    """The inputs of the loss without those that enter in the shape of their piece."""
    cut = {part.loss[0] for share in shares for part in share.parts if part.loss is not None}
    return [None if i in cut else value for i, value in enumerate(inputs)]


def _make_whole(joint: Joint, clip_grad_norm: float | None, skip_nonfinite: bool) -> Callable[..., Any]:
    """The function, to be compiled, that takes a whole step: its loss, and whether all gradients are finite."""

    def whole(inputs: list[Any], shares: list[Share]) -> tuple[Tensor, Tensor | None]:
        met = [part for share in shares for part in share.parts]
        for part in sorted(met, key=lambda part: part.pieces == (None,)):
            meet(part.tensors())
        for part in met:
            if part.loss is not None:
                place, shape = part.loss
                inputs[place] = (part.weight if part.rounded is None else part.rounded).view(shape)
        loss, grads = joint(inputs)
        held = [grads[part.grad] for share in shares for part in share.parts]
        gate = look_at(held, clip_grad_norm, skip_nonfinite)
        for share in shares:
            _change(share, [grads[part.grad] for part in share.parts], gate)
        return loss, gate.finite

    return own_code(whole)


def _change(share: Share, grads: list[Tensor], gate: Gate) -> None:
    """The part of the graph that changes what one optimizer holds."""
    squares = share.squares
    scales = None if squares is None or share.scaling is None else span_scales(squares, share.scaling)
    left = share.rule.directions(grads, share.groups, share.states, gate)
    sums: dict[int, Tensor] = {}
    for part, whole in zip(share.parts, grads, strict=True):
        coefficients = share.coefficients[part.row]
        for piece in part.pieces:
            weight, slots = part.view(part.weight, piece), tuple(part.view(slot, piece) for slot in part.slots)
            grad = whole if piece is None else piece.of(whole.contiguous())
            spans = range(0) if piece is None else piece.numbers()
            scale = None
            if piece is not None and scales is not None and spans:
                scale = piece.along(scales[spans.start : spans.stop], weight)
            rounded = None if part.rounded is None else part.view(part.rounded, piece)
            written = change(share.rule, weight, grad, slots, rounded, part.flags, coefficients, left, scale)
            if piece is not None and squares is not None and spans:
                sums[spans.start] = piece.squares(written.to(squares.dtype)).flatten()
    if squares is not None and sums:
        squares.copy_(_joined(squares, sums))


def _joined(old: Tensor, sums: dict[int, Tensor]) -> Tensor:
    """New squared norms of all spans: those that were summed up, by their first number, and the old of the others."""
    parts, end = [], 0
    for first in sorted(sums):
        parts += [old[end:first], sums[first]]
        end = first + sums[first].shape[0]
    return torch.cat([*parts, old[end:]])
