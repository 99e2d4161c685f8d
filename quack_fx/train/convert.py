"""Writes the training step of a model as one Python file that needs only torch.

In: a model or target, or a layout. Out: the source; nothing is written to disk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from quack_fx.errors import EmitError
from quack_fx.layout import QKLayout
from quack_fx.layout.fit import bare_name, without_wrappers
from quack_fx.train.program.source import OPTIMIZERS, write_program
from quack_fx.train.program.write import StandIn

if TYPE_CHECKING:
    from torch import nn

    from quack_fx.qk_norm.strip.modules import Plan

OptimizerName = Literal["adamw", "adam", "sgd", "muon", "lion"]


def convert(
    target: str | nn.Module,
    *args: Any,
    layout: QKLayout | None = None,
    optimizer: OptimizerName = "adamw",
    tau: float = 1.0,
    qk_norm: Literal["strip", "keep"] = "strip",
    title: str | None = None,
    build: str | None = None,
    inputs: str | None = None,
    assume: bool = False,
    sharded: bool = False,
    master_weights: bool = False,
    **kwargs: Any,
) -> str:
    """Source of a training step with QuacK for a model: one file that needs only torch.

    Arguments:
        target: A model, or what the command line takes: "model.py", "model.py:GPT", "pkg.module:factory", a Hugging
            Face config or its folder.
        args: Example inputs of the model's forward; the model may be on the meta device.
        layout: The model's layout, if it is known; the model is then not run.
        optimizer: The optimizer of the step: "adamw", "adam", "sgd", "muon" (with AdamW for other weights) or "lion".
        tau: Default of the step's `tau`.
        qk_norm: What happens to QK norm modules. "strip": the file removes them from the model (its function
            `strip_qk_norm`) and trains those attentions with QuacK. "keep": they stay, and those attentions train
            without QuacK. The model passed here is not changed.
        title: Name of the model in the emitted docstring; default: its class name.
        build: For a string target, an expression that builds the model.
        inputs: For a string target, an expression for the example inputs.
        assume: For a string target, whether unknown sizes may be assumed.
        sharded: Whether the file supports weights sharded by FSDP2 or tensor parallelism.
        master_weights: Whether half-precision parameters are updated through fp32 copies.
        kwargs: More example inputs, by name.

    Returns:
        The source. It passes `ruff check`, and `ruff format` at 120 columns does not change it.

    Raises:
        EmitError: There are no pairs, the optimizer is unknown, or `build` or `inputs` was given with a model.
        LayoutError: The layout does not fit the model.
        TargetError: The target does not give a model.
        CaptureError: The model cannot be run on the example inputs.

    Example:
        >>> source = convert("examples/mla.py")  # doctest: +SKIP
        >>> Path("train_mla.py").write_text(source)  # doctest: +SKIP
    """
    recording = None
    if isinstance(target, str):
        from quack_fx.targets import resolve

        resolved = resolve(target, build=build, inputs=inputs)
        if not assume:
            resolved.check_sizes("assume=True")
        model = resolved.model
        recording = None if args or kwargs else resolved.recording
        args, kwargs = args or resolved.args, kwargs or resolved.kwargs
    elif build is not None or inputs is not None:
        raise EmitError(
            "build and inputs belong to a target given as text; pass example inputs behind the model itself"
        )
    else:
        model = target
    if layout is None:
        if not args and not kwargs:
            raise EmitError("no example inputs: convert(model, *inputs), or convert(model, layout=...)")
        from quack_fx.find import find

        layout = find(model, args, kwargs, recording=recording).layout
    step = prepare(model, layout, qk_norm)
    return step.source(
        title or type(model).__name__, optimizer, tau=tau, sharded=sharded, master_weights=master_weights
    )


@dataclass(frozen=True)
class Conversion:
    """A model as the emitted step sees it, after its QK norms are removed.

    Attributes:
        layout: The model's layout, without the QK norms that the file removes.
        shapes: Shape of each parameter; tied parameters are listed under every name.
        stand_ins: The replacement of each QK norm module that the file removes.
        plan: What happens to each QK norm; None if all are kept.
    """

    layout: QKLayout
    shapes: Mapping[str, Sequence[int]]
    stand_ins: Mapping[str, StandIn]
    plan: Plan | None

    def source(self, title: str, optimizer: OptimizerName, *, tau: float, sharded: bool, master_weights: bool) -> str:
        """Source of the step; arguments and errors as in `convert`."""
        features = {name for name, asked in (("sharded", sharded), ("masters", master_weights)) if asked}
        return emit(
            self.layout,
            self.shapes,
            title=title,
            optimizer=optimizer,
            tau=tau,
            features=features,
            stand_ins=self.stand_ins,
        )


def prepare(model: nn.Module, layout: QKLayout, qk_norm: str = "strip") -> Conversion:
    """Collect what `emit` needs about a model; the model is not changed.

    Arguments:
        model: The model.
        layout: Its layout.
        qk_norm: As in `convert`.

    Raises:
        EmitError: `qk_norm` is unknown.
    """
    # All names that a layout may use; tied parameters have several.
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    if qk_norm == "keep":
        return Conversion(layout, shapes, {}, None)
    if qk_norm != "strip":
        raise EmitError(f"qk_norm={qk_norm!r} is not known; use qk_norm='strip' or qk_norm='keep'")
    from quack_fx.qk_norm.strip.modules import plan_strip

    plan = plan_strip(model, layout)
    stand_ins = {name: StandIn(module.tensors, module.factor) for name, module in plan.stand_ins.items()}
    return Conversion(plan.layout(layout, ()), shapes, stand_ins, plan)


def emit(
    layout: QKLayout,
    shapes: Mapping[str, Sequence[int]],
    *,
    title: str,
    optimizer: OptimizerName = "adamw",
    tau: float = 1.0,
    features: Collection[str] = (),
    stand_ins: Mapping[str, StandIn] | None = None,
) -> str:
    """Source of a training step with QuacK for a layout; a pure function that does not import torch.

    Arguments:
        layout: The layout.
        shapes: Shape of every parameter that the layout names.
        title: Name of the model.
        optimizer: The optimizer of the step, as in `convert`.
        tau: Default of the step's `tau`.
        features: As in `write_program`.
        stand_ins: The replacement of each QK norm module that the file removes.

    Returns:
        The source.

    Raises:
        EmitError: There are no query/key pairs, the optimizer is unknown, `tau` is not a positive number, or two
            parameters have the same name after the names of wrappers are removed.
        LayoutError: The layout does not fit the shapes.
    """
    if not 0 < tau < float("inf"):
        raise EmitError(f"tau is {tau!r}; need a positive number, 1.0 to start at the optimizer's own learning rate")
    if optimizer not in OPTIMIZERS:
        raise EmitError(f"optimizer {optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
    if not any(site.terms and not site.qk_norm for site in layout.sites):
        raise EmitError(_why_empty(layout))
    names = OPTIMIZERS[optimizer]
    layout, inside = without_wrappers(layout), {bare_name(name): shape for name, shape in shapes.items()}
    if len(inside) < len(shapes):
        twice = next(name for name, count in Counter(map(bare_name, shapes)).items() if count > 1)
        raise EmitError(
            f"two parameters are called {twice!r} without their wrappers; rename the attribute 'module' of this model"
        )
    return write_program(layout, inside, title, names, tau=tau, features=features, stand_ins=stand_ins)


def _why_empty(layout: QKLayout) -> str:
    """Error message for a layout without attentions to scale."""
    if layout.sites:
        return (
            f"all {len(layout.sites)} attentions keep their QK norm, so their logits do not depend on the norms of the "
            "weights; take it out first (--qk-norm strip, or quack_fx.strip_qk_norm)"
        )
    reasons = "; ".join(f"{skipped.name!r}: {skipped.reason}" for skipped in layout.skipped[:3])
    return f"no query/key pairs to write a training step for{f' ({reasons})' if reasons else ''}"
