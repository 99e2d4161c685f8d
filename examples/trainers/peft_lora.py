"""QuacK on PEFT LoRA adapters: base weights are frozen; their norms still count, as an adapter is multiplied with them.

    python examples/trainers/peft_lora.py

B is zero at the start and trains by the rule from the first step. A has an infinite factor while B is zero; it trains
at `tau` until B has grown to A's initial norm.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import quack_fx


def adapted() -> PeftModel:
    """A small Llama with adapters on queries, keys and values."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora)


def train(model: PeftModel, steps: int = 30) -> quack_fx.QuacK:
    """Train the adapters; the metrics are named by parameter."""
    tokens = torch.stack([(torch.arange(16) + i) % 32 for i in range(8)])
    layout = quack_fx.find_qk_pairs(model, input_ids=tokens)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    quack = quack_fx.QuacK(optimizer, model, layout)
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return quack


if __name__ == "__main__":
    for name, value in train(adapted()).metrics().items():
        print(f"{value:8.4f}  {name}")
