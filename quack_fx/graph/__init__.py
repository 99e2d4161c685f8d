"""What is true of any ATen graph, whatever is looked for in it.

ops.py       ATen ops in the few kinds that matter for following weight rows
dataflow.py  what every node depends on, and which nodes are windows on the same memory
copies.py    a copy of a graph, to be rewritten
capture/     a model and example inputs -> the graph of one forward
forward/     how a forward of a model runs here: memory, GPUs that are not there, kernels written out
"""
