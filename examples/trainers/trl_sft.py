"""QuacK in TRL's SFTTrainer, a subclass of the Hugging Face Trainer; here with PEFT adapters.

python examples/trainers/trl_sft.py
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import quack_fx


class QuackSFTTrainer(SFTTrainer):
    """An SFTTrainer with QuacK attached to its optimizer."""

    quack: quack_fx.QuacK

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Create the optimizer and attach QuacK, before the Trainer loads a checkpoint into it."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if not hasattr(self, "quack"):
            layout = quack_fx.find_qk_pairs(self.model, input_ids=torch.tensor([self.train_dataset[0]["input_ids"]]))
            self.quack = quack_fx.QuacK(optimizer, self.model, layout)
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log norms and learning rates of attention together with the loss."""
        super().log({**logs, **self.quack.metrics()} if "loss" in logs else logs, *args, **kwargs)


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per letter."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")} | {"<eos>": 26, "<unk>": 27}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def trainer_of(folder: str, steps: int) -> QuackSFTTrainer:
    """A trainer for adapters of a small Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=28, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return QuackSFTTrainer(
        model=LlamaForCausalLM(config),
        args=SFTConfig(
            folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=1, use_cpu=True,
            save_steps=3, report_to=[], disable_tqdm=True, bf16=False, max_length=32,
        ),
        train_dataset=Dataset.from_dict({"text": ["abcdefghijklmnopqrstuvwxyz"[i % 13 :] for i in range(64)]}),
        processing_class=letters(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip


if __name__ == "__main__":
    trainer_of(sys.argv[1] if len(sys.argv) > 1 else ".demo/trl_sft", steps=6).train()
