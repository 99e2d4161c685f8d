"""QuacK with Accelerate: attach to the optimizer inside the one that `prepare` returns.

python examples/trainers/accelerated.py            # or: accelerate launch examples/trainers/accelerated.py
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import quack_fx


def train(accelerator: Accelerator, steps: int = 12) -> tuple[LlamaForCausalLM, quack_fx.QuacK, list[float]]:
    """Train a small Llama with an accelerator; with gradient accumulation, an optimizer step uses several batches.

    Returns:
        The model, its QuacK, and the loss of each batch.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    layout = quack_fx.find_qk_pairs(model, input_ids=torch.zeros(1, 16, dtype=torch.int64))
    data: list[Tensor] = [(torch.arange(16) + i) % 32 for i in range(8 * steps)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=8))
    quack = quack_fx.QuacK(optimizer.optimizer, model, layout, tau=0.5)
    losses = []
    for i, tokens in enumerate(loader):
        with accelerator.accumulate(model):
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
        accelerator.log({"loss": losses[-1], **quack.metrics()}, step=i)
    return model, quack, losses


if __name__ == "__main__":
    accelerator = Accelerator(
        cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2, log_with="tensorboard",
        project_dir=sys.argv[1] if len(sys.argv) > 1 else ".demo/accelerated",
    )  # fmt: skip
    accelerator.init_trackers("quack")
    print(train(accelerator)[2])
    accelerator.end_training()
