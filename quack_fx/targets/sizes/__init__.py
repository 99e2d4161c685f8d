"""Arguments for constructors and factories: values for parameters without a default.

In: a class or function of the target, and its repository. Out: `Call`s, likeliest first (`plans.py`). Each builds a
model, and lists the values that were found in the repository (`sources.py`) and those that were assumed (`made_up.py`).
"""

from __future__ import annotations

from quack_fx.targets.sizes.call import Call
from quack_fx.targets.sizes.plans import calls

__all__ = ["Call", "calls"]
