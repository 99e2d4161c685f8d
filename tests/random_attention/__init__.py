"""Random attentions whose weight rows are known by construction, to try the finder on.

    choices.py      decisions: from a seed, from hypothesis, replayed, made smaller
    source.py       a module's source while it is written; tensors with named axes
    truth.py        what was laid out: vectors of factors, terms, the site
    projections.py  how q, k, v are stored and split into heads
    latent.py       low-rank chains, adapters, latent attention
    way.py          norms, rope and the rest between projections and logits
    logits.py       products, masks, softmax, output
    distractors.py  what looks like attention and is none
    designs.py      self, cross, joint, tied, latent ... : what queries, keys and values are made from
    attention.py    one attention module
    model.py        all of it put together: `random_model`
    compare.py      found against true
    judge.py        both together: the verdict on one model
    fuzz.py         thousands of them
    strategy.py     the decisions as hypothesis makes them
    __main__.py     one model by its number, or thousands of them

`python -m tests.random_attention 12345` shows model 12345, the truth and what was found.
"""

from .choices import Choices, shrink
from .compare import Difference, differences
from .judge import Verdict, judge
from .model import RandomModel, random_model
from .strategy import all_choices

__all__ = [
    "Choices",
    "Difference",
    "RandomModel",
    "Verdict",
    "all_choices",
    "differences",
    "judge",
    "random_model",
    "shrink",
]
