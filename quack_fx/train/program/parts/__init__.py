"""What a program has whatever the model: real code, checked and tested here, which `source.py` copies into programs.

quack.py    the scale of every query and key row
look.py     clipping, and whether all gradients are finite
adamw.py    AdamW of torch.optim
step.py     loss, backward, update
"""
