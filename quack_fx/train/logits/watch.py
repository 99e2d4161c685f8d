"""Observes the largest attention logits of a model's forward passes through module hooks.

In: a model and its layout. Out: `MaxLogits`, which has the largest logit of every query head after any number of
forward passes. The model's code is not changed: while a module with an attention runs, a `TorchFunctionMode` observes
its softmaxes and fused attentions. Gradients prove which of these are the logits of which heads (heads.py). If an
attention ran but its logits were not seen, an error gives the reason.

Only forward passes with gradients enabled count. A call costs a maximum over the logits or, for a fused attention,
computing the products of queries and keys again. Only the first pass waits for the device.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from traceback import walk_stack
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from quack_fx.errors import OptimizerError
from quack_fx.layout import AttentionSite, QKLayout
from quack_fx.layout.fit import bare_name, layout_params
from quack_fx.train.logits.heads import HeadAxes, HeadRows, Undecided, find_axes, has_sink
from quack_fx.train.logits.rows import Call, call_of, opened
from quack_fx.train.program.scaling import is_sharded
from quack_fx.train.ranks import groups_of
from quack_fx.train.units import Owners, nearest

_UNSEEN = (
    "its forward called no softmax and no scaled_dot_product_attention of these heads that Python sees; kernels of "
    "other packages, flex_attention and torch.compile hide theirs"
)


@dataclass(eq=False)
class _Site:
    """An attention, and the logits observed since the last step."""

    layout: AttentionSite
    rows: list[tuple[nn.Module, str, int, Tensor]]  # a weight's module, attribute and axis; heads of its rows
    known: dict[tuple[int, str, int], HeadAxes | None] = field(default_factory=dict)  # by call number, op, ndim
    largest: Tensor | None = None
    refused: str | None = None


@dataclass(eq=False)
class _Run:
    """A running forward: its frame, the number of calls observed, and the sites read so far."""

    frame: FrameType
    calls: int = 0
    read: list[_Site] = field(default_factory=list)


class MaxLogits:
    """The largest logit of every query head since the last `take`.

    Once a call in a module's forward is proved to be the attention, it is recognised by its number among the calls of
    that forward. New calls, ops or shapes are proved in turn; a changed order of equal calls is not noticed.

    Arguments:
        model: The model, plain or wrapped by DistributedDataParallel or FSDP2. Logits cannot be observed under tensor
            parallel and torch.compile.
        layout: Its layout. The logits of a site that keeps a QK norm are read if the norm does not mix heads.

    Raises:
        OptimizerError: The model, or a part of it with an attention, is compiled or in `nn.DataParallel`; a site is not
            a module of the model.

    Example:
        >>> watch = MaxLogits(model, layout)
        >>> loss(model(tokens)).backward()
        >>> watch.take()  # [all query heads]
        tensor([1.9, 2.2, 1.4, 0.7])
    """

    def __init__(self, model: nn.Module, layout: QKLayout) -> None:
        self._groups = groups_of(model)
        modules = {_bare(name): module for name, module in model.named_modules(remove_duplicate=False)}
        by_module: dict[nn.Module, list[_Site]] = {}
        self._sites = list(_sites(model, layout))
        for site in self._sites:
            module = modules.get(_bare(site.layout.name))
            if module is None:
                raise OptimizerError(
                    f"the logits of {site.layout.name!r} cannot be read: it is no module of this model; "
                    "find the pairs of this very model"
                )
            by_module.setdefault(module, []).append(site)
        _check_eager(model, by_module)
        self._handles = []
        for module, sites in by_module.items():
            watch = _Watch(sites)
            self._handles.append(module.register_forward_pre_hook(partial(_enter, watch), prepend=True))
            self._handles.append(module.register_forward_hook(partial(_leave, watch), always_call=True))

    def check(self, closure: bool = False) -> None:
        """Check before a step that the largest logits were read.

        Arguments:
            closure: Whether the forward passes may still follow, within the step.

        Raises:
            OptimizerError: No forward pass was observed, or the logits of one could not be read.
        """
        none = all(site.largest is None for site in self._sites)
        refused = [site for site in self._sites if site.refused is not None and (none or not site.layout.qk_norm)]
        if refused:
            name, reason = refused[0].layout.name, refused[0].refused
            for site in self._sites:  # the next step starts clean
                site.refused = site.largest = None
            raise OptimizerError(f"the largest logits of {name!r} cannot be read: {reason}")
        if none and not closure:
            raise OptimizerError(
                "no attention ran since the last step, as far as its module tells, so there are no largest logits; "
                "call the model itself (not its forward, and not under torch.compile or no_grad) before each step"
            )

    def take(self) -> Tensor:
        """Return the largest logits since the last call and reset them; the result is the same on every rank.

        Returns:
            The largest logit of each query head, site after site, in float32; -inf for heads that did not run.

        Raises:
            OptimizerError: As in `check`.
        """
        self.check()
        device = next(site.largest.device for site in self._sites if site.largest is not None)
        parts = []
        for site in self._sites:
            none = torch.full((site.layout.query_heads,), -torch.inf, device=device)
            parts.append(none if site.largest is None else site.largest.to(device, torch.float32))
            site.largest = None
        packed = torch.cat(parts)
        for group, where in self._groups.items():
            packed = packed.to(where)
            dist.all_reduce(packed, op=dist.ReduceOp.MAX, group=group)
        return packed.to(device)

    def detach(self) -> None:
        """Remove the hooks."""
        _leave_interrupted()
        for handle in self._handles:
            handle.remove()


class _Watch(TorchFunctionMode):
    """Observes the calls in a module's forward; the module's hooks enter it once per running forward."""

    def __init__(self, sites: list[_Site]) -> None:
        super().__init__()
        self._sites = sites
        self.runs: list[_Run] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Do not let Dynamo trace this code into a forward that was compiled after attaching.
        if torch.is_grad_enabled() and not torch.compiler.is_dynamo_compiling():
            if (own := opened(func)) is not None:
                with self:
                    return own(*args, **kwargs)
            if (call := call_of(func, args, kwargs)) is not None and self.runs and _is_running(self.runs[-1].frame):
                self._see(call)
        return func(*args, **kwargs)

    def _see(self, call: Call) -> None:
        """Assign the largest logits of a call to the sites that they belong to."""
        run = self.runs[-1]
        number, run.calls = run.calls, run.calls + 1
        largest: Tensor | None = None
        for site in self._sites:
            try:
                axes = _axes(site, call, number)
                if axes is None:
                    continue
                if site in run.read and site.layout.query_heads == 1:
                    raise _Unread("it has one head, and several softmaxes in its forward depend on that")
                if largest is None:
                    with torch.no_grad():
                        largest = call.largest()
                    largest = largest.to(torch.promote_types(largest.dtype, torch.float32))
                if not axes.fit(largest.shape):
                    raise _Unread(f"its logits have the shape {list(largest.shape)}, and its queries another one")
            except _Unread as error:
                site.refused = str(error)
                continue
            own = axes.first(largest).amax(-1)
            site.largest = own if site.largest is None else torch.fmax(site.largest, own)
            run.read.append(site)


class _Unread(Exception):
    """Logits cannot be read; the message is the reason."""


def _axes(site: _Site, call: Call, number: int) -> HeadAxes | None:
    """The head axes of a call, proved the first time; None if the call is not the site's attention."""
    source, heads = call.source, site.layout.query_heads
    place = number, call.op, source.dim()
    shape = [n for i, n in enumerate(source.shape) if i != call.axis]
    known = site.known.get(place)
    if place in site.known and (known is None or known.fit(shape)):
        return known
    if is_sharded(source) or source.is_nested:
        raise _Unread("its queries are DTensors, of tensor parallel, or nested tensors")
    rows = []
    for module, attribute, axis, own in site.rows:
        weight = getattr(module, attribute)
        if is_sharded(weight):
            raise _Unread(f"{attribute} is a DTensor in the forward pass, as in tensor parallel")
        if weight.requires_grad:
            rows.append(HeadRows(weight, axis, own.to(weight.device)))
    if not rows:
        raise _Unread("none of its query and key rows is trained and belongs to one head alone")
    try:
        # Gradients through a checkpointed region run it again, which may draw random numbers.
        with torch.random.fork_rng([source.device] if source.is_cuda else []):
            axes = find_axes(source, call.axis, heads, site.layout.key_heads, rows)
            if axes is not None and call.op == "softmax" and has_sink(source, call.axis, rows):
                raise _Unread("a column of its logits is no product of queries and keys, but an attention sink")
    except Undecided:  # tried again in the next pass
        return None
    except RuntimeError as error:
        text = str(error).strip().splitlines() or [""]
        raise _Unread(f"gradients that tell its heads apart cannot be had ({text[0][:200]})") from None
    if axes is None and bool(source.isnan().any()):
        raise _Unread("they are not finite in the first forward pass")
    site.known[place] = axes
    return axes


