"""QuacK in the Hugging Face Trainer: attach to the optimizer that it creates; metrics go to its own log.

python examples/trainers/hf_trainer.py
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import quack_fx


class QuackTrainer(Trainer):
    """A Trainer with QuacK attached to its optimizer; it resumes from the Trainer's own checkpoints."""

    quack: quack_fx.QuacK

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer and attach QuacK, before the Trainer loads a checkpoint into it."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if not hasattr(self, "quack"):
            layout = quack_fx.find_qk_pairs(self.model, input_ids=self.train_dataset[0]["input_ids"][None])
            self.quack = quack_fx.QuacK(optimizer, self.model, layout, tau=0.5)
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log norms and learning rates of attention together with the loss."""
        super().log({**logs, **self.quack.metrics()} if "loss" in logs else logs, *args, **kwargs)


class Tokens(Dataset):
    """Sequences of ascending numbers."""

    def __len__(self) -> int:
        """Number of sequences."""
        return 64

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        """One sequence, which is also its labels."""
        tokens = (torch.arange(16) + i) % 32
        return {"input_ids": tokens, "labels": tokens}


def trainer_of(folder: str, steps: int, **options: Any) -> QuackTrainer:
    """A Trainer of a small Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-2, lr_scheduler_type="constant",
        logging_steps=1, save_steps=3, use_cpu=True, report_to=[], disable_tqdm=True, **options,
    )  # fmt: skip
    return QuackTrainer(model=LlamaForCausalLM(config), args=arguments, train_dataset=Tokens())


if __name__ == "__main__":
    trainer_of(sys.argv[1] if len(sys.argv) > 1 else ".demo/hf_trainer", steps=6).train()
