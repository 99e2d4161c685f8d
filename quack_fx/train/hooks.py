"""Attaches QuacK, or a method to compare it with, to any torch.optim optimizer through its public hooks.

In: an optimizer, the model it trains, and the model's layout. Out: the same optimizer; its `step()` now scales the
updates of query and key rows, and its `state_dict()` contains what a resumed run needs.

Before a step, the query and key weights are copied and the scale `s` of each row is computed. After the step, row by
row,

    W <- W_old + s (W_new - W_old),    s = tau * factor / initial factor

If the optimizer's update is proportional to its learning rate, this equals a separate learning rate for each head
(Alg. 1 and 2), decoupled weight decay included. Muon orthogonalises the whole matrix; then the rows of its update are
scaled. Nothing in a step waits for the device. The method (rivals/; QuacK by default) defines the scales and anything
else that happens after a step.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quack_fx.errors import OptimizerError
from quack_fx.layout import QKLayout, merged
from quack_fx.layout.fit import layout_params
from quack_fx.train.held import (
    STATE_KEY,
    has_trained,
    is_stepping,
    no_start,
    nothing_held,
    params_of,
    stale_weight,
)
from quack_fx.train.logits import MaxLogits
from quack_fx.train.metrics import Metrics
from quack_fx.train.program.scaling import NormName, is_sharded, local, scaling_of
from quack_fx.train.ranks import check_ranks
from quack_fx.train.rivals import THRESHOLD, MethodName, check_method, method_of
from quack_fx.train.rivals.method import Method, Quack
from quack_fx.train.suited import check_optimizer
from quack_fx.train.units import in_a_row, places_of

if TYPE_CHECKING:
    from quack_fx.train.program.parts.quack import QuacK as Scaling

_attached: WeakSet[Optimizer] = WeakSet()


class QuacK:
    """QuacK learning-rate scaling, attached to an optimizer.

    Parameter groups, schedulers, closures, `GradScaler` and checkpoints work as before. Rows that a step does not
    change keep their bits, so skipped steps change nothing. Groups may be added, and parameters replaced (in both the
    model and the optimizer), at any time.

    If several optimizers train one model, attach one `QuacK` to each. It scales the rows, of weights or biases, that
    its optimizer holds, by the norms of the whole model before that optimizer's step. Do not attach to an optimizer
    that wraps others and saves their state (ZeroRedundancyOptimizer, containers); attach to each one inside. If the
    parameters of an optimizer were replaced and it no longer holds query and key weights, its next step raises; attach
    after the model and the optimizer are wrapped, sharded and cast.

    Ranks that train one model (DistributedDataParallel, FSDP2, tensor parallel) must attach together: layout, tau and
    norm are compared once, at construction. Later changes of `tau` are not compared; make them on every rank.

    Checkpoints: the initial factors are part of `optimizer.state_dict()`, under "quack_init" in the state of each
    parameter, and `optimizer.load_state_dict()` restores them, called before or after attaching.
    torch.distributed.checkpoint loads only entries that the state already has: attach before
    `get_optimizer_state_dict`. Initial factors are never recomputed from trained weights: with QuacK attached, a state
    without them is refused. To start QuacK in the middle of a run, load the state, then attach: QuacK starts from the
    current weights, and warns because this is wrong for a run that had QuacK and lost its initial factors. (An
    optimizer without state, such as SGD without momentum, does not show that it has taken steps.) Copying or pickling
    an optimizer drops its hooks, as usual in torch, but keeps "quack_init" in its state: attach again to the copy.

    With an optimizer that keeps the norms of the weights fixed, all factors keep their initial values.

    A weight that is zero at the start (LoRA's B, zero-initialised queries) makes the initial factor of its partner
    (LoRA's A, the keys) infinite. The partner then trains at `tau` until the weight has grown to the partner's own
    initial norm, and by the rule from then on; it never trains faster. Heads that are zero on both sides could never
    train and are refused.

    Arguments:
        optimizer: Any `torch.optim.Optimizer` that holds at least one query or key weight of the layout.
        model: The model, plain or wrapped by torch.compile, DistributedDataParallel or FSDP2.
        layout: The model's layout, from `find_qk_pairs`. Sites that keep a QK norm are left out (`quack.left_out`).
        tau: Learning rate of queries and keys at the start of training, relative to that of the other weights. The
            attribute may be changed between steps.
        norm: "frobenius" or "spectral" (slower, a small gain in the paper; on a GPU it waits for the device).
        method: "quack", or a method to compare it with on the same rows: "constant" (all rows at `tau`), "qk-clip"
            (heads with logits above `threshold` are scaled down after the step), "compositional" (divided by the
            partner's absolute norm), "none" (only metrics). docs/rivals.md has the formulas. Every method saves and
            restores the initial factors, so that growth in the metrics is relative to the start of the run.
        threshold: "qk-clip" scales heads with logits above this value.
        logits: Whether to read the largest logit of every head in training forward passes, for `metrics()`; "qk-clip"
            always does. The model must run in Python: eager or sdpa attention, no torch.compile.

    Raises:
        OptimizerError: The optimizer holds no weight of the layout, or weights from before the model was sharded; it
            already has a QuacK, is no `torch.optim.Optimizer` or wraps one; `tau` is not a positive number or differs
            between ranks; a loaded state does not fit; the method does not exist or does not fit the layout or the
            other arguments; or the requested logits cannot be read.
        LayoutError: The layout does not fit the model or differs between ranks.
        FactorError: A head's weights are zero on both sides, or are not finite.

    Example:
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        >>> quack = QuacK(optimizer, model, find_qk_pairs(model, tokens), tau=0.1)
        >>> loss(model(tokens)).backward()
        >>> optimizer.step()  # as before
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        layout: QKLayout,
        tau: float = 1.0,
        norm: NormName = "frobenius",
        method: MethodName = "quack",
        threshold: float = THRESHOLD,
        logits: bool = False,
    ) -> None:
        elsewhere = check_ranks(model, layout, tau, f"{norm} {method} {threshold} {logits}", [optimizer])
        check_optimizer(optimizer)
        check_tau(tau)
        check_method(method, tau, norm, threshold)
        if not isinstance(logits, bool):
            raise OptimizerError(f"logits is {logits!r}; give True or False")
        scaling = scaling_of(model, layout, tau, norm, [optimizer])
        chosen = method_of(method, scaling, model, layout, threshold)
        self._attach(optimizer, model, layout, chosen, elsewhere, logits)
        half = [p for p in self._held.values() if p.dtype in (torch.bfloat16, torch.float16)]
        if half and chosen.uses_tau:
            warnings.warn(
                f"{len(half)} query and key weights are in {half[0].dtype}: the optimizer rounds an update before "
                "QuacK scales it, so that small ones are lost; compile_train_step scales first, and keeps fp32 copies "
                "with master_weights=True",
                stacklevel=2,
            )

    @classmethod
    def around(cls, optimizer: Optimizer, model: nn.Module, layout: QKLayout, scaling: Scaling) -> QuacK:
        """Attach QuacK with existing scales, those of a training step."""
        check_optimizer(optimizer)
        quack = cls.__new__(cls)
        quack._attach(optimizer, model, layout, Quack(scaling))
        return quack

    def _attach(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        layout: QKLayout,
        method: Method,
        elsewhere: bool = False,
        logits: bool = False,
    ) -> None:
        if optimizer in _attached:
            raise OptimizerError(
                f"this {type(optimizer).__name__} has a QuacK attached already; call its detach() first"
            )
        self.optimizer, self.layout, self._model = optimizer, layout, model
        self.method, self.scaling = method, method.scaling
        self.left_out = tuple(site.name for site in layout.sites if site.qk_norm)
        self._metrics: Metrics | None = None
        self._seen: list[int] = []
        self._hold()
        own = set(model.parameters())
        # If ranks share the steps of an optimizer (ZeRO), other ranks may hold all of the weights.
        if not self._held and not (elsewhere and not own.isdisjoint(params_of(optimizer))):
            raise OptimizerError(nothing_held(optimizer, layout, self.scaling, own))
        if stale := stale_weight(optimizer, own, self._names(), self.scaling):
            raise OptimizerError(
                f"{type(optimizer).__name__} holds weights that are not in the model, and not {stale!r}, which is; "
                "make the optimizer after the model was wrapped, sharded and moved"
            )
        self._sharded = any(map(is_sharded, own))
        if (lost := self._without_start()) is not None:
            warnings.warn(
                f"{type(optimizer).__name__} has taken steps, and its state has no initial factors of QuacK "
                f"({STATE_KEY!r}) for {lost!r}: QuacK starts from these weights; to go on with a run "
                "that had QuacK, attach it before the checkpoint is read",
                stacklevel=3,
            )
        # Weights, their old values and scales; not None while a step is running, and after one that raised.
        self._snapshot: list[tuple[Tensor, Tensor, Tensor]] | None = None
        self._nested = 0  # nested calls of step in the current step
        self._paused = False
        self._take_over()
        self._logits = MaxLogits(model, layout) if logits or method.reads_logits else None
        self._largest: Tensor | None = None  # per query head, over the forward passes before the last step
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._after_state_dict),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        _attached.add(optimizer)

    @property
    def tau(self) -> float | Tensor:
        """Learning rate of queries and keys at the start of training, relative to that of the other weights."""
        return self.scaling.tau

    @tau.setter
    def tau(self, tau: float | Tensor) -> None:
        if not self.method.uses_tau:
            raise OptimizerError(f"tau is {tau!r}, and method {self.method.name!r} leaves learning rates as they are")
        check_tau(tau)
        self.scaling.tau = tau

    @property
    def init_factors(self) -> Tensor:
        """Initial factors, by kind and block; replaced when a state is loaded.

        The factor is negative for a block whose partner was zero at the start: its absolute value is the factor when
        the partner has grown to the block's initial norm.
        """
        return torch.cat([factor.flatten() for first in self.scaling.first for factor in first])

    def factors(self) -> dict[str, dict[str, float]]:
        """Learning-rate scale of every head for the current weights, for reports; waits for the device.

        Returns:
            For each site of the layout that QuacK scales, a dict from the heads of its blocks ("weight[rows]") to
            `tau * factor / initial factor`.

        Example:
            >>> quack.factors()["layers.0.attn"]["layers.0.attn.q.weight[0:64]"]
            0.1
        """
        layout, places = places_of(self.layout, self._model)
        scales = in_a_row(self.method.block_scales()).tolist()
        by_row: dict[tuple[str, int], float] = {}  # by weight and first row of a head
        for unit, place in places.items():
            row = unit.param, unit.ranges[0][0]
            by_row[row] = min(scales[place], by_row.get(row, math.inf))
        report: dict[str, dict[str, float]] = {}
        for site, bare in zip(self.layout.sites, layout.sites, strict=True):
            if site.name not in self.left_out:
                pairs = zip(site.blocks(), bare.blocks(), strict=True)
                heads = {
                    (block.param, merged(ranges)): by_row[own.param, min(ranges)[0]]
                    for (_, block), (_, own) in pairs
                    for ranges in block.heads
                    if ranges
                }
                # One module may contain several attentions.
                report.setdefault(site.name, {}).update(
                    (f"{name}[{', '.join(f'{a}:{b}' for a, b in ranges)}]", scale)
                    for (name, ranges), scale in sorted(heads.items())
                )
        return report

    def metrics(self, heads: bool = False) -> dict[str, float]:
        """Metrics of attention and its learning rates for the current weights, for a logger.

        Waits for the device once, to copy all numbers together. If weights are sharded, all ranks must call it; all get
        the same result. A site `layers.0.attn` has these names, each with `/min`, `/median` and `/max` over its heads:

        - `attention/layers.0.attn/qk_norm_product`: the product of a head's norms times the logit scale (if the layout
          has one), summed over the terms of the logit: an upper bound on the logits of inputs with norm one;
        - `attention/layers.0.attn/q/norm`, and so on for each block, by role or by parameter (LoRA): its norm;
        - `attention/layers.0.attn/q/lr_scale`: its learning-rate scale, `tau` included;
        - `attention/layers.0.attn/growth`: the norms that a block is multiplied with, relative to their initial values;
        - `attention/layers.0.attn/max_attn_logit`, with `logits=True`: the largest input of the softmax in the forward
          passes before the last step, over all ranks. Missing for sites that did not run.

        Arguments:
            heads: Whether to add the value of each head, as `/head_3`.

        Returns:
            A dict from names to numbers.

        Example:
            >>> wandb.log(quack.metrics())
        """
        if self._metrics is None:
            self._metrics = Metrics(self.layout, self._model)
        return self._metrics.read(self.method, heads, self._largest)

    def __repr__(self) -> str:
        scales = in_a_row(self.method.block_scales())
        spread = f"{float(scales.min()):.3g} to {float(scales.max()):.3g}"
        method = "" if self.method.name == "quack" else f", {self.method.name}"
        return f"QuacK({type(self.optimizer).__name__}{method}: {len(scales)} heads, scales {spread})"

    def detach(self) -> None:
        """Remove the hooks and QuacK's entries in the optimizer's state."""
        for handle in self._handles:
            handle.remove()
        if self._logits is not None:
            self._logits.detach()
        for param in self._held.values():
            self.optimizer.state.get(param, {}).pop(STATE_KEY, None)
        _attached.discard(self.optimizer)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context in which the hooks do nothing because the caller scales the step."""
        self._paused, self._snapshot = True, []
        try:
            yield
            self._snapshot = None
        finally:
            self._paused = False

    def check(self) -> None:
        """Check before a step that the optimizer still has its weights and initial factors.

        Raises:
            OptimizerError: Weights were removed from it, or its state was loaded without initial factors.
        """
        self._hold()
        # After a step that raised, the state may lack initial factors that `keep` has not written yet.
        if self._snapshot is None and (lost := self._without_start()) is not None:
            raise OptimizerError(no_start(lost))

    def _hold(self) -> None:
        """Find the weights that the optimizer holds; repeated when parameters were added or replaced."""
        params = params_of(self.optimizer)
        if self._seen == (seen := list(map(id, params))):
            return
        if self._seen:
            self._check_kept(params)
            self.scaling.find(self._model)
        self._seen = seen
        names = self._names()
        self._held = {names[param]: param for param in params if param in self.scaling.home}

    def _check_kept(self, params: list[Tensor]) -> None:
        """Raise if weights were removed from the optimizer, or sharded, after QuacK was attached."""
        now, held = layout_params(self.layout, self._model), set(params)
        lost = [name for name in self._held if now[name].requires_grad and now[name] not in held]
        kind = type(self.optimizer).__name__
        if lost:
            others = f", and {len(lost) - 1} others" if len(lost) > 1 else ""
            raise OptimizerError(
                f"{kind} no longer holds {lost[0]!r}, whose steps QuacK scaled{others}: its parameters were "
                "replaced; attach QuacK after the model and the optimizer were wrapped, sharded and cast (or set "
                "requires_grad to False, to freeze a weight)"
            )
        if any(map(is_sharded, self._model.parameters())) != self._sharded:
            raise OptimizerError(f"the model was sharded after QuacK was attached to {kind}; attach it afterwards")

    def _without_start(self) -> str | None:
        """The name of a weight that the optimizer's state shows as trained, without its attention's initial factors."""
        state, home = self.optimizer.state, self.scaling.home
        unknown = {name: p for name, p in self._held.items() if (own := state.get(p)) and STATE_KEY not in own}
        if not unknown:
            return None
        begun = {place for param, place in home.items() if STATE_KEY in (state.get(param) or {})}
        new = {name: p for name, p in unknown.items() if p.requires_grad and home[p] not in begun}
        return next((name for name, p in new.items() if has_trained(state[p])), None)

    def _take_over(self) -> None:
        """Load initial factors from the optimizer's state, and add them to the state of weights that lack them."""
        try:
            self.scaling.take_over(self.optimizer)
        except ValueError as error:
            raise OptimizerError(str(error)) from None
        # Only where there is some state: most optimizers initialise a state only if it is empty.
        self.scaling.keep(self.optimizer, [param for param in self._held.values() if self.optimizer.state.get(param)])

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Copy the weights to be scaled, and compute the scales of their rows."""
        if self._paused:
            return
        if self._snapshot is not None and is_stepping(optimizer):
            self._nested += 1
            return
        self.check()
        if self._logits is not None:
            self._logits.check(closure=bool(args or kwargs.get("closure")))
        self._take_over()
        scales = self.method.row_scales()
        self._snapshot = [(p, local(p).clone(), scales[p]) for p in self._held.values()] if scales is not None else []
        self._nested = 0

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Scale the updates of their rows, and run the method's own `after_step`."""
        if self._paused:
            return
        if self._nested:
            self._nested -= 1
            return
        for param, old, scale in self._snapshot or ():
            _scale_update(old, local(param), scale)
        if self._logits is not None:
            self._largest = self._logits.take()
        self.method.after_step(self._held, self._largest)
        self._snapshot = None
        trained = [param for param in self._held.values() if param.grad is not None or optimizer.state.get(param)]
        self.scaling.keep(optimizer, trained)

    def _after_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Give every parameter a state if the only entries are QuacK's: distributed checkpoints need all or none."""
        states = state_dict["state"]
        if states and all(isinstance(state, Mapping) and state.keys() <= {STATE_KEY} for state in states.values()):
            for group in state_dict["param_groups"]:
                for key in group["params"]:
                    states.setdefault(key, {})

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Refuse a state without initial factors, before anything is loaded."""
        groups = zip(optimizer.param_groups, state_dict["param_groups"], strict=False)
        pairs = [pair for ours, saved in groups for pair in zip(ours["params"], saved["params"], strict=False)]
        for param, key in pairs:
            state = state_dict["state"].get(key)
            scaled = param in self.scaling.home and param.requires_grad
            # Distributed checkpoints have an empty dict instead of initial factors.
            if scaled and state and not isinstance(state.get(STATE_KEY), Tensor):
                raise OptimizerError(no_start(self._names()[param]))

    def _after_load(self, optimizer: Optimizer) -> None:
        """Use the loaded initial factors; attentions not trained in that run start from the current weights."""
        self._hold()
        self._take_over()
        home = self.scaling.home
        begun = {home[param] for param in self.scaling.kept if param in home}
        self.scaling.restart(begun)  # type: ignore[attr-defined]  # see program/zeros.py

    def _names(self) -> dict[Tensor, str]:
        """The names of the weights in the layout."""
        return {param: name for name, param in layout_params(self.layout, self._model).items()}


def check_tau(tau: float | Tensor) -> None:
    """Refuse a `tau` that is not a positive number.

    Raises:
        OptimizerError: `tau` is not a positive number.
    """
    if not isinstance(tau, Tensor) and not (isinstance(tau, int | float) and 0 < tau < math.inf):
        raise OptimizerError(f"tau is {tau!r}; need a positive number, for example 0.1")


def _scale_update(old: Tensor, new: Tensor, scale: Tensor) -> None:
    """new <- old + scale (new - old), row by row, at least in float32 and rounded once."""
    # `lerp` returns `new` bit for bit if the scale is 1 or nothing changed.
    if new.dtype in (torch.float32, torch.float64):
        torch.lerp(old, new, scale.to(new.dtype), out=new)
    else:
        new.copy_(torch.lerp(old.float(), new.float(), scale.float()))
