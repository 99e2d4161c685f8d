"""USER: the part of an emitted file that is the same for every model, as text.

In: the features that a model's table makes use of. Out: Python source without a trace of the others. A line `#? bias`
in the template opens a passage for tables with a bias, `#? !bias` one for those without, `#?` ends it.

The features:
    axis    a weight whose outputs are not counted by its first axis (GPT-2's Conv1D)
    bias    a projection with a bias
    pieces  a block whose rows are not one contiguous run
    norms   QK norm modules that are taken out of the model
    factor  some of them leave a number behind that features are multiplied with
    tensors some of them norm queries and keys in one call
    gaps    rows that belong to no block (the values of a fused projection), or products of different lengths
"""

from __future__ import annotations

from collections.abc import Set


def render(template: str, features: Set[str]) -> str:
    """The passages of a template that a set of features needs."""
    lines, keep = [], True
    for line in template.splitlines():
        if line.startswith("#?"):
            keep = all((name.lstrip("!") in features) != name.startswith("!") for name in line[2:].split())
        elif keep:
            lines.append(line)
    return "\n".join(lines) + "\n"


IMPORTS = """\
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
"""

RUNTIME = '''\
@dataclass(frozen=True)
class Weight:
    """A weight of the model; slicing it gives a block of its rows, the outputs of one head for example."""

    name: str
    shape: tuple[int, ...]
#? axis
    axis: int = 0  # the one that counts outputs; "rows" lie along it
#? bias
    bias: str | None = None
#? !pieces

    def __getitem__(self, rows: slice) -> Block:
        return Block(self, rows.start, rows.stop)
#? pieces

    def __getitem__(self, rows: slice | tuple[slice, ...]) -> Block:
        pieces = rows if isinstance(rows, tuple) else (rows,)
        return Block(self, tuple(range(piece.start, piece.stop, piece.step or 1) for piece in pieces))
#?


class Block(NamedTuple):
#? !bias
    """Rows of a weight that share one norm and one learning rate."""
#? bias
    """Rows of a weight, and their entries of its bias, that share one norm and one learning rate."""
#?

    weight: Weight
#? !pieces
    start: int
    stop: int
#? pieces
    pieces: tuple[range, ...]
#?


#? norms
class PassThrough(nn.Module):
#? norms !factor !tensors
    """Stands where a QK norm stood, and hands on what it is given."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x
#? norms factor !tensors
    """Stands where a QK norm stood, and hands on what it is given, times a number."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x if self.factor == 1 else x * self.factor
#? norms tensors
    """Stands where a QK norm stood, and hands on its first arguments, times a number."""

    def __init__(self, tensors: int = 1, factor: float = 1.0) -> None:
        super().__init__()
        self.tensors, self.factor = tensors, factor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())[: self.tensors]
        kept = given if self.factor == 1 else tuple(x * self.factor for x in given)
        return kept[0] if self.tensors == 1 else kept
#? norms


def strip_qk_norm(model: nn.Module) -> nn.Module:
    """Take the QK norms out of the model, in place; call it before the optimizer is made, and after each new build."""
    for name, stand_in in qk_norms():
        model.set_submodule(name, stand_in)
    return model


#?
class HeadScales:
    """The rule of QuacK for all heads at once: from the weights to the scale of every row's learning rate.

        factor(block) = min over the products with this block of 1 / (norms of the other blocks in it, multiplied)
        scale(block) = tau * factor(block) / factor(block) at the start of training

#? gaps
    Rows that are in no block keep the scale 1. The code works with the gain, which is 1 / factor.
#? !gaps
    The code works with the gain, which is 1 / factor.
#?
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, tau: float) -> None:
        products = list(logit_products())
        number = {block: n for n, block in enumerate(dict.fromkeys(b for product in products for b in product))}
        named = {name.replace("_orig_mod.", ""): p for name, p in model.named_parameters(remove_duplicate=False)}
        self.tau, self.blocks = tau, len(number)
#? norms
        stripped = {name for name, module in model.named_modules() if isinstance(module, PassThrough)}
        stripped = {name.replace("_orig_mod.", "").removeprefix("module.") for name in stripped}
        for name, _ in qk_norms():
            if name not in stripped:
                raise ValueError(f"the model still has the QK norm {name}: call strip_qk_norm(model) first")
#?
        self.weights: list[nn.Parameter] = []
#? axis
        self.axes: list[int] = []
#? gaps
        owner: dict[str, Tensor] = {}  # for every row of a weight the number of its block, self.blocks if in none
#? !gaps
        owner: dict[str, Tensor] = {}  # for every row of a weight the number of its block
#?
        for weight in dict.fromkeys(block.weight for block in number):
            self.weights.append(find(named, weight.name, weight.shape))
#? axis
            self.axes.append(weight.axis)
            owner[weight.name] = torch.full((weight.shape[weight.axis],), self.blocks)
#? !axis
            owner[weight.name] = torch.full(weight.shape[:1], self.blocks)
#? bias
            if weight.bias is not None:
                self.weights.append(find(named, weight.bias, owner[weight.name].shape))
#? bias axis
                self.axes.append(0)
#? bias
                owner[weight.bias] = owner[weight.name]
#?
        for block, n in number.items():
#? !pieces
            owner[block.weight.name][block.start : block.stop] = n
#? pieces
            for piece in block.pieces:
                owner[block.weight.name][piece.start : piece.stop : piece.step] = n
#?
        self.rows = [len(rows) for rows in owner.values()]
        device = self.weights[0].device
        self.owner = torch.cat(list(owner.values())).to(device)
#? !gaps
        self.members = torch.tensor([[number[b] for b in product] for product in products], device=device)
#? gaps
        longest = max(map(len, products))
        members = [[number[b] for b in product] + [self.blocks] * (longest - len(product)) for product in products]
        self.members = torch.tensor(members, device=device)
#?

        norms = self.norms()
        zero = [block for block, norm in zip(number, norms.tolist(), strict=False) if norm == 0]
        if zero:
            where = f"rows {zero[0][1:]} of {zero[0].weight.name}"
            raise ValueError(f"{where} are zero, and QuacK divides by their norm: give them other initial values")
        self.first_gain = self.gain(norms)
        self.scale = self.scales()

    def norms(self) -> Tensor:
#? gaps
        """Frobenius norm of every block, then a 1 for what is in no block."""
#? !gaps
        """Frobenius norm of every block."""
#?
        dtype = torch.promote_types(self.weights[0].dtype, torch.float32)
#? !axis
        squares = [w.to(dtype).square().reshape(len(w), -1).sum(1) for w in self.weights]
#? axis
        weights = [w.movedim(axis, 0) for w, axis in zip(self.weights, self.axes, strict=True)]
        squares = [w.to(dtype).square().reshape(len(w), -1).sum(1) for w in weights]
#? gaps
        sums = squares[0].new_zeros(self.blocks + 1).index_add(0, self.owner, torch.cat(squares))
        return nn.functional.pad(sums[:-1].sqrt(), (0, 1), value=1.0)
#? !gaps
        return squares[0].new_zeros(self.blocks).index_add(0, self.owner, torch.cat(squares)).sqrt()
#?

    def gain(self, norms: Tensor) -> Tensor:
        """For every block the largest of its products, with the block itself left out."""
        members = norms[self.members]
        others = members.prod(1, keepdim=True) / members
        return torch.zeros_like(norms).scatter_reduce(0, self.members.flatten(), others.flatten(), "amax")

    def scales(self) -> Tensor:
#? gaps
        """Scale of the learning rate of every row; 1 for those in no block."""
        scale = self.tau * self.first_gain / self.gain(self.norms())
        return nn.functional.pad(scale[:-1], (0, 1), value=1.0)[self.owner]
#? !gaps
        """Scale of the learning rate of every row."""
        return (self.tau * self.first_gain / self.gain(self.norms()))[self.owner]
#?


def find(named: dict[str, nn.Parameter], name: str, shape: tuple[int, ...]) -> nn.Parameter:
    """A parameter of the table in the model; DistributedDataParallel puts a prefix before its name."""
    parameter = named.get(name, named.get(f"module.{name}"))
    if parameter is None or parameter.shape != shape or hasattr(parameter, "placements"):
        found = None if parameter is None else f"a {type(parameter).__name__} of {list(parameter.shape)}"
        raise ValueError(f"the table has a parameter {name} of {list(shape)}, whole on every rank; found {found}")
    return parameter


def update(jobs: list[tuple[Any, ...]], heads: HeadScales) -> None:
    """AdamW for every parameter (arXiv 1711.05101, Alg. 2), then the scales of the next step from the new weights.

    Compiled, the loop that writes a weight also sums up the squares of its rows: the norms cost no pass of their own.
    """
    scales = torch.split(heads.scale, heads.rows)
    for weight, grad, exp_avg, exp_avg_sq, step, lr, (beta1, beta2), eps, weight_decay, place in jobs:
        step += 1
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.lerp_(grad.square(), 1 - beta2)
        change = exp_avg / unbias(beta1, step) / ((exp_avg_sq / unbias(beta2, step)).sqrt() + eps)
        if place is not None:
#? !axis
            lr = lr * scales[place].view(-1, *[1] * (weight.dim() - 1))
#? axis
            lr = lr * scales[place].view(-1, *[1] * (weight.dim() - 1 - heads.axes[place]))
#?
        weight -= lr * (change + weight_decay * weight)
    heads.scale.copy_(heads.scales())


def unbias(beta: float, step: Tensor) -> Tensor | float:
    """1 - beta**step, with all the digits that single precision has."""
    return -torch.expm1(step * math.log(beta)) if beta > 0 else 1.0


class QuacKAdamW(torch.optim.AdamW):
    """AdamW in which every head's query and key rows have a learning rate of their own.

    Make it while the model has its initial weights: later norms are measured against theirs, also after a resume.

    Arguments:
        model: The model, or what torch.compile or DistributedDataParallel made of it.
        lr, adamw: As in torch.optim.AdamW (betas, eps, weight_decay). A new `lr` never recompiles.
        tau: Learning rate of query and key rows at the start, relative to `lr`.
        param_groups: What AdamW takes as `params`; without it, all parameters of the model.
        compile: Whether to compile the update.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor = 1e-3,
        *,
        tau: float = __TAU__,
        param_groups: Any = None,
        compile: bool = True,
        **adamw: Any,
    ) -> None:
        super().__init__(model.parameters() if param_groups is None else param_groups, lr, **adamw)
        for option in ("amsgrad", "maximize", "differentiable", "fused"):
            if any(group[option] for group in self.param_groups):
                raise ValueError(f"QuacKAdamW has no option {option}: leave it out")
        self.heads = HeadScales(model, tau)
        self.place = {weight: place for place, weight in enumerate(self.heads.weights)}
        held = {parameter for group in self.param_groups for parameter in group["params"]}
        if any(weight.requires_grad and weight not in held for weight in self.place):
            raise ValueError("param_groups lacks query or key weights that need a gradient: add or freeze them")
        self._update = torch.compile(update) if compile else update

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """As in torch.optim.AdamW. Nothing in it waits for the device."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        jobs: list[tuple[Any, ...]] = []
        for group in self.param_groups:
            lr = group["lr"] if isinstance(group["lr"], Tensor) else self.heads.scale.new_full((), group["lr"])
            hyper = lr, group["betas"], group["eps"], group["weight_decay"]
            for weight in (parameter for parameter in group["params"] if parameter.grad is not None):
                state = self.state[weight]
                if not state:
                    state["step"] = self.heads.scale.new_zeros(())
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
                moments = state["exp_avg"], state["exp_avg_sq"], state["step"]
                jobs.append((weight, weight.grad, *moments, *hyper, self.place.get(weight)))
        self._update(jobs, self.heads)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state of AdamW, and as "quack" what the rule remembers."""
        quack = {name: getattr(self.heads, name) for name in ("tau", "first_gain", "scale")}
        return super().state_dict() | {"quack": quack}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where state_dict() was taken; the hyperparameters, tau among them, are those of then."""
        quack = state_dict.get("quack")
        if quack is None or quack["scale"].shape != self.heads.scale.shape:
            raise ValueError("not a state_dict() of QuacKAdamW for this model: it holds no norms to go on from")
        super().load_state_dict(state_dict)
        for weight, state in self.state.items():
            state["step"] = state["step"].to(weight.device)
        self.heads.tau = quack["tau"]
        self.heads.first_gain.copy_(quack["first_gain"])
        self.heads.scale.copy_(quack["scale"])


def compile_train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: Callable[..., Any] | None = None
) -> Callable[..., Tensor]:
    """A training step as a function of the batch: compiled loss, backward, compiled update; returns the loss, detached.

    The loss is loss_fn(model, *batch), or model(*batch) if there is no `loss_fn`: a scalar, the one scalar of a tuple
    or the attribute `loss` of what comes back.
    """

    @torch.compile
    def compiled_loss(*batch: Any, **named: Any) -> Tensor:
        output = model(*batch, **named) if loss_fn is None else loss_fn(model, *batch, **named)
        output = getattr(output, "loss", output)
        parts = output if isinstance(output, tuple) else (output,)
        loss: Tensor = next(part for part in parts if isinstance(part, Tensor) and part.dim() == 0)
        return loss

    def train_step(*batch: Any, **named: Any) -> Tensor:
        loss = compiled_loss(*batch, **named)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return train_step
'''
