"""Record one forward pass of a model as a torch.fx.GraphModule of ATen ops.

In: an `nn.Module` (on any device, including meta) and the arguments of one forward call. Out: a `Capture`, whose graph
holds every ATen op that ran, in order, with `node.meta["val"]` (the value: real if it depends on no parameter, else a
meta tensor) and `node.meta["nn_module_stack"]` (modules whose forward was running, as in torch.export).

The forward runs once, in Python, in "hybrid" mode: parameters are fake (meta tensors), so the size of the model does
not matter, while everything that depends on no parameter (token ids, masks, positions, RoPE tables) is real, so control
flow and index tensors are right. To Python code, every tensor is on the CPU. If this fails and the model is small, the
forward runs on real values instead.

    recorder.py   the dispatch mode that builds the graph
    answers.py    made-up numbers for a forward that asks for values of fake tensors
    devices.py    makes every tensor appear to be on the CPU
    hybrid.py     runs one op when some of its inputs are fake
    executable.py a graph that runs, checked against the model
    equal.py      finds layers that differ only in the values of their weights
    layers.py     records equal layers once, if that is safe
    memory.py     storages and views
    isolate.py    leaves the model, its hooks, the RNG and global settings unchanged
    wrappers.py   the module inside wrappers, with full-shape weights
"""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from quack_fx.errors import CaptureError, first_line
from quack_fx.graph.capture.answers import VARIANTS
from quack_fx.graph.capture.equal import equal_groups
from quack_fx.graph.capture.executable import runnable
from quack_fx.graph.capture.hybrid import NUMBER
from quack_fx.graph.capture.isolate import isolated, random_states, seed_all
from quack_fx.graph.capture.layers import RepeatedLayer
from quack_fx.graph.capture.recorder import Recorder
from quack_fx.graph.capture.wrappers import first_wrapped, unwrapped
from quack_fx.graph.forward.drawn import nothing_dropped
from quack_fx.graph.forward.machine import available_memory

__all__ = ["Capture", "RepeatedLayer", "capture", "captured_otherwise", "first_wrapped", "unwrapped"]

_log = logging.getLogger(__name__)

REAL_LIMIT_BYTES = 4 << 30
"""Largest model, in bytes of parameters, that is run on real values after the hybrid run failed. The limit is lower if
less than four times as much memory is available."""


@dataclass(frozen=True)
class Capture:
    """One recorded forward pass.

    Attributes:
        graph_module: The graph. Parameters and buffers are `get_attr` nodes named by their first fully qualified name,
            other tensors from outside the forward are `get_attr` nodes `_constant_<n>`, tensor inputs are placeholders.
        way: How the forward was run: "hybrid" or "real".
        canned: Ops that need the values of fake tensors and returned a made-up result (in routing, for example).
        fallback_reason: Why the hybrid run failed, or None.
        repeated: Layers that were not run because they equal a recorded layer; only with `layers_once`.
        computed: Whether the forward read a value that depends on weights or on random draws, and so may take another
            way with other weights or draws.
    """

    graph_module: torch.fx.GraphModule
    way: Literal["hybrid", "real"]
    canned: tuple[str, ...]
    fallback_reason: str | None = None
    repeated: tuple[RepeatedLayer, ...] = ()
    computed: bool = False


def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    layers_once: bool = False,
    real: bool = False,
    executable: bool = False,
    sources: bool = False,
) -> Capture:
    """Record one forward pass of `model` as an ATen graph. The model is left unchanged.

    Arguments:
        model: Any module, on any device; on the meta device its size does not matter. If it is wrapped or sharded, the
            module inside is recorded, with its own names and full-shape weights; no rank waits for another.
        args: Positional arguments of the forward call.
        kwargs: Keyword arguments of the forward call.
        layers_once: Record only a few of many equal layers, if that is provably safe; see `layers.py`.
        real: Run on real values only; every node then has a real value.
        executable: Return a graph that runs: it is called like the model, shares its parameters and has the same
            outputs and gradients (both are checked on these arguments). The model must hold real values. Non-tensor
            arguments are baked into the graph.
        sources: Record for each op the lines of Python that ran it (`Node.stack_trace`).

    Returns:
        The recorded pass.

    Raises:
        CaptureError: The forward raised an error, which the message quotes, or does something no graph can express.

    Example:
        >>> lin = nn.Linear(3, 5, device="meta")
        >>> [n.target for n in capture(lin, [torch.ones(2, 3)]).graph_module.graph.nodes if n.op == "get_attr"]
        ['weight', 'bias']
    """
    with unwrapped(model) as inner:
        return _capture(inner, args, kwargs or {}, layers_once, real, executable, sources)


