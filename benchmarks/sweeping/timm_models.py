"""SOURCE: timm. Every architecture of `timm.list_models()`, one candidate for each distinct form, reduced in size.

In: nothing. Out: candidates. A timm entry point only passes a class and its configuration to one builder function. That
function is replaced, so all entry points are read in seconds and nothing is built. Two entry points have the same form
if their configurations differ only in numbers (or their modules contain no attention).

A candidate is built from a reduced configuration: few blocks, narrow heads, a small image. Sizes that a class accepts
are found by trial, from the smallest to the original configuration.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.sweeping.candidate import Candidate
from benchmarks.sweeping.count import chooses

PARAMETERS = 150_000_000
"""Maximum number of parameters of a model."""

SIDES = (96, 64, 126, 128, 192, 224, 240, 256)
"""Heights and widths of the image, tried in this order until every softmax has several tokens."""

BATCH = 2

_HOLDS_ATTENTION = re.compile(r"softmax|scaled_dot_product|Attention|attn|'m[hq]a'")
_DEPTHS = re.compile(r"^((serial_|parallel_)?depths?|depth_list|layers|stages|num_blocks)$")
_WIDTHS = re.compile(r"^(embed_dims?|dims|base_dims|inner_dim|width_list|widths|stem_width|dim_head|head_dim|key_dim)$")
_BLOCK_NUMBERS = re.compile(r"^global_att(n_indexes|_blocks)$")
_HEADS = re.compile(r"^num_(kv_)?heads$")
_GROUPS = re.compile(r"^attn_groups$")
"""Option for the number of attention groups, of three blocks each."""
_NOT_THE_MODEL = re.compile("^(pretrained_.*|feature_cfg)$")


@dataclasses.dataclass(frozen=True)
class Form:
    """The arguments that a timm entry point passes to the builder.

    Attributes:
        architecture: Name of the entry point.
        family: timm module of the entry point.
        model_class: Class to build, or a function that builds the model.
        config: Keyword arguments of the builder.
    """

    architecture: str
    family: str
    model_class: Callable[..., nn.Module]
    config: Mapping[str, Any]


class _Recorded(Exception):
    """Stops an entry point when it calls the builder."""


class _TooLargeError(Exception):
    """The model has more than `PARAMETERS` parameters."""


def candidates() -> Iterator[Candidate]:
    """One candidate for each distinct form of timm's architectures."""
    seen: set[object] = set()
    for form in forms():
        signature = _signature(form)
        if signature not in seen:
            seen.add(signature)
            yield Candidate("timm", form.family, form.architecture, functools.partial(build, form))


def forms() -> Iterator[Form]:
    """The form of every architecture, in timm's order."""
    import timm

    for architecture in timm.list_models():
        entry_point = timm.model_entrypoint(architecture)
        model_class, config = _recorded(architecture, entry_point)
        yield Form(architecture, entry_point.__module__.rpartition(".")[2], model_class, config)


def _recorded(
    architecture: str, entry_point: Callable[[], nn.Module]
) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    """The class and configuration that an entry point passes to the builder."""
    from timm import is_model, model_entrypoint
    from timm.models._builder import build_model_with_cfg

    def builder(model_class: Callable[..., nn.Module], variant: str, *args: Any, **config: Any) -> nn.Module:
        if is_model(variant) and model_entrypoint(variant).__module__ != entry_point.__module__:
            return build_model_with_cfg(model_class, variant, *args, **config)  # a submodel built by timm's builder
        raise _Recorded(model_class, config)

    name = "build_model_with_cfg"
    modules = [vars(module) for path, module in sys.modules.items() if path.startswith("timm.models.")]
    holders = {id(names): (names, names[name]) for names in modules if name in names}
    try:
        for names, _ in holders.values():
            names[name] = builder
        entry_point()
    except _Recorded as recorded:
        return recorded.args  # type: ignore[return-value]
    finally:
        for names, real in holders.values():
            names[name] = real
    raise RuntimeError(f"{entry_point} builds its model in a way of its own")


def build(form: Form) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """The smallest model of a form that can be built and run, in evaluation mode, with an input image.

    Raises:
        ValueError: No model with at most `PARAMETERS` parameters runs; the message describes the last trial.
    """
    problem: Exception | None = None
    built = None
    for config in _shrunk({**_defaults(form.model_class), **form.config}):
        for side in SIDES:
            try:
                model = _build(form, config, side)
                made = model, (torch.randn(BATCH, 3, side, side),), dict[str, Any]()
                enough = chooses(*made)
            except _TooLargeError as error:
                problem = error
                break
            except Exception as error:
                problem = error
            else:
                built = built or made
                if enough:
                    return made
        if built is not None:
            return built
    raise ValueError(f"{form.architecture}: no size of it could be built and run: {problem}") from problem


def _build(form: Form, config: Mapping[str, Any], side: int) -> nn.Module:
    from timm.models._builder import build_model_with_cfg

    config = {**config, "num_classes": 5}
    if "img_size" in inspect.signature(form.model_class).parameters:
        config["img_size"] = side
    if not any(isinstance(part, nn.Module) for part in _parts(config)):  # it has real weights
        with torch.device("meta"):
            total = sum(p.numel() for p in _made(build_model_with_cfg, form, config).parameters())
        if total > PARAMETERS:
            raise _TooLargeError(f"{total:,} parameters are more than {PARAMETERS:,}")
    return _made(build_model_with_cfg, form, config).eval()


