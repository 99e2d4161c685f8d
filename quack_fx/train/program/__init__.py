"""The training step of one model, written as Python that needs torch alone.

In: a layout and the shapes of its parameters. Out: source code, which `convert` returns and `compile_train_step` runs.

    kinds.py     groups the attentions of a layout into kinds, so that equal attentions are written once
    rows.py      the rows of each head, as expressions
    rule.py      the factor of each block, as expressions
    write.py     the classes and functions of each kind, in the model's own names
    norms.py     the QK norms that the program removes from the model
    about.py     the program's docstring
    parts/       code that is the same for every model; it is copied into the program
    source.py    puts these together
    text.py      helpers that lay out source code as a formatter does
    names.py     names of parameters, as variables and as templates with numbers
    execute.py   runs the source as a module
    scaling.py   writes and runs the program of a given model; the spectral norm
    zeros.py     weights that start at zero
"""
