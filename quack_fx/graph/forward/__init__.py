"""Contexts in which a model's forward runs on this machine, shared by `capture`, `targets` and `prove`.

machine.py    available memory, and limits on its use
gpus.py       code that requests a GPU, on a machine without one
eager.py      no compilation, no fast path, no inference mode
drawn.py      random draws by which layers are skipped
fused.py      memory layout of the results of fused attention
jagged.py     attention over nested tensors in plain ops
"""
