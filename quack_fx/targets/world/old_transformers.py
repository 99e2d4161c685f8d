"""What models, configs and caches of transformers had before version 5, for files written for version 4.

In: the modules of transformers that are imported. `as_before` gives their classes what is gone, where it is gone, with
its former meaning; `as_today` takes it away again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_ABSENT = object()
_CHANGED: list[tuple[type, str, Any]] = []
"""Attributes that were added or replaced, with what was there."""


def as_before() -> None:
    """Add to the imported classes of transformers what files for version 4 rely on."""
    for module, owner, attributes in _FORMER:
        cls = getattr(sys.modules.get(f"transformers.{module}"), owner, None)
        for name, value in attributes.items() if cls is not None else ():
            if not hasattr(cls, name):
                _change(cls, name, value)  # type: ignore[arg-type]
    config = getattr(sys.modules.get("transformers.configuration_utils"), "PreTrainedConfig", None)
    if isinstance(now := vars(config or object).get("rope_scaling"), property) and now.fget is not _rope_scaling:
        _change(config, "rope_scaling", property(_rope_scaling, now.fset))  # type: ignore[arg-type]
    model = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    tied = vars(model or object).get("get_expanded_tied_weights_keys")
    if tied is not None and not hasattr(tied, "also_lists"):
        _change(model, "get_expanded_tied_weights_keys", _also_lists(tied))  # type: ignore[arg-type]
    functions = getattr(sys.modules.get("transformers.modeling_rope_utils"), "ROPE_INIT_FUNCTIONS", None)
    if functions is not None:
        functions.setdefault("default", _default_frequencies)


def as_today() -> None:
    """Undo `as_before`."""
    while _CHANGED:
        cls, name, before = _CHANGED.pop()
        delattr(cls, name) if before is _ABSENT else setattr(cls, name, before)
    functions = getattr(sys.modules.get("transformers.modeling_rope_utils"), "ROPE_INIT_FUNCTIONS", {})
    if functions.get("default") is _default_frequencies:
        del functions["default"]


def _change(cls: type, name: str, value: Any) -> None:
    _CHANGED.append((cls, name, vars(cls).get(name, _ABSENT)))
    setattr(cls, name, value)


# ---- configs ---------------------------------------------------------------------------------------------------------


class _RopeTheta:
    """`rope_theta`, which is now in `rope_parameters`; a config may have its own."""

    def __get__(self, config: Any, owner: type) -> Any:
        return (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)


def _rope_scaling(config: Any) -> Any:
    """`rope_scaling`: None for the default, and with the key "type"."""
    given = config.rope_parameters
    kind = given.get("rope_type", given.get("type", "default")) if given else "default"
    return None if kind == "default" else {"type": kind, **given}


def _default_frequencies(
    config: Any, device: Any = None, seq_len: int | None = None, **kwargs: Any
) -> tuple[Tensor, float]:
    """The entry "default" of `ROPE_INIT_FUNCTIONS`: inverse frequencies, and the factor on attention."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    count = int(width * getattr(config, "partial_rotary_factor", 1.0))
    powers = torch.arange(0, count, 2, dtype=torch.int64).float().to(device) / count
    return 1.0 / config.rope_theta**powers, 1.0


_NUMBER_OF_POSITIONS = property(lambda self: self.n_positions, lambda self, value: setattr(self, "n_positions", value))
_CONFIG: dict[str, Any] = {
    **dict.fromkeys("bos_token_id pad_token_id eos_token_id sep_token_id decoder_start_token_id".split()),
    **dict.fromkeys("cross_attention_hidden_size tokenizer_class prefix finetuning_task".split()),
    **dict.fromkeys("is_decoder add_cross_attention tie_encoder_decoder torchscript use_bfloat16".split(), False),
    "tie_word_embeddings": True,
    "pruned_heads": {},
    "n_ctx": _NUMBER_OF_POSITIONS,
    "rope_theta": _RopeTheta(),
}

# ---- models ----------------------------------------------------------------------------------------------------------


