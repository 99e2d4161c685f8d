"""SOURCE: torch.nn, x-transformers, vit-pytorch, torchvision, open_clip and kornia.

In: nothing. Out: candidates. Each package has a function that yields them and a table of constructor arguments: small
sizes, and each option that changes how queries and keys are computed. A package that is not installed yields nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.sweeping.candidate import Candidate, CannotBeRunError

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Options = dict[str, Any]

BATCH, TOKENS, WIDTH, HEADS = 2, 6, 32, 4

_BROKEN = {
    ("simple_flash_attn_vit", "SimpleViT 1"): "it uses einsum and does not import it",
    ("simple_flash_attn_vit_3d", "SimpleViT 1"): "it uses einsum and does not import it",
    ("CustomTextCLIP", "vision: scaled cosine"): "it gives bmm, which multiplies stacks of matrices, four axes",
    ("CustomTextCLIP", "text: scaled cosine"): "it gives bmm, which multiplies stacks of matrices, four axes",
}
"""Models that run with no inputs, by family and name, with the reason."""


def candidates() -> Iterator[Candidate]:
    """Candidates of every installed package."""
    packages: dict[str, Callable[[], Iterator[tuple[str, str, Callable[[], Built]]]]] = {
        "torch": _torch,
        "x_transformers": _x_transformers,
        "vit_pytorch": _vit_pytorch,
        "torchvision": _torchvision,
        "open_clip": _open_clip,
        "kornia": _kornia,
    }
    for package, source in packages.items():
        if importlib.util.find_spec(package) is not None:
            for family, name, build in source():
                if reason := _BROKEN.get((family, name)):
                    build = partial(_fails, reason)
                yield Candidate(package.replace("_", "-"), family, name, partial(_in_evaluation_mode, build))


def _in_evaluation_mode(build: Callable[[], Built]) -> Built:
    model, args, kwargs = build()
    model.eval()
    with torch.no_grad():
        model(*args, **kwargs)  # an error of the package itself must not count as one of quack-fx
    return model, args, kwargs


def _fails(reason: str) -> Built:
    raise CannotBeRunError(f"the package's own code fails: {reason}")


def _sequence(tokens: int = TOKENS, width: int = WIDTH) -> Tensor:
    return torch.randn(BATCH, tokens, width)


def _picture(side: int) -> Tensor:
    return torch.randn(BATCH, 3, side, side)


def _attribute(path: str) -> Any:
    """The object at a dotted path "package.module.Name"."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


# ---- torch.nn --------------------------------------------------------------------------------------------------------

_MULTIHEAD: dict[str, Options] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "kdim, vdim": {"kdim": 24, "vdim": 16, "batch_first": True},
    "bias_k": {"add_bias_kv": True, "batch_first": True},
    "add_zero_attn": {"add_zero_attn": True, "batch_first": True},
    "all options": {"kdim": 24, "vdim": 16, "add_bias_kv": True, "add_zero_attn": True},
}

_ENCODER_LAYER: dict[str, Options] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "norm_first": {"norm_first": True, "batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "gelu": {"activation": "gelu", "batch_first": True},
}


def _torch() -> Iterator[tuple[str, str, Callable[[], Built]]]:
    for name, options in _MULTIHEAD.items():
        for call in ({}, {"need_weights": False}, {"average_attn_weights": False}):
            title = ", ".join([name, *(f"{option}={value}" for option, value in call.items())])
            yield "MultiheadAttention", title, partial(_multihead, options, call)
    yield "MultiheadAttention", "one sequence, no batch", _multihead_unbatched
    yield "MultiheadAttention", "masks", _multihead_masked
    for name, options in _ENCODER_LAYER.items():
        yield "TransformerEncoderLayer", name, partial(_encoder, options, 0)
        yield "TransformerEncoder", name, partial(_encoder, options, 2)
        yield "TransformerDecoderLayer", name, partial(_decoder, options, 0)
        yield "TransformerDecoder", name, partial(_decoder, options, 2)
        yield "Transformer", name, partial(_seq2seq, options)


def _multihead(options: Options, call: Options) -> Built:
    query, key = _sequence(), _sequence(TOKENS + 2, options.get("kdim", WIDTH))
    value = _sequence(TOKENS + 2, options.get("vdim", WIDTH))
    if not options.get("batch_first"):
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    return nn.MultiheadAttention(WIDTH, HEADS, **options), (query, key, value), dict(call)


def _multihead_unbatched() -> Built:
    x = torch.randn(TOKENS, WIDTH)
    return nn.MultiheadAttention(WIDTH, HEADS), (x, x, x), {}


