"""A copy of a graph, to be rewritten.

In: a `GraphModule`. Out: its graph once more, and which node of it stands for which of the original.
"""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node


def copy_graph(graph_module: GraphModule) -> tuple[Graph, dict[Node, Node]]:
    """Copy a graph, with the way in which it is called.

    Arguments:
        graph_module: Whose graph; it is not changed.

    Returns:
        The copy, which belongs to no module yet, and for each node of the original its copy.
    """
    graph, copies = Graph(), dict[Node, Node]()
    for node in graph_module.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    # How arguments and results are packed (torch.export) has no public name to read it by.
    graph.set_codegen(graph_module.graph._codegen)
    return graph, copies
