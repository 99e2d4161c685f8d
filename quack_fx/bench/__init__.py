"""Times a training step with and without QuacK, and in other implementations.

In: a model, its layout, a loss and a batch. Out: a `Comparison` and its table.

    arms.py     the ways to take a step
    measure.py  interleaved timing, peak memory, kernels, limits of the machine
    compare.py  measures all ways in one process
    table.py    their table
"""

from quack_fx.bench.arms import MEANING, Case
from quack_fx.bench.compare import Comparison, Way, compare
from quack_fx.bench.table import findings, legend, markdown, setting, terminal

__all__ = ["MEANING", "Case", "Comparison", "Way", "compare", "findings", "legend", "markdown", "setting", "terminal"]