def _multihead_masked() -> Built:
    x = _sequence()
    causal = nn.Transformer.generate_square_subsequent_mask(TOKENS)
    padding = torch.zeros(BATCH, TOKENS)
    return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), (x, x, x, padding), {"attn_mask": causal}


def _encoder(options: Options, layers: int) -> Built:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, dim_feedforward=64, **options)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False) if layers else layer
    return model, (_sequence(),), {}


def _decoder(options: Options, layers: int) -> Built:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, dim_feedforward=64, **options)
    model = nn.TransformerDecoder(layer, layers) if layers else layer
    memory = _sequence(TOKENS + 2) if options.get("batch_first") else _sequence()
    return model, (_sequence(), memory), {}


def _seq2seq(options: Options) -> Built:
    model = nn.Transformer(WIDTH, HEADS, 2, 2, 64, **options)
    return model, (_sequence(), _sequence()), {}


# ---- x-transformers --------------------------------------------------------------------------------------------------

_X_DECODERS: dict[str, Options] = {
    "plain": {},
    "flash": {"attn_flash": True},
    "rotary": {"rotary_pos_emb": True},
    "rotary xpos": {"rotary_xpos": True},
    "rotary on some heads": {"rotary_pos_emb": True, "rotate_num_heads": 2},
    "polar positions": {"polar_pos_emb": True},
    "alibi": {"alibi_pos_bias": True, "alibi_num_heads": 2},
    "relative position bias": {"rel_pos_bias": True},
    "dynamic position bias": {"dynamic_pos_bias": True},
    "contextual positions": {"attn_use_cope": True},
    "contextual positions, talking heads": {"attn_use_cope": True, "attn_cope_talking_heads": True},
    "data dependent alibi": {"attn_data_dependent_alibi": True},
    "relative projected bias": {"attn_use_rel_proj_pos_bias": True},
    "qk norm": {"attn_qk_norm": True},
    "qk norm in groups": {"attn_qk_norm": True, "attn_qk_norm_groups": 2},
    "qk norm, scale per dimension": {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True},
    "qk rmsnorm": {"attn_qk_rmsnorm": True},
    "k rmsnorm": {"attn_k_rmsnorm": True},
    "l2 distance": {"attn_l2_distance": True},
    "sigmoid": {"attn_sigmoid": True},
    "talking heads before": {"attn_pre_talking_heads": True},
    "talking heads after": {"attn_post_talking_heads": True},
    "talking heads before and after": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
    "head scale": {"attn_head_scale": True},
    "sparse top k": {"attn_sparse_topk": 3},
    "hard": {"attn_hard": True},
    "one kv head": {"attn_one_kv_head": True},
    "grouped queries": {"attn_kv_heads": 2},
    "grouped queries, flash": {"attn_kv_heads": 2, "attn_flash": True},
    "memory kv": {"attn_num_mem_kv": 3},
    "memory kv, one kv head": {"attn_num_mem_kv": 3, "attn_one_kv_head": True},
    "zero kv": {"attn_add_zero_kv": True},
    "head sinks": {"attn_head_learned_sink": True},
    "soft clamp": {"attn_softclamp_logits": True},
    "selective": {"attn_selective": True},
    "cog, signed": {"attn_cog_signed": True},
    "laser": {"attn_laser": True},
    "gated values": {"attn_gate_values": True},
    "gated value heads": {"attn_gate_value_heads": True},
    "inverted": {"attn_inverted_attention": True},
    "latent queries": {"attn_use_latent_q": True, "attn_dim_latent_q": 16},
    "latent keys and values": {"attn_use_latent_kv": True, "attn_dim_latent_kv": 16},
    "latent, rope on sub-heads": {
        "attn_use_latent_q": True,
        "attn_dim_latent_q": 16,
        "attn_use_latent_kv": True,
        "attn_dim_latent_kv": 16,
        "attn_latent_rope_subheads": 2,
        "rotary_pos_emb": True,
    },
    "wide values": {"attn_value_dim_head": 24},
    "value residual": {"add_value_residual": True},
    "orthogonal values": {"attn_orthog_projected_values": True},
    "residual attention": {"residual_attn": True},
    "tied layers": {"weight_tie_layers": True},
    "sandwich": {"sandwich_coef": 1},
    "sandwich norm": {"sandwich_norm": True},
    "macaron": {"macaron": True},
    "shifted tokens": {"shift_tokens": 1},
    "rmsnorm, value rmsnorm": {"use_rmsnorm": True, "attn_value_rmsnorm": True},
    "qkv receive different residuals": {"qkv_receive_diff_residuals": True, "num_residual_streams": 2},
    "layers integrated": {"integrate_layers": True},
    "hyper connections": {"num_residual_streams": 2},
    "parallel layers": {"par_ratio": 2},
    "bounded past": {"attn_max_attend_past": 3},
}

