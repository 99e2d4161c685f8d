"""QuacK with torchrun: FSDP2, and torch.distributed.checkpoint, which can resume on a different number of ranks.

torchrun --nproc-per-node 2 examples/trainers/fsdp2_dcp.py .demo/fsdp2
torchrun --nproc-per-node 1 examples/trainers/fsdp2_dcp.py .demo/fsdp2    # resumes
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import quack_fx


class Run:
    """A sharded model, its optimizer and QuacK, as saved in a checkpoint."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
        self.model = LlamaForCausalLM(config)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        layout = quack_fx.find_qk_pairs(self.model, input_ids=torch.zeros(1, 16, dtype=torch.int64))
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.quack = quack_fx.QuacK(self.optimizer, self.model, layout, tau=0.5)  # after sharding, before loading
        self.step = 0

    def train(self, steps: int) -> None:
        """Take some steps; every rank reads the metrics, and rank 0 prints them."""
        rows = torch.arange(16) + torch.arange(8)[dist.get_rank() :: dist.get_world_size(), None]
        for _ in range(steps):
            tokens = (rows + self.step) % 32
            loss = self.model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1
            metrics = self.quack.metrics()
            if dist.get_rank() == 0:
                largest = max(value for name, value in metrics.items() if name.endswith("qk_norm_product/max"))
                print(f"step {self.step}  loss {float(loss.detach()):.3f}  largest qk_norm_product {largest:.3f}")

    def state_dict(self) -> dict[str, Any]:
        """The contents of a checkpoint."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the contents of a checkpoint."""
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.step = state["step"]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    run = Run()
    if (folder / ".metadata").exists():
        dcp.load({"run": run}, checkpoint_id=folder)
    run.train(3)
    dcp.save({"run": run}, checkpoint_id=folder)
    dist.barrier()  # gloo may abort a rank if another one has exited
    dist.destroy_process_group()
