"""How the forward of a model runs on this machine.

Each file is a context manager or a number, used by all folders that run models (`capture`, `targets`, `prove`).

    machine.py    how much memory is left
    gpus.py       code that asks for a GPU, on a machine without one
    eager.py      nothing compiled, no fast path, no inference mode
    fused.py      memory layout of the results of fused attention
    jagged.py     attention over nested tensors in plain ops
"""
