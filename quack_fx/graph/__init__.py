"""What holds for any ATen graph, whatever is looked for in it.

ops.py       ATen ops in the few kinds that matter for following weight rows
dataflow.py  what every node depends on, and which nodes are views of the same memory
walk.py      a walk that reaches each node once
copies.py    a copy of a graph, to be rewritten
capture/     a model and example inputs -> the graph of one forward
forward/     how a forward runs on this machine: memory, missing GPUs, fused kernels as plain ops
"""
