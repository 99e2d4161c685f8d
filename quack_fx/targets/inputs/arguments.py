"""Candidates for one argument of a forward.

In: its name and annotation, its `Use`, the model, and the spec of the leading argument (the data). Out: `Spec`s,
likeliest first. The layer that an argument is passed to decides, where there is one; otherwise its name does: a mask, a
time step, positions, a class, rotary embeddings, a cache. An argument of which nothing is known becomes more data.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from quack_fx.targets.inputs import layers
from quack_fx.targets.inputs.uses import Use
from quack_fx.targets.inputs.values import (
    BATCH,
    TOKENS,
    Array,
    CausalBlocks,
    Constant,
    Group,
    Size,
    Spec,
    cheapest_first,
    numbers,
)

Numbers = Literal["", "int", "float", "bool"]

_NUMBERS: dict[str, Numbers] = {**dict.fromkeys(("long", "int", "short", "uint"), "int"), "bool": "bool"}
_KINDS: dict[str, Numbers] = {
    **dict.fromkeys(("ids", "index", "count"), "int"),
    **dict.fromkeys(("bool", "half", "padding"), "bool"),
}
"""Kinds of dtype by the kind of an array; "float" for the others."""
_TENSOR = re.compile(r"\b(Long|Int|Short|Bool|Float|Half|BFloat16|Double)Tensor\b")
_WITH_AXES = re.compile(r"\b(U?Int|Bool|Float|BFloat|Shaped|Num|Complex)\d*\[[^\[\],]+, *['\"]([^'\"]*)['\"]\]")
"""As jaxtyping writes them: `Float[Tensor, "batch tokens width"]`."""

_AXES = re.compile(r"(.+?)_(B[BCDFHKLMNPQSTVW0-9]{0,5}|b[cdfhlnstvw]{2,4})")
"""A name that ends in one letter for each axis, the batch first: tokens_BL, x_bld. Words have vowels."""

LIMIT = 24
"""The most candidates that are tried."""

TIME = re.compile(r"t|ts|time|times|(diffusion_)?timesteps?|time_?steps?|sigmas?|noise_levels?|guidance(_scale)?|t_emb")
_CLASS = re.compile(r"y|labels?|class_(ids?|labels?)|classes|user_?ids?|users?")
_IDS = re.compile(r"(.*_)?(ids?|idx|tokens?|input_ids|seqs?|items?|indices)$")
_IMAGE = re.compile(r"(.*_)?(img|imgs|images?|pixel_values|pixels)$")
_CACHE = re.compile(r"(.*_)?(caches?|past|pasts|past_key_values?|kvs?|mems|states?_cache|layer_past)$")
_LENGTHS = re.compile(r".*(lengths?|lens)$")
_POSITIONS = re.compile(r"(input_|token_|cache_)?pos(ition)?s?(_ids?)?")
_ROTATION = re.compile(r"(freqs|rope|rotary|cos|sin|freq).*|.*_(freqs|rope|rotary|cos|sin|cis)|pe")
_FLAG = re.compile(r"(is|use|return|causal|output|training|train|do|with)(_|$).*")
_NUMBER = re.compile(r"(.*_)?(num|number|size|len|n|count|height|width|h|w|depth|frames?|steps?|blocks?)(_.*)?")


@dataclass(frozen=True)
class Context:
    """The model, and the spec of the leading argument; None while its own candidates are made."""

    model: nn.Module
    data: Spec | None = None


def options(name: str, annotation: Any, use: Use, context: Context) -> list[Spec]:
    """Candidates for an argument, likeliest first; `name` is its key or attribute where it is part of another one."""
    told = hint_of(use.name or name, annotation)
    name = told.name
    if use.rank is None and told.axes:
        use = replace(use, rank=len(told.axes))
    hint = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    lower = name.lower()
    if "BlockMask" in str(annotation):
        return [CausalBlocks()]
    has_parts_only = use.parts and not use.taken and use.rank is None
    plain = [] if has_parts_only else _plain(lower, hint, str(annotation), use, context)
    if (told.numbers or told.axes) and all(isinstance(spec, Array) for spec in plain):
        plain = [*told.first([spec for spec in plain if isinstance(spec, Array)], use.rank)]
    groups = _groups(use, context)
    if "iterated" in use.marks and any(kind in ("key", "attr") for kind, _ in use.parts):
        # Iterated and with fields: a list of records, one for each entry of the batch.
        records = [spec for spec in groups if isinstance(spec, Group) and spec.form in ("dict", "namespace")]
        groups = [Group("list", (("0", spec), ("1", spec))) for spec in records] + groups
    is_tuple = re.match(r"(typing\.)?(tuple|list|dict|mapping|sequence)", str(annotation), re.I) is not None
    ordered = [*groups, *plain] if is_tuple or not plain else [*plain, *groups]
    if "iterated" in use.marks and groups == [] and is_tuple:
        several = [spec for spec in ordered[:2] if not (isinstance(spec, Group) and spec.form == "list")]
        ordered = [Group("list", (("0", spec), ("1", spec))) for spec in several] + ordered
    if "numpy" in use.marks:
        ordered = [replace(spec, numpy=True) if isinstance(spec, Array) else spec for spec in ordered]
    return list(dict.fromkeys(ordered))


@dataclass(frozen=True)
class Hint:
    """What a name and an annotation state: the name without the letters of its axes, the kind of dtype ("" where it is
    not stated), and a letter or word for each axis. Python checks neither, so what fits is only tried first."""

    name: str
    numbers: Numbers = ""
    axes: tuple[str, ...] = ()

    def fits(self, array: Array) -> bool:
        """Whether an array has such a dtype."""
        if array.kind in ("zeros", "ones"):
            return self.numbers in ("", "float" if array.dtype.is_floating_point else "int")
        return self.numbers in ("", _KINDS.get(array.kind, "float"))

    def first(self, found: list[Array], rank: int | None) -> list[Array]:
        """The arrays, those that fit first; where none fits, with a new one of this rank."""
        if not any(map(self.fits, found)) and self.numbers in ("int", "bool"):
            shape: tuple[Size, ...] = ("B", "T")
            shape = shape[:rank] if rank in (None, 0, 1, 2) else found[0].shape if found else shape
            found = [Array("ids" if self.numbers == "int" else "bool", shape), *found]
        found = sorted(found, key=lambda a: not self.fits(a))
        of_batch = self.axes == ("B",)
        return [replace(a, shape=("B",)) if of_batch and a.shape == ("T",) else a for a in found]


def hint_of(name: str, annotation: Any) -> Hint:
    """The hint in the name and the annotation of an argument."""
    numbers: Numbers = ""
    axes: tuple[str, ...] = ()
    if (ends := _AXES.fullmatch(name)) is not None:
        name, axes = ends[1], tuple(ends[2])
    text = annotation if isinstance(annotation, str) else f"{getattr(annotation, '__name__', '')} {annotation}"
    if (tensor := _TENSOR.search(text)) is not None:
        numbers = _NUMBERS.get(tensor[1].lower(), "float")
    elif (written := _WITH_AXES.search(text)) is not None:
        if written[1] not in ("Shaped", "Num"):
            numbers = _NUMBERS.get(written[1].lower(), "float")
        words = written[2].split()
        if words and not any(re.search(r"\.\.\.|^\*", word) for word in words):
            axes = tuple(words)
    return Hint(name, numbers, axes)


def _plain(name: str, hint: str, annotation: str, use: Use, context: Context) -> list[Spec]:
    """Candidates that are one value and not a group."""
    told = layers.evidence(use, context.model)
    if context.data is None:
        return [*_fitted(_data(name, told, use, context.model), use)]
    special = _special(name, hint, annotation, use, context, told)
    if special:
        return special
    data = [context.data] if isinstance(context.data, Array) else []
    if _IDS.fullmatch(name) and not told:
        data.sort(key=lambda a: a.kind != "ids")
    if "ids" in use.marks:
        told = [_ids_like(array) for array in data[:1]]
    if told and told[0].kind == "float" and use.rank is None:
        is_vector = re.match(r"pooled|vec|cond$|global|y$", name) is not None
        told.sort(key=lambda a: a.kind == "float" and is_vector != (len(a.shape) == 2))
    rest = [array for array in layers.any_layer(context.model, LIMIT) if array not in data][:3]
    return [*_fitted([*told, *data, *rest], use)]


def _fitted(found: list[Array], use: Use) -> list[Array]:
    """Arrays with the rank and the sizes that the forward requires, then those that cannot have that rank."""
    fitting, other = [], []
    for array in found:
        shape = layers.with_rank(array, list(array.shape), use.rank)
        if shape is None:
            other.append(array)
            continue
        array = replace(array, shape=shape)
        for axis, relation, number in use.sizes:
            if -len(shape) <= axis < len(shape):
                array = _with_size(array, axis, relation, number)
        fitting.append(array)
    return [*dict.fromkeys(fitting), *other]


def _with_size(array: Array, axis: int, relation: str, number: int) -> Array:
    """An array whose size along an axis is equal to a number ("=="), a multiple of it ("%") or at most it ("<=")."""
    count = numbers(array.shape, array.tokens or TOKENS)[axis]
    fits = {"==": count == number, "%": count % number == 0, "<=": count <= number}
    if fits[relation]:
        return array
    if array.shape[axis] == "T" and array.shape.count("T") == 1:
        return replace(array, tokens=number)
    changed = list(array.shape)
    changed[axis] = number
    return replace(array, shape=tuple(changed))


def _data(name: str, told: list[Array], use: Use, model: nn.Module) -> list[Array]:
    """Candidates for the leading argument, likeliest first."""
    found = [*layers.any_layer(model, LIMIT), *layers.own_parameters(model)]
    # Sorting is stable, so the order is otherwise that of the model.
    if _IMAGE.fullmatch(name):
        found.sort(key=lambda a: not (a.kind == "float" and len(a.shape) == 4))
    elif _IDS.fullmatch(name):
        found.sort(key=lambda a: a.kind != "ids")
    if "numpy" in use.marks:
        found.sort(key=lambda a: a.kind != "ids")
    # Some forwards take one sequence, without a batch axis.
    alone = [replace(a, shape=("T",)) for a in told[:1] if a.kind == "ids" and a.shape == ("B", "T")]
    return [*told, *(array for array in found if array not in told), *(alone if use.rank is None else [])]


def _ids_like(array: Array) -> Array:
    if array.kind == "ids":
        return array
    return Array("ids", array.shape[:-1] if len(array.shape) < 4 else array.shape[:1])


def _groups(use: Use, context: Context) -> list[Spec]:
    """A dict, a namespace or a tuple with the parts that the forward reads."""
    found: list[Spec] = []
    for kind, form in (("key", "dict"), ("attr", "namespace"), ("at", "tuple")):
        parts = [(part, name) for part, name in use.parts if part == kind]
        needed = [part for part in parts if part not in use.optional] or parts
        for chosen in (needed, parts) if len(needed) < len(parts) else (needed,):
            found += _group(form, [(str(name), use.parts[kind, name]) for _, name in chosen], context)
    return found


def _group(form: Any, parts: list[tuple[str, Use]], context: Context) -> list[Spec]:
    if not parts:
        return []
    choices: list[list[tuple[str, Spec]]] = []
    data = context.data
    # The part that is passed to a layer leads: it sets the sizes of the others.
    order = sorted(parts, key=lambda part: not part[1].taken or bool(re.search("mask|time|label|target", part[0])))
    for name, use in order:
        specs = options(name, "", use, replace(context, data=data))[:4] or [Constant(None)]
        data = data or specs[0]
        choices.append([(name, spec) for spec in specs])
    places = {name: place for place, (name, _) in enumerate(parts)}
    return [
        Group(form, tuple(sorted(combined, key=lambda part: places[part[0]])))
        for combined in cheapest_first(choices, 8)
    ]


def _special(name: str, hint: str, annotation: str, use: Use, context: Context, told: list[Array]) -> list[Spec]:
    """Candidates by name and annotation; none where those say nothing."""
    data = context.data
    ids = isinstance(data, Array) and data.kind == "ids"
    flat: tuple[Size, ...] = ("B",)
    if hint == "bool" or (_FLAG.fullmatch(name) and not use.taken):
        return [Constant(False)]
    if re.search(r"start_pos|offset|start_index", name) or (hint == "int" and not _NUMBER.fullmatch(name)):
        return [Constant(0)]
    unused = not (use.taken or use.marks or use.steps)
    if hint == "int" or "number" in use.marks or (_NUMBER.fullmatch(name) and unused):
        if re.search("Tensor", annotation):
            return [Array("ones", (), dtype=torch.int64)]
        return [Constant(TOKENS if re.search(r"len|size|seq", name) or hint != "int" else 1), Constant(1)]
    if hint == "float":
        return [Constant(1.0)]
    if "mask" in name or {"index", "bool"} <= use.marks:
        return _masks(name, annotation, use, told)
    if TIME.fullmatch(name):
        return _times(use, told, data)
    if _CACHE.fullmatch(name) and not told:
        count = max((len(m) for m in context.model.modules() if isinstance(m, nn.ModuleList)), default=1)
        return [Constant(None), Group("list", tuple((str(i), Constant(None)) for i in range(count))), Group("list", ())]
    if _POSITIONS.fullmatch(name) and (not told or told[0].kind == "ids"):
        shapes: list[tuple[Size, ...]] = [("T",), ("B", "T")]
        shapes.sort(key=lambda shape: use.rank is not None and len(shape) != use.rank)
        return [Array("index", shape) for shape in shapes]
    if _LENGTHS.fullmatch(name) and re.search(r"(list|sequence|tuple)\[int", annotation, re.I):
        packed = isinstance(data, Array) and len(data.shape) == 1
        each: Spec = Constant(TOKENS // BATCH if packed else TOKENS)
        return [Group("list", tuple((str(n), each) for n in range(BATCH)))]
    if _LENGTHS.fullmatch(name) and not told:
        return [Array("count", flat)]
    if _ROTATION.fullmatch(name) and not told:
        return _rotations(name, context.model)
    if name.endswith("edge_index"):
        return [Array("ids", (2, "T"), 2)]
    if re.fullmatch(r"(img|txt|image|text|latent)_ids", name) and not told:
        return [Array("zeros", shape) for shape in (("B", "T", 3), ("T", 3))]
    is_class = _CLASS.fullmatch(name) and not (ids and not re.match("class|user", name))
    if is_class and (use.rank or 0) < 3 and (not told or told[0].kind == "ids"):
        of_sequences: Spec = Array("zeros", flat, dtype=torch.int64)
        of_tokens: Spec = Array("ids", ("B", "T"), told[0].high if told else 1)
        return [of_sequences, of_tokens] if use.rank is None else [of_sequences if use.rank == 1 else of_tokens]
    return []


def _times(use: Use, told: list[Array], data: Spec | None) -> list[Spec]:
    """A time step for each sequence, or for each token."""
    ids = told[:1] if told and told[0].kind == "ids" else []
    steps: list[Spec] = [Array("ones", ("B",)), Array("ones", ("B",), dtype=torch.int64)]
    if use.rank == 2 or (ids and use.rank is None and isinstance(data, Array) and len(data.shape) == 3):
        of_tokens = [*ids, Array("ones", ("B", "T"), dtype=torch.int64), Array("ones", ("B", "T"))]
        return [*of_tokens, *steps] if use.rank == 2 else [steps[1], *of_tokens[:1], steps[0]]
    narrow = [array for array in told if array.kind == "float" and all(size == "B" for size in array.shape)]
    wide = [array for array in told if array.kind == "float" and array not in narrow]
    if wide and use.rank is None and not narrow:
        steps = [*steps, *[array for array in wide if len(array.shape) == 2]]
        if any(array.shape[-1] == 1 for array in wide):  # it is passed to a Linear as it is
            return [Array("ones", ("B", 1)), *steps]
    return [steps[1], steps[0]] if ids else steps


def _masks(name: str, annotation: str, use: Use, told: list[Array]) -> list[Spec]:
    """Masks of the dtype and shape that fit the use; None first where the forward also runs without one."""
    number = "number-mask" in use.marks and "bool" not in use.marks
    if "index" in use.marks and not number and not told:
        # A mask that selects: as many entries in each sequence, but neither all nor none.
        rows: list[tuple[Size, ...]] = [("T",), ("B", "T")] if use.rank == 1 else [("B", "T"), ("T",)]
        return [*(Array("half", shape) for shape in rows), *([] if "needed" in use.marks else [Constant(None)])]
    shapes: list[tuple[Size, ...]] = [("B", "T"), ("T", "T"), ("B", 1, 1, "T"), ("B", "T", "T")]
    news = [[step for step in views if step[0] == "new"] for views in use.steps]
    added = max(map(len, news), default=0)
    rank = use.rank
    if rank is not None:
        shapes.sort(key=lambda shape: len(shape) != rank)
        shapes = [("B", 1, "T"), *shapes] if rank == 3 else [("B", 1, "T", "T"), *shapes] if rank == 4 else shapes
    elif added == 1 and ("new", -1) not in [step for steps in news for step in steps]:
        shapes = [("B", "T", "T"), ("B", "T"), ("B", 1, "T")]
    elif not added and "broadcast" in use.marks and "padding" not in name:
        shapes = [("T", "T"), ("B", 1, 1, "T"), ("B", "T")]
    found: list[Spec] = [*told]
    for shape in shapes:
        if number:
            found.append(Array("zeros" if "broadcast" in use.marks or not use.steps else "ones", shape))
        else:
            found.append(Array("padding" if "padding" in name else "bool", shape))
    if not number and not added and rank is None and not told:
        found.insert(2, Array("zeros", ("T", "T")))
    found = [Array("index", shape) for shape in (("B", "T"), ("T",))] + found if "long" in use.marks else found
    tensor = re.fullmatch(r"(torch\.)?(Tensor|BoolTensor|LongTensor)|<class 'torch\.Tensor'>", annotation)
    used = ({"tensor", "bool"} & use.marks or use.steps) and "checked" not in use.marks
    found = list(dict.fromkeys(found))[:4]
    return [*found, Constant(None)] if tensor or "needed" in use.marks or used else [Constant(None), *found]


def _rotations(name: str, model: nn.Module) -> list[Spec]:
    """Rotary embeddings: complex numbers for half the head width, or cosines and sines."""
    width = head_width(model)
    halves: list[Spec] = [Array("float", ("T", width // 2)), Array("float", ("T", width))]
    wide: list[Spec] = [Array("float", ("B", "T", width)), Array("float", (1, 1, "T", width))]
    complexes: list[Spec] = [Array("complex", ("T", width // 2))]
    if re.search("cos|sin", name):
        return [*halves, *wide]
    pair = [Group("tuple", (("cos", spec), ("sin", spec))) for spec in (*halves, wide[0])]
    if re.search("cis", name):
        return [*complexes, *halves, pair[0]]
    if "freqs" in name:
        return [*complexes, *halves, *pair]
    return [*pair, *complexes, *halves]


def head_width(model: nn.Module) -> int:
    """Head width of the attention: as a module or its config says, or else its width divided by its number of heads."""
    for module in model.modules():
        for owner in (module, getattr(module, "config", None), getattr(module, "args", None)):
            for name in ("head_dim", "d_head", "dim_head", "head_size", "d_k", "head_width", "qk_rope_head_dim"):
                if isinstance(width := getattr(owner, name, None), int) and width > 1:
                    return width
    for module in model.modules():
        for name in ("n_heads", "num_heads", "n_head", "heads", "nheads", "num_attention_heads"):
            heads = getattr(module, name, None)
            linear = next((m for m in module.children() if isinstance(m, nn.Linear)), None)
            if isinstance(heads, int) and heads and linear is not None and linear.in_features % heads == 0:
                return linear.in_features // heads
    return 64


def signature(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of a model's forward."""
    return list(inspect.signature(model.forward).parameters.values())