def captured_otherwise(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None, way: Literal["hybrid", "real"]
) -> Iterator[Capture]:
    """Record a pass again, to see what depends on values that it computes (`Capture.computed`).

    Arguments:
        model: The model.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        way: How the forward was run: "hybrid" to change the made-up answers, "real" to change the weights.

    Yields:
        A recording for each variant with which the forward runs; random draws differ as well.
    """
    with unwrapped(model) as inner:
        for variant in range(1, len(VARIANTS)):
            gc.collect()  # frees the recording before, which has cycles
            try:
                yield _run(inner, args, kwargs or {}, Recorder(inner, way, variant=variant))
            except Exception as error:
                _log.info("with variant %d of what it computes, the forward fails: %s", variant, first_line(error))


def _capture(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    layers_once: bool,
    real: bool,
    executable: bool,
    sources: bool,
) -> Capture:
    if executable:
        try:
            return Capture(runnable(model, args, kwargs), "real", ())
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(
                f"the forward of {type(model).__name__}, or its backward, fails on the example inputs: "
                f"{first_line(error)}"
            ) from error
    failures: list[tuple[int, Exception]] = []
    groups = list(equal_groups(model)) if layers_once and not real else []
    # If the forward fails with equal layers left out, run it again with all layers.
    for equal in () if real else [groups, []] if groups else [[]]:
        for _, earlier in failures:
            traceback.clear_frames(earlier.__traceback__)  # the frames keep the failed recording alive
        recorder = Recorder(model, "hybrid", equal, sources=sources)
        try:
            return _run(model, args, kwargs, recorder)
        except Exception as error:
            _log.debug("with fake weights%s: %s", " and equal layers once" if equal else "", first_line(error))
            failures.append((recorder.entered, error))
    reason = first_line(failures[-1][1]) if failures else None
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    room = available_memory()
    if size > (room // 2 if real else min(REAL_LIMIT_BYTES, room // 4)):
        refusal = f"cannot be recorded with fake weights ({reason}), and at" if reason else "cannot be run for real: at"
        raise CaptureError(
            f"the forward of {type(model).__name__} {refusal} {size / 2**30:.0f} GiB it is too large to run for real; "
            "pass a smaller configuration of the model"
        ) from (failures[-1][1] if failures else None)
    for _, earlier in failures:
        traceback.clear_frames(earlier.__traceback__)
    _log.info("recording on real numbers: %s", reason or "asked for")
    recorder = Recorder(model, "real", sources=sources)
    try:
        return _run(model, args, kwargs, recorder, reason)
    except Exception as error:
        failures.insert(0, (recorder.entered, error))
    # Report the run that got furthest: it shows what is wrong with the call; the others failed because of their mode.
    _, telling = max(failures, key=lambda failure: failure[0])
    raise CaptureError(
        f"the forward of {type(model).__name__} fails on the example inputs: {first_line(telling)}"
    ) from telling


def _run(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    recorder: Recorder,
    fallback_reason: str | None = None,
) -> Capture:
    # The first two run every layer, which the first variant thus compares; the others skip some at random.
    draws = nothing_dropped() if recorder.variant < 2 else nullcontext()
    with isolated(model), draws:
        args, kwargs = recorder.inputs(args, kwargs)
        seed_all(recorder.variant)
        before = repr(random_states())  # numpy's has arrays
        with torch.no_grad(), recorder:
            output = model(*args, **kwargs)
        drew = repr(random_states()) != before
    repeated = recorder.layers.done()
    graph = recorder.finish(output)
    computed = NUMBER in recorder.canned or recorder.reads > 0 or drew
    return Capture(graph, recorder.way, tuple(recorder.canned), fallback_reason, repeated, computed)
