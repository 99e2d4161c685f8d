"""USER: the training step of one model, written down as Python that needs torch alone.

In: a layout and the shapes of its parameters. Out: source text. It is complete for AdamW and tested against the hooks
of `quack_fx.optim`; `convert` and `compile_train_step` do not hand it out yet.

    kinds.py     the layout as kinds of attention: equal attentions once
    rows.py      rows of heads as expressions
    rule.py      the factors of a kind's blocks as expressions
    write.py     both as classes and functions in the model's own names
    parts/       what is the same for every model: real code, copied
    source.py    all of that put together
    text.py      small pieces of source
"""
