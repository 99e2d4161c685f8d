"""Copy a graph before rewriting it.

In: a `GraphModule`. Out: a copy of its graph, and a map from each node to its copy.
"""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node


def copy_graph(graph_module: GraphModule) -> tuple[Graph, dict[Node, Node]]:
    """Copy a graph, including its calling convention.

    Arguments:
        graph_module: The module whose graph to copy; it is not changed.

    Returns:
        The copy, which belongs to no module yet, and a map from each node of the original to its copy.
    """
    graph, copies = Graph(), dict[Node, Node]()
    for node in graph_module.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    # Private: torch has no public getter for the codegen, which packs arguments and results (torch.export).
    graph.set_codegen(graph_module.graph._codegen)
    return graph, copies
