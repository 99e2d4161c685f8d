"""USER: a loss and its gradients as two graphs that fit each other, with what is cheap computed again.

In: the graph of a loss, as Dynamo has traced it, and its inputs. Out: a `Joint`: a forward graph and a backward graph
as torch.compile itself would cut them (its min-cut partition decides what is kept and what is computed again), not
compiled yet, so that they can become parts of a larger graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from quack_fx.errors import StepError


@dataclass(frozen=True)
class Joint:
    """Loss and gradients of one batch.

    Attributes:
        forward: From the inputs to the loss, and what is kept for the gradients.
        backward: From what was kept and the tangent of the loss to the gradients of the inputs.
        kept: Which outputs of `forward` the inputs of `backward` are, in order; None for the tangent.
        differentiable: Which inputs get a gradient.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    kept: Sequence[int | None]
    differentiable: Sequence[int]

    def __call__(self, inputs: Sequence[Any]) -> tuple[Tensor, list[Tensor]]:
        """The loss, and the gradients of the differentiable inputs."""
        found = self.forward(*inputs)
        tangent = torch.ones_like(found[0])
        grads = self.backward(*(tangent if place is None else found[place] for place in self.kept))
        return found[0], [grads[i] for i in self.differentiable]


def joint_of(loss: fx.GraphModule, inputs: Sequence[Any]) -> Joint:
    """Cut a loss's graph and that of its gradients.

    Arguments:
        loss: The graph, with the loss as its only output.
        inputs: Its inputs, parameters among them.

    Returns:
        Both graphs.

    Raises:
        StepError: The graph does more than to compute a loss.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    found: list[tuple[fx.GraphModule, fx.GraphModule, int]] = []

    def partition(
        graph: fx.GraphModule, example: Any, *, num_fwd_outputs: int, **options: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        joint_graph_passes(graph)
        forward, backward = min_cut_rematerialization_partition(graph, example, num_fwd_outputs=num_fwd_outputs)
        found.append((forward, backward, num_fwd_outputs))
        return forward, backward

    cutting = aot_autograd(
        fw_compiler=lambda graph, _: graph,  # what it makes is never called
        partition_fn=partition,
        decompositions=select_decomp_table,
        keep_inference_input_mutations=True,
    )
    cutting(loss, inputs)
    (forward, backward, outputs), *more = found
    if more or outputs != 1 or len(_inputs(forward)) != len(inputs):
        raise StepError("whole_graph=True: the model changes tensors that share memory; leave it out")
    places = {node.name: i for i, node in enumerate(_outputs(forward)) if isinstance(node, fx.Node)}
    kept = [None if name.startswith("tangents") else places[name] for name in _inputs(backward)]
    if kept.count(None) != 1:
        raise StepError("whole_graph=True: more than the loss can be differentiated; leave it out")
    forward, backward = (fx.GraphModule(graph, graph.graph) for graph in (forward, backward))  # not lazy ones
    return Joint(forward, backward, kept, [i for i, grad in enumerate(_outputs(backward)) if grad is not None])


def _inputs(graph: fx.GraphModule) -> list[str]:
    return [node.name for node in graph.graph.nodes if node.op == "placeholder"]


def _outputs(graph: fx.GraphModule) -> Sequence[Any]:
    (outputs,) = graph.graph.output_node().args
    assert isinstance(outputs, (tuple, list))
    return outputs
