"""The table of stand-ins that compute what the missing package would.

In: the dotted name of an import, "flash_attn.flash_attn_interface.flash_attn_func". Out: its stand-in, or None. Only
the package and the last part of the name count: functions move between modules from version to version.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from quack_fx.targets.world import attention, flash_attn, masks, rotations, timm_vit, vision
from quack_fx.targets.world.fields import Fields, Loader
from quack_fx.targets.world.inert import Inert, StandInUsed
from quack_fx.targets.world.old_names import as_it_is


def meaning(name: str) -> Any:
    """The stand-in for a dotted name; None where the table has none."""
    package, last = name.split(".")[0], name.rsplit(".", 1)[-1]
    return _KNOWN.get(package, {}).get(last)


class _Kernel:
    """A Triton kernel: it can be defined, but not run."""

    def __init__(self, function: Any) -> None:
        self.__name__ = getattr(function, "__name__", "kernel")
        self.__wrapped__ = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise StandInUsed(f"triton (kernel {self.__name__})")

    __getitem__ = __call__

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Inert(f"triton (kernel {self.__name__}).{name}")  # what its tuning is set by


def _kernel(*args: Any, **kwargs: Any) -> Any:
    """`triton.jit`, with or without arguments, and decorators around it."""
    return _Kernel(args[0]) if len(args) == 1 and not kwargs and callable(args[0]) else _Kernel


class ParallelLinear(nn.Linear):
    """A linear layer of tensor parallelism, on the only rank."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *args: Any, dtype: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, dtype=dtype)


