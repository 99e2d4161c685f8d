"""Tools for any ATen graph, independent of the search for attention.

ops.py       ATen ops, grouped into the kinds that matter for tracing weight rows
dataflow.py  what every node depends on, and which nodes are views of the same memory
walk.py      graph traversal that visits each node once
copies.py    copy a graph before rewriting it
capture/     a model and example inputs -> the graph of one forward pass
forward/     how a forward runs on this machine: memory, missing GPUs, fused kernels as plain ops
"""
