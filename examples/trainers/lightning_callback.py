"""QuacK in Lightning: a callback that attaches to the optimizers and logs to the Trainer's own logger.

python examples/trainers/lightning_callback.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import quack_fx


class QuackCallback(lightning.Callback):
    """Finds the pairs of `module.model` and attaches QuacK to each optimizer that holds query or key weights."""

    def __init__(self, inputs: dict[str, Tensor], tau: float = 1.0) -> None:
        self.inputs, self.tau, self.quacks = inputs, tau, list[quack_fx.QuacK]()

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        """Attach QuacK: the optimizers exist, and no checkpoint is loaded into them yet."""
        layout = quack_fx.find_qk_pairs(pl_module.model, **self.inputs)
        held = {block.param for site in layout.sites for _, block in site.blocks()}
        pairs = {pl_module.model.get_parameter(name) for name in held}
        for optimizer in trainer.optimizers:
            if not pairs.isdisjoint(p for group in optimizer.param_groups for p in group["params"]):
                self.quacks.append(quack_fx.QuacK(optimizer, pl_module.model, layout, self.tau))

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *args: Any) -> None:
        """Log the metrics when the Trainer logs."""
        if trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log_dict(self.quacks[0].metrics())


class Llama(lightning.LightningModule):
    """A small Llama."""

    def __init__(self) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
        self.model = LlamaForCausalLM(config)

    def training_step(self, tokens: Tensor) -> Tensor:
        """The loss of a batch."""
        loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(folder: str, steps: int, resume: Path | None = None) -> tuple[Llama, QuackCallback]:
    """Train for some steps, with a checkpoint after every three steps; optionally resume from one."""
    torch.manual_seed(0)
    callback = QuackCallback({"input_ids": torch.zeros(1, 16, dtype=torch.int64)}, tau=0.5)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=CSVLogger(folder), log_every_n_steps=1, enable_progress_bar=False,
        callbacks=[callback, ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)],
    )  # fmt: skip
    module = Llama()
    trainer.fit(module, DataLoader([(torch.arange(16) + i) % 32 for i in range(24)], batch_size=8), ckpt_path=resume)
    return module, callback


if __name__ == "__main__":
    fit(sys.argv[1] if len(sys.argv) > 1 else ".demo/lightning", steps=6)
