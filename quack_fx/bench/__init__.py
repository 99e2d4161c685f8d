"""Times a training step with and without QuacK, and compares short training runs.

In: a model, its layout, a loss and a batch. Out: a `Comparison` and its table. Or, from several batches, the losses of
short training runs and a recommendation.

    arms.py         implementations of a training step
    measure.py      interleaved timing, peak memory, kernels, limits of the machine
    compare.py      measures all implementations in one process
    table.py        formats the measurements
    normed.py       a model with QK norm, to compare with
    tune.py         short training runs over learning rates and seeds
    tune_text.py    a language model's loss and batches from bytes
    tune_advice.py  the table of these runs, and the recommendation
"""

from quack_fx.bench.arms import MEANING, Case
from quack_fx.bench.compare import Comparison, Way, compare
from quack_fx.bench.table import findings, legend, markdown, setting, terminal

__all__ = ["MEANING", "Case", "Comparison", "Way", "compare", "findings", "legend", "markdown", "setting", "terminal"]
