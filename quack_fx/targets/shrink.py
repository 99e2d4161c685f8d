"""DOOR: a small configuration with the structure of a large one.

In: a transformers config. Out: configs of the same class, the smallest first: fewer layers but every kind of layer,
narrower heads, fewer of them, fewer experts, a small vocabulary, small pictures. A model built from one has the same
modules, the same parameter names and the same arrangement of weight rows as the large one.

Widths are divided by common factors, so that whatever divided before divides afterwards: widths of a head by `narrow`,
numbers of heads by `fewer`, and all that spans the heads (the hidden size) by both. Layers are cut to the shortest
beginning that holds every kind. Which field is what, its name tells; where a name misleads, the next config tried is
nearer to the original.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

VOCABULARY = 512
LAYERS = 2
MOST_LAYERS = 12
EXPERTS = 8

_LAYERS = re.compile(
    r"^(num_|n_)?(hidden_|encoder_|decoder_|text_|vision_|speech_|adapter_|feature_)?(layers?|blocks|n_layer)$"
    r"|^(n_layers?|num_layers?|depth|num_hidden_layers|(num_)?\w*(encoder|decoder|attention|transformer)_layers)$"
)
_HEADS = re.compile(r"^(num_|n_)?(\w*_)?(heads|head|n_head)$|^(num_|n_)\w*heads\w*$|^\w*attention_heads$|^n_heads?$")
_PER_HEAD = re.compile(r"(^|_)(head_dim|head_size|kv_channels|d_kv|d_head|rope_head_dim|nope_head_dim|rotary_dim)$")
_PER_HEAD_TOO = re.compile(r"^(global_head_dim|index_head_dim|v_head_dim|qk_\w*dim|attention_head_\w*dim|key_length)$")
_WIDTH = re.compile(
    r"hidden|intermediate|ffn|inner|embe?d|d_model|d_ff|d_inner|dim$|_dim_|dims$|width|channels|lora_rank|proj|lru"
)
_NO_WIDTH = re.compile(
    r"vocab|image|patch|position|window|token|^max_|num_|kernel|layer|head|dropout|prob|type|std|act|scale|norm|ratio"
    r"|index|expand|stride|group|conv_dim|tdnn|codevector|xvector|classifier|in_channels|out_channels|input_dim|bins"
)
_OUTPUTS = ("out_features", "out_indices", "stage_names")
"""Which layers a backbone gives out: the class has a default that fits its layers."""
_EXPERTS = re.compile(r"^(num_|n_)(\w*_)?experts$")
_PERIODS = re.compile(r"(period|interval|pattern|every|freq|frequency|_step|offset|first_k_dense\w*|moe_layer_start)")


def shrunk(config: Any) -> Iterator[Any]:
    """Smaller configs of the same structure, the smallest first, the most faithful last.

    Arguments:
        config: A `PretrainedConfig` of transformers.

    Yields:
        Configs of the same class; building a model from one may still fail, and the next is then to be tried.

    Example:
        >>> from transformers import LlamaConfig
        >>> small = next(shrunk(LlamaConfig(num_hidden_layers=80, num_key_value_heads=8)))
        >>> small.num_hidden_layers, small.hidden_size, small.num_attention_heads, small.num_key_value_heads
        (2, 64, 8, 2)
    """
    fields = config.to_dict()
    seen: list[dict[str, Any]] = []
    for narrow, fewer, pictures, tables in (
        (True, True, True, True),
        (True, False, True, True),
        (True, True, False, True),
        (True, False, False, False),
        (False, False, False, True),
        (False, False, False, False),
    ):
        small = _shrunk(fields, _factors(fields, narrow, fewer), pictures, tables)
        if small not in seen:
            seen.append(small)
            try:
                made = type(config).from_dict(small)
            except Exception:
                # The class checks its fields, and these do not go together: the next ones may.
                continue
            made.architectures = getattr(config, "architectures", None)
            yield made


def _parts(fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The fields of a config and of the configs inside it."""
    yield fields
    for value in fields.values():
        if _is_part(value):
            yield from _parts(value)


