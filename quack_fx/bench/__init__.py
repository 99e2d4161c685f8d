"""What a training step costs with and without QuacK, and what it brings.

In: a model, its layout, a loss and a batch. Out: a `Comparison` and its table. Or, from several batches, losses after
short training runs, and what they say.

    arms.py         the ways to take a step
    measure.py      times that take turns, memory, kernels, what the machine could do at best
    compare.py      all ways side by side
    table.py        their table
    normed.py       a model with QK norm, to compare with
    tune.py         short training runs, over learning rates and seeds
    tune_text.py    a language model's loss and batches out of bytes
    tune_advice.py  the table of those runs, and what follows from them
"""

from quack_fx.bench.arms import MEANING, Case
from quack_fx.bench.compare import Comparison, Way, compare
from quack_fx.bench.table import findings, legend, markdown, setting, terminal

__all__ = ["MEANING", "Case", "Comparison", "Way", "compare", "findings", "legend", "markdown", "setting", "terminal"]
