"""Training with QuacK.

In: a layout, the model and its optimizer. Out: a training step with separate learning rates for query and key rows.

    program/     writes the training step of one model as Python source that needs only torch
    convert.py   returns that source to users
    step.py      runs it, with gradient accumulation, GradScaler and several optimizers
    hooks.py     attaches QuacK to any optimizer through step hooks
    held.py      the query and key weights that an optimizer holds
    rivals/      QuacK and the methods it is compared with
    logits/      reads the largest attention logits in forward passes
    owners.py    which rows are used by one query head only
    metrics.py   norms, learning rates and growth for a logger
    places.py    the index of each head in the flattened numbers of a program
    record.py    records a run as JSON lines and for TensorBoard
    inline.py    inserts the scaling into a traced graph
    loss.py      the arguments that a loss function passes to the model
    lion.py      detects Lion
"""
