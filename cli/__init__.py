"""The command line `quack-fx`: one file a command. torch is imported only when needed, so --help is fast.

app.py       the commands in one program; errors become one line and an exit status
common.py    options, progress, from a target to its layout, writing files
inspect.py   every query/key pair of a model
convert.py   a training step with QuacK as source
verify.py    proof of the pairs by gradients
proof.py     the proof that verify and inspect --verify share
bench.py     times a training step with and without QuacK
"""
