"""Small made-up values for unknown sizes, so that a model of the right structure can be built.

In: the name of a parameter or of a config's field, and its annotation. Values fit each other: widths are multiples of
the number of heads, image sizes of the patch size. They say nothing about the real model, so reports list them.
"""

from __future__ import annotations

import re
from typing import Any

import torch

WIDTH, HEADS, HEAD_DIM, LAYERS, VOCABULARY, LENGTH = 64, 4, 16, 2, 128, 64

_FLAG = re.compile(
    r"^(use|is|has|with|do|enable|disable|apply|add|learn|share|tie|return|output|no|if|causal|bidirectional|pre_?norm|"
    r"normalize|norm_first|individual|flash|debug|verbose|checkpoint|gradient_checkpointing|distil|revin|affine)(_|$)|"
    r"_(flag|enabled|only|first|sharing|bias)$|^bias$|bias$|^(train(ing)?|pretrained|frozen|freeze)$"
)
_RULES: tuple[tuple[str, Any], ...] = (
    # The first pattern that matches the name, in lower case, applies.
    (r"(^|_)(eps|epsilon)$|_eps_|layer_?norm_eps", 1e-5),
    (r"^inf$", 1e9),
    (r"drop|(^|_)p$|prob(ability)?$|_pdrop", 0.0),
    (r"(^|_)(theta|rope_base|base)$|rope_theta|rotary_base", 10000.0),
    (r"init.*(std|range|scale)|(^|_)std$", 0.02),
    (r"pad_(token_)?(id|idx)|padding_idx|(pad|bos|eos|sos|unk|cls|sep|mask)(_token)?_(id|idx)|_idx$", 0),
    (r"^(device|rank)$", "cpu"),
    (r"dtype", torch.float32),
    (r"^(max_)?batch(_size)?$|max_batch_size|^bsz$", 2),
    (r"(kv|key_value)_?heads?|n_kv|num_kv|heads?_kv|query_groups|n_local_heads", HEADS),
    (r"heads?_?dim|dim_?heads?|d_head|head_size|^d_?(k|v|q|kv)$|d_keys|d_values|kv_channels|(qk|v)_head_dim", HEAD_DIM),
    (r"(n|num|number)(_of)?_?\w*heads?|^heads?$|\w*_heads?$|^h$|nheads?|attn_?heads", HEADS),
    (r"layers?|depths?|blocks?$|^n$|num_blocks|n_blocks|^e_layers|^d_layers|stages?", LAYERS),
    (r"block_size|(seq|sequence|context|ctx|text|src|tgt|trg|max)_?(len|length|size)|n_ctx|max_?(len|pos|position|seq)\w*"
     r"|length|n_positions|context_window|window_size|maxlen|num_tokens?_max|max_tokens|n_tokens", LENGTH),
    (r"pred_len|label_len|horizon|forecast|future", 16),
    (r"vocab|n_?(src|trg|tgt|tokens?|words?|items?|users?)|(num|number_of)_?(tokens?|items?|users?|embeddings)|ntokens?|"
     r"(item|user|word)_(num|count|size)|dict(ionary)?_size|alphabet_size|n_entities|field_dims?", VOCABULARY),
    (r"class(es)?|n_?labels?|num_?labels|n_?out$|out_?classes|categories|n_cls", 10),
    (r"(img|image|input|picture)_?(size|res|resolution)|resolution|^image_(h|w)|^height$", 32),
    (r"patch", 8),
    (r"in_?chan\w*|(img|image|input|num|n)_?channels?|^channels?$|^in_c(hannels)?$|^c$", 3),
    (r"enc_in|dec_in|c_out|c_in|n_?(vars?|variates?|features?)|num_?(variables|features|sensors|nodes)|"
     r"(feature|state|act|action|obs|observation)_?(dim|size)|^(state|act|action)_dim$", 8),
    (r"mel|n_?fft|freq_?bins|(input|feat)_dim$", 16),
    (r"ffn?_?\w*|d_?ff|inner|inter(mediate)?\w*|mlp_(dim|size|hidden)|hidden_?dim_?ff|feed_?forward\w*|d_inner|"
     r"multiple_of", 2 * WIDTH),
    (r"mlp_ratio|expansion\w*|ffn_mult|_mult$|ratio", 4),
    (r"latent|lora|rank", 32),
    (r"experts_per_tok|top_?k|n_activated|active", 2),
    (r"experts", 4),
    (r"kernel|conv_size|filter_size", 3),
    (r"stride|padding|dilation|groups?$|factor|moving_avg", 1),
    (r"dim|width|hidden|embed|d_?model|n_?embd?|channels|units|size$|features|^d$|filters|planes|emb$", WIDTH),
    (r"norm|act(ivation)?|pos(ition)?_?(emb|enc)\w*|type|mode(?!l)|name|kind|method|freq$|embed$", ""),
    (r"^(n|num|number)_|_(num|count)$", 4),
)  # fmt: skip


def made_up(name: str, hint: Any = None) -> Any:
    """A value for a parameter or a field, by its name and its annotation.

    Example:
        >>> made_up("n_heads"), made_up("d_model"), made_up("dropout"), made_up("use_bias"), made_up("flag", bool)
        (4, 64, 0.0, False, False)
    """
    known = by_name(name)
    if hint is bool:
        return False
    if hint in (str, dict, list, tuple):
        return known if isinstance(known, hint) else hint()
    if hint is float:
        return float(known) if isinstance(known, int | float) else 0.0
    if hint is int:
        return int(known) if isinstance(known, int | float) and not isinstance(known, bool) else 4
    return 4 if known is None else known


def by_name(name: str) -> Any:
    """The value for a name; None where no pattern matches."""
    lower = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    if _FLAG.search(lower):
        return False
    return next((value for pattern, value in _RULES if re.search(pattern, lower)), None)
