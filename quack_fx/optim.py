"""USER: QuacK on any torch.optim optimizer, through its public hooks.

In: an optimizer, the model it trains, and the model's layout. Out: the same optimizer, whose `step()` now scales the
update of every query and key head, and whose `state_dict()` carries what a resumed run needs.

Before a step the rows of the units are copied and their scales computed from the weights as they are; after it

    W <- W_old + s (W_new - W_old),    s = tau * factor / factor at the start of training

on the rows of each unit and the entries of its bias. For an optimizer whose update is proportional to its learning rate
this is what a learning rate of its own for every head would do (Alg. 1 and 2), decoupled weight decay included; Muon
orthogonalises the whole matrix and then has the rows of its update scaled. Nothing in a step waits for the device.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import warnings
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from quack_fx.distributed import LocalStrip, UnitNorms
from quack_fx.errors import OptimizerError
from quack_fx.factors import FactorPlan, NormName, PlanTables, Unit, check_norms, factors, layout_params, plan_params
from quack_fx.layout import QKLayout

STATE_KEY = "quack_init"
"""Key of QuacK's entry in the optimizer state of each parameter: see `_encode`."""

_UNSUITED = {
    "lbfgs": "it evaluates the loss at several points in one step and learns curvature from steps that QuacK changes",
    "schedulefree": "it rebuilds the weights from sequences of its own, so that a scaled update does not last",
    "adafactor": "its steps are relative to the size of the weights, which already changes with their norms",
}
"""Why QuacK does not suit an optimizer, by part of its class name."""

_attached: WeakSet[Optimizer] = WeakSet()


