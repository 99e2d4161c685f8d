"""Tiny real models, each with its true layout written by hand from the models' own documentation of their weights.

In: a name of `CASES`. Out: a `Case` of model, inputs and layout. No finder is involved.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from quack_fx.layout import AttentionSite, LogitTerm, Norm, QKLayout, Role, WeightBlock

EXAMPLES = Path(__file__).parent.parent / "examples"
IDS = torch.arange(2 * 7).remainder(11).view(2, 7) + 3
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


def heads(count: int, width: int, start: int = 0, stride: int | None = None) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Rows of each head: `width` of them, every `stride` rows, from `start` on."""
    stride = width if stride is None else stride
    return tuple(((start + h * stride, start + h * stride + width),) for h in range(count))


def site(name: str, query: WeightBlock, key: WeightBlock, width: int, **more: Any) -> AttentionSite:
    """A site with one block on each side."""
    n, m = len(query.heads), len(key.heads)
    kind = "mha" if n == m else "mqa" if m == 1 else "gqa"
    fields: dict[str, Any] = {
        "kind": kind,
        "cross": False,
        "calls": 1,
        "query_heads": n,
        "key_heads": m,
        "head_dim": width,
        "head_map": tuple(h // (n // m) for h in range(n)),
        "query": (query,),
        "key": (key,),
        "terms": (LogitTerm((0,), (0,)),),
    }
    return AttentionSite(name, **{**fields, **more})


def separate(name: str, q: str, k: str, n: int, m: int, width: int, bias: bool = False, **more: Any) -> AttentionSite:
    """A site whose queries and keys come out of two matrices of their own."""

    def block(at: str, role: Role, count: int) -> WeightBlock:
        return WeightBlock(f"{name}.{at}.weight", role, 0, heads(count, width), f"{name}.{at}.bias" if bias else None)

    return site(name, block(q, "q", n), block(k, "k", m), width, **more)


def fused(name: str, at: str, n: int, width: int, *, k: int, stride: int | None = None, axis: int = 0) -> AttentionSite:
    """A site whose queries and keys come out of one matrix with a bias; keys start at row `k`."""
    weight, bias = f"{name}.{at}.weight", f"{name}.{at}.bias"
    query = WeightBlock(weight, "q", axis, heads(n, width, 0, stride), bias)
    return site(name, query, WeightBlock(weight, "k", axis, heads(n, width, k, stride), bias), width)


def latent(
    name: str, n: int, nope: int, rope: int, value: int, ranks: tuple[int, int], names: tuple[str, ...]
) -> AttentionSite:
    """An MLA site in DeepSeek's arrangement: up projections per head, the shared rotated key beside the latent."""
    dq, uq, dkv, ukv, q_norm, kv_norm = (f"{name}.{at}.weight" for at in names)
    whole = ((0, ranks[0]),)
    return AttentionSite(
        name=name,
        kind="mla",
        cross=False,
        calls=1,
        query_heads=n,
        key_heads=n,
        head_dim=nope + rope,
        head_map=tuple(range(n)),
        query=(
            WeightBlock(uq, "uq", 0, heads(n, nope, 0, nope + rope)),
            WeightBlock(uq, "qr", 0, heads(n, rope, nope, nope + rope)),
            WeightBlock(dq, "dq", 0, (whole,) * n),
        ),
        key=(
            WeightBlock(ukv, "uk", 0, heads(n, nope, 0, nope + value)),
            WeightBlock(dkv, "dkv", 0, (((0, ranks[1]),),) * n),
            WeightBlock(dkv, "kr", 0, (((ranks[1], ranks[1] + rope),),) * n),
        ),
        terms=(LogitTerm((0, 2), (0, 1)), LogitTerm((1, 2), (2,))),
        latent_norm=(
            Norm("query", "rms", ranks[0], q_norm.removesuffix(".weight"), q_norm),
            Norm("key", "rms", ranks[1], kv_norm.removesuffix(".weight"), kv_norm),
        ),
    )


def example(file: str) -> Any:
    """Module of an example file."""
    return import_file(EXAMPLES / f"{file}.py")


def import_file(path: Path) -> ModuleType:
    """The module of a file, by the file's name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Case:
    """A model, its inputs and its true layout."""

    model: nn.Module
    inputs: dict[str, Any]
    layout: QKLayout


def hugging_face(kind: str, sites: list[AttentionSite], auto: str = "AutoModelForCausalLM", **config: Any) -> Case:
    """A tiny model of transformers."""
    attention = config.pop("attention", "sdpa")
    built = transformers.AutoConfig.for_model(kind, **{**SMALL, **config})
    model = getattr(transformers, auto).from_config(built, attn_implementation=attention)
    inputs = {"input_ids": IDS}
    if kind == "t5":
        inputs["decoder_input_ids"] = IDS[:, :5]
    else:
        inputs["use_cache"] = False
    return Case(model, inputs, QKLayout(tuple(sites)))


def norms(name: str, width: int, kind: Any = "rms") -> tuple[Norm, ...]:
    return tuple(
        Norm(side, kind, width, f"{name}.{at}_norm", f"{name}.{at}_norm.weight")
        for side, at in (("query", "q"), ("key", "k"))
    )


def llama(attention: str = "sdpa") -> Case:
    sites = [separate(f"model.layers.{i}.self_attn", "q_proj", "k_proj", 4, 2, 8) for i in range(2)]
    return hugging_face("llama", sites, num_key_value_heads=2, attention=attention)


def qwen3() -> Case:
    names = [f"model.layers.{i}.self_attn" for i in range(2)]
    sites = [separate(n, "q_proj", "k_proj", 4, 2, 8, qk_norm=norms(n, 8)) for n in names]
    return hugging_face("qwen3", sites, num_key_value_heads=2, head_dim=8)


def olmo2() -> Case:
    names = [f"model.layers.{i}.self_attn" for i in range(2)]
    sites = [separate(n, "q_proj", "k_proj", 4, 4, 8, qk_norm=norms(n, 32)) for n in names]
    return hugging_face("olmo2", sites, num_key_value_heads=4)


def gpt2() -> Case:
    sites = [fused(f"transformer.h.{i}.attn", "c_attn", 4, 8, k=32, axis=1) for i in range(2)]
    return hugging_face("gpt2", sites, n_embd=32, n_layer=2, n_head=4, n_positions=32)


def gpt_neox() -> Case:
    sites = [fused(f"gpt_neox.layers.{i}.attention", "query_key_value", 4, 8, k=8, stride=24) for i in range(2)]
    return hugging_face("gpt_neox", sites)


def bloom() -> Case:
    sites = [fused(f"transformer.h.{i}.self_attention", "query_key_value", 4, 8, k=8, stride=24) for i in range(2)]
    return hugging_face("bloom", sites, n_layer=2, n_head=4, attention="eager")


def bert() -> Case:
    sites = [separate(f"encoder.layer.{i}.attention.self", "query", "key", 4, 4, 8, bias=True) for i in range(2)]
    return hugging_face("bert", sites, auto="AutoModel")


def albert() -> Case:
    name = "encoder.albert_layer_groups.0.albert_layers.0.attention"
    sites = [separate(name, "query", "key", 4, 4, 8, bias=True, calls=2)]
    return hugging_face("albert", sites, auto="AutoModel", embedding_size=16)


def t5() -> Case:
    def at(name: str, **more: Any) -> AttentionSite:
        return separate(name, "q", "k", 4, 4, 8, **more)

    sites = [at(f"encoder.block.{i}.layer.0.SelfAttention") for i in range(2)]
    sites += [at(f"decoder.block.{i}.layer.0.SelfAttention") for i in range(2)]
    sites += [at(f"decoder.block.{i}.layer.1.EncDecAttention", cross=True) for i in range(2)]
    return hugging_face("t5", sites, auto="AutoModel", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)


def deepseek_v3() -> Case:
    names = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "q_a_layernorm", "kv_a_layernorm")
    sites = [latent(f"model.layers.{i}.self_attn", 4, 8, 4, 8, (24, 16), names) for i in range(2)]
    return hugging_face(
        "deepseek_v3",
        sites,
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    )


def falcon() -> Case:
    """One key head for all query heads, behind them in one matrix."""

    def at(name: str) -> AttentionSite:
        weight = f"{name}.query_key_value.weight"
        key = WeightBlock(weight, "k", 0, heads(1, 8, 32))
        return site(name, WeightBlock(weight, "q", 0, heads(4, 8)), key, 8)

    sites = [at(f"transformer.h.{i}.self_attention") for i in range(2)]
    return hugging_face("falcon", sites, multi_query=True, parallel_attn=True, bias=False)


def gemma3() -> Case:
    names = [f"model.layers.{i}.self_attn" for i in range(2)]
    sites = [separate(n, "q_proj", "k_proj", 4, 2, 8, qk_norm=norms(n, 8)) for n in names]
    return hugging_face("gemma3_text", sites, num_key_value_heads=2, head_dim=8, sliding_window=4)


def whisper() -> Case:
    """Keys without a bias; the decoder attends to itself and to the encoder."""

    def at(name: str, **more: Any) -> AttentionSite:
        plain = separate(name, "q_proj", "k_proj", 4, 4, 8, **more)
        return replace(plain, query=(replace(plain.query[0], bias=f"{name}.q_proj.bias"),))

    sites = [at(f"encoder.layers.{i}.self_attn") for i in range(2)]
    sites += [at(f"decoder.layers.{i}.self_attn") for i in range(2)]
    sites += [at(f"decoder.layers.{i}.encoder_attn", cross=True) for i in range(2)]
    case = hugging_face(
        "whisper",
        sites,
        auto="AutoModel",
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=9,
        max_target_positions=16,
        decoder_start_token_id=1,
    )
    frames = torch.randn(2, 8, 18, generator=torch.Generator().manual_seed(1))
    return replace(case, inputs={"input_features": frames, "decoder_input_ids": IDS, "use_cache": False})


def swin() -> Case:
    """Windows folded into the batch; twice the heads in the second stage."""
    sites = [
        separate(f"encoder.layers.{i}.blocks.{j}.attention", "q_proj", "k_proj", 2 * (i + 1), 2 * (i + 1), 8, bias=True)
        for i in range(2)
        for j in range(2)
    ]
    sizes: dict[str, Any] = {"image_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16}
    model = transformers.SwinModel(transformers.SwinConfig(depths=[2, 2], num_heads=[2, 4], **sizes))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return Case(model, {"pixel_values": pixels}, QKLayout(tuple(sites)))


class Joint(nn.Module):
    """Flux's double block by hand: two streams with projections and QK norms of their own, attending to both."""

    def __init__(self) -> None:
        super().__init__()
        for stream in ("image", "text"):
            for part in ("q", "k", "v"):
                self.add_module(f"{stream}_{part}", nn.Linear(16, 16))
            for part in ("q", "k"):
                self.add_module(f"{stream}_{part}_norm", nn.RMSNorm(4))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        parts: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
        for stream, x in (("text", text), ("image", image)):
            for part in parts:
                y = self.get_submodule(f"{stream}_{part}")(x).unflatten(-1, (4, 4)).transpose(1, 2)
                parts[part].append(self.get_submodule(f"{stream}_{part}_norm")(y) if part != "v" else y)
        return nn.functional.scaled_dot_product_attention(*(torch.cat(part, 2) for part in parts.values()))


def joint() -> Case:
    def side(name: Any) -> tuple[WeightBlock, ...]:
        streams = (f"{stream}_{name}" for stream in ("image", "text"))
        return tuple(WeightBlock(f"{s}.weight", name, 0, heads(4, 4), f"{s}.bias") for s in streams)

    qk_norm = tuple(
        Norm(at, "rms", 4, f"{stream}_{part}_norm", f"{stream}_{part}_norm.weight")
        for at, part in (("query", "q"), ("key", "k"))
        for stream in ("image", "text")
    )
    terms = tuple(LogitTerm((i,), (j,)) for i in range(2) for j in range(2))
    base = site("", side("q")[0], side("k")[0], 4)
    one = replace(base, query=side("q"), key=side("k"), terms=terms, qk_norm=qk_norm)
    image, text = (torch.randn(2, n, 16, generator=torch.Generator().manual_seed(n)) for n in (6, 3))
    return Case(Joint(), {"image": image, "text": text}, QKLayout((one,)))


class Differential(nn.Module):
    """Differential attention by hand: the weights of one softmax less those of another, each with heads of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16, bias=False) for _ in range(3))
        self.share = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        q, k = (part(x).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4) for part in (self.q, self.k))
        v = self.v(x).unflatten(-1, (2, 8)).transpose(1, 2)
        one, two = ((a @ b.mT / 2).softmax(-1) for a, b in zip(q, k, strict=True))
        return (one - self.share * two) @ v


def differential() -> Case:
    def at(start: int) -> AttentionSite:
        query = WeightBlock("q.weight", "q", 0, heads(2, 4, start))
        return site("", query, WeightBlock("k.weight", "k", 0, heads(2, 4, start)), 4)

    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    return Case(Differential(), {"x": x}, QKLayout((at(0), at(8))))


class CrossCovariance(nn.Module):
    """XCiT's attention by hand: the channels of a head attend to each other, normed over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48, bias=False)
        self.temperature = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 4, 1)
        q, k = (nn.functional.normalize(part, dim=-1) for part in (q, k))
        return ((q @ k.mT * self.temperature).softmax(-1) @ v).flatten(1, 2).mT


