"""A small model with grouped queries, and the definition of QuacK: each of its heads a parameter group of its own."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from quack_fx.layout import AttentionSite, LogitTerm, QKLayout, WeightBlock

LAYERS, HEADS, KEY_HEADS, DIM, WIDTH, TOKENS = 2, 4, 2, 4, 16, 6


def heads(n: int, start: int = 0, dim: int = DIM) -> tuple[tuple[tuple[int, int], ...], ...]:
    return tuple(((start + h * dim, start + (h + 1) * dim),) for h in range(n))


class Attention(nn.Module):
    """Grouped-query attention; q has a bias, and k | v are fused."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * DIM)
        self.kv = nn.Linear(WIDTH, 2 * KEY_HEADS * DIM, bias=False)
        self.out = nn.Linear(HEADS * DIM, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(attend(x, self.q.weight, self.q.bias, self.kv.weight))


def attend(x: Tensor, q_weight: Tensor, q_bias: Tensor, kv_weight: Tensor) -> Tensor:
    q = F.linear(x, q_weight, q_bias).unflatten(-1, (HEADS, DIM)).transpose(-2, -3)
    k, v = F.linear(x, kv_weight).unflatten(-1, (2, KEY_HEADS, DIM)).unbind(-3)
    k, v = (t.transpose(-2, -3).repeat_interleave(HEADS // KEY_HEADS, -3) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)


class Layers(nn.Module):
    """Attentions one after the other, each with a residual, and a linear layer on top."""

    def __init__(self, attention: Callable[[], nn.Module], width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(attention() for _ in range(LAYERS))
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        out: Tensor = self.head(x)
        return out


class Model(Layers):
    def __init__(self) -> None:
        super().__init__(Attention, WIDTH)


def site(layer: int, **fields: Any) -> AttentionSite:
    name = f"layers.{layer}"
    return AttentionSite(
        name=name,
        kind="gqa",
        cross=False,
        calls=1,
        query_heads=HEADS,
        key_heads=KEY_HEADS,
        head_dim=DIM,
        head_map=tuple(h * KEY_HEADS // HEADS for h in range(HEADS)),
        query=(WeightBlock(f"{name}.q.weight", "q", 0, heads(HEADS), f"{name}.q.bias"),),
        key=(WeightBlock(f"{name}.kv.weight", "k", 0, heads(KEY_HEADS)),),
        terms=(LogitTerm((0,), (0,)),),
        **fields,
    )


LAYOUT = QKLayout(tuple(map(site, range(LAYERS))))


def batch(step: int) -> Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(step))


def loss_of(model: Callable[[Tensor], Tensor], step: int) -> Tensor:
    x = batch(step).to(next(model.parameters()).dtype)
    return F.mse_loss(model(x), x.roll(1, -1).sin())


def train(model: nn.Module, *optimizers: Optimizer, steps: range = range(50)) -> nn.Module:
    for step in steps:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, step).backward()
        for optimizer in optimizers:
            optimizer.step()
    return model


def assert_same(model: nn.Module, other: nn.Module) -> None:
    """Bit for bit."""
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


def relative_error(found: Tensor, expected: Tensor) -> float:
    difference = (found - expected).detach().norm() / expected.detach().norm()
    return float(difference)


class Lion(Optimizer):
    """A third-party optimizer, as its paper writes it: sign of an interpolation, decoupled decay."""

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(p)
                beta1, beta2 = group["betas"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(state["exp_avg"].lerp(p.grad, 1 - beta1).sign(), alpha=-group["lr"])
                state["exp_avg"].lerp_(p.grad, 1 - beta2)
        return loss


class PerHead(nn.Module):
    """The same model with every head its own parameter, and every parameter its own group: the definition of QuacK."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.rest = copy.deepcopy(model)
        self.q_weight, self.q_bias, self.k_weight = (nn.ParameterList() for _ in range(3))
        self.v_weight = nn.ParameterList()
        for layer in self.rest.layers:
            self.q_weight.extend(map(nn.Parameter, layer.q.weight.detach().clone().split(DIM)))
            self.q_bias.extend(map(nn.Parameter, layer.q.bias.detach().clone().split(DIM)))
            k, v = layer.kv.weight.detach().clone().chunk(2)
            self.k_weight.extend(map(nn.Parameter, k.split(DIM)))
            self.v_weight.append(nn.Parameter(v))
        for layer in self.rest.layers:
            layer.q = layer.kv = None

    def pieces(self, layer: int) -> dict[str, list[nn.Parameter]]:
        """Each weight of a layer of the model as it was, as the pieces of its rows."""
        q, k = slice(layer * HEADS, (layer + 1) * HEADS), slice(layer * KEY_HEADS, (layer + 1) * KEY_HEADS)
        keys = [*self.k_weight[k], self.v_weight[layer]]
        return {"q.weight": list(self.q_weight[q]), "q.bias": list(self.q_bias[q]), "kv.weight": keys}

    def weights(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        q_weight, q_bias, kv_weight = map(torch.cat, self.pieces(layer).values())
        return q_weight, q_bias, kv_weight

    @torch.no_grad()
    def read(self, model: Model, layer: int) -> None:
        """Take the values of a layer's weights as somebody has changed them in the model as it was."""
        for name, pieces in self.pieces(layer).items():
            parts = model.get_parameter(f"layers.{layer}.{name}").split([len(piece) for piece in pieces])
            for piece, part in zip(pieces, parts, strict=True):
                piece.copy_(part)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.rest.layers):
            x = x + layer.out(attend(x, *self.weights(i)))
        out: Tensor = self.rest.head(x)
        return out

    def groups(self) -> list[dict[str, Any]]:
        """One group for each head, queries (weight and bias) first; then one for the rest."""
        scaled = [[w, b] for w, b in zip(self.q_weight, self.q_bias, strict=True)] + [[w] for w in self.k_weight]
        ids = {id(p) for group in scaled for p in group}
        rest = [p for p in self.parameters() if id(p) not in ids]
        return [{"params": params} for params in [*scaled, rest]]

    def take(self, model: Model) -> None:
        """The gradients of the model as it was, each head's its own."""
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for i in range(LAYERS):
            for name, pieces in self.pieces(i).items():
                for piece, part in zip(
                    pieces, grads[f"layers.{i}.{name}"].split([len(piece) for piece in pieces]), strict=True
                ):
                    piece.grad = part.clone()
        for name, p in self.rest.named_parameters():
            p.grad = grads[name].clone()

    def factors(self) -> list[float]:
        """Factors in the order of the groups, by the loops of Alg. 1, the largest query head for a shared key."""
        share = HEADS // KEY_HEADS
        q = [
            math.sqrt(sum(float(p.detach().double().square().sum()) for p in head))
            for head in zip(self.q_weight, self.q_bias, strict=True)
        ]
        k = [float(p.detach().double().norm()) for p in self.k_weight]
        met = [k[i // share] for i in range(len(q))] + [max(q[i * share : (i + 1) * share]) for i in range(len(k))]
        return [1 / norm if norm else math.inf for norm in met]


class PerHeadRun:
    """Training by the definition: before each step the learning rate of every head's group is set by its factor."""

    def __init__(self, model: Model, make: Callable[[Any], Optimizer], tau: float) -> None:
        self.model, self.tau = PerHead(model), tau
        self.optimizer = make(self.model.groups())
        self.base = [group["lr"] for group in self.optimizer.param_groups]
        self.first = self.model.factors()

    def scales(self) -> list[float]:
        """Those of the heads; what meets a head that was set to zero makes logits of zero, at any rate."""
        pairs = zip(self.model.factors(), self.first, strict=True)
        return [self.tau * (1.0 if math.isinf(now) else now / first) for now, first in pairs]

    def step(self, lr: float = 1.0) -> None:
        """A step by the gradients that are there, all learning rates times `lr`."""
        scales = [*self.scales(), 1.0]
        for group, base, scale in zip(self.optimizer.param_groups, self.base, scales, strict=True):
            group["lr"] = base * lr * scale
        self.optimizer.step()


def train_per_head(
    model: Model,
    make: Callable[[Any], Optimizer],
    tau: float,
    schedule: Callable[[int], float],
    steps: int = 50,
    clip: float | None = None,
    accumulate: int = 1,
) -> PerHead:
    run = PerHeadRun(model, make, tau)
    for step in range(steps):
        run.optimizer.zero_grad()
        for part in range(accumulate):
            (loss_of(run.model, step * accumulate + part) / accumulate).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(run.model.parameters(), clip)
        run.step(schedule(step))
    return run.model


def row_factors(model: Model) -> dict[nn.Parameter, Tensor]:
    """Factor of every row of queries and keys, by Alg. 1 in fp64."""
    found = {}
    for layer in model.layers:
        q_rows = torch.cat([layer.q.weight, layer.q.bias[:, None]], 1).detach().double()
        q = q_rows.view(HEADS, -1).norm(dim=1)
        k = layer.kv.weight.detach().double()[: KEY_HEADS * DIM].view(KEY_HEADS, -1).norm(dim=1)
        of_q, of_k = (1 / k).repeat_interleave(HEADS // KEY_HEADS), 1 / q.view(KEY_HEADS, -1).amax(1)
        found[layer.q.weight] = found[layer.q.bias] = of_q.repeat_interleave(DIM)
        found[layer.kv.weight] = of_k.repeat_interleave(DIM)
    return found
