"""One random model, judged: right, refused, wrong or crashed.

In: decisions. Out: a `Verdict`.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass

from quack_fx.errors import QuackError
from quack_fx.find import find_qk_pairs
from quack_fx.layout import QKLayout

from .choices import Choices
from .compare import Difference, differences
from .model import RandomModel, random_model


@dataclass(frozen=True)
class Verdict:
    """What came out of one model; `found` is None where the finder raised."""

    model: RandomModel
    found: QKLayout | None
    differences: tuple[Difference, ...]

    @property
    def sort(self) -> str:
        """The first difference's sort; "right" where there is none."""
        return self.differences[0].sort if self.differences else "right"


def judge(choices: Choices) -> Verdict:
    """Make a model and hold what is found in it against the truth."""
    model = random_model(choices)
    try:
        found = find_qk_pairs(model.model, *model.inputs)
    except QuackError as error:
        return Verdict(model, None, (Difference("crash", f"{type(error).__name__}: {error}"),))
    except Exception as error:
        text = "".join(traceback.format_exception(error)[-3:])
        return Verdict(model, None, (Difference(f"crash {type(error).__name__}", text),))
    shapes = {name: tuple(p.shape) for name, p in model.model.named_parameters()}
    return Verdict(model, found, tuple(differences(model.expected, found, shapes)))
