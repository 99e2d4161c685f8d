"""Small configs with the structure of a large one.

In: a transformers config. Out: configs of the same class, smallest first: fewer layers but every kind of layer, fewer
and narrower heads, fewer experts, a small vocabulary, small images. A model built from one has the same modules, the
same parameter names and the same arrangement of weight rows as the large one.

Sizes are divided by common factors, so that they stay multiples of each other: head widths by `narrow`, numbers of
heads by `fewer`, and sizes that span all heads (the hidden size) by both. The role of a field is inferred from its
name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

VOCABULARY, LAYERS, MOST_LAYERS, EXPERTS, QUERY_HEADS = 512, 2, 12, 8, 4

SPAN, HEAD_WIDTH, CHANNELS = 16, 8, 32
"""The least hidden size; the least head width, which partial and sectioned rotary embeddings need; the least number of
channels, which group norms divide into as many groups."""

QUERIES, PATCHES, IMAGE_TOKENS = 12, 4, 4
"""The most learned queries, since a small image has few positions to attend to; patches along a side of an image;
tokens of an image, two rows of two."""

_LAYERS = re.compile(
    r"^(num_|n_)?(hidden_|encoder_|decoder_|text_|vision_|speech_|adapter_|feature_)?(layers?|blocks|n_layer)$"
    r"|^(n_layers?|num_layers?|depths?|num_hidden_layers|(num_)?\w*(encoder|decoder|attention|transformer)_layers)$"
    r"|^(stage_num_?b\w*|layer_depths?|blocks_per_stage|num_self_attends_per_block|num_block_repeats)$"
)
_HEADS = re.compile(r"^(num_|n_)?(\w*_)?(heads|head|n_head)$|^(num_|n_)\w*heads\w*$|^\w*attention_heads\w*$|^n_heads?$")
_KEY_HEADS = re.compile(r"kv|key_value|query_groups|mamba|linear|index")
_PER_HEAD = re.compile(
    r"(^|_)(head_dim|dim_head|head_size|kv_channels|d_kv|d_head|rope_head_dim|nope_head_dim|rotary_dim)$"
    r"|^(global_head_dim|index_head_dim|v_head_dim|qk_\w*dim|attention_head_\w*dim|key_length)$"
)
_SPAN = re.compile(
    r"^((\w+_)?hidden_sizes?|d_model|d_latents|n_embd|dim|(encoder_)?embed_dims?|embedding_size|hidden_dim|q_dim)$"
)
_WIDTH = re.compile(
    r"hidden|intermediate|ffn|inner|embe?d|d_model|d_ff|d_inner|d_latents|d_ssm|dim$|_dim_|dims$|width|channels?|lora_rank"
    r"|proj|lru|emb_size|filters|adapter_input"
)
_QUERIES = re.compile(r"^num_(object_)?quer(y|ies)$|^num_query_tokens$")
_INNER = re.compile(r"intermediate_(size|dim)$|ffn_(dim|hidden_size)$")
"""Widths on which no other depends. Grouped matmuls need rows of experts to be multiples of 16 bytes."""
_NO_WIDTH = re.compile(
    r"vocab|image|patch|position|window|token|^max_|num_(?!filters)|kernel|layer|head|dropout|prob|type|std|act|scale|norm"
    r"|ratio|index|expand|stride|group|conv_dim|tdnn|codevector|xvector|classifier|^in_channels|^(num_)?out_channels"
    r"|^audio_channels|input_dim|bins"
)
_OUTPUTS = ("out_features", "out_indices", "stage_names")
"""Which layers a backbone returns; one of the fields determines the others."""
_EXPERTS = re.compile(r"^(moe_)?(num_|n_)(\w*_)?experts$")
_CHOSEN = re.compile(r"experts_per_tok|^(?!index).*top_?k|moe_k")
_PERIODS = re.compile(r"(period|interval|pattern|every|freq|frequency|_step|offset|first_k_dense\w*|moe_layer_start)")
_NUMBERED = re.compile(r"^(?!.*(channels|sizes|dims)).*(layer|index|indices|attention_blocks)")
_SHARED = re.compile(r"^num_\w*shared_layers$")
_NAME_OF_A_MODEL = ("architecture", "backbone")
"""A sub-config with such a field is of a model that another package builds by name, at its own size."""
_STATE_SPACE = re.compile(r"mamba|ssm|linear|conv")
"""Recurrent layers have heads of their own, which may be narrow."""


def shrunk(config: Any) -> Iterator[Any]:
    """Smaller configs (`PretrainedConfig`) of the same class, the smallest first, the most faithful last.

    If a model cannot be built from one, since the role of a field is not what its name says, try the next.

    Example:
        >>> from transformers import LlamaConfig
        >>> small = next(shrunk(LlamaConfig(num_hidden_layers=80, num_key_value_heads=8)))
        >>> small.num_hidden_layers, small.hidden_size, small.num_attention_heads, small.num_key_value_heads
        (2, 64, 8, 2)
    """
    fields = config.to_dict()
    seen: list[dict[str, Any]] = []
    for narrow, fewer, apart, images, tables in (
        (True, True, True, True, True),
        (True, True, False, True, True),
        (True, True, True, False, True),
        (False, True, False, True, True),
        (False, True, False, False, True),
        (True, False, False, True, True),
        (False, False, False, True, True),
        (False, False, False, False, True),
        (False, False, False, False, False),
    ):
        small = _shrunk(fields, _factors(fields, narrow, fewer, apart), images, tables)
        if small not in seen:
            seen.append(small)
            try:
                made = type(config).from_dict(small)
            except Exception:  # the class refuses this combination of fields
                continue
            made.architectures = getattr(config, "architectures", None)
            yield made


def _parts(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The fields of a config, and those of each sub-config."""
    yield fields
    for value in fields.values():
        if _is_part(value):
            yield from _parts(value)