def _no_head_mask(self: Any, head_mask: Any, num_hidden_layers: int, *args: Any) -> list[None]:
    """`get_head_mask`, for a forward that is given none."""
    if head_mask is not None:
        raise NotImplementedError("masks of heads are gone from transformers; leave head_mask out")
    return [None] * num_hidden_layers


def _inverted_mask(self: Any, encoder_attention_mask: Tensor) -> Tensor:
    """`invert_attention_mask`: what is added to logits for a mask of keys, [B, T] or [B, S, T]."""
    seen = encoder_attention_mask.to(self.dtype)
    seen = seen[:, None, None, :] if seen.dim() == 2 else seen[:, None]
    return (1.0 - seen) * torch.finfo(self.dtype).min


def _extended_mask(self: Any, attention_mask: Tensor, input_shape: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
    """`get_extended_attention_mask`: the same, with earlier tokens only if the model is a decoder."""
    seen = attention_mask
    if seen.dim() == 2 and self.config.is_decoder:
        tokens, keys = int(input_shape[-1]), seen.shape[-1]
        causal = torch.ones(tokens, keys, device=seen.device).tril(keys - tokens)
        seen = causal * seen[:, None, :]
    return _inverted_mask(self, seen)


def _also_lists(original: Callable[..., dict[str, str]]) -> Callable[..., dict[str, str]]:
    """`get_expanded_tied_weights_keys` for models whose `_tied_weights_keys` is a list: names without their sources."""

    def expanded(self: Any, all_submodels: bool = False) -> dict[str, str]:
        if isinstance(self._tied_weights_keys, list | tuple | set):
            self._tied_weights_keys = _output_to_input(self)
        return original(self, all_submodels)

    expanded.also_lists = True  # type: ignore[attr-defined]
    return expanded


def _output_to_input(model: Any) -> dict[str, str]:
    """The name of the output embeddings, with that of the input embeddings whose weight they share."""
    names = {id(p): name for name, p in model.named_parameters()}
    try:
        pair = [getattr(side, "weight", None) for side in (model.get_output_embeddings(), model.get_input_embeddings())]
    except (NotImplementedError, AttributeError):
        return {}
    output, source = (names.get(id(weight), "") for weight in pair)
    return {output: source} if output and source and output != source else {}


_MODEL: dict[str, Any] = {
    "all_tied_weights_keys": {},  # now set in `post_init`, which older constructors do not call
    "get_head_mask": _no_head_mask,
    "invert_attention_mask": _inverted_mask,
    "get_extended_attention_mask": _extended_mask,
    "warnings_issued": {},
    "model_parallel": False,
    "is_parallelizable": False,
}

# ---- caches ----------------------------------------------------------------------------------------------------------


def _from_tuples(cls: Any, past_key_values: Any = None, *args: Any, **kwargs: Any) -> Any:
    """`from_legacy_cache`: a cache that holds the keys and values of a tuple for each layer."""
    cache = cls()
    for i, (keys, values) in enumerate(past_key_values or ()):
        cache.update(keys, values, i)
    return cache


def _to_tuples(self: Any) -> tuple[tuple[Tensor, Tensor], ...]:
    """`to_legacy_cache`."""
    return tuple((layer.keys, layer.values) for layer in self.layers)


_CACHE: dict[str, Any] = {
    "get_usable_length": lambda self, new_seq_length, layer_idx=0: self.get_seq_length(layer_idx),
    "get_max_cache_shape": lambda self, layer_idx=0: None,
    "from_legacy_cache": classmethod(_from_tuples),
    "to_legacy_cache": _to_tuples,
    "seen_tokens": property(lambda self: self.get_seq_length()),
    "key_cache": property(lambda self: [layer.keys for layer in self.layers]),
    "value_cache": property(lambda self: [layer.values for layer in self.layers]),
    "__getitem__": lambda self, layer_idx: (self.layers[layer_idx].keys, self.layers[layer_idx].values),
}
_FORMER: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("configuration_utils", "PreTrainedConfig", _CONFIG),
    ("modeling_utils", "PreTrainedModel", _MODEL),
    ("cache_utils", "DynamicCache", _CACHE),
)