class QuacK:
    """QuacK learning-rate scaling, attached to an optimizer.

    The optimizer stays the user's: its groups, schedulers, closures, `GradScaler` and checkpoints work as before. Rows
    that a step leaves alone stay bit for bit, so skipped steps change nothing.

    Several optimizers over one model take one `QuacK` each. Each scales the rows that its optimizer holds, weights or
    biases, by norms of the whole model as they are before that optimizer's step.

    Checkpoints: the factors at the start of training are part of `optimizer.state_dict()`, under "quack_init" in the
    state of each parameter, and come back with `optimizer.load_state_dict()`, called before or after attaching. They
    are never recomputed from trained weights: with QuacK attached, a state without them is refused. (To start QuacK in
    the middle of a run, load the state first and attach then.) Copying or pickling an optimizer drops its hooks, as
    torch does, but not that entry of its state: attach again to the copy.

    An optimizer that keeps the norms of the weights fixed leaves all factors at one.

    Arguments:
        optimizer: Any `torch.optim.Optimizer` that holds at least one query or key weight of the layout.
        model: The model, plain or wrapped by torch.compile, DistributedDataParallel or FSDP2.
        layout: Its layout, from `find_qk_pairs`. Sites that keep a QK norm are left out (`quack.plan.left_out`).
        tau: Learning rate of queries and keys at the start of training, relative to that of the other weights.
        norm: "frobenius" or "spectral" (slower, a small gain in the paper; on a GPU it waits for the device).

    Raises:
        OptimizerError: The optimizer holds no weight of the layout, has a QuacK already, is no `torch.optim.Optimizer`
            or wraps one, `tau` is not a positive number, or a loaded state does not fit.
        LayoutError: The layout does not fit the model.
        FactorError: A head's weights have norm zero, or are not finite.

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
    ) -> None:
        _check_optimizer(optimizer)
        if not (isinstance(tau, int | float) and 0 < tau < math.inf):
            raise OptimizerError(f"tau is {tau!r}; need a positive number, for example 0.1")
        self.tau = tau
        self.optimizer = optimizer
        self.layout = layout
        self.plan = FactorPlan.from_layout(layout)
        self._norm = norm
        self._params = plan_params(self.plan, layout_params(layout, model))
        self._hold()
        if meta := [name for name, param in self._params.items() if param.is_meta]:
            raise OptimizerError(
                f"{meta[0]!r} is on the meta device; give the model real weights before attaching QuacK"
            )
        self._unit_norms = UnitNorms(self.plan, self._params, norm)
        norms = self._unit_norms()
        check_norms(layout, self.plan, norms)
        self._init = factors(self.plan, norms)
        self._snapshot: list[tuple[LocalStrip, Tensor, Tensor]] | None = None  # rows before the step, their scales
        self._nested = 0  # steps inside the running step
        self._unpublished: list[str] = []  # parameters whose entry is not in the optimizer's state yet
        self._adopt()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._after_state_dict),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        ]
        _attached.add(optimizer)

    def factors(self) -> dict[str, dict[str, float]]:
        """Scale of every head's learning rate as the weights are now, for reports; waits for the device.

        Returns:
            For each site of the layout that QuacK scales, its units (`str(unit)`) with `tau * factor / initial factor`.

        Example:
            >>> quack.factors()["layers.0.attn"]["layers.0.attn.q.weight[0:64]"]
            0.1
        """
        scales = dict(zip(self.plan.units, self._scales().tolist(), strict=True))
        report: dict[str, dict[str, float]] = {}
        for site in self.layout.sites:
            if not site.qk_norm:
                terms = (term for head in range(site.query_heads) for term in site.head_terms(head))
                units = (Unit.of(block, ranges) for term in terms for block, ranges in term)
                report[site.name] = {str(unit): scales[unit] for unit in units}
        return report

    @property
    def params(self) -> dict[str, Tensor]:
        """The model's parameters that have units, by their names in the layout."""
        return self._params

    @property
    def init_factors(self) -> Tensor:
        """Factors at the start of training, [n_units]; others once a state was loaded."""
        return self._init

    @property
    def tables(self) -> PlanTables:
        """The plan's tables, where the factors are."""
        return self.plan.tables(self._init.device)

    def publish(self) -> None:
        """Put the entries into the optimizer's state, where it is there by now; every step does, in whatever form."""
        self._unpublished = [name for name in self._unpublished if not self._publish(name)]

    def detach(self) -> None:
        """Remove the hooks and QuacK's entries in the state: the optimizer is as it was before."""
        for handle in self._handles:
            handle.remove()
        for param in self._held.values():
            self.optimizer.state.get(param, {}).pop(STATE_KEY, None)
        _attached.discard(self.optimizer)

    def _hold(self) -> None:
        """Find the rows that the optimizer holds; again when a group was added to it."""
        self._n_groups = len(self.optimizer.param_groups)
        ids = {id(param) for group in self.optimizer.param_groups for param in group["params"]}
        self._held = {name: param for name, param in self._params.items() if id(param) in ids}
        if not self._held:
            raise OptimizerError(_nothing_held(self.optimizer, self.plan))
        units: dict[str, list[int]] = {name: [] for name in self._held}
        for i, unit in enumerate(self.plan.units):
            for name, _ in unit.parts():
                if name in units:
                    units[name].append(i)
        # sorted by place, so that a layout that lists its sites in another order reads the same state
        self._units = {name: sorted(on, key=lambda i: (self.plan.units[i].ranges, i)) for name, on in units.items()}
        tables = self.plan.tables(next(iter(self._params.values())).device)
        strips = (LocalStrip.of(s, self._held[s.name]) for s in tables.strips if s.name in self._held)
        self._strips = [strip for strip in strips if strip.strip.stop > strip.strip.start]

    def _scales(self) -> Tensor:
        """Scale of every unit by the weights as they are now, [n_units]."""
        return self.tau * (factors(self.plan, self._unit_norms()) / self._init)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Copy the rows of the units and compute their scales."""
        if self._snapshot is not None and _is_stepping(optimizer):
            self._nested += 1
            return
        if len(optimizer.param_groups) != self._n_groups:
            self._hold()
            self._remember(self._init)
        scales = self._scales()
        by_row = self.plan.tables(scales.device).spread(scales)
        self._snapshot = [(strip, strip.rows().clone(), by_row[strip.flat]) for strip in self._strips]
        self._nested = 0

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Scale what the step did to the rows of the units."""
        if self._nested:
            self._nested -= 1
            return
        for strip, old, scale in self._snapshot or ():
            _scale_update(old, strip.rows(), scale)
        self._snapshot = None
        self.publish()

    def _remember(self, init: Tensor) -> None:
        """Take factors as those of the start of training, and prepare the entries of the state."""
        self._init = init
        saved = init.double().cpu()
        self._entries = {
            name: _encode(self._fingerprint(name), saved[self._units[name]]).to(param.device)
            for name, param in self._held.items()
        }
        self._unpublished = list(self._held)

    def _publish(self, name: str) -> bool:
        """Put an entry into the optimizer's own state of a parameter, once that state is there.

        From then on it is in every copy and checkpoint. Not earlier: most optimizers make their state where they find
        none, and take a state with anything in it for theirs. SGD does not, and may never make any.
        """
        param = self._held[name]
        if not (self.optimizer.state.get(param) or isinstance(self.optimizer, SGD)):
            return False
        self.optimizer.state[param][STATE_KEY] = self._entries[name]
        return True

    def _after_state_dict(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Add the entries: to the state of their parameter or, where it has none (`_publish`), beside the states."""
        keys, states = state_keys(optimizer, state_dict), state_dict["state"]
        if isinstance(optimizer, SGD):
            for key in keys.values():  # torch.distributed.checkpoint wants a state for all parameters or for none
                states.setdefault(key, {})
        for name, param in self._held.items():
            key = keys[id(param)]
            home = states if states.get(key) or isinstance(optimizer, SGD) else state_dict.setdefault(STATE_KEY, {})
            home.setdefault(key, {})[STATE_KEY] = self._entries[name]

    def _before_load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Read the entries of a state that is about to be loaded, and hand it on without them."""
        keys, states, beside = state_keys(optimizer, state_dict), state_dict["state"], state_dict.get(STATE_KEY, {})
        if not keys.keys() >= {id(param) for param in self._held.values()}:
            return None  # of another number of parameters: the optimizer refuses it in its own words
        found = {}
        for name, param in self._held.items():
            entry = {**beside.get(keys[id(param)], {}), **states.get(keys[id(param)], {})}
            if STATE_KEY in entry:
                found[name] = entry[STATE_KEY]
        remedy = (
            "use the layout that it was saved with"
            if found
            else ("it was saved without QuacK, so load it first and attach QuacK then, to start from these weights")
        )
        self._loading = self._read(found, remedy)
        bare = {key: _without_ours(state) for key, state in states.items()}
        return {**state_dict, "state": {key: state for key, state in bare.items() if state or not states[key]}}

    def _after_load(self, optimizer: Optimizer) -> None:
        """Take over what `_before_load` read."""
        self._remember(self._loading)

    def _adopt(self) -> None:
        """Take the entries of a state that was loaded or copied before QuacK was attached, if there are any."""
        states = {name: self.optimizer.state.get(param, {}) for name, param in self._held.items()}
        found = {name: state[STATE_KEY] for name, state in states.items() if STATE_KEY in state}
        self._remember(self._read(found, "attach QuacK first and load it then") if found else self._init)
        for name in found:
            del states[name][STATE_KEY]
            if not states[name]:  # ours alone: see `_publish`
                del self.optimizer.state[self._held[name]]

    def _read(self, found: Mapping[str, Tensor], remedy: str) -> Tensor:
        """Initial factors, those of the held units from the entries of a state, by name of the parameter."""
        init = self._init.double().cpu()
        for name, param in self._held.items():
            if name in found:
                init[self._units[name]] = _decode(found[name], self._fingerprint(name), name)
            elif param.requires_grad:  # a frozen parameter may have no state at all
                raise OptimizerError(
                    f"the optimizer state has no initial factors of QuacK ({STATE_KEY!r}) for {name!r}; {remedy}"
                )
        return init.to(self._init)

    def _fingerprint(self, name: str) -> bytes:
        """Eight bytes that name the units of a parameter and the norm that their factors are made of."""
        units = [self.plan.units[i] for i in self._units[name]]
        text = repr((self._norm, [(unit.ranges, unit.axis, name == unit.bias) for unit in units]))
        return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _encode(fingerprint: bytes, init: Tensor) -> Tensor:
    """Entry of a parameter: 8 bytes that name its units, then the initial factor of each as a float64; uint8 [8 + 8 n].

    Bytes, because `Optimizer.load_state_dict` casts state to the type of its parameter: whole numbers below 256 are
    exact in all of them, and factors rounded to bfloat16 would be useless.
    """
    return torch.cat([torch.frombuffer(bytearray(fingerprint), dtype=torch.uint8), init.view(torch.uint8)])


def _decode(entry: Tensor, fingerprint: bytes, name: str) -> Tensor:
    """Initial factors in an entry, float64 [n]."""
    raw = entry.detach().to("cpu", torch.uint8)
    if bytes(raw[:8].tolist()) != fingerprint:
        raise OptimizerError(
            f"the optimizer state has QuacK factors for other heads, or another norm, of {name!r}; use the layout and "
            "the norm that it was saved with"
        )
    return raw[8:].clone().view(torch.float64)


def _scale_update(old: Tensor, new: Tensor, scale: Tensor) -> None:
    """new <- old + scale (new - old), row by row, in float32 at least and rounded once.

    lerp gives `new` back bit for bit where the scale is 1 or nothing changed.
    """
    scale = scale.to(new.device).view(-1, *[1] * (new.dim() - 1))
    if new.dtype in (torch.float32, torch.float64):
        torch.lerp(old, new, scale.to(new.dtype), out=new)
    else:
        new.copy_(torch.lerp(old.float(), new.float(), scale.float()))


def state_keys(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> dict[int, Any]:
    """Key of each parameter (by id) in a state dict of the optimizer."""
    groups = zip(optimizer.param_groups, state_dict["param_groups"], strict=False)
    return {
        id(param): key for ours, theirs in groups for param, key in zip(ours["params"], theirs["params"], strict=False)
    }


def _without_ours(state: Any) -> Any:
    """State of a parameter without QuacK's entry; state that belongs to no parameter may be anything."""
    return {key: value for key, value in state.items() if key != STATE_KEY} if isinstance(state, Mapping) else state


def _is_stepping(optimizer: Optimizer) -> bool:
    """Whether a step hook runs inside another step of the same optimizer.

    torch fires the hooks twice where a subclass's `step` calls `super().step()`, and only the outer call sees the whole
    update. The calls are told from the stack, since a step that ends with an exception leaves no other trace. (Should
    torch rename its wrapper, the inner call is taken for the outer one.)
    """
    steps, frame = 0, inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_globals.get("__name__") == Optimizer.__module__:
            steps += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps > 1


def _check_optimizer(optimizer: Optimizer) -> None:
    """Refuse what has no step hooks, or a QuacK already; warn of what QuacK does not suit."""
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise OptimizerError(f"optimizer is {kind}, which is no torch.optim.Optimizer; QuacK attaches to those only")
    try:
        optimizer.register_step_pre_hook(lambda *_: None).remove()
    except AttributeError:
        raise OptimizerError(
            f"{kind} has no hooks, as wrappers of optimizers do; attach QuacK to the one inside"
        ) from None
    if optimizer in _attached:
        raise OptimizerError(f"this {kind} has a QuacK attached already; call its detach() first")
    lineage = " ".join(cls.__name__.lower() for cls in type(optimizer).__mro__)
    for name, reason in _UNSUITED.items():
        if name in lineage and _relative(optimizer, name):
            warnings.warn(f"QuacK does not suit {kind}: {reason}", stacklevel=3)


def _relative(optimizer: Optimizer, name: str) -> bool:
    """False for the Adafactor of transformers when its relative steps are switched off."""
    switches = [optimizer.defaults[k] for k in ("relative_step", "scale_parameter") if k in optimizer.defaults]
    return name != "adafactor" or not switches or any(switches)


def _nothing_held(optimizer: Optimizer, plan: FactorPlan) -> str:
    """Message for an optimizer that holds no rows of a plan."""
    kind = type(optimizer).__name__
    if not plan.units:
        left_out = f" ({len(plan.left_out)} sites keep a QK norm)" if plan.left_out else ""
        return f"the layout has no query or key weights that QuacK scales{left_out}; use {kind} as it is"
    return (
        f"{kind} holds none of the query and key weights, such as {plan.units[0].param!r}; attach QuacK to the "
        "optimizer that has them, made after the model was wrapped, sharded and moved"
    )