class ParallelEmbedding(nn.Embedding):
    """An embedding of tensor parallelism, on the only rank."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx=kwargs.get("padding_idx"))


class PairedLinear(ParallelLinear):
    """The linear layer of Megatron, which returns a pair: the output, and a bias that is to be added later."""

    def forward(self, input: Tensor) -> Any:
        """The output with the bias added, and None."""
        return super().forward(input), None


class _PlainNorm:
    """Mixin: the options that packages of fused norms add to those of torch."""

    def __init__(
        self, normalized_shape: Any, eps: float = 1e-5, elementwise_affine: Any = True, *args: Any, **kwargs: Any
    ) -> None:
        if kwargs.get("zero_centered_gamma"):  # then features are multiplied with 1 + weight
            raise NotImplementedError("a norm with zero_centered_gamma has no stand-in")
        super().__init__(normalized_shape, eps=eps, elementwise_affine=elementwise_affine is not False)  # type: ignore[call-arg]


class RMSNorm(_PlainNorm, nn.RMSNorm):
    """A fused RMS norm."""


class LayerNorm(_PlainNorm, nn.LayerNorm):
    """A fused layer norm."""


class SwiGLU(nn.Module):
    """A gated MLP whose two input projections are one weight, or with `_pack_weights=False` two."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = True,
        *,
        _pack_weights: bool = True,
    ) -> None:
        super().__init__()
        self.w12 = nn.Linear(in_features, 2 * hidden_features, bias=bias) if _pack_weights else None
        self.w1 = None if _pack_weights else nn.Linear(in_features, hidden_features, bias=bias)
        self.w2 = None if _pack_weights else nn.Linear(in_features, hidden_features, bias=bias)
        self.w3 = nn.Linear(hidden_features, out_features or in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        if self.w1 is None or self.w2 is None:
            assert self.w12 is not None
            gate, value = self.w12(x).chunk(2, -1)
        else:
            gate, value = self.w1(x), self.w2(x)
        out: Tensor = self.w3(nn.functional.silu(gate) * value)
        return out


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """A fused cross-entropy; options that torch's does not have are ignored."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        known = inspect.signature(nn.CrossEntropyLoss).parameters
        super().__init__(**{n: v for n, v in kwargs.items() if n in known})


class Registry:
    """A registry of classes by name, filled by decorators."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._classes: dict[str, Any] = {}

    def register_module(self, name: Any = None, force: bool = False, module: Any = None, **kwargs: Any) -> Any:
        """Register a class, or return a decorator that does."""
        if module is None and callable(name):
            name, module = None, name
        if module is None:
            return lambda decorated: self.register_module(name, force, decorated)
        for known in name if isinstance(name, list | tuple) else [name or module.__name__]:
            self._classes[known] = module
        return module

    register = register_module

    def get(self, name: str) -> Any:
        """The class of a name, or None."""
        return self._classes.get(name)

    __getitem__ = get

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def build(self, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        """An object of the class that a config names, made with its other fields."""
        given = {**kwargs.get("default_args", {}), **cfg}
        kind = given.pop("type")
        return (self._classes[kind] if isinstance(kind, str) else kind)(**given)


class LossKwargs(TypedDict, total=False):
    """Options that forwards of transformers 4 hand on to the loss."""

    num_items_in_batch: Any


class _Truncated:
    """`scipy.stats.truncnorm`, from which layers draw initial weights: zeros here."""

    def __call__(self, *args: Any, **kwargs: Any) -> _Truncated:
        """A distribution with given bounds."""
        return self

    def rvs(self, *args: Any, size: Any = 1, **kwargs: Any) -> Any:
        """Samples."""
        return torch.zeros(size).numpy()

    def std(self, *args: Any, **kwargs: Any) -> float:
        """That of the normal without bounds."""
        return 1.0


class LightningModule(nn.Module):
    """A LightningModule, as far as constructors and forwards use one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def save_hyperparameters(self, *args: Any, **kwargs: Any) -> None:
        """Keep the constructor's arguments as `self.hparams`."""
        frame = inspect.currentframe()
        given = frame.f_back.f_locals if frame is not None and frame.f_back is not None else {}
        kept = {n: v for n, v in given.items() if n not in ("self", "__class__")}
        self.hparams = SimpleNamespace(**kept)

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Log nothing."""

    log_dict = log

    @property
    def device(self) -> Any:
        """Where the parameters are."""
        return next(self.parameters()).device


_FLASH_NAMES = "flash_attn_func flash_attn_qkvpacked_func flash_attn_kvpacked_func flash_attn_varlen_func"
_FLASH_NAMES += " flash_attn_varlen_qkvpacked_func flash_attn_varlen_kvpacked_func flash_attn_with_kvcache"
_FLASH_NAMES += " FlashAttention FlashSelfAttention FlashCrossAttention unpad_input pad_input index_first_axis"
_FLASH: dict[str, Any] = {name: getattr(flash_attn, name) for name in _FLASH_NAMES.split()}
_FLASH |= {name.replace("varlen", "unpadded"): stand_in for name, stand_in in _FLASH.items()}  # of version 1
_FLASH |= dict.fromkeys(("apply_rotary_emb", "apply_rotary_emb_func"), flash_attn.apply_rotary_emb)
_FLASH |= {"RMSNorm": RMSNorm, "CrossEntropyLoss": CrossEntropyLoss}
_FLASH_3 = _FLASH | {
    "flash_attn_func": flash_attn.flash_attn_3_func,
    "flash_attn_varlen_func": flash_attn.flash_attn_3_varlen_func,
}
_XFORMERS_NAMES = "memory_efficient_attention LowerTriangularMask LowerTriangularFromBottomRightMask BlockDiagonalMask"
_XFORMERS = {name: getattr(attention, name) for name in [*_XFORMERS_NAMES.split(), "BlockDiagonalCausalMask"]}
_NORMS: dict[str, Any] = dict.fromkeys(("FusedLayerNorm", "MixedFusedLayerNorm", "FastLayerNorm"), LayerNorm)
_NORMS |= dict.fromkeys(("FusedRMSNorm", "MixedFusedRMSNorm"), RMSNorm)
_PARALLEL: dict[str, Any] = {
    **dict.fromkeys(("ColumnParallelLinear", "RowParallelLinear"), ParallelLinear),
    **dict.fromkeys(("ParallelEmbedding", "VocabParallelEmbedding"), ParallelEmbedding),
    "get_model_parallel_group": lambda *args, **kwargs: Inert("the model-parallel group"),
    "get_model_parallel_src_rank": lambda *args, **kwargs: 0,
    "model_parallel_is_initialized": lambda *args, **kwargs: True,
}
for _kind in ("model", "data", "tensor_model"):
    _PARALLEL[f"get_{_kind}_parallel_world_size"] = lambda *args, **kwargs: 1
    _PARALLEL[f"get_{_kind}_parallel_rank"] = lambda *args, **kwargs: 0
for _collective in ("copy_to", "gather_from", "reduce_from", "scatter_to"):
    _PARALLEL[f"{_collective}_model_parallel_region"] = lambda x, *args, **kwargs: x
_VISION = "DropPath to_2tuple trunc_normal_ lecun_normal_ register_model PatchEmbed Mlp Attention Block"
_TIMM = {name: getattr(vision, name) for name in _VISION.split()}
_TIMM |= {"VisionTransformer": timm_vit.VisionTransformer, "create_model": timm_vit.create_model}
_CONFIGS = "ConfigDict FrozenConfigDict EasyDict DictConfig CfgNode Munch Dict AttrDict DefaultMunch Box"
_FIELDS: dict[str, Any] = dict.fromkeys(_CONFIGS.split(), Fields) | {"OmegaConf": Loader}
_HOLDERS = ("ml_collections", "omegaconf", "easydict", "addict", "munch", "attrdict", "box", "yacs", "fvcore", "mmcv")
_REGISTRY = {"Registry": Registry}
_LIGHTNING = {"LightningModule": LightningModule}
_TRANSFORMERS: dict[str, Any] = {
    **masks.FUNCTIONS,
    **dict.fromkeys(("is_torch_fx_available", "is_torch_fx_proxy", "is_deepspeed_zero3_enabled"), lambda *args: False),
    "LossKwargs": LossKwargs,
}
_KNOWN: dict[str, dict[str, Any]] = {
    "flash_attn": _FLASH,
    "flash_attn_interface": _FLASH_3,
    "xformers": _XFORMERS | {"SwiGLU": SwiGLU, "unbind": torch.unbind},
    "sageattention": {"sageattn": attention.sageattn},
    "rotary_emb": {"apply_rotary": rotations.apply_rotary},
    "rotary_embedding_torch": {n: getattr(rotations, n) for n in ("RotaryEmbedding", "apply_rotary_emb")},
    "pytorch3d": {n: getattr(rotations, n) for n in dir(rotations) if n.startswith("quaternion_")},
    "apex": _NORMS,
    "fairscale": _PARALLEL,
    "megatron": _PARALLEL | {"ColumnParallelLinear": PairedLinear, "RowParallelLinear": PairedLinear},
    "transformer_engine": {"Linear": ParallelLinear, "LayerNorm": LayerNorm, "RMSNorm": RMSNorm},
    "timm": _TIMM,
    "torchvision": {"_is_tracing": lambda: False},
    "triton": {"jit": _kernel, "autotune": as_it_is, "heuristics": as_it_is},
    **dict.fromkeys(("mmengine", "mmdet", "mmseg", "detectron2"), _REGISTRY),
    "pytorch_lightning": _LIGHTNING,
    "lightning": _LIGHTNING,
    **dict.fromkeys(_HOLDERS, _FIELDS | _REGISTRY),
    "scipy": {"truncnorm": _Truncated()},
    "transformers": _TRANSFORMERS,
}