def _is_part(value: Any) -> bool:
    """Whether a field holds fields itself, and no table of labels."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _numbers(value: Any) -> list[int]:
    values = value if isinstance(value, list | tuple) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


# ---- widths ----------------------------------------------------------------------------------------------------------


def _factors(fields: dict[str, Any], narrow: bool, fewer: bool) -> tuple[int, int]:
    """By what to divide the width of a head, and the number of heads."""
    heads: list[int] = []
    widths: list[int] = []
    spans: list[int] = []
    for part in _parts(fields):
        heads += [n for key, value in part.items() if _is_heads(key) for n in _numbers(value) if n > 0]
        widths += [n for key, value in part.items() if _is_per_head(key) for n in _numbers(value) if n > 0]
        hidden = [
            n for key in ("hidden_size", "d_model", "n_embd", "embed_dim", "dim") for n in _numbers(part.get(key))
        ]
        spans += hidden
        queries = [
            n for key in ("num_attention_heads", "n_head", "num_heads") for n in _numbers(part.get(key)) if n > 0
        ]
        widths += [h // q for h in hidden[:1] for q in queries[:1] if h % q == 0]
    by_heads = 1
    if fewer and heads:
        most = [n for n in heads if n > 1]
        common = math.gcd(*most) if most else 1
        smallest = min(most, default=1)
        by_heads = max((n for n in range(1, common + 1) if common % n == 0 and smallest // n >= 2), default=1)
    by_width = 1
    while narrow and widths and all(n % (by_width * 2) == 0 and n // (by_width * 2) >= 8 for n in widths):
        if any(n % (by_width * 2 * by_heads) for n in spans):
            break
        by_width *= 2
    return by_width, by_heads


def _is_heads(key: str) -> bool:
    return bool(_HEADS.search(key)) and not _is_per_head(key)


def _is_per_head(key: str) -> bool:
    return bool(_PER_HEAD.search(key) or _PER_HEAD_TOO.search(key))


def _divided(value: Any, by: int) -> Any:
    if isinstance(value, list | tuple):
        return [_divided(v, by) for v in value]
    if not isinstance(value, int) or isinstance(value, bool) or value < 2 * by or by == 1:
        return value
    return value // by if value % by == 0 else max(8, value // by // 8 * 8)


# ---- one config ------------------------------------------------------------------------------------------------------


def _shrunk(fields: dict[str, Any], factors: tuple[int, int], pictures: bool, tables: bool) -> dict[str, Any]:
    narrow, fewer = factors
    layers = _layers_kept(fields)
    counts = {n for key, value in fields.items() if _LAYERS.search(key) for n in _numbers(value)}
    vocabulary = min(VOCABULARY, fields.get("vocab_size") or VOCABULARY) if tables else fields.get("vocab_size")
    small: dict[str, Any] = {}
    for key, value in fields.items():
        if _is_part(value):
            rope = key.startswith("rope")
            small[key] = _scaled_rope(value, narrow) if rope else _shrunk(value, factors, pictures, tables)
        elif key in _OUTPUTS:
            continue
        elif _LAYERS.search(key) and _numbers(value):
            small[key] = [min(n, LAYERS) for n in value] if isinstance(value, list | tuple) else min(value, layers)
        elif isinstance(value, list) and len(value) in counts and len(value) > layers and layers > 0:
            small[key] = value[:layers]  # one entry a layer
        elif isinstance(value, list) and ("layer" in key or "index" in key) and _numbers(value) == value:
            small[key] = [n for n in value if n < layers]  # numbers of layers
        elif _is_heads(key):
            small[key] = _divided(value, fewer)
        elif key == "mrope_section":
            small[key] = _sections(value, narrow)
        elif _is_per_head(key):
            small[key] = _divided(value, narrow)
        elif _EXPERTS.search(key) and isinstance(value, int) and value > 0:
            small[key] = _experts(fields, value)
        elif key == "vocab_size" and vocabulary:
            small[key] = vocabulary
        elif key.endswith("token_id") or key.endswith("token_index"):
            small[key] = _within(value, vocabulary, sum(map(ord, key)))
        elif pictures and key == "image_size":
            small[key] = _picture(value, fields.get("patch_size"))
        elif _WIDTH.search(key) and not _NO_WIDTH.search(key):
            small[key] = _divided(value, narrow * fewer)
        else:
            small[key] = value
    return small


def _layers_kept(fields: dict[str, Any]) -> int:
    """Length of the shortest beginning of the stack that holds every kind of layer."""
    counts = [v for key, v in fields.items() if _LAYERS.search(key) and type(v) is int]
    total = max(counts, default=LAYERS)
    needed = [LAYERS]
    for key, value in fields.items():
        kinds = isinstance(value, list) and len(value) > 1 and all(isinstance(v, str | int) for v in value)
        if kinds and (len(value) == total or re.search(r"layer\w*types?|block_types?", key)):
            needed.append(max(map(value.index, set(value))) + 1)
        elif isinstance(value, list) and value and "layer" in key and _numbers(value) == value:
            needed.append(min(value) + 2)
        elif _PERIODS.search(key) and type(value) is int and 0 < value <= MOST_LAYERS:
            needed.append(value + 1)
    return min(total, MOST_LAYERS, max(needed))


def _experts(fields: dict[str, Any], count: int) -> int:
    """Fewer experts, as many as routing needs."""
    chosen = [n for k, v in fields.items() if re.search(r"experts_per_tok|top_?k|moe_k", k) for n in _numbers(v)]
    groups = [n for k, v in fields.items() if k == "n_group" for n in _numbers(v)]
    wanted = max([EXPERTS, *(2 * n for n in chosen), *(2 * n for n in groups)])
    return count if wanted >= count or any(wanted % n for n in groups) else wanted


def _within(value: Any, vocabulary: int | None, seed: int) -> Any:
    """A special token's id inside the vocabulary, different ones for different tokens mostly."""
    if isinstance(value, list):
        return [_within(v, vocabulary, seed + i) for i, v in enumerate(value)]
    if not isinstance(value, int) or isinstance(value, bool) or not vocabulary or value < vocabulary:
        return value
    return vocabulary - 1 - seed % (vocabulary // 4)


def _picture(value: Any, patch: Any) -> Any:
    """A picture of a few patches."""
    if isinstance(value, list | tuple):
        patches = patch if isinstance(patch, list | tuple) else [patch] * len(value)
        return [_picture(v, p) for v, p in zip(value, patches, strict=False)]
    if not isinstance(patch, int):
        return min(value, 64) if isinstance(value, int) else value
    return value if not isinstance(value, int) or value <= 4 * patch or patch < 8 else 4 * patch


def _sections(value: Any, by: int) -> Any:
    """Parts of a head's features that add up to the smaller head."""
    if not isinstance(value, list | tuple) or sum(value) % by or sum(value) // by < len(value):
        return value
    parts = [max(1, n // by) for n in value[1:]]
    return [sum(value) // by - sum(parts), *parts]


def _scaled_rope(fields: dict[str, Any], narrow: int) -> dict[str, Any]:
    """RoPE's parameters; sections count pairs of features of a head."""
    return {
        key: _scaled_rope(value, narrow)
        if isinstance(value, dict)
        else _sections(value, narrow)
        if key == "mrope_section"
        else [v for v in value[: len(value) // narrow]]
        if key in ("short_factor", "long_factor") and isinstance(value, list)
        else value
        for key, value in fields.items()
    }
