"""DOOR: example inputs from the signature of a model's forward and from its first layers.

In: a model. Out: `Inputs`, most likely first; the caller keeps the first for which the forward runs. They are tiny:
batches of 2, 4 tokens. A parameter of forward with a default keeps it, so targets and labels are left out. The first
required one is the data: token ids where the model begins with an Embedding, an image for a Conv2d, features for a
Linear. Others go by annotation and name (a mask, a time step, positions, a class), or else are more data.

Letters at the end of a tensor's name are its shape: B sequences, T tokens, D features, C channels, H height, W width.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quack_fx.errors import TargetError
from quack_fx.targets import hf

BATCH, TOKENS = 2, 4
LIMIT = 24
"""Candidates that are tried at most."""

_TIME = re.compile(r"t|ts|time|times|timesteps?|sigmas?|noise_levels?")
_CLASS = re.compile(r"y|labels?|class_(ids?|labels?)|classes")
_CONDITION = re.compile(rf"{_TIME.pattern}|class_(ids?|labels?)|classes")
"""What diffusion models call optional and cannot do without."""

Make = Callable[[], Any]


@dataclass(frozen=True, eq=False)
class Inputs:
    """Arguments of one forward call, and how to show them: "idx=int64[2, 4]"."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    text: str

    def expression(self) -> str:
        """Python that makes inputs like these, for a user to change."""
        args = ", ".join(_expression(value) for value in self.args)
        kwargs = f"dict({', '.join(f'{name}={_expression(value)}' for name, value in self.kwargs.items())})"
        if not self.kwargs:
            return args if len(self.args) == 1 else f"({args})"
        return kwargs if not self.args else f"(({args},), {kwargs})"


