"""The command line `quack-fx`. One file a command; none imports torch before it is needed, so help comes at once.

app.py       the commands in one program; errors become one line and an exit status
common.py    what the commands share: options, progress, finding, writing files
inspect.py   every query/key pair of a model
convert.py   a training step with QuacK as source
verify.py    proof of the pairs on real numbers
bench.py     what QuacK adds to a compiled step of a model
"""
