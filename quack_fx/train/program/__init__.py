"""Writes the training step of one model as Python source that needs only torch (the program).

In: a layout and the shapes of its parameters. Out: source code, which `convert` returns and `compile_train_step` runs.

    kinds.py     groups the attentions of a layout into kinds, so that equal attentions are written once
    rows.py      the rows of each head, as expressions
    rule.py      the factor of each block, as expressions
    write.py     the classes and functions of each kind, with names from the model; the QK norms that it removes
    about.py     the program's docstring
    parts/       code that is the same for every model and is copied into the program
    source.py    assembles the program from these
    text.py      helpers that format source code and names
    scaling.py   writes and runs the program of a given model; spectral norms
    zeros.py     support for weights that are zero at the start
"""
