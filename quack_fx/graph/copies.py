"""A copy of a graph, to be rewritten.

In: a `GraphModule`. Out: a copy of its graph, and the copy of each node.
"""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node


def copy_graph(graph_module: GraphModule) -> tuple[Graph, dict[Node, Node]]:
    """Copy a graph, with its calling convention.

    Arguments:
        graph_module: The module whose graph to copy; it is not changed.

    Returns:
        The copy, which belongs to no module yet, and the copy of each node of the original.
    """
    graph, copies = Graph(), dict[Node, Node]()
    for node in graph_module.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    # How arguments and results are packed (torch.export) has no public name to read it by.
    graph.set_codegen(graph_module.graph._codegen)
    return graph, copies
