"""USER: the optimizers that an emitted file can carry.

In: the name of one. Out: its classes and their arithmetic as source, and what the file's docstring says of it.

The arithmetic is that of `quack_fx/step/rules/`, as text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quack_fx.emit.library import flattened
from quack_fx.errors import EmitError

_BASE = ("step/rules/rule.py", "UpdateRule")
_MEMBERS = (
    "refusal", "flags", "slots", "kept", "numbers", "count", "advance", "coefficients", "directions", "change",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One class of optimizer.

    Attributes:
        name: Its name, as torch.optim has it.
        chain: Its rule and what that inherits from.
        helpers: Functions that its rule calls.
        lr: Type of its learning rate.
        own: Whether torch.optim does not have it.
    """

    name: str
    chain: tuple[tuple[str, str], ...]
    helpers: tuple[tuple[str, str], ...] = ()
    lr: str = "float | Tensor"
    own: bool = False

    @property
    def rule(self) -> str:
        """Name of its rule in the emitted file."""
        return f"{self.name}Rule"

    def rule_source(self) -> str:
        """The rule's class."""
        return flattened(self.rule, (*self.chain, _BASE), _MEMBERS)


_ADAM_RULE = ("step/rules/adam.py", "AdamRule")
_LOG = ("step/rules/adam.py", "_log")
_ADAM = Kind("Adam", (_ADAM_RULE,), (_LOG,))
_ADAMW = Kind("AdamW", (("step/rules/adam.py", "AdamWRule"), _ADAM_RULE), (_LOG,))


@dataclass(frozen=True)
class Choice:
    """An optimizer to choose.

    Attributes:
        kinds: The classes that the file carries; several where the first takes some parameters only.
        making: Lines that make them, for the docstring.
        passed: How they are passed to the training step.
    """

    kinds: tuple[Kind, ...]
    making: tuple[str, ...]
    passed: str = "optimizer"

    @property
    def several(self) -> bool:
        """Whether it takes more than one to train a model."""
        return len(self.kinds) > 1

    @property
    def title(self) -> str:
        """Its name."""
        return " and ".join(kind.name for kind in self.kinds)

    @property
    def like(self) -> str:
        """What it is in all else than QuacK."""
        bases = [f"torch.optim.{'Optimizer' if kind.own else kind.name}" for kind in self.kinds]
        return f"the optimizers are {' and '.join(bases)}" if self.several else f"the optimizer is a {bases[0]}"


CHOICES = {
    "adamw": Choice((_ADAMW,), ("optimizer = QuacKAdamW(model, lr=3e-4, weight_decay=0.1)",)),
    "adam": Choice((_ADAM,), ("optimizer = QuacKAdam(model, lr=3e-4)",)),
    "sgd": Choice(
        (Kind("SGD", (("step/rules/sgd.py", "SGDRule"),)),), ("optimizer = QuacKSGD(model, lr=0.1, momentum=0.9)",)
    ),
    "muon": Choice(
        (Kind("Muon", (("step/rules/muon.py", "MuonRule"),), lr="float"), _ADAMW),
        (
            "muon = QuacKMuon(model, lr=0.02, param_groups=matrices)  # those of the hidden layers",
            "adamw = QuacKAdamW(model, lr=3e-4, param_groups=others)  # embeddings, output, norms, biases",
        ),
        "[muon, adamw]",
    ),
    "lion": Choice(
        (Kind("Lion", (("step/rules/lion.py", "LionRule"),), own=True),),
        ("optimizer = QuacKLion(model, lr=1e-4, weight_decay=1.0)",),
    ),
}
"""By the name that users choose them by."""

OptimizerName = Literal["adamw", "adam", "sgd", "muon", "lion"]


def choice(name: str) -> Choice:
    """The optimizer of a name.

    Raises:
        EmitError: There is none.
    """
    if name not in CHOICES:
        raise EmitError(f"optimizer {name!r} is not one of {', '.join(CHOICES)}")
    return CHOICES[name]