_X_WRAPPERS: dict[str, Options] = {
    "memory tokens": {"num_memory_tokens": 2},
    "memory tokens in between": {"num_memory_tokens": 2, "memory_tokens_interspersed_every": 3},
    "tied embedding": {"tie_embedding": True},
    "attention pool": {"attn_pool": True},
}


def _x_transformers() -> Iterator[tuple[str, str, Callable[[], Built]]]:
    for name, options in _X_DECODERS.items():
        yield "Decoder", name, partial(_x_language, "Decoder", options, {})
    for name in ("plain", "rotary", "qk norm", "talking heads before and after", "memory kv", "grouped queries"):
        yield "Encoder", name, partial(_x_language, "Encoder", _X_DECODERS[name], {})
    for name, options in _X_WRAPPERS.items():
        yield "TransformerWrapper", name, partial(_x_language, "Decoder", {}, options)
    for name in ("plain", "qk norm", "grouped queries", "memory kv", "flash"):
        yield "CrossAttender", name, partial(_x_cross, _X_DECODERS[name])
    yield "Decoder", "cross attention", partial(_x_cross, {}, "Decoder", {"cross_attend": True})
    yield (
        "Decoder",
        "cross attention alone",
        partial(_x_cross, {}, "Decoder", {"cross_attend": True, "only_cross": True}),
    )
    yield "XTransformer", "plain", partial(_x_seq2seq, {})
    yield "XTransformer", "tied", partial(_x_seq2seq, {"tie_token_emb": True})
    yield "ViTransformerWrapper", "plain", _x_vision
    yield "ContinuousTransformerWrapper", "plain", _x_continuous


def _x_layers(kind: str, options: Options) -> nn.Module:
    return _attribute(f"x_transformers.{kind}")(dim=WIDTH, depth=2, heads=HEADS, attn_dim_head=8, **options)


def _x_language(kind: str, options: Options, wrapper: Options) -> Built:
    make = _attribute("x_transformers.TransformerWrapper")
    model = make(num_tokens=50, max_seq_len=16, attn_layers=_x_layers(kind, options), **wrapper)
    return model, (torch.randint(0, 50, (BATCH, 8)),), {}


def _x_cross(options: Options, kind: str = "CrossAttender", more: Options | None = None) -> Built:
    return _x_layers(kind, {**options, **(more or {})}), (_sequence(),), {"context": _sequence(TOKENS + 2)}


def _x_seq2seq(options: Options) -> Built:
    sides = {f"{side}_{name}": value for side in ("enc", "dec") for name, value in _X_SIDE.items()}
    model = _attribute("x_transformers.XTransformer")(dim=WIDTH, **sides, **options)
    return model, (torch.randint(0, 50, (BATCH, 7)), torch.randint(0, 50, (BATCH, 9))), {}


_X_SIDE: Options = {"num_tokens": 50, "depth": 2, "heads": HEADS, "max_seq_len": 16, "attn_dim_head": 8}


def _x_vision() -> Built:
    make = _attribute("x_transformers.ViTransformerWrapper")
    model = make(image_size=32, patch_size=8, num_classes=5, attn_layers=_x_layers("Encoder", {}))
    return model, (_picture(32),), {}


def _x_continuous() -> Built:
    make = _attribute("x_transformers.ContinuousTransformerWrapper")
    return make(dim_in=8, dim_out=8, max_seq_len=16, attn_layers=_x_layers("Decoder", {})), (_sequence(8, 8),), {}


# ---- vit-pytorch -----------------------------------------------------------------------------------------------------

_VIT_SMALL: Options = {
    "image_size": 32,
    "patch_size": 8,
    "image_patch_size": 8,
    "freq_patch_size": 8,
    "frame_patch_size": 2,
    "frames": 4,
    "max_frames": 4,
    "seq_len": 32,
    "num_classes": 5,
    "dim": WIDTH,
    "depth": 2,
    "spatial_depth": 2,
    "temporal_depth": 2,
    "cls_depth": 1,
    "heads": HEADS,
    "dim_head": 8,
    "mlp_dim": 64,
    "num_residual_streams": 2,
}
"""Arguments of vit-pytorch constructors, by name."""