def cross_covariance() -> Case:
    norms = (Norm("query", "l2", 7), Norm("key", "l2", 7))
    query, key = (WeightBlock("qkv.weight", s, 0, heads(4, 4, start)) for s, start in (("q", 0), ("k", 16)))  # type: ignore[arg-type]
    one = site("", query, key, 4, kind="other", qk_norm=norms)
    x = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1))
    return Case(CrossCovariance(), {"x": x}, QKLayout((one,)))


class Fusion(nn.Module):
    """Grounding DINO's fusion by hand: one product, less its largest number, read in both directions."""

    def __init__(self) -> None:
        super().__init__()
        for stream in ("image", "text"):
            self.add_module(stream, nn.Linear(16, 16))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        one, other = (
            self.get_submodule(n)(x).unflatten(-1, (4, 4)).transpose(1, 2)
            for n, x in (("image", image), ("text", text))
        )
        logits = one @ other.mT / 2
        logits = logits - logits.max()
        return logits.softmax(-1) @ other, logits.mT.softmax(-1) @ one


def fusion() -> Case:
    def side(name: Any, stream: str) -> WeightBlock:
        return WeightBlock(f"{stream}.weight", name, 0, heads(4, 4), f"{stream}.bias")

    there, back = (
        site("", side("q", a), side("k", b), 4, cross=True) for a, b in (("image", "text"), ("text", "image"))
    )
    image, text = (torch.randn(2, n, 16, generator=torch.Generator().manual_seed(n)) for n in (7, 5))
    return Case(Fusion(), {"image": image, "text": text}, QKLayout((there, back)))


