"""The command line `quack-fx`: one file per command. torch is imported only when needed, so that --help is fast.

app.py       the commands as one program; errors become one line and an exit status
options.py   arguments and options that several commands have
common.py    progress, from a target to its layout, writing files
inspect.py   every query/key pair of a model
convert.py   a training step with QuacK as source
verify.py    proof of the pairs by gradients
proof.py     the proof behind verify and inspect --verify
bench.py     times a training step with and without QuacK
tune.py      short training runs: without QuacK, with it, with QK norm
report.py    a recorded training run
watch.py     a training run while it is recorded
"""