_VIT_STAGES: Options = {
    f"s{stage}_{name}": value
    for stage in (1, 2, 3, 4)
    for name, value in {"emb_dim": 16 * stage, "depth": 1, "heads": 2, "local_patch_size": 2, "global_k": 2}.items()
}

_VIT_OPTIONS: dict[str, list[Options]] = {
    "ats_vit.ViT": [{"max_tokens_per_depth": (8, 4)}],
    "cct.CCT": [
        {"img_size": 32, "embedding_dim": WIDTH, "kernel_size": 3, "padding": 1, "num_layers": 2, "num_heads": HEADS}
        | {"num_classes": 5, "mlp_ratio": 2.0, "positional_embedding": positions}
        for positions in ("learnable", "sine")
    ],
    "cct_3d.CCT": [
        {"img_size": 16, "num_frames": 4, "embedding_dim": WIDTH, "kernel_size": 3, "padding": 1, "num_layers": 2}
        | {"num_heads": HEADS, "num_classes": 5, "positional_embedding": "learnable"}
    ],
    "cross_vit.CrossViT": [
        {"sm_dim": 16, "lg_dim": 24, "sm_patch_size": 8, "lg_patch_size": 16, "lg_enc_depth": 1, "depth": 1}
        | {f"{part}_heads": 2 for part in ("sm_enc", "lg_enc", "cross_attn")}
        | {f"{part}_dim_head": 8 for part in ("sm_enc", "lg_enc", "cross_attn")}
    ],
    "crossformer.CrossFormer": [
        {"dim": (32, 32, 64, 64), "depth": (1, 1, 1, 1), "local_window_size": 2, "global_window_size": (4, 2, 2, 2)}
        | {"image_size": 128}
    ],
    "cvt.CvT": [_VIT_STAGES | {"image_size": 64}],
    "jet_vit.JetViT": [{"window_size": 2, "attn_layers": ["LA", "WA", "FA"], "depth": 3}],
    "levit.LeViT": [{"dim": (16, 24, 32), "depth": 1, "heads": (2, 3, 4), "mlp_mult": 2, "image_size": 128}],
    "look_vit.LookViT": [
        {"image_size": 32, "patch_size": 16, "highres_patch_size": 8, "cross_attn_heads": 2, "cross_attn_dim_head": 8}
        | {"depth": 2, "heads": HEADS, "dim_head": 8}
    ],
    "looped_vit.LoopedViT": [
        {"pre_loop_depth": 1, "num_looped_blocks": 1, "post_loop_depth": 1, "loop_depth": loops, "adaptive_loop": gate}
        | {"heads": HEADS, "dim_head": 8, "mlp_dim": 64, "image_size": 32, "patch_size": 8}
        for loops, gate in ((2, False), (2, True))
    ],
    "local_vit.LocalViT": [{"dim": 8, "image_size": 64}],  # its norm needs as many patch columns as features
    "max_vit.MaxViT": [{"depth": (1, 1), "dim": 16, "dim_head": 8, "window_size": 2, "image_size": 32}],
    "max_vit_with_registers.MaxViT": [{"depth": (1, 1), "dim": 16, "dim_head": 8, "window_size": 2, "image_size": 32}],
    "mobile_vit.MobileViT": [
        {"image_size": (128, 128), "dims": [16, 24, 32], "depths": (1, 1, 1), "patch_size": (2, 2)}
        | {"channels": [8, 8, 16, 16, 16, 16, 24, 24, 24, 24, 32]}
    ],
    "nest.NesT": [{"image_size": 32, "patch_size": 4, "num_hierarchies": 3, "block_repeats": (1, 1, 2), "heads": 2}],
    "pit.PiT": [{"depth": (1, 1), "heads": 2, "image_size": 32}],
    "regionvit.RegionViT": [
        {"dim": (16, 16, 32, 32), "depth": (1, 1, 1, 1), "window_size": 3, "use_peg": peg, "image_size": 192}
        for peg in (False, True)
    ],
    "rvt.RvT": [{"use_rotary": rotary, "use_ds_conv": conv} for rotary, conv in ((True, True), (False, False))],
    "scalable_vit.ScalableViT": [
        {"dim": 16, "depth": (1, 1, 1, 1), "heads": (1, 2, 2, 2), "reduction_factor": (4, 2, 2, 1)}
        | {"window_size": (8, 4, None, None), "image_size": 64}
    ],
    "sep_vit.SepViT": [{"dim": 16, "depth": (1, 1), "heads": (1, 2), "window_size": 7, "image_size": 56}],
    "simple_flash_attn_vit.SimpleViT": [{"use_flash": True}, {"use_flash": False}],
    "simple_flash_attn_vit_3d.SimpleViT": [{"use_flash_attn": True}, {"use_flash_attn": False}],
    "simple_vit_attn_residual.SimpleViTAttnResidual": [{"learned_query": True}, {"learned_query": False}],
    "simple_vit_with_specialized_cls.SimpleViT": [{}, {"specialize_qkv_depth": 1}],
    "t2t.T2TViT": [{"t2t_layers": ((3, 2), (3, 2)), "image_size": 32}],
    "twins_svt.TwinsSVT": [_VIT_STAGES | {"image_size": 128}],
    "vit_with_patch_merger.ViT": [{"patch_merge_layer": 1, "patch_merge_num_tokens": 3}],
    "vivit.ViViT": [{"variant": kind} for kind in ("factorized_encoder", "factorized_self_attention")]
    + [{"use_flash_attn": False}],
    "wwt.WWT": [{"num_slots": 4}, {"num_slots": (6, 3)}],
}
"""Additional arguments of individual classes; each entry of a list is a candidate."""