def our_mla() -> Case:
    module = example("mla")
    names = ("q_down", "q_up", "kv_down", "kv_up", "q_norm", "kv_norm")
    sites = [latent(f"blocks.{i}.attn", 6, 32, 16, 32, (96, 64), names) for i in range(2)]
    return Case(module.MLATransformer(module.MLAConfig(layers=2)), {"idx": IDS}, QKLayout(tuple(sites)))


def our_gpt() -> Case:
    module = example("gpt")
    sites = [fused(f"blocks.{i}.attn", "qkv", 6, 32, k=192) for i in range(2)]
    return Case(module.GPT(module.GPTConfig(layers=2)), {"idx": IDS}, QKLayout(tuple(sites)))


def torch_mha() -> Case:
    model = nn.MultiheadAttention(16, 4, batch_first=True)
    query = WeightBlock("in_proj_weight", "q", 0, heads(4, 4), "in_proj_bias")
    key = WeightBlock("in_proj_weight", "k", 0, heads(4, 4, 16), "in_proj_bias")
    x, y = torch.randn(2, 4, 4, 16, generator=torch.Generator().manual_seed(1))  # batch, lengths and heads are all 4
    return Case(model, {"query": x, "key": y, "value": y}, QKLayout((site("", query, key, 4, cross=True),)))


CASES: dict[str, Callable[[], Case]] = {
    "llama": llama,
    "cross_covariance": cross_covariance,
    "fusion": fusion,
    "llama_eager": lambda: llama("eager"),
    "qwen3": qwen3,
    "olmo2": olmo2,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "bloom": bloom,
    "bert": bert,
    "albert": albert,
    "t5": t5,
    "deepseek_v3": deepseek_v3,
    "falcon": falcon,
    "gemma3": gemma3,
    "whisper": whisper,
    "swin": swin,
    "joint": joint,
    "differential": differential,
    "our_gpt": our_gpt,
    "our_mla": our_mla,
    "torch_mha": torch_mha,
}
