"""The training step of one model, written down as Python that needs torch alone.

In: a layout and the shapes of its parameters. Out: source, which `convert` hands out and `compile_train_step` runs.

    kinds.py     the layout as kinds of attention: equal attentions once
    rows.py      rows of heads as expressions
    rule.py      the factors of a kind's blocks as expressions
    write.py     both as classes and functions in the model's own names
    norms.py     the QK norms that it takes out of the model
    about.py     its docstring
    parts/       what is the same for every model: real code, copied
    source.py    all of that put together
    text.py      small pieces of source
    names.py     names of parameters as it writes them
    execute.py   the text, run
    scaling.py   that of a model as it stands, and the scales of its rows
"""
