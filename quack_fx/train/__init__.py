"""Training with QuacK.

In: a layout, the model and its optimizer. Out: a training step whose query and key rows have learning rates of their
own.

    program/     the training step of one model, written down as Python that needs torch alone
    convert.py   that text for users
    step.py      the same text, run, with accumulation, scaler, several optimizers
    hooks.py     QuacK on any optimizer's own step
    held.py      the weights that an optimizer holds
    rivals/      what QuacK, and methods to compare it with, do in a step
    logits/      the largest attention logits, read in forward passes
    owners.py    which rows make the logits of one head alone
    metrics.py   norms, learning rates and growth as numbers for a logger
    places.py    where the numbers of a head stand among those of a program
    record.py    a run as a file of JSON lines, and TensorBoard
    inline.py    the scaling inside a graph that somebody traced
    loss.py      what a loss function feeds its model
    lion.py      whether an optimizer is Lion
"""
