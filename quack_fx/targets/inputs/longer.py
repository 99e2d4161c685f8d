"""Makes inferred inputs longer if parts of an attention run on long sequences only.

In: inputs for which the forward runs, and its recording. Out: the same, or longer inputs with their recording. With
compressed keys, for example, an attention has some of its keys only from the first full window on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from quack_fx.errors import CaptureError
from quack_fx.graph.capture import Capture
from quack_fx.graph.ops import op_of
from quack_fx.targets.inputs.changes import changed, refilled
from quack_fx.targets.inputs.values import TOKENS, Inputs

LENGTHS = (512, 64)
"""Tokens of a sequence to try; the second where the model takes no sequence as long as the first."""


def long_enough(
    model: nn.Module, inputs: Inputs, recording: Capture, record: Callable[[Inputs], Capture]
) -> tuple[Inputs, Capture]:
    """The inputs, or longer ones on which more of the attentions' parameters are read, and their recording.

    Arguments:
        model: The model.
        inputs: Inferred inputs.
        recording: The recorded forward on them.
        record: Records the forward on other inputs; raises `CaptureError` if it fails.
    """
    unread = unread_in_attention(model, recording)
    for length in LENGTHS if unread else ():
        longer = changed(inputs, partial(_longer, length=length))
        if longer.text == inputs.text:
            break
        try:
            again = record(longer)
        except CaptureError:
            continue
        return (longer, again) if len(unread_in_attention(model, again)) < len(unread) else (inputs, recording)
    return inputs, recording


def unread_in_attention(model: nn.Module, recording: Capture) -> set[str]:
    """Parameters that no op read, of modules whose forward computes attention weights, and of modules within those."""
    nodes = recording.graph_module.graph.nodes
    stacks = [n.meta.get("nn_module_stack") for n in nodes if op_of(n).kind in ("softmax", "attention")]
    modules = tuple({f"{[*stack.values()][-1][0]}." for stack in stacks if stack} - {"."})
    read = {node.target for node in nodes if node.op == "get_attr" and node.users}
    return {name for name, _ in model.named_parameters() if name.startswith(modules) and name not in read}


def _longer(x: Tensor, length: int) -> Tensor | None:
    """A tensor with sequences of another length; None if it has no axis of tokens."""
    if TOKENS not in x.shape:
        return None
    return refilled(x, tuple(length if size == TOKENS else size for size in x.shape))
