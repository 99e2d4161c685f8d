"""Arguments for constructors and factories: values for parameters without a default.

In: a class or function of the target, and its repository. Out: `Call`s, the likeliest first. Each builds a model, and
lists the values that were found in the repository, with file and line, and those that were assumed.

    plans.py       chooses a value for each parameter
    sources.py     values in the repository: calls, options, classes, dicts, config files
    ready.py       config objects and classes that the target's files define
    settings.py    a config object whose fields are filled in when they are read
    made_up.py     a small value for a name
    uses.py        how the code uses a name: as a flag, a choice of strings, a list
    signatures.py  parameters and annotations of a callable
    call.py        a call with the chosen values
"""

from __future__ import annotations

from quack_fx.targets.sizes.call import Call
from quack_fx.targets.sizes.plans import calls

__all__ = ["Call", "calls"]