def _parts(value: Any) -> Iterator[Any]:
    """A configuration's values, nested ones included."""
    yield value
    if isinstance(value, Mapping):
        for one in value.values():
            yield from _parts(one)
    if isinstance(value, functools.partial):
        yield from _parts(value.keywords)


def _made(builder: Callable[..., nn.Module], form: Form, config: Mapping[str, Any]) -> nn.Module:
    # A deep copy, because some classes modify their configuration.
    return builder(form.model_class, form.architecture, False, **copy.deepcopy(dict(config)))


# ---- smaller ---------------------------------------------------------------------------------------------------------


def _shrunk(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Reduced variants of a configuration, smallest first; the original is last."""
    for deepest, narrower, fewer in ((2, 8, 1), (3, 8, 1), (2, 4, 1), (2, 2, 1), (2, 4, 4), (2, 1, 1), (4, 1, 1)):
        small = {name: _smaller(name, value, deepest, narrower, fewer) for name, value in config.items()}
        total = config.get("depth")
        yield {
            name: _of_each_kind(value, deepest) if _is_per_block(value, total) else value
            for name, value in small.items()
        }
    yield dict(config)


def _is_per_block(value: Any, blocks: Any) -> bool:
    return isinstance(blocks, int) and isinstance(value, list | tuple) and len(value) == blocks


def _of_each_kind(values: Any, count: int) -> Any:
    """Select `count` of the per-block values, in order, with one of each distinct value if possible."""
    firsts = [i for i, value in enumerate(values) if value not in values[:i]][:count]
    others = [i for i in range(len(values)) if i not in firsts]
    return type(values)(values[i] for i in sorted(firsts + others[: count - len(firsts)]))


def _defaults(model_class: Callable[..., nn.Module]) -> dict[str, Any]:
    """Default depths and widths of a constructor."""
    parameters = inspect.signature(model_class).parameters.items()
    sizes = {name: p.default for name, p in parameters if _DEPTHS.match(name) or _WIDTHS.match(name)}
    return {name: size for name, size in sizes.items() if isinstance(size, int | list | tuple)}


def _smaller(name: str, value: Any, deepest: int, narrower: int, fewer: int) -> Any:
    """A reduced value of a configuration: depths are limited, widths and numbers of heads are divided."""
    if _NOT_THE_MODEL.match(name):
        return value
    if _DEPTHS.match(name):
        return _each(value, lambda n: min(n, deepest))
    if _WIDTHS.match(name):
        return _each(value, lambda n: n // narrower if n % narrower == 0 else n)
    if _HEADS.match(name):
        return _each(value, lambda n: n // fewer if n % fewer == 0 else n)
    if _GROUPS.match(name):
        return _each(value, lambda n: min(n, max(1, deepest // 3)))
    if name == "block_args" and isinstance(value, list):
        return [_fewer(stage, deepest) for stage in value]
    if isinstance(value, functools.partial) and "multiplier" in value.keywords:
        return functools.partial(value, multiplier=value.keywords["multiplier"] / narrower)
    if _BLOCK_NUMBERS.match(name):
        return type(value)([deepest - 1])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **{f: _smaller(f, v, deepest, narrower, fewer) for f, v in fields.items()})
    return value


def _fewer(blocks: list[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """The first `most` blocks of each type in a stage, and its last block."""
    types = [block["block_type"] for block in blocks]
    return [block for i, block in enumerate(blocks) if types[:i].count(types[i]) < most or block is blocks[-1]]


def _each(value: Any, change: Callable[[int], int]) -> Any:
    """Apply a function to an integer, or to every integer of a nested sequence."""
    if isinstance(value, list | tuple):
        return type(value)(_each(one, change) for one in value)
    return change(value) if isinstance(value, int) and not isinstance(value, bool) else value


# ---- same form -------------------------------------------------------------------------------------------------------


def _signature(form: Form) -> object:
    """A signature that is equal for forms that differ only in numbers."""
    source = inspect.getsource(importlib.import_module(f"timm.models.{form.family}"))
    if not _HOLDS_ATTENTION.search(source + repr(form.config.get("block_args"))):
        return form.family
    config = {name: value for name, value in form.config.items() if not _NOT_THE_MODEL.match(name)}
    return form.family, getattr(form.model_class, "__name__", ""), _without_numbers(config)


def _without_numbers(value: Any) -> object:
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, list | tuple):
        return tuple(dict.fromkeys(_without_numbers(one) for one in value))
    if isinstance(value, Mapping):
        return tuple((name, _without_numbers(one)) for name, one in sorted(value.items()))
    if isinstance(value, functools.partial):
        return repr(value.func), _without_numbers(value.keywords)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return type(value).__name__, _without_numbers(fields)
    return type(value).__name__ if isinstance(value, nn.Module) else repr(value)
