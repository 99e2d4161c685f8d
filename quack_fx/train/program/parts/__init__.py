"""The code of a program that is the same for every model. It is checked and tested here; `source.py` copies it.

A statement that ends with the comment `if FEATURE` is copied only into programs with that feature; one that ends with
`if not FEATURE`, only into programs without it.

    quack.py     the scale of every query and key row
    sharded.py   weights of which each rank holds a part
    norms.py     removes QK norms from the model
    change.py    the update of weights, whatever the optimizer
    adamw.py     Adam and AdamW
    sgd.py, muon.py, lion.py
    masters.py   fp32 copies of weights in half precision
    step.py      loss, backward, update
"""
