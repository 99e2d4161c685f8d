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
    from torch._guards import detect_fake_mode
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.virtualized import V

    found: list[tuple[fx.GraphModule, fx.GraphModule, int]] = []

    def partition(
        graph: fx.GraphModule, example: Any, *, num_fwd_outputs: int, **options: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        with V.set_fake_mode(detect_fake_mode()):
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
    saved = iter(range(1, len(_outputs(forward))))
    kept = [None if name.startswith("tangents") else next(saved, None) for name in _inputs(backward)]
    if kept.count(None) != 1:
        raise StepError("whole_graph=True: more than the loss can be differentiated; leave it out")
    for graph in (forward, backward):
        _draw_nothing(graph.graph)
    forward, backward = (fx.GraphModule(graph, graph.graph) for graph in (forward, backward))  # not lazy ones
    return Joint(forward, backward, kept, [i for i, grad in enumerate(_outputs(backward)) if grad is not None])


def _draw_nothing(graph: fx.Graph) -> None:
    """Take out what remembers random numbers for ops that are computed again, but draw none (attention, mostly).

    Raises:
        StepError: One draws some.
    """
    from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state

    for node in graph.find_nodes(op="call_function", target=run_and_save_rng_state):
        again, (output,) = _by_itself(graph, node, *node.args), graph.find_nodes(op="output")
        of_state = {user for user in node.users if user.args[1] == 0}
        for user in node.users.keys() - of_state:
            user.replace_all_uses_with(again)
        output.args = ([None if value in of_state else value for value in output.args[0]],)
    for node in graph.find_nodes(op="call_function", target=run_with_rng_state):
        _, *called = node.args
        node.replace_all_uses_with(_by_itself(graph, node, *called))
    graph.eliminate_dead_code()


def _by_itself(graph: fx.Graph, node: fx.Node, op: Any, *args: Any) -> fx.Node:
    """The op that a node calls, called by itself."""
    defaults = {argument.name: argument.default_value for argument in op._schema.arguments}
    given = defaults | dict(zip(defaults, args, strict=False)) | node.kwargs
    if given.get("dropout_p") != 0:
        raise StepError("whole_graph=True: random numbers are drawn inside what is computed again; leave it out")
    with graph.inserting_before(node):
        return graph.call_function(op, args, dict(node.kwargs))


def _inputs(graph: fx.GraphModule) -> list[str]:
    return [node.name for node in graph.graph.nodes if node.op == "placeholder"]


def _outputs(graph: fx.GraphModule) -> Sequence[Any]:
    (outputs,) = graph.graph.output_node().args
    assert isinstance(outputs, (tuple, list))
    return outputs
