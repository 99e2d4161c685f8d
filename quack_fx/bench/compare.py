"""Measures all implementations of a training step in one process.

In: a `Case`. Out: a `Comparison`: for each implementation ("way"), the time of a step, of the update alone and of the
first step, and the peak memory; and the limits of the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from quack_fx.bench.arms import Arm, Case, arms
from quack_fx.bench.measure import (
    Times,
    Work,
    bandwidth,
    device_work,
    interleaved,
    machine,
    matmul_rate,
    peak_bytes,
    time_of,
)
from quack_fx.errors import StepError
from quack_fx.layout import QKLayout
from quack_fx.layout.fit import qk_count


@dataclass(frozen=True)
class Way:
    """Cost of one implementation of the step.

    Attributes:
        step: Seconds of a whole step.
        update: Seconds of the update alone, clipping included.
        peak: Peak bytes of tensors during a step, beyond weights and optimizer state.
        first: Seconds of the first step, compilation included.
        work: Kernels of a step; None on a CPU.
        update_work: Kernels of an update; None on a CPU.
    """

    step: Times
    update: Times
    peak: int
    first: float
    work: Work | None
    update_work: Work | None


@dataclass(frozen=True)
class Comparison:
    """The measurements of all ways, and the limits of the machine.

    Attributes:
        ways: The measured ways, by name.
        missing: The reason for each way that was not measured.
        machine: Kind of machine and versions.
        rounds: Rounds of whole steps.
        update_rounds: Rounds of updates.
        weights: Number of trained scalar weights.
        scaled: How many of them are in query and key rows.
        tokens: Tokens in a batch; None for other inputs.
        flops: FLOPs of forward and backward, matrix products only.
        update_bytes: Memory traffic of an update: gradients read once for clipping; weights, gradients and moments
            read; weights and moments written.
        bandwidth: Bytes per second of a large copy.
        rate: FLOPs per second of a large matrix product.
    """

    ways: Mapping[str, Way]
    missing: Mapping[str, str]
    machine: str
    rounds: int
    update_rounds: int
    weights: int
    scaled: int
    tokens: int | None
    flops: int
    update_bytes: int
    bandwidth: float
    rate: float

    def ratio(self, one: str, other: str, what: Literal["step", "update"]) -> str:
        """Median and quartiles of the ratio within a round; "-" if one of the ways is missing."""
        if not self.ways.keys() >= {one, other}:
            return "-"
        above, below = (getattr(self.ways[name], what) for name in (one, other))
        low, middle, high = above.over(below)
        return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def compare(
    case: Case,
    names: Sequence[str],
    rounds: int,
    progress: Callable[[str], None] | None = None,
    update_rounds: int | None = None,
) -> Comparison:
    """Measure several ways to run the step, interleaved, in this process.

    Arguments:
        case: What is trained.
        names: The ways; keys of `MEANING`.
        rounds: Rounds of whole steps.
        progress: Called with a short text to report progress.
        update_rounds: Rounds of updates; None for three times `rounds`.

    Returns:
        The measurements.
    """
    tell = progress or (lambda text: None)
    ways, missing = arms(names, case)
    first: dict[str, float] = {}
    for name, arm in [*ways.items()]:
        tell(f"compiling way {name}")
        try:
            first[name] = time_of(arm.step)
        except StepError as error:
            missing[name] = str(error)
            del ways[name]
    tell("measuring memory")
    costs: dict[str, tuple[int, Work | None]] = {}
    for name, arm in ways.items():
        arm.step()
        arm.step()  # again, because another way's writes to shared weights make it recompute norms
        costs[name] = peak_bytes(arm.step), device_work(arm.step)
    tell(f"timing {rounds} rounds of steps")
    models = [arm.model for arm in ways.values()]
    shared = [name for name, arm in ways.items() if models.count(arm.model) > 1]
    steps = interleaved({name: arm.step for name, arm in ways.items()}, rounds, warm=shared)
    update_rounds = update_rounds or 3 * rounds
    tell(f"timing {update_rounds} rounds of updates")
    alone = _updates_alone(ways)
    updates = interleaved(alone, update_rounds, warm=alone)
    measured = {
        name: Way(steps[name], updates[name], peak, first[name], work, device_work(alone[name]))
        for name, (peak, work) in costs.items()
    }
    tell("measuring what the machine can do")
    trained = [p for p in case.model.parameters() if p.requires_grad]
    device, weights = trained[0].device, sum(p.numel() for p in trained)
    sizes = [p.element_size() * p.numel() for p in trained]
    return Comparison(
        ways=measured,
        missing=missing,
        machine=machine(),
        rounds=rounds,
        update_rounds=update_rounds,
        weights=weights,
        scaled=_scaled(case),
        tokens=_tokens(case),
        flops=_flops(case),
        update_bytes=sum(sizes) * (1 + 4 + 3),
        bandwidth=bandwidth(device),
        rate=matmul_rate(device, _matmul_dtype(case), 8192 if device.type == "cuda" else 1024),
    )


def _updates_alone(ways: Mapping[str, Arm]) -> dict[str, Callable[[], None]]:
    """For each way, a function that runs its update alone, with the same gradients every time."""
    kept: dict[nn.Module, list[Tensor | None]] = {}  # one copy per model: arms that share one use the same addresses
    for arm in ways.values():
        arm.forward()
        if arm.model not in kept:
            kept[arm.model] = [None if p.grad is None else p.grad.clone() for p in arm.model.parameters()]
        arm.model.zero_grad()

    def update(name: str) -> None:
        model = ways[name].model
        for parameter, gradient in zip(model.parameters(), kept[model], strict=True):
            parameter.grad = gradient
        ways[name].update()

    return {name: partial(update, name) for name in ways}


def _scaled(case: Case) -> int:
    """Number of weights in rows that QuacK scales."""
    shapes = {name: tuple(p.shape) for name, p in case.model.named_parameters(remove_duplicate=False)}
    return qk_count(QKLayout(tuple(site for site in case.layout.sites if not site.qk_norm)), shapes)


def _tokens(case: Case) -> int | None:
    """Number of tokens in the first argument that contains tokens."""
    tensors = (value for value in (*case.args, *case.kwargs.values()) if isinstance(value, Tensor))
    return next((tensor.numel() for tensor in tensors if tensor.dtype == torch.int64 and tensor.dim() > 1), None)


def _flops(case: Case) -> int:
    """FLOPs of the matrix products in one forward and backward; causal attention counts in full."""
    loss, args, kwargs = _Loss(case), case.args, dict(case.kwargs)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH):
        try:  # on fake tensors, because unfused attention may not fit in memory next to the copies of the model
            with FakeTensorMode(allow_non_fake_inputs=True) as mode, counter:
                tensors = chain(loss.named_parameters(), loss.named_buffers())
                held: dict[str, Any] = {name: mode.from_tensor(tensor) for name, tensor in tensors}
                args, kwargs = tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
                functional_call(loss, held, args, kwargs).backward()
        except DataDependentOutputException:  # the model reads values
            with counter:
                loss(*case.args, **case.kwargs).backward()
            case.model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


class _Loss(nn.Module):
    """The loss as a module, so that it can be called with replaced parameters."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.model, self._loss = case.model, case.loss

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._loss(self.model, *args, **kwargs)


class _MatmulDtypes(TorchDispatchMode):
    """Records the dtypes of all matrix products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split("::")[-1].split(".")[0] in ("mm", "addmm", "bmm", "baddbmm"):
            self.seen.append(args[-1].dtype)
        return func(*args, **(kwargs or {}))


def _matmul_dtype(case: Case) -> torch.dtype:
    """The most frequent dtype of matrix products; the loss may use autocast."""
    with _MatmulDtypes() as types, torch.no_grad():
        case.loss(case.model, *case.args, **case.kwargs)
    return max(types.seen, key=types.seen.count, default=torch.float32)