def _is_part(value: Any) -> bool:
    """Whether a field is a sub-config: neither a table of labels, nor a model that another package builds by name."""
    if not isinstance(value, dict) or any(isinstance(value.get(key), str) for key in _NAME_OF_A_MODEL):
        return False
    return all(isinstance(key, str) for key in value)


def _numbers(value: Any) -> list[int]:
    return [v for v in (value if isinstance(value, list | tuple) else [value]) if type(v) is int]


def _numbers_of(parts: Iterable[dict[str, Any]], wanted: Callable[[str], object]) -> list[int]:
    """The numbers in all fields whose names are wanted."""
    return [n for part in parts for key, value in part.items() if wanted(key) for n in _numbers(value)]


def _is_ascending(value: Any) -> bool:
    """Whether a field is a list of increasing integers, such as indices of layers."""
    return isinstance(value, list) and value == sorted(set(_numbers(value)))


def _factors(fields: dict[str, Any], narrow: bool, fewer: bool, apart: bool) -> tuple[int, int]:
    """The divisors of head widths, which may become `narrow`, and of numbers of heads, of which there may be `fewer`.
    With `apart`, the head width must differ from the number of heads, so that axes can be told apart."""
    parts = list(_parts(fields))
    counts = [(key, n) for part in parts for key, value in part.items() if _is_heads(key) for n in _numbers(value)]
    heads = {n for _, n in counts if n > 1}
    most = min((n // (2 if _KEY_HEADS.search(key) else QUERY_HEADS) for key, n in counts if n > 1), default=1)
    by_heads = max(n for n in range(1, max(1, most) + 1) if n == 1 or (fewer and math.gcd(*heads) % n == 0))
    spans = set(_numbers_of(parts, _SPAN.search))
    widths = {width for part in parts for width in _head_widths(part)}
    states = set(_numbers_of(parts, lambda key: _PER_HEAD.search(key) and _STATE_SPACE.search(key)))
    sections = [sum(value) for part in parts for key, value in part.items() if key == "mrope_section" and value]
    least = HEAD_WIDTH if widths else CHANNELS
    measured = (widths | states) or spans  # a model without attention has channels only
    fitting = [1]
    while narrow and measured and all(n % (2 * fitting[-1]) == 0 for n in measured):
        by = 2 * fitting[-1]
        if any(n // by < least for n in widths or spans) or any(n % (by * by_heads) for n in spans):
            break
        if any(n // (by * by_heads) < SPAN <= n for n in spans) or any(n // by < 4 for n in sections):
            break
        fitting.append(by)
    good = [by for by in fitting[-3:] if apart and not any(_is_square(part, by, by_heads) for part in parts)]
    return max(good or fitting), by_heads


def _is_square(part: dict[str, Any], by_width: int, by_heads: int) -> bool:
    heads = {n // by_heads for n in _numbers_of([part], _is_heads)}
    return any(width // by_width in heads for width in _head_widths(part))


def _head_widths(part: dict[str, Any]) -> Iterator[int]:
    """Head widths of one config: as its fields say, or else its widths divided by its numbers of heads."""
    per_head = _numbers_of([part], lambda key: _PER_HEAD.search(key) and not _STATE_SPACE.search(key))
    own = [n for n in per_head if n > 0]
    yield from own
    if own:
        return
    spans = [_numbers(value) for key, value in part.items() if _SPAN.search(key)]
    for key, value in part.items():
        if _is_heads(key) and not _KEY_HEADS.search(key):
            for span in spans:
                yield from (n // h for n, h in _by_stage(span, _numbers(value)) if h > 0 and n % h == 0)


def _by_stage(spans: list[int], heads: list[int]) -> list[tuple[int, int]]:
    """Pairs of a width and a number of heads, stage by stage; a single width is that of the first stage."""
    if len(spans) == 1:
        return [(spans[0] * heads[i] // heads[0], h) for i, h in enumerate(heads) if heads[0]]
    return list(zip(spans, heads * len(spans) if len(heads) == 1 else heads, strict=False))


def _is_heads(key: str) -> bool:
    return bool(_HEADS.search(key)) and not _PER_HEAD.search(key)


def _each(value: Any, change: Callable[[Any], Any]) -> Any:
    return [_each(v, change) for v in value] if isinstance(value, list | tuple) else change(value)


def _divided(value: Any, by: int) -> Any:
    if type(value) is not int or value < 2 * by or by == 1:
        return value
    return value // by if value % by == 0 else max(8, value // by // 8 * 8)


def _inner(value: Any, by: int) -> Any:
    """A smaller width on which no other depends."""
    return max(1, value // (by * 8)) * 8 if type(value) is int and value > 8 else value


def _shrunk(fields: dict[str, Any], factors: tuple[int, int], images: bool, tables: bool) -> dict[str, Any]:
    narrow, fewer = factors
    layers, cut = _layers_kept(fields), _lengths_of_stacks(fields)
    vocabulary = min(VOCABULARY, fields.get("vocab_size") or VOCABULARY) if tables else fields.get("vocab_size")
    small: dict[str, Any] = {}
    for key, value in fields.items():
        if key not in _OUTPUTS and isinstance(value, list) and len(value) in cut and len(value) > layers > 0:
            value = value[:layers]  # one entry a layer
        if _is_per_layer(key, value):
            parts = {number: part for number, part in value.items() if int(number) < layers}
            small[key] = {number: _shrunk(part, factors, images, tables) for number, part in parts.items()}
        elif _is_part(value):
            rope = key.startswith("rope")
            small[key] = _scaled_rope(value, narrow) if rope else _shrunk(value, factors, images, tables)
        elif key in _OUTPUTS:
            if key == "out_indices" and isinstance(value, list):
                last = list(range(layers - len(value) + 1, layers + 1))
                small[key] = last if cut else value
        elif _LAYERS.search(key) and _numbers(value):
            small[key] = [min(n, LAYERS + 1) for n in value] if isinstance(value, list | tuple) else min(value, layers)
        elif _SHARED.search(key) and isinstance(value, int):
            small[key] = layers if value >= max(cut, default=0) else min(value, layers // 2)
        elif _NUMBERED.search(key) and _is_ascending(value):
            small[key] = [n for n in value if -layers <= n < layers]  # numbers of layers
        elif key.endswith("layer_id") and type(value) is int:
            small[key] = min(value, layers - 1)
        elif _is_heads(key):
            small[key] = _each(value, lambda v: _divided(v, fewer))
        elif key == "mrope_section":
            small[key] = _sections(value, narrow)
        elif _PER_HEAD.search(key):
            small[key] = _each(value, lambda v: _divided(v, narrow))
        elif _EXPERTS.search(key) and isinstance(value, int) and value > 0:
            small[key] = _experts(fields, value)
        elif key == "vocab_size" and vocabulary:
            small[key] = vocabulary
        elif tables and "vocab" in key and _numbers(value) == [value]:
            small[key] = min(value, VOCABULARY)
        elif images and _QUERIES.search(key) and _numbers(value) == [value]:
            small[key] = min(value, QUERIES)
        elif key.endswith(("token_id", "token_index")):
            small[key] = _within(value, vocabulary, sum(map(ord, key)))
        elif images and key == "mm_tokens_per_image" and isinstance(value, int):
            small[key] = min(value, IMAGE_TOKENS)
        elif images and key == "image_size":
            small[key] = _image_size(value, fields.get("patch_size"))
        elif "channels" in key and not _NO_WIDTH.search(key) and isinstance(value, int):
            small[key] = max(value // (narrow * fewer), min(value, CHANNELS))
        elif _INNER.search(key):
            small[key] = _each(value, lambda v: _inner(v, narrow * fewer))
        elif (_WIDTH.search(key) and not _NO_WIDTH.search(key)) or _is_group_a_feature(key, value, fields):
            small[key] = _each(value, lambda v: _divided(v, narrow * fewer))
        else:
            small[key] = value
    return small


def _is_per_layer(key: str, value: Any) -> bool:
    """Whether a field maps indices of layers to fields."""
    return isinstance(value, dict) and "layer" in key and bool(value) and all(str(number).isdigit() for number in value)


def _is_group_a_feature(key: str, value: Any, fields: dict[str, Any]) -> bool:
    """Whether a field is the number of groups of a depthwise convolution."""
    return key.endswith("groups") and isinstance(value, int) and value == fields.get("hidden_size")


def _lengths_of_stacks(fields: dict[str, Any]) -> set[int]:
    """Lengths of lists with one entry a layer. Lists with one entry a stage stay as they are."""
    return {v for key, v in fields.items() if _LAYERS.search(key) and type(v) is int} - _stages(fields)


def _stages(fields: dict[str, Any]) -> set[int]:
    """Numbers of stages, for networks that have stages."""
    return {
        len(value)
        for key, value in fields.items()
        if isinstance(value, list) and value and value == _numbers(value)
        if _LAYERS.search(key) or key.startswith("stage_") or key == "hidden_sizes"
    }


def _layers_kept(fields: dict[str, Any]) -> int:
    """Length of the shortest prefix of the layers that contains every kind."""
    counts = [v for key, v in fields.items() if _LAYERS.search(key) and type(v) is int]
    total = max(counts, default=LAYERS)
    needed = [LAYERS]
    for key, value in fields.items():
        kinds = isinstance(value, list) and len(value) > 1 and all(isinstance(v, str | int) for v in value)
        if kinds and (len(value) == total or re.search(r"layer\w*types?|block_types?", key)):
            needed.append(max(map(value.index, set(value))) + 1)
        elif value and _NUMBERED.search(key) and _is_ascending(value):
            needed.append(min(value) + 2)
        elif _is_per_layer(key, value):
            needed.append(min(map(int, value)) + 1)
        elif _PERIODS.search(key) and type(value) is int and 0 < value <= MOST_LAYERS:
            needed.append(value + 1)
    if _lengths_of_stacks(fields) and isinstance(outputs := fields.get("out_indices"), list):
        needed.append(len(outputs))
    if any(_SHARED.search(key) and value and value < total for key, value in fields.items()):
        needed = [2 * max(needed)]  # every kind, both among layers that share and among shared ones
    return min(total, MOST_LAYERS, max(needed))


def _experts(fields: dict[str, Any], count: int) -> int:
    """A smaller number of experts, enough for routing."""
    chosen, groups = _numbers_of([fields], _CHOSEN.search), _numbers_of([fields], "n_group".__eq__)
    wanted = max([EXPERTS, *(2 * n for n in chosen), *(2 * n for n in groups)])
    return count if wanted >= count or any(wanted % n for n in groups) else wanted


def _within(value: Any, vocabulary: int | None, seed: int) -> Any:
    """The id of a special token inside a smaller vocabulary, in most cases different for different tokens."""
    if isinstance(value, list):
        return [_within(v, vocabulary, seed + i) for i, v in enumerate(value)]
    if type(value) is not int or not vocabulary or value < vocabulary:
        return value
    return vocabulary - 1 - seed % max(1, vocabulary // 4)


def _image_size(value: Any, patch: Any) -> Any:
    """A smaller image size, of a few patches."""
    if isinstance(value, list | tuple):
        patches = patch if isinstance(patch, list | tuple) else [patch] * len(value)
        return [_image_size(v, p) for v, p in zip(value, patches, strict=False)]
    if not isinstance(patch, int):
        return min(value, 64) if isinstance(value, int) else value
    return value if not isinstance(value, int) or value <= PATCHES * patch or patch < 8 else PATCHES * patch


def _sections(value: Any, by: int) -> Any:
    """Sections of a head that add up to the narrower head; equal sections stay equal."""
    if not isinstance(value, list | tuple) or sum(value) % by or sum(value) // by < len(value):
        return value
    parts = [max(1, n // by) for n in value]
    left = sum(value) // by - sum(parts)
    for n in dict.fromkeys(value):
        share, rest = divmod(left, value.count(n))
        if not rest and max(1, n // by) + share > 0:
            return [part + share * (of == n) for part, of in zip(parts, value, strict=True)]
    return value


def _scaled_rope(fields: dict[str, Any], narrow: int) -> dict[str, Any]:
    """Parameters of rotary embeddings for narrower heads."""
    small = dict(fields)
    for key, value in fields.items():
        if isinstance(value, dict):
            small[key] = _scaled_rope(value, narrow)
        elif key == "mrope_section":
            small[key] = _sections(value, narrow)
        elif key in ("short_factor", "long_factor") and isinstance(value, list):
            small[key] = value[: len(value) // narrow]
    return small
