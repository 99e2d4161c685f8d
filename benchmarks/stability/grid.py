"""The runs of the experiment, and their order.

In: the name of a preset. Out: its `Setup`, and `Run`s in an order that allows stopping after any run: each seed covers
the whole grid before the next seed starts, and the most informative learning rates come first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal

from benchmarks.stability.models import ATTENTIONS, Shape
from quack_fx.train.rivals import THRESHOLD, MethodName

Kind = MethodName | Literal["qk-norm"]


@dataclass(frozen=True)
class Method:
    """A method to control attention logits.

    Attributes:
        kind: "none", "qk-norm", or a `method` of `quack_fx.QuacK`.
        tau: Learning rate of queries and keys, relative to that of the other weights.
        threshold: qk-clip scales heads with logits above this value.
    """

    kind: Kind
    tau: float = 1.0
    threshold: float = THRESHOLD

    @property
    def name(self) -> str:
        """The method's name in tables and records."""
        if self.kind in ("none", "qk-norm"):
            return self.kind
        return f"{self.kind} {self.threshold if self.kind == 'qk-clip' else self.tau:g}"

    def fits(self, attention: str, optimizer: str) -> bool:
        """Whether the method applies: "compositional" was published for Muon with one query and one key projection."""
        return self.kind != "compositional" or (attention, optimizer) == ("mha", "muon")


METHODS = (
    Method("none"),
    Method("quack", 1.0),
    Method("qk-norm"),
    Method("qk-clip", threshold=30.0),
    Method("quack", 0.1),
    Method("constant", 0.1),
    Method("qk-clip", threshold=100.0),
    Method("quack", 0.01),
    Method("quack", 10.0),
    Method("compositional", 1.0),
)
"""The methods to compare; a constant tau of 1 would be the same as none."""

LONG_METHODS = METHODS[:6]
"""The methods to compare in the long runs."""


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        attention: Key of `ATTENTIONS`.
        optimizer: "muon" (together with AdamW) or "adamw".
        method: The method to control logits.
        lr: Learning rate of the matrices.
        seed: Seed of the weights and the batches.
        steps: Number of steps.
    """

    attention: str
    optimizer: str
    method: Method
    lr: float
    seed: int
    steps: int

    @property
    def key(self) -> str:
        """A unique name of the run."""
        method = self.method.name.replace(" ", "-")
        return f"{self.attention}-{self.optimizer}-{method}-lr{self.lr:g}-seed{self.seed}-steps{self.steps}"

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Run:
        """From its JSON form."""
        return cls(**{**d, "method": Method(**d["method"])})


@dataclass(frozen=True)
class Setup:
    """The settings that all runs of a preset share.

    Attributes:
        shape: Sizes of the models.
        sequences: Sequences in a batch in memory.
        accumulate: Number of batches whose gradients are accumulated for one step.
        positions: Positions in a sequence.
        steps: Steps of a run.
        long_steps: Steps of the long runs.
        check_batches: Number of batches for the validation loss.
        probed: Number of sequences of the probe batch for which logits are read.
        points: Points on the curves of a run.
        lrs: Learning rates of each optimizer, the most informative first.
        other_lr: Learning rate of AdamW, which trains embeddings and gains if the optimizer is Muon.
        weight_decay: Weight decay of the matrices.
        seeds: Number of seeds.
        long_lr: Optimizer and learning rate of the long runs, for each attention.
        device: Device of the models.
        bf16: Whether the forward runs under bf16 autocast.
        compile: Whether the models are compiled.
    """

    shape: Shape
    sequences: int
    accumulate: int
    positions: int
    steps: int
    long_steps: int
    check_batches: int
    probed: int
    points: int
    lrs: Mapping[str, tuple[float, ...]]
    other_lr: float
    weight_decay: float
    seeds: int
    long_lr: Mapping[str, tuple[str, float]]
    device: str = "cpu"
    bf16: bool = False
    compile: bool = False

    def runs(self, long: bool = False) -> Iterator[Run]:
        """All runs, in order.

        Arguments:
            long: Whether to return the long runs at the points of `long_lr` instead of the grid.
        """
        if long:
            for seed, method in product(range(self.seeds), LONG_METHODS):
                for attention, (optimizer, lr) in self.long_lr.items():
                    yield Run(attention, optimizer, method, lr, seed, self.long_steps)
            return
        ranks = range(max(map(len, self.lrs.values())))
        for seed, rank, method, optimizer in product(range(self.seeds), ranks, METHODS, self.lrs):
            for attention in ATTENTIONS:
                if method.fits(attention, optimizer) and rank < len(self.lrs[optimizer]):
                    yield Run(attention, optimizer, method, self.lrs[optimizer][rank], seed, self.steps)


_GRID = {
    "muon": (3e-2, 1e-1, 1e-2, 3e-1, 3e-3, 1.0),
    "adamw": (3e-3, 1e-2, 1e-3, 3e-2, 3e-4, 1e-1),
}

PRESETS = {
    "cpu": Setup(
        shape=Shape(layers=4, width=128, heads=4, ffn_width=384, q_latent=64, kv_latent=32),
        sequences=4,
        accumulate=1,
        positions=64,
        steps=300,
        long_steps=1500,
        check_batches=64,
        probed=4,
        points=30,
        lrs=_GRID,
        other_lr=3e-3,
        weight_decay=0.0,
        seeds=3,
        long_lr={"mla": ("muon", 3e-2), "mha": ("muon", 1e-1)},
    ),
    "gpu-125m": Setup(
        shape=Shape(layers=12, width=768, heads=12, ffn_width=3072, q_latent=384, kv_latent=192),
        sequences=16,
        accumulate=4,
        positions=1024,
        steps=3000,
        long_steps=10_000,
        check_batches=16,
        probed=1,
        points=60,
        lrs={"muon": (3e-2, 1e-1, 3e-3)},
        other_lr=3e-3,
        weight_decay=0.0,
        seeds=1,
        long_lr={"mla": ("muon", 3e-2)},
        device="cuda",
        bf16=True,
        compile=True,
    ),
    "gpu-1b": Setup(
        shape=Shape(layers=14, width=2048, heads=32, ffn_width=8192, q_latent=512, kv_latent=256),
        sequences=8,
        accumulate=12,
        positions=2048,
        steps=5000,
        long_steps=20_000,
        check_batches=8,
        probed=1,
        points=100,
        lrs={"muon": (3e-2, 3e-3, 3e-4)},
        other_lr=3e-3,
        weight_decay=0.0,
        seeds=1,
        long_lr={"mla": ("muon", 3e-2)},
        device="cuda",
        bf16=True,
        compile=True,
    ),
    "toy": Setup(
        shape=Shape(layers=2, width=16, heads=2, ffn_width=32, q_latent=8, kv_latent=8),
        sequences=2,
        accumulate=2,
        positions=8,
        steps=10,
        long_steps=20,
        check_batches=2,
        probed=1,
        points=5,
        lrs={"muon": (3e-2,), "adamw": (3e-3,)},
        other_lr=3e-3,
        weight_decay=0.0,
        seeds=1,
        long_lr={"mla": ("muon", 3e-2)},
        bf16=True,
    ),
}
"""The presets, by name. "gpu-125m" and "gpu-1b" have not been run; "toy" is for tests."""
