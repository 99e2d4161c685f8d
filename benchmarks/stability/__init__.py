"""Trains small language models with QuacK, with other methods and without, over learning rates and seeds.

__main__.py  the command line
grid.py      the runs, their order and sizes
models.py    the models
text.py      the training text
train.py     one run
probe.py     attention logits of a batch
pool.py      many runs in a few processes
records.py   results on disk
report.py    docs/stability.md: tables; plots.py: its figures
"""
