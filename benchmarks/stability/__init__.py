"""Small language models trained with QuacK, with its rivals and with nothing, over learning rates and seeds.

__main__.py  the command line
grid.py      which runs, in which order, at which sizes
models.py    the models
text.py      what they read
train.py     one run
probe.py     attention logits of a batch
pool.py      many runs in a few processes
records.py   their results on the disk
report.py    docs/stability.md: tables; plots.py its pictures
"""
