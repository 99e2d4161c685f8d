"""Training with QuacK.

In: a layout, the model and its optimizer. Out: a training step with separate learning rates for query and key rows.

    program/     writes the training step of one model as Python source that needs only torch
    convert.py   returns that source to users
    step.py      runs it, with gradient accumulation, GradScaler and several optimizers
    hooks.py     attaches QuacK to any optimizer through step hooks
    held.py      the query and key weights that an optimizer holds
    rivals/      QuacK and the methods it is compared with
    logits/      reads the largest attention logits in forward passes
    metrics.py   norms, learning rates and growth for a logger
    units.py     the rows of each head: who else uses them, and their index in the numbers of a program
    record.py    records a run as JSON lines and for TensorBoard
    inline.py    inserts the scaling into a traced graph
    loss.py      the arguments that a loss function passes to the model
    suited.py    whether QuacK suits an optimizer, and whether it is Lion
    ranks.py     makes sure that ranks take the same steps
"""
