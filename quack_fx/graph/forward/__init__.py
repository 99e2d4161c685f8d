"""How the forward of a model runs on this machine, whoever runs it.

Each file is a context, or a number; all that run models (`capture`, `targets`, `prove`) share them.

    machine.py    how much memory is left
    gpus.py       code that asks for a GPU, on a machine without one
    inference.py  forwards that switch inference mode on, run without it
    fused.py      what fused attention gives back, as its kernels lay it out in memory
    jagged.py     attention over nested tensors in plain ops
"""