def _enter(watch: _Watch, module: nn.Module, args: Any) -> None:
    """Start observing the calls in a forward."""
    _leave_interrupted()
    watch.runs.append(_Run(sys._getframe(1)))
    watch.__enter__()  # type: ignore[no-untyped-call]


def _leave(watch: _Watch, module: nn.Module, args: Any, output: Any) -> None:
    """Stop observing; `output` is None if the forward raised."""
    watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
    run = watch.runs.pop()
    if output is not None and torch.is_grad_enabled():
        for site in watch._sites:
            if site not in run.read and site.refused is None:
                site.refused = _UNSEEN


def _leave_interrupted() -> None:
    """Leave forwards interrupted by Ctrl-C, for which torch does not call the hooks."""
    stack = _get_current_function_mode_stack()
    while stack and isinstance(watch := stack.pop(), _Watch) and watch.runs and not _is_running(watch.runs[-1].frame):
        watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        watch.runs.pop()


def _is_running(frame: FrameType) -> bool:
    """Whether a frame is on the current call stack."""
    return any(caller is frame for caller, _ in walk_stack(sys._getframe(1)))


def _sites(model: nn.Module, layout: QKLayout) -> Iterator[_Site]:
    """The sites of a layout, each with the location of its weights and the heads of their rows."""
    params = layout_params(layout, model)
    homes: dict[int, tuple[nn.Module, str]] = {}
    for module in model.modules():
        for attribute, param in module.named_parameters(recurse=False, remove_duplicate=False):
            homes.setdefault(id(param), (module, attribute))
    for site in layout.sites:
        # Only this site counts: rows that another site also uses still tell its heads apart.
        owners = Owners(QKLayout((site,)), params)
        units = [unit for head in range(site.query_heads) for pair in nearest(site, head) for unit in pair]
        names = dict.fromkeys(name for unit in units if unit is not None for name in unit.names)
        told = [name for name in names if bool((owners.rows[name] >= 0).any())]
        yield _Site(site, [(*homes[id(params[name])], owners.axes[name], owners.rows[name]) for name in told])


def _bare(name: str) -> str:
    """A module name without the segments added by wrappers."""
    return bare_name(f"{name}.weight").rpartition(".")[0]


def _check_eager(model: nn.Module, watched: dict[nn.Module, list[_Site]]) -> None:
    """Raise for modules that torch.compile runs, and for `nn.DataParallel`."""
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel):
            raise OptimizerError("the largest logits cannot be read in nn.DataParallel; use DistributedDataParallel")
        compiled = type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        if compiled and any(inner in watched for inner in module.modules()):
            raise OptimizerError(
                f"the largest logits cannot be read: {name or type(module).__name__!r} is compiled, and compiled code "
                "does not show its logits; use the model without torch.compile, or a method that needs none"
            )
