"""USER: QK norm into a model that has none, so that it can be compared with QuacK on one's own model.

In: a model and its layout. Out: an `InsertReport`; the projections of its queries and keys hand their heads through an
`nn.RMSNorm` with a gain, right where they come out, as Qwen3 does it. `InsertReport.restore` takes them out again, and
so does `strip_qk_norm`.

The norm is a submodule (`q_norm`, `k_norm`) of the module that holds the projection's weight, called by a hook on that
module: no name of a parameter changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from quack_fx.errors import StripError
from quack_fx.layout import SIDES, AttentionSite, Norm, QKLayout, Side, WeightBlock
from quack_fx.strip.report import LeftSite

__all__ = ["InsertReport", "insert_qk_norm"]


@dataclass(frozen=True, slots=True)
class InsertReport:
    """Where norms were put in, and where not and why.

    Attributes:
        inserted: Names of the norm modules.
        left: The sites without new norms, and why.
        layout: The layout of the model as it is now.
    """

    inserted: tuple[str, ...]
    left: tuple[LeftSite, ...]
    layout: QKLayout
    _restore: Callable[[], None] = field(repr=False, compare=False)

    def restore(self) -> None:
        """Take the norms out again; the model computes bitwise what it did before."""
        self._restore()


class NormHeads:
    """Forward hook of a projection: some of its features pass a norm, head by head.

    Arguments:
        name: The norm, a submodule of the projection.
        rows: Features of each head, [heads, head_dim].
        axis: Axis of the output on which the features lie.
    """

    def __init__(self, name: str, rows: Tensor, axis: int) -> None:
        self.name, self.rows, self.axis = name, rows, axis

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """The output with those features normed."""
        rows = self.rows.to(output.device)
        x = output.movedim(self.axis, -1)
        normed = module.get_submodule(self.name)(x[..., rows])
        return x.index_copy(-1, rows.flatten(), normed.flatten(-2)).movedim(-1, self.axis)


def insert_qk_norm(model: nn.Module, layout: QKLayout, *, eps: float = 1e-6) -> InsertReport:
    """Put an RMS norm with a gain behind the query and the key projection of each attention, in place.

    Do it before the optimizer is built: the gains are parameters of the model.

    Arguments:
        model: Model the layout was found on.
        layout: Its layout.
        eps: What the norms add to the mean square.

    Returns:
        Where norms are now, and the layout with them. A site is left as it is where it has a QK norm, where its heads
        are put together from more than one projection (MLA, joint attention, LoRA), or where a weight is not that of a
        module which multiplies with it.

    Raises:
        StripError: The layout names a parameter that the model does not have. The model is then unchanged.

    Example:
        >>> from quack_fx.find import find_qk_pairs
        >>> class Attention(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.qkv = nn.Linear(8, 24)
        ...     def forward(self, x):
        ...         q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        ...         return (q @ k.mT / 2).softmax(-1) @ v
        >>> model = Attention()
        >>> insert_qk_norm(model, find_qk_pairs(model, torch.zeros(1, 3, 8))).inserted
        ('qkv.q_norm', 'qkv.k_norm')
    """
    left: list[LeftSite] = []
    norms: dict[int, tuple[Norm, ...]] = {}
    hooks: dict[str, NormHeads] = {}
    for place, site in enumerate(layout.sites):
        planned = _planned(model, site, hooks)
        if isinstance(planned, str):
            left.append(LeftSite(site.name, planned))
            continue
        hooks.update(planned.values())
        norms[place] = tuple(
            Norm(side, "rms", site.head_dim, name, f"{name}.weight") for side, (name, _) in planned.items()
        )
    handles = [_put_in(model, name, hook, eps) for name, hook in hooks.items()]

    def restore() -> None:
        for take_out in handles:
            take_out()

    sites = tuple(replace(s, qk_norm=norms[i]) if i in norms else s for i, s in enumerate(layout.sites))
    return InsertReport(tuple(hooks), tuple(left), replace(layout, sites=sites), restore)


_Planned = tuple[str, NormHeads]


def _planned(model: nn.Module, site: AttentionSite, hooks: dict[str, NormHeads]) -> dict[Side, _Planned] | str:
    """Norm and hook of both sides of a site; or why it gets none."""
    if site.qk_norm:
        return "it has a QK norm"
    planned: dict[Side, _Planned] = {}
    for side in SIDES:
        plan = _plan(model, site, side)
        if isinstance(plan, str):
            return plan
        name, hook = planned[side] = plan
        if name in hooks and not torch.equal(hooks[name].rows, hook.rows):
            return f"another attention reads other heads of {name.rpartition('.')[0]!r}"
    (query, q_hook), (key, k_hook) = planned.values()
    same = query.rpartition(".")[0] == key.rpartition(".")[0]
    return "its queries and keys are the same features" if same and _share(q_hook.rows, k_hook.rows) else planned


def _share(a: Tensor, b: Tensor) -> bool:
    return bool(torch.isin(a, b).any())


def _plan(model: nn.Module, site: AttentionSite, side: Side) -> _Planned | str:
    """Norm and hook for one side of a site; or why there can be none."""
    blocks: tuple[WeightBlock, ...] = getattr(site, side)
    if len(blocks) != 1:
        return f"its {side} heads are put together from {len(blocks)} weights; insert a norm by hand"
    (block,) = blocks
    owner, _, weight = block.param.rpartition(".")
    try:
        module, parameter = model.get_submodule(owner), model.get_parameter(block.param)
    except AttributeError:
        raise StripError(
            f"the layout names the parameter {block.param!r}, which {type(model).__name__} does not have; "
            "find the pairs again on this model"
        ) from None
    others = [n for n, p in model.named_parameters(remove_duplicate=False) if p is parameter and n != block.param]
    if others:
        return f"its {side} projection {block.param!r} is also {others[0]!r}"
    rows = [[row for start, stop in ranges for row in range(start, stop)] for ranges in block.heads]
    if any(len(row) != site.head_dim for row in rows):
        return f"its {side} heads do not have {site.head_dim} features each"
    distinct = list(dict.fromkeys(map(tuple, rows)))
    axis = _feature_axis(module, weight, block, parameter)
    if axis is None:
        return f"{block.param!r} is not the weight of a module that multiplies with it"
    name = "q_norm" if side == "query" else "k_norm"
    if hasattr(module, name):
        return f"{owner!r} already has a {name!r}"
    return f"{owner}.{name}".removeprefix("."), NormHeads(name, torch.tensor(distinct), axis)


@torch.no_grad()
def _feature_axis(module: nn.Module, weight: str, block: WeightBlock, parameter: Tensor) -> int | None:
    """Axis of a projection's output on which the features lie; None for a module that is no projection."""
    if getattr(module, weight, None) is None or len(list(module.children())) > 0:
        return None
    if isinstance(module, _ConvNd):
        return 1
    if isinstance(module, nn.Linear) and block.axis == 0:
        return -1
    if parameter.dim() != 2:
        return None
    # A linear layer of somebody else's (Conv1D of transformers): it turns one width into the other.
    width = parameter.shape[1 - block.axis]
    try:
        made = module(torch.zeros(2, 3, width, dtype=parameter.dtype, device=parameter.device))
    except Exception:
        return None
    return -1 if isinstance(made, Tensor) and made.shape == (2, 3, parameter.shape[block.axis]) else None


def _put_in(model: nn.Module, name: str, hook: NormHeads, eps: float) -> Callable[[], None]:
    """Add one norm and its hook; what takes them out again."""
    module = model.get_submodule(name.rpartition(".")[0])
    like = next(module.parameters())
    norm = nn.RMSNorm(hook.rows.shape[1], eps=eps, device=like.device, dtype=like.dtype).train(module.training)
    module.add_module(hook.name, norm)
    handle = module.register_forward_hook(hook)

    def take_out() -> None:
        handle.remove()
        delattr(module, hook.name)

    return take_out
