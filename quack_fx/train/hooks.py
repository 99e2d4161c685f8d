"""QuacK, or a method to compare it with, on any torch.optim optimizer, through its public hooks.

In: an optimizer, the model it trains, and the model's layout. Out: the same optimizer, whose `step()` now scales the
update of every query and key row, and whose `state_dict()` carries what a resumed run needs.

Before a step the weights with query and key rows are copied and the scales of those rows computed; after it

    W <- W_old + s (W_new - W_old),    s = tau * factor / factor at the start of training

row by row. For an optimizer whose update is proportional to its learning rate this is what a learning rate of its own
for every head would do (Alg. 1 and 2), decoupled weight decay included; Muon orthogonalises the whole matrix and then
has the rows of its update scaled. Nothing in a step waits for the device. What the scales are, and what else happens
after a step, is the method's (rivals/), which is QuacK unless another one is asked for.
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
    and_others,
    has_trained,
    is_stepping,
    no_start,
    nothing_held,
    params_of,
    stale_weight,
)
from quack_fx.train.logits import MaxLogits
from quack_fx.train.metrics import Metrics
from quack_fx.train.places import in_a_row
from quack_fx.train.program.scaling import NormName, is_sharded, local, scaling_of
from quack_fx.train.ranks import check_ranks
from quack_fx.train.rivals import THRESHOLD, MethodName, check_method, method_of
from quack_fx.train.rivals.method import Method
from quack_fx.train.rivals.quack import Quack
from quack_fx.train.suited import check_optimizer

if TYPE_CHECKING:
    from quack_fx.train.program.parts.quack import QuacK as Scaling

_attached: WeakSet[Optimizer] = WeakSet()


class QuacK:
    """QuacK learning-rate scaling, attached to an optimizer.

    The optimizer stays the user's: its groups, schedulers, closures, `GradScaler` and checkpoints work as before. Rows
    that a step leaves alone stay bit for bit, so skipped steps change nothing. Groups may be added and parameters
    replaced (in the model and the optimizer) at any time.

    Several optimizers over one model take one `QuacK` each. Each scales the rows that its optimizer holds, weights or
    biases, by norms of the whole model as they are before that optimizer's step. An optimizer around others, whose
    state is that of those (ZeroRedundancyOptimizer, containers), takes none: each one inside does. An optimizer that
    holds query and key weights no longer, because somebody replaced its parameters, raises at its next step; attach
    after the model and the optimizer are wrapped, sharded and cast.

    Ranks that train one model (DistributedDataParallel, FSDP2, tensor parallel) attach together: layout, tau and norm
    are compared once, here. Later changes of `tau` are not; make them on every rank.

    Checkpoints: the factors at the start of training are part of `optimizer.state_dict()`, under "quack_init" in the
    state of each parameter, and come back with `optimizer.load_state_dict()`, called before or after attaching.
    torch.distributed.checkpoint reads the entries that a state has already: attach before `get_optimizer_state_dict`.
    They are never recomputed from trained weights: with QuacK attached, a state without them is refused. To start QuacK
    in the middle of a run, load the state first and attach then: it starts from the weights as they are, and warns,
    since that is wrong for a run that had QuacK and lost its initial factors. (An optimizer that has no state, as SGD
    without momentum, does not show that it has taken steps.) Copying or pickling an optimizer drops its hooks, as torch
    does, but not that entry of its state: attach again to the copy.

    An optimizer that keeps the norms of the weights fixed leaves all factors at one.

    Weights that start at zero (LoRA's B, zero-initialised queries) leave what they are multiplied with (LoRA's A, the
    keys) without a factor to be relative to: its bound on the change of a logit, the learning rate times the norms that
    it meets, is zero there. Such a block gets the bound that the weights of zero have: it trains at `tau` until those
    have grown to the norm that the block itself had at the start, and by the rule from then on; it never trains
    faster. Heads that are zero on both sides could never train, and are refused.

    Arguments:
        optimizer: Any `torch.optim.Optimizer` that holds at least one query or key weight of the layout.
        model: The model, plain or wrapped by torch.compile, DistributedDataParallel or FSDP2.
        layout: Its layout, from `find_qk_pairs`. Sites that keep a QK norm are left out (`quack.left_out`).
        tau: Learning rate of queries and keys at the start of training, relative to that of the other weights. The
            attribute may be changed between steps.
        norm: "frobenius" or "spectral" (slower, a small gain in the paper; on a GPU it waits for the device).
        method: "quack", or one to compare it with on the same rows: "constant" (all of them at `tau`), "qk-clip" (heads
            with logits above `threshold` are scaled down after the step), "compositional" (divided by the partner's
            norm itself), "none" (metrics alone). docs/rivals.md has their formulas. The initial factors are kept and
            looked for under each, so that growth in the metrics counts from the start of the run.
        threshold: The largest logit that "qk-clip" leaves alone.
        logits: Whether to read the largest logit of every head in the forward passes of training, for `metrics()`;
            "qk-clip" does so at any rate. The model has to be one that Python runs: an eager or sdpa attention, no
            torch.compile.

    Raises:
        OptimizerError: The optimizer holds no weight of the layout, or some that the model had before it was sharded;
            it has a QuacK already, is no `torch.optim.Optimizer` or wraps one; `tau` is not a positive number, or
            another one on other ranks; a loaded state does not fit; the method does not exist or does not fit the
            layout or the numbers given; or logits that are wanted cannot be read.
        LayoutError: The layout does not fit the model, or is another one on other ranks.
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
        half = [p for p in self._held if p.dtype in (torch.bfloat16, torch.float16)]
        if half and chosen.uses_tau:
            warnings.warn(
                f"{len(half)} query and key weights are in {half[0].dtype}: the optimizer rounds an update before "
                "QuacK scales it, so that small ones are lost; compile_train_step scales first, and keeps fp32 copies "
                "with master_weights=True",
                stacklevel=2,
            )

    @classmethod
    def around(cls, optimizer: Optimizer, model: nn.Module, layout: QKLayout, scaling: Scaling) -> QuacK:
        """QuacK by scales that exist already, those of a training step."""
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
        # Where ranks share the steps of an optimizer (ZeRO), the weights may all be another rank's.
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
                f"({STATE_KEY!r}) for {self._names()[lost]!r}: QuacK starts from these weights; to go on with a run "
                "that had QuacK, attach it before the checkpoint is read",
                stacklevel=3,
            )
        self._snapshot: list[tuple[Tensor, Tensor, Tensor]] | None = None  # weights, as they were, their scales
        self._nested = 0  # steps inside the running step
        self._paused = False
        self._within = False  # a step runs, or has ended with an exception
        self._take_over()
        self._logits = MaxLogits(model, layout) if logits or method.reads_logits else None
        self._largest: Tensor | None = None  # of each query head, in the forward passes before the last step
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
        """Factors at the start of training, kind by kind and block by block; others once a state was loaded.

        That of a block which met zeros is negative: of when those have grown as large as the block was.
        """
        return torch.cat([factor.flatten() for first in self.scaling.first for factor in first])

    def factors(self) -> dict[str, dict[str, float]]:
        """Scale of every head's learning rate as the weights are now, for reports; waits for the device.

        Returns:
            For each site of the layout that QuacK scales, its blocks' heads ("weight[rows]") with
            `tau * factor / initial factor`.

        Example:
            >>> quack.factors()["layers.0.attn"]["layers.0.attn.q.weight[0:64]"]
            0.1
        """
        by_row = self._scale_of_first_rows()
        params = {name: weight for weight, name in self._names().items()}
        report: dict[str, dict[str, float]] = {}
        for site in self.layout.sites:
            if site.name not in self.left_out:
                heads = {
                    (block.param, merged(ranges)) for _, block in site.blocks() for ranges in block.heads if ranges
                }
                # Several attentions may be in one module.
                report.setdefault(site.name, {}).update(
                    (f"{name}[{', '.join(f'{a}:{b}' for a, b in ranges)}]", by_row[params[name], ranges[0][0]])
                    for name, ranges in sorted(heads)
                )
        return report

    def metrics(self, heads: bool = False) -> dict[str, float]:
        """Attention and its learning rates as the weights are now, for a logger.

        Waits for the device once, to copy all numbers at once. Where weights are sharded all ranks call it, and get the
        same. The names of a site `layers.0.attn`, each with `/min`, `/median` and `/max` over its heads:

        - `attention/layers.0.attn/qk_norm_product`: the product of a head's norms times the logit scale (where the
          layout knows one), added up over the terms of the logit: no logit of inputs of norm one is larger;
        - `attention/layers.0.attn/q/norm`, and so on for each block, by role, or by parameter (LoRA): its norm;
        - `attention/layers.0.attn/q/lr_scale`: what its learning rate is multiplied with, `tau` included;
        - `attention/layers.0.attn/growth`: how often the norms that a block is multiplied with are what they were at
          the start of training;
        - `attention/layers.0.attn/max_attn_logit`, with `logits=True`: the largest number that went into the softmax in
          the forward passes before the last step, on any rank. Sites that did not run then have none.

        Arguments:
            heads: Whether to add the number of each head, as `/head_3`.

        Returns:
            Names and numbers.

        Example:
            >>> wandb.log(quack.metrics())
        """
        if self._metrics is None:
            self._metrics = Metrics(self.layout, self._model)
        return self._metrics.read(self.method, heads, self._largest)

    def _scale_of_first_rows(self) -> dict[tuple[Tensor, int], float]:
        """The scale of each head by its weight and the first of its rows."""
        found: dict[tuple[Tensor, int], float] = {}
        for stacks, rows, scales in zip(
            self.scaling.stacks, self.scaling.rows, self.method.block_scales(), strict=True
        ):
            for (index, *names), by_head in zip(rows, scales, strict=True):
                first_rows = index.amin(-1).tolist()
                for weights, _ in (stacks[name] for name in names):
                    for weight, own in zip(weights, by_head.tolist(), strict=True):
                        for row, scale in zip(first_rows, own, strict=True):
                            found[weight, row] = min(scale, found.get((weight, row), scale))
        return found

    def __repr__(self) -> str:
        scales = in_a_row(self.method.block_scales())
        spread = f"{float(scales.min()):.3g} to {float(scales.max()):.3g}"
        method = "" if self.method.name == "quack" else f", {self.method.name}"
        return f"QuacK({type(self.optimizer).__name__}{method}: {len(scales)} heads, scales {spread})"

    def detach(self) -> None:
        """Remove the hooks and QuacK's entries in the state: the optimizer is as it was before."""
        for handle in self._handles:
            handle.remove()
        if self._logits is not None:
            self._logits.detach()
        for param in self._held:
            self.optimizer.state.get(param, {}).pop(STATE_KEY, None)
        _attached.discard(self.optimizer)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Steps in here are not scaled: somebody else does."""
        self._paused = self._within = True
        try:
            yield
            self._within = False
        finally:
            self._paused = False

    def check(self) -> None:
        """Look before a step whether the optimizer is the one that QuacK was attached to still.

        Raises:
            OptimizerError: It holds some weights no longer, or its state was loaded without initial factors.
        """
        self._hold()
        # What a step leaves that ended with an exception is ours.
        if not self._within and (lost := self._without_start()) is not None:
            raise OptimizerError(no_start(self._names()[lost]))

    def _hold(self) -> None:
        """Find the weights that the optimizer holds; again when some were added to it or replaced."""
        params = params_of(self.optimizer)
        if self._seen == (seen := list(map(id, params))):
            return
        if self._seen:
            self._check_kept(params)
            self.scaling.find(self._model)
        self._seen = seen
        self._held = [param for param in params if param in self.scaling.home]
        names = self._names()
        self._held_names = [names[param] for param in self._held]

    def _check_kept(self, params: list[Tensor]) -> None:
        """Refuse to go on where the weights were taken out of the optimizer, or sharded, after QuacK was attached."""
        now, held = layout_params(self.layout, self._model), set(params)
        lost = [name for name in self._held_names if now[name].requires_grad and now[name] not in held]
        kind = type(self.optimizer).__name__
        if lost:
            raise OptimizerError(
                f"{kind} no longer holds {lost[0]!r}, whose steps QuacK scaled{and_others(lost)}: its parameters were "
                "replaced; attach QuacK after the model and the optimizer were wrapped, sharded and cast (or set "
                "requires_grad to False, to freeze a weight)"
            )
        if any(map(is_sharded, self._model.parameters())) != self._sharded:
            raise OptimizerError(f"the model was sharded after QuacK was attached to {kind}; attach it afterwards")

    def _without_start(self) -> Tensor | None:
        """A weight that was trained, by the optimizer's state, but whose attention has no initial factors there."""
        state, home = self.optimizer.state, self.scaling.home
        unknown = [param for param in self._held if (own := state.get(param)) and STATE_KEY not in own]
        if not unknown:
            return None
        begun = {place for param, place in home.items() if STATE_KEY in (state.get(param) or {})}
        trained = (p for p in unknown if p.requires_grad and home[p] not in begun and has_trained(state[p]))
        return next(trained, None)

    def _take_over(self) -> None:
        """Take over initial factors that the optimizer's state has, and keep them where it has none."""
        try:
            self.scaling.take_over(self.optimizer)
        except ValueError as error:
            raise OptimizerError(str(error)) from None
        # Only where there is some state: most optimizers make theirs where they find none, and take any for it.
        self.scaling.keep(self.optimizer, [param for param in self._held if self.optimizer.state.get(param)])

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Copy the weights whose updates are scaled, and compute their scales."""
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
        self._snapshot = [(p, local(p).clone(), scales[p]) for p in self._held] if scales is not None else []
        self._nested, self._within = 0, True

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Scale what the step did to their rows, and do what the method does after it."""
        if self._paused:
            return
        if self._nested:
            self._nested -= 1
            return
        for param, old, scale in self._snapshot or ():
            _scale_update(old, local(param), scale)
        if self._logits is not None:
            self._largest = self._logits.take()
        self.method.after_step(dict(zip(self._held_names, self._held, strict=True)), self._largest)
        self._snapshot, self._within = None, False
        trained = [param for param in self._held if param.grad is not None or optimizer.state.get(param)]
        self.scaling.keep(optimizer, trained)

    def _after_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Give every parameter a state where some have ours alone: distributed checkpoints want all or none."""
        states = state_dict["state"]
        if states and all(isinstance(state, Mapping) and state.keys() <= {STATE_KEY} for state in states.values()):
            for group in state_dict["param_groups"]:
                for key in group["params"]:
                    states.setdefault(key, {})

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Refuse a state without initial factors before anything is loaded."""
        groups = zip(optimizer.param_groups, state_dict["param_groups"], strict=False)
        pairs = [pair for ours, saved in groups for pair in zip(ours["params"], saved["params"], strict=False)]
        for param, key in pairs:
            state = state_dict["state"].get(key)
            if not (param in self.scaling.home and state and param.requires_grad):
                continue
            if not isinstance(state.get(STATE_KEY), Tensor):  # distributed checkpoints leave an empty dict for none
                raise OptimizerError(no_start(self._names()[param]))

    def _after_load(self, optimizer: Optimizer) -> None:
        """Take over what was loaded; attentions that were not trained by then start from the weights as they are."""
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
        OptimizerError: It is not.
    """
    if not isinstance(tau, Tensor) and not (isinstance(tau, int | float) and 0 < tau < math.inf):
        raise OptimizerError(f"tau is {tau!r}; need a positive number, for example 0.1")


def _scale_update(old: Tensor, new: Tensor, scale: Tensor) -> None:
    """new <- old + scale (new - old), row by row, in float32 at least and rounded once.

    lerp gives `new` back bit for bit where the scale is 1 or nothing changed.
    """
    if new.dtype in (torch.float32, torch.float64):
        torch.lerp(old, new, scale.to(new.dtype), out=new)
    else:
        new.copy_(torch.lerp(old.float(), new.float(), scale.float()))