def infer(model: nn.Module, name: str) -> list[Inputs]:
    """Example inputs that the forward may take, most likely first; at least one.

    Arguments:
        model: The model, on any device.
        name: What to call it in an error.

    Raises:
        TargetError: Nothing can be inferred.
    """
    if hf.is_pretrained(model):
        return [_named(kwargs) for kwargs in hf.inputs(model, BATCH, TOKENS)]
    parameters = _wanted(model)
    if not parameters:
        return [_named({})]
    optional = [p for p in _parameters(model) if p.default is None and p not in parameters]
    conditions = [p for p in optional if _CONDITION.fullmatch(p.name.lower())]
    found = _candidates(model, parameters, LIMIT // 2 if conditions else LIMIT)
    if conditions:
        found += _candidates(model, [*parameters, *conditions], LIMIT // 2)
    if not found:
        raise TargetError(
            f"no inputs can be inferred for forward{inspect.signature(model.forward)} of {name}; "
            'give them, for example --inputs "torch.randn(2, 16, 64)"'
        )
    return found


def _candidates(model: nn.Module, parameters: list[inspect.Parameter], limit: int) -> list[Inputs]:
    """Inputs with a value for each of these parameters."""
    data, *others = parameters
    combined = (
        makes
        for make in _data(model, data)
        for makes in itertools.product([make], *(_other(p, make, model) for p in others))
    )
    return [_assign(parameters, makes) for makes in itertools.islice(combined, limit)]


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


def _wanted(model: nn.Module) -> list[inspect.Parameter]:
    """Parameters of forward to fill: the required ones; where there are none, the first one that takes data."""
    parameters = _parameters(model)
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if required:
        return required
    return [p for p in parameters if p.default is None or p.kind is p.VAR_POSITIONAL][:1]


def _assign(parameters: list[inspect.Parameter], makes: tuple[Make, ...]) -> Inputs:
    args, kwargs, parts = [], {}, []
    for parameter, make in zip(parameters, makes, strict=True):
        value = make()
        parts.append(f"{parameter.name}={_shown(value)}")
        if parameter.kind is parameter.KEYWORD_ONLY or parameter.default is None:
            kwargs[parameter.name] = value
        else:
            args.append(value)
    return Inputs(tuple(args), kwargs, ", ".join(parts))


def _named(kwargs: dict[str, Any]) -> Inputs:
    return Inputs((), kwargs, ", ".join(f"{name}={_shown(value)}" for name, value in kwargs.items()) or "nothing")


def _expression(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    if value.is_floating_point():
        return f"torch.randn({', '.join(map(str, value.shape))})"
    if value.dtype == torch.bool:
        return f"torch.ones({', '.join(map(str, value.shape))}, dtype=torch.bool)"
    return f"torch.randint(0, {int(value.max()) + 1}, {tuple(value.shape)})"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)


# ---- the data --------------------------------------------------------------------------------------------------------


def _data(model: nn.Module, parameter: inspect.Parameter) -> list[Make]:
    """What the first parameter may be, most likely first."""
    makes: list[tuple[str, Make]] = []
    for module in model.modules():
        makes += [m for m in _taken_by(module, model) if m[0] not in {key for key, _ in makes}]
        if len(makes) > LIMIT:
            break
    makes += _taken_by_parameters(model)
    name = parameter.name.lower()
    likely = "ids" if re.search(r"(^|_)(ids?|idx|tokens?|input_ids)$", name) else ""
    likely = "image" if re.search(r"(^|_)(img|imgs|images?|pixel_values|pixels)$", name) else likely
    makes.sort(key=lambda m: not (likely and m[0].startswith(likely)))  # stable: the model's own order otherwise
    return [make for _, make in makes]


def _taken_by(module: nn.Module, model: nn.Module) -> Iterator[tuple[str, Make]]:
    """Data that a layer takes, told by its type or by the attributes that hold its width."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        yield f"ids {module.num_embeddings}", _ids(module.num_embeddings)
    elif isinstance(module, nn.Conv2d):
        for side in _sides(model, module):
            yield f"image {side}", _features(BATCH, module.in_channels, side, side)
    elif isinstance(module, nn.Conv1d):
        for length in (TOKENS, 64, 1024):
            yield f"signal {module.in_channels} {length}", _features(BATCH, module.in_channels, length)
    elif isinstance(module, nn.Conv3d):
        for side in _sides(model, module):
            yield f"video {side}", _features(BATCH, module.in_channels, TOKENS, side, side)
    elif isinstance(width := _width(module), int):
        patch = math.isqrt(width // 3)
        if width == 3 * patch**2 and patch > 1 and _declared_sides(model):  # a Linear on flattened patches
            for side in _declared_sides(model):
                yield f"image {side}", _features(BATCH, 3, side, side)
        yield f"features {width}", _features(BATCH, TOKENS, width)
        yield f"flat {width}", _features(BATCH, width)


def _width(module: nn.Module) -> Any:
    """Number of features that a Linear, a norm or an attention takes."""
    shape = getattr(module, "normalized_shape", None)
    if isinstance(shape, tuple) and shape:
        return shape[-1]
    return next((v for a in ("in_features", "embed_dim") if isinstance(v := getattr(module, a, None), int)), None)


def _taken_by_parameters(model: nn.Module) -> list[tuple[str, Make]]:
    """Data for models that multiply with parameters of their own: rows may be tokens, either axis may be features."""
    matrices = [p.shape for p in model.parameters() if p.dim() == 2 and min(p.shape) > 1][:2]
    found: list[tuple[str, Make]] = []
    for rows, columns in matrices:
        found += [(f"features {n}", _features(BATCH, TOKENS, n)) for n in dict.fromkeys((rows, columns))]
        found.append((f"ids {rows}", _ids(rows)))
    return found


def _ids(vocabulary: int) -> Make:
    return lambda: torch.arange(1, BATCH * TOKENS + 1).remainder(vocabulary).view(BATCH, TOKENS)


def _features(*shape: int) -> Make:
    # A generator of its own: the user's random state stays as it was.
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _sides(model: nn.Module, conv: nn.Conv2d | nn.Conv3d) -> list[int]:
    """Sides of a square image: as declared, as the number of learned positions tells, and usual ones."""
    stride = conv.stride[-1]
    learned = []
    for parameter in model.parameters():
        if parameter.dim() in (2, 3) and parameter.shape[-1] == conv.out_channels:
            for extra in (0, 1):  # a class token
                count = parameter.shape[-2] - extra
                if count > 1 and math.isqrt(count) ** 2 == count:
                    learned.append(math.isqrt(count) * int(stride))
    return list(dict.fromkeys([*_declared_sides(model), *learned, 32, 224, 64]))


def _declared_sides(model: nn.Module) -> list[int]:
    """Sizes that a module says its images have."""
    found = []
    for module in itertools.islice(model.modules(), 8):
        for name in ("img_size", "image_size", "input_size"):
            size = getattr(module, name, None) or getattr(getattr(module, "config", None), name, None)
            size = size[0] if isinstance(size, tuple | list) and size else size
            if isinstance(size, int):
                found.append(size)
    return found


# ---- what else forward asks for --------------------------------------------------------------------------------------


def _other(parameter: inspect.Parameter, data: Make, model: nn.Module) -> list[Make]:
    """What a further required parameter may be."""
    hint = (
        parameter.annotation if isinstance(parameter.annotation, str) else getattr(parameter.annotation, "__name__", "")
    )
    name = parameter.name.lower()
    if hint == "bool" or re.match(r"(is|use|return|causal)(_|$)", name):
        return [lambda: False]
    if hint == "int" or re.search(r"start_pos|offset", name):
        return [lambda: TOKENS] if re.search(r"len|size|seq|num", name) else [lambda: 0]
    if hint == "float":
        return [lambda: 1.0]
    if "mask" in name:
        none: Make = lambda: None  # noqa: E731
        tensors: list[Make] = [lambda: torch.ones(BATCH, TOKENS, dtype=torch.bool), lambda: torch.zeros(TOKENS, TOKENS)]
        return [*tensors, none] if hint in ("Tensor", "torch.Tensor") else [none, *tensors]
    if _TIME.fullmatch(name):
        return [lambda: torch.ones(BATCH), lambda: torch.ones(BATCH, dtype=torch.int64)]
    if _CLASS.fullmatch(name) and data().is_floating_point():
        return [lambda: torch.zeros(BATCH, dtype=torch.int64)]
    if re.fullmatch(r"(input_)?pos(ition)?s?(_ids)?", name):
        return [lambda: torch.arange(TOKENS), lambda: torch.arange(TOKENS).expand(BATCH, TOKENS)]
    if re.search(r"lengths?$|lens$", name):
        return [lambda: torch.full((BATCH,), TOKENS)]
    kinds = [make for module in model.modules() for _, make in _taken_by(module, model)]
    return [data, *itertools.islice((make for make in kinds if _shown(make()) != _shown(data())), 3)]
