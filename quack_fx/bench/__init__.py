"""What a training step costs with and without QuacK, and in other ways to take it.

In: a model, its layout, a loss and a batch. Out: a `Comparison` and its table.

    arms.py     the ways to take a step
    measure.py  times that take turns, memory, kernels, what the machine could do at best
    compare.py  all ways side by side
    table.py    their table
"""

from quack_fx.bench.arms import MEANING, Case
from quack_fx.bench.compare import Comparison, Way, compare
from quack_fx.bench.table import findings, legend, markdown, setting, terminal

__all__ = ["MEANING", "Case", "Comparison", "Way", "compare", "findings", "legend", "markdown", "setting", "terminal"]
