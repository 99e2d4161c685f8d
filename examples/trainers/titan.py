"""QuacK in torchtitan: `post_optimizer_build_fn` of the ModelSpec attaches to the optimizers inside the container.

    torchrun --nproc-per-node 1 -m torchtitan.train --module examples.trainers.titan --config llama3_debugmodel
    torchrun --nproc-per-node 1 -m torchtitan.train --module examples.trainers.titan --config deepseek_v3_debugmodel

`with_quack(config)` adds QuacK to any torchtitan config.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.deepseek_v3 import config_registry as deepseek_v3
from torchtitan.models.llama3 import config_registry as llama3
from torchtitan.trainer import Trainer

import quack_fx

quacks: list[quack_fx.QuacK] = []
"""The `QuacK` of each optimizer that holds queries or keys."""


class QuackMetrics(MetricsProcessor):
    """Metrics of torchtitan, plus those of QuacK."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        """The config of this processor."""

    def log(self, *args: Any, extra_metrics: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Log the metrics of torchtitan and QuacK."""
        super().log(*args, extra_metrics={**(extra_metrics or {}), **quacks[0].metrics()}, **kwargs)


def with_quack(config: Trainer.Config, tau: float = 1.0) -> Trainer.Config:
    """A config that attaches QuacK to the optimizers, after sharding and before a checkpoint is loaded."""
    spec = config.model_spec
    build = spec.post_optimizer_build_fn

    def attach(optimizers: OptimizersContainer, model_parts: list[nn.Module], parallel_dims: Any) -> None:
        if build is not None:
            build(optimizers, model_parts, parallel_dims)
        (model,) = model_parts  # no pipeline parallel: a stage would need a layout of its part of the model
        with torch.device("meta"):
            plain = spec.model.build()
        positions = torch.arange(16)[None]
        masks = {}
        if not isinstance(spec.model.first_attention.inner_attention, ScaledDotProductAttention.Config):
            with torch.compiler.set_stance("force_eager"):
                masks["attention_masks"] = plain.get_attention_masks(positions)
        layout = quack_fx.find_qk_pairs(plain, positions, positions=positions, **masks)
        held = {block.param for site in layout.sites for _, block in site.blocks()}
        pairs = {p for name, p in model.named_parameters() if name.replace("_checkpoint_wrapped_module.", "") in held}
        for optimizer in optimizers:
            if not pairs.isdisjoint(p for group in optimizer.param_groups for p in group["params"]):
                quacks.append(quack_fx.QuacK(optimizer, model, layout, tau))

    spec.post_optimizer_build_fn = attach
    config.metrics = QuackMetrics.Config(log_freq=config.metrics.log_freq)
    return config


def llama3_debugmodel() -> Trainer.Config:
    """The Llama of torchtitan's tests."""
    return with_quack(llama3.llama3_debugmodel(), tau=0.5)


def deepseek_v3_debugmodel() -> Trainer.Config:
    """The DeepSeek-V3 of torchtitan's tests."""
    return with_quack(deepseek_v3.deepseek_v3_debugmodel(), tau=0.5)