_VIT_ON_A_VIT: dict[str, tuple[str, str, Options]] = {
    "mae.MAE": ("encoder", "deepvit.DeepViT", {"decoder_dim": 24, "decoder_heads": 2, "decoder_dim_head": 8}),
    "simmim.SimMIM": ("encoder", "deepvit.DeepViT", {}),
    "mpp.MPP": ("transformer", "deepvit.DeepViT", {"patch_size": 8, "dim": WIDTH}),
    "recorder.Recorder": ("vit", "vit.ViT", {}),
    "extractor.Extractor": ("vit", "vit.ViT", {}),
}
"""Classes that train or wrap a ViT: the name of that argument, a class that fits, and the other arguments."""


def _vit_pytorch() -> Iterator[tuple[str, str, Callable[[], Built]]]:
    package = importlib.import_module("vit_pytorch")
    for info in pkgutil.iter_modules(package.__path__):
        try:
            module = importlib.import_module(f"vit_pytorch.{info.name}")
        except ImportError:
            continue  # it needs a package that is not installed
        for name, made in list(vars(module).items()):
            path = f"{info.name}.{name}"
            if path in _VIT_ON_A_VIT:
                yield info.name, name, partial(_vit_on_a_vit, path)
            elif path in _VIT_OPTIONS:
                for number, options in enumerate(_VIT_OPTIONS[path]):
                    yield info.name, f"{name} {number}" if number else name, partial(_vit, made, options)
            elif _is_whole_vit(made, module.__name__):
                yield info.name, name, partial(_vit, made, {})
    yield "efficient", "ViT on an x-transformers Encoder", _vit_efficient
    yield "learnable_memory_vit", "Adapter", _vit_adapter
    for ndim in (1, 2, 3):
        for module_name in ("vit_nd", "vit_nd_pope", "vit_nd_rotary"):
            yield module_name, f"ViTND, {ndim} axes", partial(_vit_nd, module_name, ndim)


def _is_whole_vit(made: Any, module: str) -> bool:
    """Whether a class is a whole model that can be built from the small arguments alone."""
    if not (inspect.isclass(made) and issubclass(made, nn.Module) and made.__module__ == module):
        return False
    parameters = inspect.signature(made).parameters
    needed = {name for name, p in parameters.items() if p.default is p.empty and p.kind is p.KEYWORD_ONLY}
    return bool(needed & {"image_size", "seq_len"}) and "num_classes" in needed and needed <= set(_VIT_SMALL)


def _vit(made: Callable[..., nn.Module], options: Options) -> Built:
    parameters = inspect.signature(made).parameters
    needed = {name for name in parameters if name in _VIT_SMALL and name not in options}
    own = {name: value for name, value in options.items() if name in parameters or "kwargs" in parameters}
    model = made(**{name: _VIT_SMALL[name] for name in needed}, **own)
    side = options.get("image_size", options.get("img_size", _VIT_SMALL["image_size"]))
    side = side[0] if isinstance(side, tuple) else side
    called = inspect.signature(model.forward).parameters
    if "batched_images" in called:
        return model, ([[*_pictures_of_two_shapes(side)], [torch.randn(3, side, side)]],), {}
    if "images" in called and "token_dropout_prob" in parameters:
        return model, (_pictures_of_two_shapes(side),), {}
    if "volumes" in called:
        return model, ([torch.randn(3, 4, side, side), torch.randn(3, 2, side, side)],), {}
    if "seq_len" in parameters:
        return model, (torch.randn(BATCH, 3, _VIT_SMALL["seq_len"]),), {}
    if frames := {"frames", "num_frames"} & set(parameters):
        count = options.get(min(frames), _VIT_SMALL["frames"])
        return model, (torch.randn(BATCH, 3, count, side, side),), {}
    return model, (_picture(side),), {}


