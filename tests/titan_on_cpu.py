"""torchtitan's own Trainer on a CPU, for a config of examples/trainers/titan.py: `titan_on_cpu.py CONFIG FOLDER STEPS`.

torchtitan 0.3 is for accelerators: it takes the device for "cuda" where there is none, asks it for memory, and its
flex attention has no backward on a CPU. Here the device is the CPU with made-up answers, the attention torch's causal
one (which torchtitan has, too), and text and tokenizer are made up, since its package has none. The rest is torchtitan
as it is: models, FSDP2 over gloo, optimizers, schedules, checkpoints, loggers.
"""

from __future__ import annotations

import json
import os
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule


class Cpu(types.ModuleType):
    """torch.cpu, with what torchtitan asks a device for."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def get_device_name(self, device: Any = None) -> str:
        return "CPU"

    def get_device_properties(self, device: Any = None) -> Any:
        return types.SimpleNamespace(total_memory=1 << 34)

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        return {}

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        pass

    empty_cache = reset_peak_memory_stats


def main(name: str, folder: str, steps: int) -> None:
    """Train, going on from the last checkpoint in the folder; prints one line of JSON."""
    import torchtitan.tools.utils as utils

    utils.device_type, utils.device_module = "cpu", Cpu("cpu")  # before anything else of it is imported
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "trainers"))
    import titan
    import torchtitan.distributed.utils
    from datasets import Dataset
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.hf_datasets import DatasetConfig
    from torchtitan.hf_datasets.text_datasets import DATASETS

    class Bytes(BaseTokenizer):
        """The bytes of a text."""

        @dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):
            pass

        def __init__(self, config: Any = None, **_: Any) -> None:
            super().__init__()
            self.eos_id = 0

        def encode(self, text: str, add_bos: bool = True, add_eos: bool = True) -> list[int]:
            return [1] * add_bos + list(text.encode()) + [0] * add_eos

        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode()

        def get_vocab_size(self) -> int:
            return 2048

    torchtitan.distributed.utils.set_pg_timeouts = lambda *_, **__: None  # gloo's barrier knows no device
    texts = [f"{i} and again, {i} and again. " * 12 for i in range(64)]
    DATASETS["c4_test"] = DatasetConfig("", lambda _: Dataset.from_dict({"text": texts}), lambda sample: sample["text"])
    config = getattr(titan, name)()
    for layer in config.model_spec.model.layers:
        layer.attention.inner_attention = titan.ScaledDotProductAttention.Config()
    config.tokenizer = Bytes.Config()
    config.training.local_batch_size, config.training.seq_len, config.training.steps = 2, 32, steps
    config.training.disable_cuda_graphs, config.validator.enable = True, False
    config.checkpoint.enable, config.checkpoint.interval, config.checkpoint.keep_latest_k = True, 2, 0
    config.metrics.enable_tensorboard, config.dump_folder = True, folder
    if int(os.environ["WORLD_SIZE"]) > 1:
        config.parallelism.spmd_backend = "full_dtensor"  # FSDP2 of torch 2.13 takes no other
    trainer = config.build()
    for module in trainer.model_parts[0].modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no averages
    attached = titan.quacks[0].init_factors.tolist()
    trainer.train()
    metrics = titan.quacks[0].metrics()
    first = titan.quacks[0].init_factors.tolist()
    if torch.distributed.get_rank() == 0:
        print(json.dumps({"attached": attached, "first": first, "metrics": metrics, "step": trainer.step}))
    trainer.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
