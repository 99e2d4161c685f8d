"""USER: a training step with QuacK as one Python file that needs torch alone.

In: a layout, or a model or target to find it in. Out: source text; nothing is written to disk.

    table.py      the layout as a generator of products of weight rows: one entry for every kind of site
    entry.py      one entry: loops over layers, the weights, loops over heads
    norms.py      the QK norms that are taken out, as a generator of names
    layers.py     numbers in names as loops over layers
    heads.py      rows of heads as expressions in the number of the head
    optimizers.py the optimizers to choose from
    library.py    definitions of this library as text, so that the file computes what the library does
    template.py   what else is the same for every model
    runtime.py    all of that put together
    source.py     pieces of Python source in the formatter's own layout
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from quack_fx.emit.norms import StandIn, norm_features, write_norms
from quack_fx.emit.optimizers import Choice, OptimizerName, choice
from quack_fx.emit.runtime import contents, imports, runtime
from quack_fx.emit.table import Table, write_table
from quack_fx.errors import EmitError
from quack_fx.layout import QKLayout
from quack_fx.train.program.text import WIDTH

if TYPE_CHECKING:
    from torch import nn

    from quack_fx.strip.modules import Plan

__all__ = ["convert", "emit"]

_LEFT_OUT = 6
"""How many kinds of attention without QuacK the docstring names."""


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
    **kwargs: Any,
) -> str:
    """Source of a training step with QuacK for a model: one file that needs torch alone.

    Arguments:
        target: A model, or what the command line takes: "model.py", "model.py:GPT", "pkg.module:factory", a Hugging
            Face config or its folder.
        args: Example inputs of the model's forward; the model may be on the meta device.
        layout: The pairs, if they are known; the model is then not run.
        optimizer: Whose update the file carries: "adamw", "adam", "sgd", "muon" (with AdamW beside it) or "lion".
        tau: Default of the emitted optimizer's `tau`.
        qk_norm: What becomes of QK norms that are modules of their own. "strip": the file takes them out of the model
            (its `strip_qk_norm`), and QuacK works on those attentions; "keep": those attentions stay as they are,
            without QuacK. The model itself is not changed here.
        title: Name of the model in the emitted docstring; its class if left out.
        build: For a target that is text, an expression that builds the model.
        inputs: For a target that is text, an expression for the example inputs.
        assume: For a target that is text, whether sizes that nobody gives may be assumed.
        kwargs: More example inputs, by name.

    Returns:
        The source. It passes `ruff check` and is stable under `ruff format` at 120 columns.

    Raises:
        EmitError: There is nothing to emit, the optimizer is not known, or `build` and `inputs` came with a model.
        LayoutError: The layout does not fit the model.
        TargetError: The target gives no model.
        CaptureError: The model cannot be run on the example inputs.

    Example:
        >>> source = convert("examples/mla.py")  # doctest: +SKIP
        >>> Path("train_mla.py").write_text(source)  # doctest: +SKIP
    """
    if isinstance(target, str):
        from quack_fx.targets import resolve

        resolved = resolve(target, build=build, inputs=inputs)
        if not assume:
            resolved.check_sizes("assume=True")
        model = resolved.model
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
        from quack_fx.find import find_qk_pairs

        layout = find_qk_pairs(model, *args, **kwargs)
    # The names that a layout may use: tied parameters under each of theirs.
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    stand_ins: Mapping[str, StandIn] = {}
    if qk_norm == "strip":
        layout, stand_ins, _ = surgery(model, layout)
    elif qk_norm != "keep":
        raise EmitError(f"qk_norm={qk_norm!r} is not known; use qk_norm='strip' or qk_norm='keep'")
    title = title or type(model).__name__
    return emit(layout, shapes, title=title, optimizer=optimizer, tau=tau, stand_ins=stand_ins)


def surgery(model: nn.Module, layout: QKLayout) -> tuple[QKLayout, Mapping[str, StandIn], Plan]:
    """The layout that a model has once its QK norms are out, and what the emitted file puts in their place.

    Arguments:
        model: The model, which is not changed.
        layout: Its layout.

    Returns:
        That layout, what stands in for each norm module, and the whole plan.
    """
    from quack_fx.strip.modules import plan_strip

    plan = plan_strip(model, layout)
    stand_ins = {name: StandIn(module.tensors, module.factor) for name, module in plan.stand_ins.items()}
    return plan.layout(layout, ()), stand_ins, plan


def emit(
    layout: QKLayout,
    shapes: Mapping[str, Sequence[int]],
    *,
    title: str,
    optimizer: OptimizerName = "adamw",
    tau: float = 1.0,
    stand_ins: Mapping[str, StandIn] | None = None,
) -> str:
    """Source of a training step with QuacK for a layout; a pure function that does not import torch.

    Arguments:
        layout: The pairs.
        shapes: Shape of every parameter that the layout names.
        title: Name of the model.
        optimizer: Whose update the file carries, as in `convert`.
        tau: Default of the emitted optimizer's `tau`.
        stand_ins: For each QK norm module that the file takes out of the model what it puts there.

    Returns:
        The source.

    Raises:
        EmitError: There is nothing to emit, the optimizer is not known, or `tau` is not a positive number.
        LayoutError: The layout does not fit the shapes.
    """
    if not 0 < tau < float("inf"):
        raise EmitError(f"tau is {tau!r}; need a positive number, 1.0 to start at the optimizer's own learning rate")
    chosen = choice(optimizer)
    table = write_table(layout, shapes)
    features = table.features | norm_features(stand_ins or {})
    code = [_generator(table)]
    if stand_ins:
        code.append("\n".join(write_norms(stand_ins)))
    code += runtime(features, chosen, tau)
    head = f"{_docstring(layout, table, title, chosen, bool(stand_ins))}\n\n{imports(code)}"
    return "\n\n\n".join((head, *code)) + "\n"


def _generator(table: Table) -> str:
    """The function that is the table."""
    summary = "The table of query/key pairs: the products of weight rows in each head's logits; w[a:b] is rows a to b."
    return "\n".join(("def logit_products() -> Iterator[tuple[Block, ...]]:", f'    """{summary}"""', *table.lines))


def _docstring(layout: QKLayout, table: Table, title: str, chosen: Choice, strips: bool) -> str:
    """What the file is, for whom, how to use it, and what it leaves out."""
    name = " ".join(title.split()).replace("\\", "/").replace('"', "'")
    algorithm = "Algorithms 1 and 2" if table.plain and table.latent else f"Algorithm {2 if table.latent else 1}"
    left_out = _left_out(layout)
    lines = [
        *_fill(
            f'"""{chosen.title} with QuacK for {name}: a learning rate of its own for every head\'s query and key rows.'
        ),
        "",
        *_fill(
            "A step of one weight moves the attention logits in proportion to the norms of the weights it is "
            f"multiplied with. QuacK (arXiv 2511.21377, {algorithm}) divides the learning rate by those norms, so "
            "that the logits change at the same pace however large the weights grow. This file needs torch alone; "
            "quack-fx wrote it from the model's graph."
        ),
        "",
        *(["    strip_qk_norm(model)  # QuacK takes the place of its QK norms"] if strips else []),
        *(f"    {line}" for line in chosen.making),
        f"    train_step = compile_train_step(model, {chosen.passed})",
        "    for batch in batches:",
        "        loss = train_step(*batch)",
        "",
        *contents(chosen, strips),
        "",
        *_fill(
            f"In all else {chosen.like}: parameter groups, schedulers, state_dict, load_state_dict. On a CPU "
            "each step is that of quack_fx.compile_train_step, bit for bit."
        ),
        *(["", "Left out, with the plain learning rate:", *left_out] if left_out else []),
        '"""',
    ]
    return "\n".join(lines)


def _left_out(layout: QKLayout) -> list[str]:
    """A few lines on the attentions that are not in the table, those with the same name but for numbers together."""
    kept = "QK norm is kept, so the logits do not depend on the norms of these weights"
    entries = [(site.name, kept) for site in layout.sites if site.qk_norm]
    entries += [(skipped.name, skipped.reason) for skipped in layout.skipped]
    groups = Counter((re.sub(r"\d+", "*", name) or "the model itself", reason) for name, reason in entries)
    lines = []
    for (name, reason), count in groups.most_common(_LEFT_OUT):
        text = f"- {name}{f' ({count} times)' if count > 1 else ''}: {' '.join(reason.split())}"
        lines += _fill(text.replace("\\", "/").replace('"', "'"), subsequent_indent="  ")
    if len(groups) > _LEFT_OUT:
        lines.append(f"- and {sum(groups.values()) - sum(n for _, n in groups.most_common(_LEFT_OUT))} more")
    return lines


def _fill(text: str, **options: Any) -> list[str]:
    """A paragraph in lines."""
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False, **options)