def _pictures_of_two_shapes(side: int) -> list[Tensor]:
    return [torch.randn(3, side, side), torch.randn(3, side // 2, side)]


def _plain_vit(path: str = "vit.ViT") -> nn.Module:
    return _vit(_attribute(f"vit_pytorch.{path}"), {})[0]


def _vit_on_a_vit(path: str) -> Built:
    argument, vit, options = _VIT_ON_A_VIT[path]
    return _attribute(f"vit_pytorch.{path}")(**{argument: _plain_vit(vit)}, **options), (_picture(32),), {}


def _vit_efficient() -> Built:
    encoder = _x_layers("Encoder", {"residual_attn": True})
    model = _attribute("vit_pytorch.efficient.ViT")(
        image_size=32, patch_size=8, num_classes=5, dim=WIDTH, transformer=encoder
    )
    return model, (_picture(32),), {}


def _vit_adapter() -> Built:
    vit = _plain_vit("learnable_memory_vit.ViT")
    return _attribute("vit_pytorch.learnable_memory_vit.Adapter")(vit=vit), (_picture(32),), {}


def _vit_nd(module: str, ndim: int) -> Built:
    small = {name: _VIT_SMALL[name] for name in ("num_classes", "dim", "depth", "heads", "mlp_dim", "dim_head")}
    model = _attribute(f"vit_pytorch.{module}.ViTND")(ndim=ndim, input_shape=8, patch_size=4, **small)
    return model, (torch.randn(BATCH, 3, *[8] * ndim),), {}


# ---- torchvision -----------------------------------------------------------------------------------------------------


def _torchvision() -> Iterator[tuple[str, str, Callable[[], Built]]]:
    yield "VisionTransformer", "plain", _tv_vit
    yield "SwinTransformer", "v1", partial(_tv_swin, {})
    v2 = {"block": "SwinTransformerBlockV2", "downsample_layer": "PatchMergingV2"}
    yield "SwinTransformer", "v2", partial(_tv_swin, v2)
    yield "MaxVit", "plain", _tv_maxvit
    yield "SwinTransformer3d", "plain", _tv_swin3d
    yield "MViT", "v1", partial(_tv_mvit, False)
    yield "MViT", "v2", partial(_tv_mvit, True)


def _tv_vit() -> Built:
    model = _attribute("torchvision.models.VisionTransformer")(
        image_size=32, patch_size=8, num_layers=2, num_heads=HEADS, hidden_dim=WIDTH, mlp_dim=64, num_classes=5
    )
    return model, (_picture(32),), {}


_SWIN: Options = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "num_classes": 5}


def _tv_swin(parts: Mapping[str, str]) -> Built:
    parts = {name: _attribute(f"torchvision.models.swin_transformer.{part}") for name, part in parts.items()}
    make = _attribute("torchvision.models.SwinTransformer")
    return make(patch_size=[4, 4], window_size=[4, 4], **_SWIN, **parts), (_picture(32),), {}


def _tv_swin3d() -> Built:
    make = _attribute("torchvision.models.video.SwinTransformer3d")
    model = make(patch_size=[2, 4, 4], window_size=[2, 4, 4], **_SWIN)
    return model, (torch.randn(BATCH, 3, 4, 32, 32),), {}


def _tv_maxvit() -> Built:
    model = _attribute("torchvision.models.MaxVit")(
        input_size=(32, 32),
        stem_channels=8,
        partition_size=2,
        block_channels=[16, 32],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
        num_classes=5,
    )
    return model, (_picture(32),), {}


def _tv_mvit(second: bool) -> Built:
    block = _attribute("torchvision.models.video.mvit.MSBlockConfig")
    blocks = [
        block(1, 16, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
        block(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
        block(2, 32, 32, [], [3, 3, 3], [], [1, 1, 1]),
    ]
    model = _attribute("torchvision.models.video.MViT")(
        spatial_size=(32, 32),
        temporal_size=4,
        block_setting=blocks,
        residual_pool=second,
        residual_with_cls_embed=not second,
        rel_pos_embed=second,
        proj_after_attn=second,
        num_classes=5,
    )
    return model, (torch.randn(BATCH, 3, 4, 32, 32),), {}


# ---- open_clip -------------------------------------------------------------------------------------------------------

_OC_TEXT: Options = {"context_length": 8, "vocab_size": 60, "width": WIDTH, "heads": HEADS, "layers": 2}
_OC_VISION: Options = {"layers": 2, "width": WIDTH, "head_width": 8, "patch_size": 8, "image_size": 32}

_OC_VISIONS: dict[str, Options] = {
    "plain": {},
    "qk norm": {"qk_norm": True},
    "scaled cosine": {"scaled_cosine_attn": True},
    "scaled heads": {"scale_heads": True},
    "scales everywhere": {"scale_attn": True, "scale_attn_inner": True, "scale_fc": True},
    "attentional pool": {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
    "two attentional pools": {"attentional_pool": "parallel", "attn_pooler_queries": 4, "attn_pooler_heads": 2},
    "sine positions, average": {"pos_embed_type": "sin_cos_2d", "pool_type": "avg", "no_ln_pre": True},
    "residual network": {"layers": (1, 1, 1, 1), "width": 16, "head_width": 8},
    "timm ViT": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
}

_OC_TEXTS: dict[str, Options] = {
    "no causal mask": {"no_causal_mask": True, "pool_type": "last"},
    "class token": {"embed_cls": True},
    "qk norm": {"qk_norm": True},
    "scaled cosine": {"scaled_cosine_attn": True},
}


def _open_clip() -> Iterator[tuple[str, str, Callable[[], Built]]]:
    for name, options in _OC_VISIONS.items():
        yield "CustomTextCLIP", f"vision: {name}", partial(_oc_two_towers, options, {})
    for name, options in _OC_TEXTS.items():
        yield "CustomTextCLIP", f"text: {name}", partial(_oc_two_towers, {}, options)
    yield "CLIP", "plain", partial(_oc_two_towers, {}, {}, "CLIP")
    yield "CoCa", "plain", _oc_captions


def _oc_two_towers(vision: Options, text: Options, kind: str = "CustomTextCLIP") -> Built:
    model = _attribute(f"open_clip.model.{kind}")(WIDTH, {**_OC_VISION, **vision}, {**_OC_TEXT, **text})
    tokens = torch.randint(1, 60, (BATCH, 7 if text.get("embed_cls") else 8))
    return model, (_picture(vision.get("image_size", 32)), tokens), {}


def _oc_captions() -> Built:
    vision = {**_OC_VISION, **_OC_VISIONS["attentional pool"], "output_tokens": True}
    text = {**_OC_TEXT, "embed_cls": True, "output_tokens": True}
    captions = {**_OC_TEXT, "attn_pooler_heads": 2, "mlp_ratio": 2.0}
    model = _attribute("open_clip.coca_model.CoCa")(WIDTH, captions, text, vision)
    return model, (_picture(32), torch.randint(1, 60, (BATCH, 8))), {}


# ---- kornia ----------------------------------------------------------------------------------------------------------

_K_CONFIG: Options = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": 64,
    "vocab_size": 60,
    "image_size": 32,
    "patch_size": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "init_pos_emb_height": 8,
    "init_pos_emb_width": 8,
}

_K_LOFTR: Options = {"d_model": WIDTH, "d_ffn": 64, "nhead": HEADS, "layer_names": ["self", "cross"] * 2}


def _kornia() -> Iterator[tuple[str, str, Callable[[], Built]]]:
    yield "VisionTransformer", "plain", _k_vit
    yield "MobileViT", "xxs", lambda: (_attribute("kornia.models.vit_mobile.MobileViT")("xxs"), (_picture(256),), {})
    yield "TinyViT", "plain", _k_tiny_vit
    yield "ImageEncoderViT", "relative positions", _k_sam_encoder
    yield "TwoWayTransformer", "plain", _k_two_way
    yield "SigLip2", "vision", partial(_k_siglip, "vision")
    yield "SigLip2", "text", partial(_k_siglip, "text")
    yield "MoonViT", "plain", _k_moonvit
    yield "PaliGemma", "layer", _k_gemma_layer
    yield (
        "RT-DETR",
        "AIFI",
        lambda: (
            _attribute("kornia.models.rt_detr.architecture.hybrid_encoder.AIFI")(WIDTH, HEADS, 64),
            (torch.randn(BATCH, WIDTH, 3, 4),),
            {},
        ),
    )
    yield (
        "EfficientViT",
        "LiteMLA",
        lambda: (
            _attribute("kornia.models.efficient_vit.nn.ops.LiteMLA")(16, 16, dim=8),
            (torch.randn(BATCH, 16, 6, 6),),
            {},
        ),
    )
    for kind in ("linear", "full"):
        yield "LoFTR", f"{kind} attention", partial(_k_loftr_layers, kind)
    yield "LoFTR", "whole", _k_loftr
    for kind in ("SelfBlock", "CrossBlock", "TransformerLayer"):
        yield "LightGlue", kind, partial(_k_lightglue, kind)
    yield "DINOv2 of DeDoDe", "plain", _k_dino


def _k_vit() -> Built:
    make = _attribute("kornia.models.vit.VisionTransformer")
    return make(image_size=32, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=HEADS), (_picture(32),), {}


def _k_tiny_vit() -> Built:
    make = _attribute("kornia.models.tiny_vit.TinyViT")
    stages = {
        "embed_dims": [16, 16, 32, 32],
        "depths": [1, 1, 2, 1],
        "num_heads": [2, 2, 4, 4],
        "window_sizes": [4] * 4,
    }
    return make(img_size=64, num_classes=5, **stages), (_picture(64),), {}


def _k_sam_encoder() -> Built:
    model = _attribute("kornia.models.sam.architecture.image_encoder.ImageEncoderViT")(
        img_size=32,
        patch_size=8,
        embed_dim=WIDTH,
        depth=2,
        num_heads=HEADS,
        out_chans=16,
        use_rel_pos=True,
        window_size=2,
        global_attn_indexes=(1,),
    )
    return model, (_picture(32),), {}


def _k_two_way() -> Built:
    make = _attribute("kornia.models.sam.architecture.transformer.TwoWayTransformer")
    picture, positions = torch.randn(BATCH, WIDTH, 3, 4), torch.randn(BATCH, WIDTH, 3, 4)
    return make(depth=2, embedding_dim=WIDTH, num_heads=HEADS, mlp_dim=64), (picture, positions, _sequence(5)), {}


def _k_config(path: str) -> Any:
    """A kornia configuration object with the small sizes."""
    made = _attribute(path)
    return made(**{name: value for name, value in _K_CONFIG.items() if name in inspect.signature(made).parameters})


def _k_siglip(tower: str) -> Built:
    title = tower.capitalize()
    config = _k_config(f"kornia.models.siglip2.config.SigLip2{title}Config")
    model = _attribute(f"kornia.models.siglip2.{tower}_encoder.SigLip2{title}Model")(config)
    return model, (_picture(32) if tower == "vision" else torch.randint(0, 60, (BATCH, 7)),), {}


def _k_moonvit() -> Built:
    config = _k_config("kornia.models.kimi_vl.config.MoonViTConfig")
    return _attribute("kornia.models.kimi_vl.moonvit.MoonViT")(config), (_picture(32),), {}


def _k_gemma_layer() -> Built:
    config = _k_config("kornia.models.paligemma.configuration_paligemma.PaliGemmaConfig")
    model = _attribute("kornia.models.paligemma.modeling_paligemma.GemmaDecoderLayer")(config, 0)
    return model, (_sequence(),), {"position_ids": torch.arange(TOKENS).expand(BATCH, -1)}


def _k_loftr_layers(kind: str) -> Built:
    make = _attribute("kornia.feature.loftr.loftr_module.transformer.LocalFeatureTransformer")
    return make({**_K_LOFTR, "attention": kind}), (_sequence(), _sequence(TOKENS + 2)), {}


def _k_loftr() -> Built:
    picture = torch.rand(1, 1, 64, 64)
    model = _attribute("kornia.feature.loftr.loftr.LoFTR")(pretrained=None)
    return model, ({"image0": picture, "image1": torch.roll(picture, 8, -1)},), {}


def _k_lightglue(kind: str) -> Built:
    model = _attribute(f"kornia.feature.lightglue.{kind}")(WIDTH, HEADS)
    one, other = _sequence(), _sequence(TOKENS + 2)
    turn = [torch.randn(2, BATCH, 1, tokens, WIDTH // HEADS) for tokens in (TOKENS, TOKENS + 2)]
    inputs = {"SelfBlock": (one, turn[0]), "CrossBlock": (one, other), "TransformerLayer": (one, other, *turn)}
    return model, inputs[kind], {}


def _k_dino() -> Built:
    make = _attribute("kornia.feature.dedode.transformer.dinov2.DinoVisionTransformer")
    model = make(img_size=32, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=HEADS, block_chunks=0)
    return model, (_picture(32),), {}
