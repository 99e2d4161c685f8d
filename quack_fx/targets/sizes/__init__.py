"""Values for what a constructor or a factory asks for and has no default of.

In: a class or function of the target, and the repository it lies in. Out: `Call`s, the likeliest first, each of which
makes a model and says with which values: those found in the repository, with their place, and those that were assumed.

    uses.py      what the code does with a name: a flag, a choice of words, a list
    sources.py   sizes that stand somewhere in the repository
    made_up.py   a small value by a name
    settings.py  a config object that is filled in as it is read
    ready.py     configs and parts that the files have ready
    signatures.py  what a callable takes
    plans.py     a value for each parameter
    call.py      a call with those values
"""

from __future__ import annotations

from quack_fx.targets.sizes.call import Call
from quack_fx.targets.sizes.plans import calls

__all__ = ["Call", "calls"]
