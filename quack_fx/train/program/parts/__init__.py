"""What a program has whatever the model: real code, checked and tested here, which `source.py` copies into programs.

A statement that ends with the comment `if FEATURE`, or `if not FEATURE`, is copied into such programs only.

    quack.py     the scale of every query and key row
    sharded.py   weights of which each rank holds a part
    norms.py     QK norms are taken out
    change.py    how weights are changed, whatever the optimizer
    adamw.py     Adam and AdamW
    sgd.py, muon.py, lion.py
    masters.py   fp32 copies of weights in half precision
    step.py      loss, backward, update
"""
